"What the site must know of the book: settings.ini, _quarto.yml and nbs/sidebar.yml, read once for everybody."
import re
from configparser import ConfigParser
from pathlib import Path
import yaml

root = Path(__file__).resolve().parent.parent
nbs, proc, docs, source = root/'nbs', root/'_proc', root/'_docs', root/'build/site'
_config = ConfigParser(delimiters=['='])
_config.read(root/'settings.ini', encoding='utf-8')
settings = _config['DEFAULT']
quarto = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))
website = quarto['website']
host = settings['doc_host'] + settings['doc_baseurl'] + '/'


def sections():
    "The sidebar: a list of (section, [notebook file names])."
    contents = yaml.safe_load((nbs/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    return [(part['section'], part['contents']) for part in contents]


def page(notebook):
    "`00_landscape.ipynb` becomes `landscape`: nbdev drops the number from the page's name."
    return re.sub(r'^\d+[a-zA-Z0-9]*_', '', Path(notebook).stem.lower())


def links(notebook):
    "The notebook on GitHub and in Colab."
    path = f"blob/{settings['branch']}/{settings['nbs_path']}/{notebook}"
    return (f"{settings['git_url']}/{path}",
            f"https://colab.research.google.com/github/{settings['user']}/{settings['repo']}/{path}")


def relink(markdown, base=''):
    "Point links written as `01_core.ipynb`, `core.html` or the published address at `base` + `core.html`."
    def fix(m): return f"]({base}{page(m['stem'] + '.ipynb')}.html{m['anchor'] or ''})"
    link = rf"\]\((?:{re.escape(host)})?(?P<stem>[\w.-]+?)\.(?:ipynb|html)(?P<anchor>#[^)\s]*)?\)"
    return re.sub(link, fix, markdown)
