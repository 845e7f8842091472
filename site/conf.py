"Sphinx' settings; everything about the book itself comes from book.py."
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
from around import menu, meta, rooms
from book import host, nbs, settings, website
from find import Anchors, Names

project = website['title']
author, copyright, language = settings['author'], settings['copyright'], 'en'
extensions = ['myst_nb', 'sphinx.ext.mathjax', 'sphinx_copybutton']
exclude_patterns = []
suppress_warnings = ['myst.header', 'mystnb.unknown_mime_type']

nb_execution_mode = 'off'                     # saved outputs are shown, nothing runs here
nb_merge_streams = True
nb_render_markdown_format = 'myst'
myst_enable_extensions = ['dollarmath', 'html_image', 'strikethrough']
myst_all_links_external = True                # the adapter has already pointed links at pages
myst_update_mathjax = False

html_theme = 'furo'
html_title = project
html_favicon, html_baseurl = str(nbs/'favicon.svg'), host
html_search_scorer = str(Path(__file__).parent/'scorer.js')
html_static_path = ['_static', str(nbs/'styles.css')]
html_js_files = [('book.js', {'defer': 'defer'})]
templates_path = ['_templates']
html_css_files = ['styles.css', 'book.css']
html_show_sourcelink = html_copy_source = html_show_sphinx = False
html_use_index = False
pygments_style, pygments_dark_style = 'ink.Paper', 'ink.Night'
html_theme_options = {'top_of_page_buttons': [], 'footer_icons': [
    {'name': o['text'], 'url': o['href'], 'html': o['text'], 'class': ''} for o in website['navbar']['right']]}
html_context = {'description': website['description']}

copybutton_selector = 'article .highlight:not(.cell_output *) > pre'

# MathJax from local files. One web font, so that a formula looks the same on every machine.
mathjax_path = 'mathjax/MathJax.js'
mathjax2_config = {
    'config': ['TeX-AMS-MML_HTMLorMML-full.js'], 'messageStyle': 'none', 'showMathMenu': False,
    'menuSettings': {'assistiveMML': True},
    'HTML-CSS': {'availableFonts': [], 'webFont': 'STIX-Web', 'imageFont': None, 'scale': 98,
                 'styles': {'@font-face': {'font-family': 'MathJax_Blank', 'src': "local('no such font')"}}},
    'tex2jax': {'inlineMath': [[r'\(', r'\)']], 'displayMath': [[r'\[', r'\]']], 'processEnvironments': False,
                'ignoreClass': '.*', 'processClass': 'math'},
}


def as_written(app, doctree):
    "Displayed formulas reach MathJax as the notebook has them: Sphinx would wrap some in `split`, which forbids a tag."
    from docutils import nodes
    for node in doctree.findall(nodes.math_block):
        tex = rf'\[{node.astext()}\]'
        node.replace_self(nodes.math_block(tex, tex, **{'no-wrap': True, 'number': None}))


def style_first(app):
    "myst-nb copies its style sheet when all pages are written, and they name its checksum: here it is there before them."
    from myst_nb.sphinx_ext import add_global_html_resources
    if app.builder.format != 'html': return
    (Path(app.outdir)/'_static').mkdir(parents=True, exist_ok=True)
    add_global_html_resources(app, None)


def setup(app):
    app.add_domain(Names)
    app.add_transform(Anchors)
    app.connect('doctree-read', as_written)
    app.connect('builder-inited', style_first)
    for part in (meta, menu, rooms): app.connect('html-page-context', part, priority=900)    # after the theme's
