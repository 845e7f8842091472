"What stands around a page: what search engines and social networks read in its head, and the room its pictures need."
import re
from base64 import b64decode
from html import escape
from io import BytesIO
from pathlib import Path
from PIL import Image
from book import heading, host, page, present, quarto, website
from room import reserve

picture = '_static/social.png', 1200, 630, 'The path of SAM from a sharp minimum of a loss surface to a flat one'


def meta(app, name, template, context, doctree):
    "Description, canonical address and card of a page, from its title cell."
    context['language'] = quarto['lang']
    notebook = next((o for o in present() if page(o) == name), None)
    if not notebook:
        context['pageurl'] = None
        context['metatags'] = context.get('metatags', '') + '<meta name="robots" content="noindex">' * (name != 'search')
        return
    title, sentence = heading(notebook)
    url = context['pageurl'] = host + ('' if name == 'index' else f'{name}.html')
    image, width, height, alt = picture
    named = {'description': sentence, 'twitter:card': 'summary_large_image', 'twitter:title': title,
             'twitter:description': sentence, 'twitter:image': host + image, 'twitter:image:alt': alt}
    graph = {'og:type': 'website' if name == 'index' else 'article', 'og:site_name': website['title'], 'og:title': title,
             'og:description': sentence, 'og:url': url, 'og:locale': 'en_GB', 'og:image': host + image,
             'og:image:width': width, 'og:image:height': height, 'og:image:alt': alt}
    tags = [f'<meta {kind}="{key}" content="{escape(str(value))}">'
            for kind, group in (('name', named), ('property', graph)) for key, value in group.items()]
    context['metatags'] = '\n'.join([context.get('metatags', ''), *tags])


def menu(app, name, template, context, doctree):
    "A heading must say of which level it is; those of the menu do not by themselves."
    tree = context['furo_navigation_tree']
    context['furo_navigation_tree'] = tree.replace('role="heading"', 'role="heading" aria-level="2"')


def size(src, files):
    "Width and height in pixels of what an `img` shows, None for a drawing."
    if src.startswith('data:'): where = BytesIO(b64decode(src.partition(',')[2]))
    else: where = files.get(Path(src).name, '')
    if not where or str(where).endswith('.svg') or src.startswith('data:image/svg'): return None
    with Image.open(where) as o: return o.size


def rooms(app, name, template, context, doctree):
    "Give every picture its width and height and every formula its room: the text keeps its place while they come."
    files = {o: Path(app.srcdir, src) for src, o in app.builder.images.items()}
    def fix(m):
        if re.search(r'\swidth=.*\sheight=', m[0], re.S) or not (found := size(m['src'], files)): return m[0]
        return m[0].replace('<img', f'<img width="{found[0]}" height="{found[1]}"', 1)
    if 'body' in context: context['body'] = reserve(re.sub(r'<img\b[^>]*?\ssrc="(?P<src>[^"]+)"[^>]*>', fix, context['body']))
