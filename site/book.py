"What the site must know of the book: settings.ini, _quarto.yml and nbs/sidebar.yml, read once for everybody."
import functools, re
from configparser import ConfigParser
from pathlib import Path
import nbformat, yaml

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


def present():
    "The notebooks of the sidebar that have been written."
    return [o for _, notebooks in sections() for o in notebooks if (nbs/o).exists()]


def links(notebook):
    "The notebook on GitHub, in Colab, and open for a change on GitHub."
    path = f"{settings['branch']}/{settings['nbs_path']}/{notebook}"
    return (f"{settings['git_url']}/blob/{path}",
            f"https://colab.research.google.com/github/{settings['user']}/{settings['repo']}/blob/{path}",
            f"{settings['git_url']}/edit/{path}")


def plain(markdown):
    "A paragraph without its marks: for descriptions and alternative texts."
    return re.sub(r'[`*$\\]|\[(.+?)\]\(.+?\)', r'\1', markdown.strip()).replace('\n', ' ')


@functools.cache
def heading(notebook):
    "Title and sentence of a notebook's title cell, as plain text."
    cell = next(o for o in nbformat.read(nbs/notebook, 4).cells if o.cell_type == 'markdown')
    title, _, sentence = cell.source.partition('\n')
    return plain(title.lstrip('# ')), plain(re.sub('^> ?', '', sentence.strip(), flags=re.M))


def relink(markdown, base=''):
    "Point links written as `01_core.ipynb`, `core.html` or the published address at `base` + `core.html`."
    def fix(m): return f"]({base}{page(m['stem'] + '.ipynb')}.html{m['anchor'] or ''})"
    link = rf"\]\((?:{re.escape(host)})?(?P<stem>[\w.-]+?)\.(?:ipynb|html)(?P<anchor>#[^)\s]*)?\)"
    return re.sub(link, fix, markdown)
