"The files that describe the book agree with each other, and every notebook keeps the house rules a page depends on."
import ast, re, subprocess, sys
from pathlib import Path
import nbformat, pytest, yaml

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'site'))
from book import links, nbs, page, quarto, sections, settings, website

notebooks = sorted(o for o in nbs.glob('*.ipynb') if o.name[0] not in '_.')
each_notebook = pytest.mark.parametrize('path', notebooks, ids=lambda o: o.stem)
listed = [o for _, names in sections() for o in names]

known = {'': {'project', 'lang', 'format', 'website'}, 'project': {'type'}, 'format': {'html'},
         'format.html': {'theme', 'css', 'toc', 'toc-depth', 'code-copy', 'html-math-method', 'include-in-header'},
         'website': {'title', 'description', 'favicon', 'repo-actions', 'open-graph', 'search', 'page-navigation',
                     'navbar', 'sidebar', 'page-footer'}}


def cells(path, kind): return [o for o in nbformat.read(path, 4).cells if o.cell_type == kind]
def outputs(path): return [o for cell in cells(path, 'code') for o in cell.outputs]


def tight_lists(text):
    "Lines that start a list right below a line of prose: Quarto would run them into the paragraph."
    text = re.sub(r'```.*?```|\$\$.*?\$\$', lambda m: '\n' * m[0].count('\n'), text, flags=re.S)
    lines = [re.sub(r'^(> ?)+', '', line) for line in text.split('\n')]
    item = re.compile(r'\s*([-*+]|\d{1,2}[.)])\s')
    return [line for before, line in zip(lines, lines[1:])
            if item.match(line) and before.strip() and not item.match(before) and not before.startswith('  ')]


def mixed_imports(source):
    "Does the cell import and also do something? The page's builder runs such a cell without those before it."
    if re.search(r'^#\| *(exports?i?\b|eval: *false)', source, re.M) or 'nbdev_export()' in source: return False
    body = ast.parse(re.sub(r'^\s*[%!].*', '', source, flags=re.M)).body
    imports = any(isinstance(o, (ast.Import, ast.ImportFrom)) for tree in body for o in ast.walk(tree))
    return imports and any(not isinstance(o, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)) for o in body)


def undescribed(notebook):
    "Picture outputs without words: no `#| fig-alt:` in the cell, no paragraph before it, or an `<img>` without `alt`."
    prose = ''
    for cell in notebook.cells:
        if cell.cell_type == 'markdown': prose = cell.source.strip().split('\n\n')[-1]
        for out in cell.get('outputs', []):
            data = out.get('data', {})
            if any(o.startswith('image/') for o in data) and '#| fig-alt:' not in cell.source:
                if len(prose) < 40 or prose.startswith(('#', '|', '$$', '<')): yield cell.source
            if re.search(r'<img(?![^>]*\balt="[^"]+")', data.get('text/html', '')): yield cell.source


def test_the_small_quarto_file_includes_the_root_one():
    small = yaml.safe_load((nbs/'_quarto.yml').read_text())
    assert small == {'project': {'type': 'website'}, 'metadata-files': ['../_quarto.yml', 'nbdev.yml', 'sidebar.yml']}
    assert 'metadata-files' not in quarto, 'Quarto does not follow the key in an included file'


@pytest.mark.parametrize('where', known)
def test_quarto_knows_every_key(where):
    part = quarto
    for key in filter(None, where.split('.')): part = part[key]
    assert set(part) <= known[where]


def test_files_that_the_root_quarto_file_names_are_in_nbs():
    html = quarto['format']['html']
    for name in [html['css'], website['favicon'], html['theme']['dark'][-1]]: assert (nbs/name).is_file()


def test_title_and_links_are_those_of_settings():
    assert (website['title'], website['description']) == (settings['title'], settings['description'])
    assert settings['git_url'] in [o['href'] for o in website['navbar']['right']]


def test_the_sidebar_lists_every_notebook_once():
    assert sorted(listed) == [o.name for o in notebooks]
    assert len({page(o) for o in listed}) == len(listed), 'two notebooks make the same page'


def test_the_readme_is_fresh():
    run = subprocess.run([sys.executable, root/'site/readme.py', '--check'], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@each_notebook
def test_the_title_cell_is_a_title_and_one_sentence(path):
    assert re.fullmatch(r'# \S.*\n\n> \S.*', cells(path, 'markdown')[0].source)


@each_notebook
def test_a_page_works_without_a_kernel_and_without_scripts(path):
    notebook = nbformat.read(path, 4)
    assert 'widgets' not in notebook.metadata
    assert not [o for o in outputs(path) if o.output_type == 'error' or o.get('name') == 'stderr']
    assert not [o for o in cells(path, 'markdown') if '<script' in o.source]
    assert not [o for o in outputs(path) if '<script' in o.get('data', {}).get('text/html', '')]


@each_notebook
def test_a_blank_line_before_every_list(path):
    assert not [line for o in cells(path, 'markdown') for line in tight_lists(o.source)]


@each_notebook
def test_imports_stand_alone(path):
    assert not [o.source for o in cells(path, 'code') if mixed_imports(o.source)]


@each_notebook
def test_every_picture_is_described(path):
    assert not list(undescribed(nbformat.read(path, 4)))


@each_notebook
def test_colab_opens_this_very_notebook(path):
    prose = '\n'.join(o.source for o in cells(path, 'markdown'))
    place = f"/{settings['user']}/{settings['repo']}/blob/{settings['branch']}/{path.relative_to(root)}"
    for link in [links(path.name)[1], *re.findall(r'https://colab\.research\.google\.com/[^)\s"]+', prose)]:
        assert link.endswith(place)


def test_the_rules_can_fail():
    new = nbformat.v4
    picture = new.new_output('display_data', {'image/png': 'AA=='})
    heading, plot = new.new_markdown_cell('## A heading'), new.new_code_cell('plot()', outputs=[picture])
    bare = new.new_notebook(cells=[heading, plot])
    assert list(undescribed(bare)) == ['plot()']
    assert tight_lists('Text:\n- a\n- b\n\n1. c\n   more\n2. d\n\n> so:\n> - e') == ['- a', '- e']
    assert mixed_imports('import torch\nx = 1') and not mixed_imports('import torch')
