"""Build the site from the notebooks: nbdev processes them, this file turns the result into what myst-nb reads, and
Sphinx makes the pages. Nothing is executed but imports and exported cells, and unchanged pages are left alone.
"""
import argparse, ast, functools, importlib.util, io, os, re, shutil, subprocess, sys, time, tokenize
from contextlib import contextmanager
from html import escape
import nbformat, yaml
from book import docs, heading, host, links, nbs, page, plain, present, proc, relink, root, sections, settings, source

raw_fence = re.compile(r'\s*(?P<ticks>`{3,})\{=html\}\n(?P<html>.*)\n(?P=ticks)\s*', re.S)
doc_entry = re.compile(r'---\n\n(?:\[source\]\((?P<src>\S+?)\)\{.*?\}\n\n)?#+ (?P<name>\S+)\n\n'
                       r'```python\n(?P<sig>.*?)\n```\s*(?P<doc>.*)', re.S)
option = re.compile(r'^#\| *([\w-]+): *(.*?) *(?:\n|\Z)', re.M)


def arguments(signature):
    "(name, default, comment) of each argument in a signature as nbdev prints it, and the comment on what it returns."
    signature = re.sub(r"<function ([\w.]+) at 0x\w+>|<class '(?:\w+\.)*(\w+)'>", r'\1\2', signature)   # in a `partial`
    args, rows, by_line = ast.parse(signature + '\n    ...').body[0].args, [], {}
    plain = args.posonlyargs + args.args
    defaults = [None] * (len(plain) - len(args.defaults)) + args.defaults + [None] + args.kw_defaults + [None]
    for arg, default in zip(plain + [args.vararg] + args.kwonlyargs + [args.kwarg], defaults):
        if not arg or arg.arg == 'self': continue
        star = '*' if arg is args.vararg else '**' if arg is args.kwarg else ''
        rows.append([star + arg.arg, ast.unparse(default) if default else '', ''])
        by_line[arg.lineno] = rows[-1]
    by_line[signature.count('\n') + 1] = row = returned = ['', '', '']
    for token in tokenize.generate_tokens(io.StringIO(signature).readline):
        if token.type == tokenize.COMMENT:
            row = by_line.get(token.start[0], row)
            row[2] = f"{row[2]} {token.string.lstrip('# ')}".strip()
    return rows, returned[2]


@functools.cache
def classes(module):
    "The classes of a module of the package, as they are written."
    text = (root/settings['lib_path']/module).read_text(encoding='utf-8')
    return {o.name: o for o in ast.parse(text).body if isinstance(o, ast.ClassDef)}


def inherited(name, src, rows):
    "What a class of the book hands on to another: that one, as a link, and those arguments. `src` is the link to its source."
    from nbdev.doclinks import NbdevLookup
    module = re.search(r'(\w+\.py)#L', src or '')
    new = classes(module[1]).get(name) if module else None
    parent = next((o.id for o in new.bases if isinstance(o, ast.Name)), '') if new else ''
    address = parent and NbdevLookup().doc(parent)
    init = next((o.args for o in new.body if getattr(o, 'name', '') == '__init__'), None) if address else None
    own = {o.arg for o in init.args + init.kwonlyargs} if init else set()
    if not address or not str(address).startswith(host) or (init and not init.kwarg): return '', []
    return f'[`{parent}`]({address})', [row[0] for row in rows if row[0] not in own]


def api(entry):
    """nbdev's `show_doc` output as Markdown: a heading one can link to, the signature, the docstring, the arguments.
    What a subclass hands on to its parent is explained there."""
    name, src, (rows, returned) = entry['name'], entry['src'], arguments(entry['sig'])
    call = ', '.join(arg + (f'={default}' if default else '') for arg, default, _ in rows)
    doc = re.sub(r'\A\*(.*?)\*(?=\n|\Z)', r'\1', entry['doc'].strip())     # nbdev puts the first line in italics
    more = f'<a class="api-source" href="{escape(src)}">source</a>' if src else ''
    parent, theirs = inherited(name, src, rows)
    if theirs: doc += f"\n\nThe arguments {', '.join(f'`{o}`' for o in theirs)} are those of {parent}."
    table = ['| Argument | Default | Meaning |', '|---|---|---|']
    for arg, default, comment in [o for o in rows if o[0] not in theirs] + [['returns', '', returned]] * bool(returned):
        cells = f'`{arg}`' if arg != 'returns' else '*returns*', f'`{default}`' if default else '', comment
        table.append('| ' + ' | '.join(cell.replace('|', r'\|') for cell in cells) + ' |')
    return '\n\n'.join([
        f'### `{name}`',
        f'<div class="api"><p class="api-call"><code><b>{name}</b>({escape(call)})</code>{more}</p>', doc,
        '\n'.join(table) if any(row[2] for row in rows) or returned else '', '</div>'])


def markdown(text): return nbformat.v4.new_markdown_cell(relink(text))


def title(front, notebook):
    "The front matter that nbdev made of the title cell, as the head of a page."
    front = yaml.safe_load(front.strip().strip('-'))
    github, colab, edit = links(notebook)
    return markdown(f"""# {front['title']}\n\n<div class="subtitle">\n\n{front.get('description', '')}\n\n</div>
<p class="page-links"><a href="{colab}">Open in Colab</a> <a href="notebooks/{notebook}" download>Download this notebook</a>
<a href="{github}">See it on GitHub</a> <a href="{edit}">Edit it there</a></p>""")


def last_paragraph(text):
    "A figure without its own description is described by the paragraph before it."
    return plain(text.strip().split('\n\n')[-1])


def output(out):
    "One output for a page: no live widgets (they need a kernel), raw HTML as HTML, links that work."
    data = out.get('data', {})
    for mime in [m for m in data if 'widget' in m]: del data[mime]
    text = data.get('text/markdown', '')
    if fence := raw_fence.fullmatch(text): data['text/html'] = fence['html']
    if 'text/html' in data: data.pop('text/markdown', None)
    elif text: data['text/markdown'] = relink(text)
    return out


def fold(title, text, most=12):
    "The source of an export, folded where it would be long: the entry above it says how to call it."
    lines = [o for o in text.splitlines() if o.strip()]
    opened = ' open' if len(lines) <= most and not re.search('^class ', text, re.M) else ''
    return f'<details class="exported"{opened}>\n<summary>{title}</summary>\n\n```python\n{text}\n```\n\n</details>'


def code(cell, before):
    "A code cell with its `#| key: value` lines obeyed and removed. `before` is the prose above it."
    options = {key: value.strip('"\'') for key, value in option.findall(cell.source)}
    text, outputs = option.sub('', cell.source).strip(), [output(o) for o in cell.outputs]
    entries = [doc_entry.match(o.get('data', {}).get('text/markdown', '')) for o in outputs]
    if text.startswith('show_doc('): return [markdown(api(entry)) for entry in entries if entry]
    if 'code-summary' in options and not outputs: return [markdown(fold(options['code-summary'], text))]
    if options.get('include') == 'false': return []
    parts = {'echo': 'input', 'output': 'output'}
    hidden = [f'remove-{part}' for key, part in parts.items() if options.get(key) == 'false']
    new = nbformat.v4.new_code_cell(text, outputs=outputs, metadata={
        'tags': hidden, 'mystnb': {'image': {'alt': options.get('fig-alt') or last_paragraph(before)}}})
    if 'fig-cap' in options: new.metadata['mystnb']['figure'] = {'caption': options['fig-cap']}
    return [new]


def adapt(notebook):
    "A processed notebook as myst-nb reads it."
    old, cells, before = nbformat.read(proc/notebook, 4), [], ''
    for cell in old.cells:
        if cell.cell_type == 'raw': cells.append(title(cell.source, notebook))
        elif cell.cell_type == 'code': cells += code(cell, before)
        elif not cell.source.startswith('<!-- WARNING'): cells.append(markdown(before := cell.source))
    if page(notebook) == 'index': cells.append(contents())
    for i, cell in enumerate(cells): cell.id = f'c{i}'
    return nbformat.v4.new_notebook(cells=cells, metadata={
        'language_info': {'name': 'python', 'pygments_lexer': 'ipython3'},
        'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}})


def contents():
    "The sidebar, as the hidden tables of contents that Sphinx wants on the first page."
    trees = []
    for name, notebooks in sections():
        pages = [page(o) if page(o) != 'index' else 'Overview <self>' for o in notebooks if o in present()]
        trees.append('\n'.join(['```{toctree}', ':hidden:', f':caption: {name}', '', *pages, '```']) if pages else '')
    return markdown('\n\n'.join(trees))


def menu():
    "What all pages show of each other: sections, order and titles."
    return '\n'.join([contents().source, *(heading(o)[0] for o in present())])


def not_found():
    "The page for addresses that lead nowhere, with what may help: the search and all sections."
    text = """---\norphan: true\n---\n# This page is not here\n\nIt may have moved, or its address has a slip. Search the book:
\n<form class="find" role="search" action="search.html"><input type="search" name="q" aria-label="Search the book" required>
<button>Search</button></form>\n\nOr go on from one of its sections:\n\n"""
    for name, notebooks in sections():
        pages = [f'[{heading(o)[0]}]({page(o)}.html)' for o in notebooks if o in present()]
        if pages: text += f'- **{name}**: ' + ', '.join(pages) + '\n'
    return text


def absolute(html, base=settings['doc_baseurl']):
    "A page whose links work from any depth: the server shows it in the place of any other."
    html = re.sub(r'(?<=[ \n])(href|src|action)="(?![a-z]+:|[/#])([^"]+)"', rf'\1="{base}/\2"', html)
    return html.replace('data-content_root="./"', f'data-content_root="{base}/"')


def moved(table=root/'site/moved.txt'):
    "Old page -> new address, from lines `old -> new#anchor`."
    lines = [o.split('->') for o in table.read_text(encoding='utf-8').splitlines() if o.strip() and not o.startswith('#')]
    return {old.strip(): re.sub(r'(?=#)|$', '.html', new.strip(), count=1) for old, new in lines}


def redirect(new):
    "A page that leads to `new`."
    return f"""<!doctype html>
<html lang="en-GB"><meta charset="utf-8"><title>This page has moved</title>
<meta http-equiv="refresh" content="0; url={escape(new)}"><link rel="canonical" href="{escape(host + new)}">
<meta name="robots" content="noindex"><p>This page has moved: <a href="{escape(new)}">{escape(new)}</a></p></html>
"""


def redirects(pages, table):
    "Old addresses as pages that lead on. A line of the table that contradicts the book stops the build."
    for old, new in table.items():
        path, _, anchor = new.partition('#')
        if old in pages: raise SystemExit(f'site/moved.txt: {old} is a page of the book')
        if path.removesuffix('.html') not in pages: raise SystemExit(f'site/moved.txt: {old} leads to {new}, which is no page')
        if anchor and f'id="{anchor}"' not in (docs/path).read_text(encoding='utf-8'):
            raise SystemExit(f'site/moved.txt: {old} leads to {new}, where there is no such anchor')
        put(docs/f'{old}.html', redirect(new).encode())


def put(path, content):
    "Write `content`, unless the file holds it already: Sphinx rebuilds what is newer than its page. Whether it was written."
    if path.exists() and path.read_bytes() == content: return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return True


def read(files): return b''.join(o.read_bytes() for o in sorted(files) if o.is_file())


def process():
    "nbdev's part. It watches the notebooks and settings.ini; the index of linked names is watched here."
    from nbdev.config import get_config
    from nbdev.serve import proc_nbs
    index, seen = get_config().lib_path/'_modidx.py', root/'build/modidx'
    names = index.read_bytes() if index.exists() else b''
    proc_nbs(force=not seen.exists() or seen.read_bytes() != names)
    put(seen, names)


def mathjax():
    "MathJax from its pip package, without the output formats and languages this site does not use."
    package = importlib.util.find_spec('jupyter_server_mathjax').submodule_search_locations[0]
    target = docs/'_static/mathjax'
    unused = shutil.ignore_patterns('SVG', 'localization', 'asciimath2jax.js', 'mhchem*', '*.py')
    if not target.exists(): shutil.copytree(f'{package}/static', target, ignore=unused)


@contextmanager
def timed(what):
    "Say how long a part of the build took; processor time too, for other work may share the machine."
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    yield
    print(f'{what}: {time.perf_counter() - wall:.1f} s, {sum(os.times()[:4]) - cpu:.1f} s of processor time')


def sphinx():
    "Processed notebooks to pages; a warning is an error, and after an error the next run reads everything again."
    from sphinx.cmd.build import main
    notebooks, pages, old = present(), {page(o) for o in present()}, moved()
    with timed('adapting notebooks'):
        for o in notebooks:
            put(source/f'{page(o)}.ipynb', nbformat.writes(adapt(o)).encode())
            put(docs/'notebooks'/o, (nbs/o).read_bytes())
        put(source/'404.md', not_found().encode())
        for image in proc.rglob('*'):
            if image.suffix in ('.png', '.svg', '.webp', '.jpg'): put(source/image.relative_to(proc), image.read_bytes())
    for file in [*source.glob('*.ipynb'), *docs.glob('*.html'), *docs.glob('notebooks/*')]:
        if file.stem not in pages | {'search', '404', *old} and file.name not in notebooks: file.unlink()
    mathjax()
    doctrees = root/'build/doctrees'
    if put(root/'build/made_by', read(root.glob('site/*.py'))): shutil.rmtree(doctrees, ignore_errors=True)
    shared = menu().encode() + read([*root.glob('site/_*/**/*'), root/'site/scorer.js', nbs/'styles.css'])
    everything = ['-a'] if put(root/'build/shared', shared) else []             # what all pages show or name a version of
    with timed('Sphinx'):
        failed = main([*everything, '-b', 'html', '-q', '-W', '-j', '2', '-c', str(root/'site'), '-d', str(doctrees),
                       str(source), str(docs)])
    if failed: shutil.rmtree(doctrees, ignore_errors=True)
    else:
        put(docs/'404.html', absolute((docs/'404.html').read_text(encoding='utf-8')).encode())
        redirects(pages, old)
    return failed


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--no-quarto', action='store_true', help='use Sphinx even where quarto is installed')
    os.chdir(root)
    if shutil.which('quarto') and not parser.parse_args().no_quarto: failed = subprocess.call(['nbdev_docs'])
    else:
        for o in {o for _, notebooks in sections() for o in notebooks} - {*present()}:
            print(f'{o} is in nbs/sidebar.yml but not in nbs/: skipped')
        with timed('nbdev'): process()
        failed = sphinx()
    if failed: sys.exit(failed)
    print(f"{docs/'index.html'}\nmake serve")
