"README.md from nbs/index.ipynb, without Quarto. `--check` writes nothing and fails when README.md is out of step."
import re, sys
import nbformat
from book import host, nbs, relink, root, settings

hidden = re.compile(r'^#\| *(hide\b|echo: *false|include: *false|export\b|exporti\b|default_exp\b)', re.M)
silent = re.compile(r'^#\| *(hide *$|include: *false|output: *false|export\b|exporti\b|default_exp\b)', re.M)


def outputs(cell):
    "What a cell printed, as text. A picture belongs in nbs/images/ and in Markdown, where GitHub can show it."
    for out in cell.outputs:
        text = out.get('text') or out.get('data', {}).get('text/markdown') or out.get('data', {}).get('text/plain', '')
        if 'text/markdown' in out.get('data', {}): yield text
        elif text.strip() and not text.startswith('<Figure'): yield f'```text\n{text.rstrip()}\n```'


def blocks(notebook):
    "The parts of the page in order, as Markdown."
    for cell in notebook.cells:
        if cell.cell_type == 'markdown':
            text = re.sub(r'\]\((images/[^)]+)\)', r"](nbs/\1)", cell.source)
            yield re.sub(r'src="(images/[^"]+)"', r'src="nbs/\1"', text)
        elif cell.cell_type == 'code':
            code = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
            if code and not hidden.search(cell.source): yield f'```python\n{code}\n```'
            if not silent.search(cell.source): yield from outputs(cell)


def readme():
    "The whole file; links between pages lead to the published site."
    index = nbs/settings['readme_nb']
    note = f'<!-- Made from {index.relative_to(root)} by `make readme`; change that and run it again. -->'
    return relink('\n\n'.join([note, *blocks(nbformat.read(index, 4))]), host) + '\n'


if __name__ == '__main__':
    target, text = root/'README.md', readme()
    if '--check' not in sys.argv: target.write_text(text, encoding='utf-8')
    elif not target.exists() or target.read_text(encoding='utf-8') != text:
        sys.exit('README.md is stale: run make readme')
