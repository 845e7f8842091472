"""Build the site from the notebooks: nbdev processes them, this file turns the result into what myst-nb reads, and
Sphinx makes the pages. Nothing is executed but imports and exported cells, and unchanged pages are left alone.
"""
import argparse, ast, importlib.util, io, os, re, shutil, subprocess, sys, tokenize
from html import escape
import nbformat, yaml
from book import docs, links, nbs, page, proc, relink, root, sections, source

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


def api(entry):
    "nbdev's `show_doc` output as Markdown: a heading one can link to, the signature, the docstring, the arguments."
    name, src, (rows, returned) = entry['name'], entry['src'], arguments(entry['sig'])
    call = ', '.join(arg + (f'={default}' if default else '') for arg, default, _ in rows)
    doc = re.sub(r'\A\*(.*?)\*(?=\n|\Z)', r'\1', entry['doc'].strip())     # nbdev puts the first line in italics
    more = f'<a class="api-source" href="{escape(src)}">source</a>' if src else ''
    table = ['| Argument | Default | Meaning |', '|---|---|---|']
    for arg, default, comment in rows + [['returns', '', returned]] * bool(returned):
        cells = f'`{arg}`' if arg != 'returns' else '*returns*', f'`{default}`' if default else '', comment
        table.append('| ' + ' | '.join(cell.replace('|', r'\|') for cell in cells) + ' |')
    return '\n\n'.join([
        f'<span class="anchor" id="{name.lower()}"></span>', f'### `{name}`',
        f'<div class="api"><p class="api-call"><code><b>{name}</b>({escape(call)})</code>{more}</p>', doc,
        '\n'.join(table) if any(row[2] for row in rows) or returned else '', '</div>'])


def markdown(text): return nbformat.v4.new_markdown_cell(relink(text))


def title(front, notebook):
    "The front matter that nbdev made of the title cell, as the head of a page."
    front = yaml.safe_load(front.strip().strip('-'))
    github, colab = links(notebook)
    return markdown(f"""# {front['title']}\n\n<div class="subtitle">\n\n{front.get('description', '')}\n\n</div>
<p class="page-links"><a href="{github}">Notebook on GitHub</a> <a href="{colab}">Open in Colab</a></p>""")


def last_paragraph(text):
    "A figure without its own description is described by the paragraph before it."
    return re.sub(r'[`*$\\]|\[(.+?)\]\(.+?\)', r'\1', text.strip().split('\n\n')[-1]).replace('\n', ' ')


def output(out):
    "One output for a page: no live widgets (they need a kernel), raw HTML as HTML, links that work."
    data = out.get('data', {})
    for mime in [m for m in data if 'widget' in m]: del data[mime]
    text = data.get('text/markdown', '')
    if fence := raw_fence.fullmatch(text): data['text/html'] = fence['html']
    if 'text/html' in data: data.pop('text/markdown', None)
    elif text: data['text/markdown'] = relink(text)
    return out


def code(cell, before):
    "A code cell with its `#| key: value` lines obeyed and removed. `before` is the prose above it."
    options = {key: value.strip('"\'') for key, value in option.findall(cell.source)}
    text, outputs = option.sub('', cell.source).strip(), [output(o) for o in cell.outputs]
    entries = [doc_entry.match(o.get('data', {}).get('text/markdown', '')) for o in outputs]
    if text.startswith('show_doc('): return [markdown(api(entry)) for entry in entries if entry]
    if 'code-summary' in options and not outputs:
        return [markdown(f'<details class="exported" open>\n<summary>{options["code-summary"]}</summary>\n\n'
                         f'```python\n{text}\n```\n\n</details>')]
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


def present():
    "The notebooks of the sidebar that have been written."
    return [o for _, notebooks in sections() for o in notebooks if (nbs/o).exists()]


def contents():
    "The sidebar, as the hidden tables of contents that Sphinx wants on the first page."
    trees = []
    for name, notebooks in sections():
        pages = [page(o) if page(o) != 'index' else 'Overview <self>' for o in notebooks if o in present()]
        trees.append('\n'.join(['```{toctree}', ':hidden:', f':caption: {name}', '', *pages, '```']) if pages else '')
    return markdown('\n\n'.join(trees))


def menu():
    "What all pages show of each other: sections, order and titles."
    def title(o): return next(c.source for c in nbformat.read(nbs/o, 4).cells if c.cell_type == 'markdown').splitlines()[0]
    return '\n'.join([contents().source, *map(title, present())])


def put(path, content):
    "Write `content`, unless the file holds it already: Sphinx rebuilds what is newer than its page. Whether it was written."
    if path.exists() and path.read_bytes() == content: return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return True


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


def sphinx():
    "Processed notebooks to pages; a warning is an error, and after an error the next run reads everything again."
    from sphinx.cmd.build import main
    notebooks, pages = present(), {page(o) for o in present()}
    for o in notebooks: put(source/f'{page(o)}.ipynb', nbformat.writes(adapt(o)).encode())
    for image in proc.rglob('*'):
        if image.suffix in ('.png', '.svg', '.webp', '.jpg'): put(source/image.relative_to(proc), image.read_bytes())
    for old in [*source.glob('*.ipynb'), *docs.glob('*.html')]:
        if old.stem not in pages | {'search'}: old.unlink()
    mathjax()
    doctrees = root/'build/doctrees'
    everything = ['-a'] if put(root/'build/menu', menu().encode()) else []      # the menu is on every page
    failed = main([*everything, '-b', 'html', '-q', '-W', '-c', str(root/'site'), '-d', str(doctrees), str(source), str(docs)])
    if failed: shutil.rmtree(doctrees, ignore_errors=True)
    return failed


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--no-quarto', action='store_true', help='use Sphinx even where quarto is installed')
    os.chdir(root)
    if shutil.which('quarto') and not parser.parse_args().no_quarto: failed = subprocess.call(['nbdev_docs'])
    else:
        for o in {o for _, notebooks in sections() for o in notebooks} - {*present()}:
            print(f'{o} is in nbs/sidebar.yml but not in nbs/: skipped')
        process()
        failed = sphinx()
    if failed: sys.exit(failed)
    print(f"{docs/'index.html'}\nmake serve")
