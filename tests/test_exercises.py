"The exercises: what is asked runs as it stands, its check refuses the hole, and the solution that the page folds away passes it."
import re
from pathlib import Path

import nbformat
import pytest
import torch

nbs = Path(__file__).resolve().parent.parent/'nbs'
FOLD = re.compile(r'<details>(.*?)</details>', re.S)
PYTHON = re.compile(r'^```python\n(.*?)^```', re.S | re.M)


def exercises(path):
    "Code cells and solutions after `## Exercises`, in their order, as pairs (kind, source)"
    found, inside = [], False
    for c in nbformat.read(path, 4).cells:
        if c.cell_type == 'markdown' and re.search(r'^## ', c.source, re.M): inside = bool(re.search(r'^## Exercises', c.source, re.M))
        if not inside: continue
        if c.cell_type == 'code': found.append(('asked', c.source))
        else: found += [('solved', code) for fold in FOLD.findall(c.source) for code in PYTHON.findall(fold)]
    return found


everywhere = {p.stem: exercises(p) for p in sorted(nbs.glob('*.ipynb'))}
pages = {page: found for page, found in everywhere.items() if any('def check_' in source for _, source in found)}


def calls(source):
    "The calls of checks at the end of a solution, as pairs (check, solution)"
    return re.findall(r'^(check_\w+)\((\w+)\)', source, re.M)


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.mark.parametrize('page', pages)
def test_solutions_pass_and_holes_do_not(page):
    space = {'__name__': 'exercises'}
    for kind, source in pages[page]:
        if kind == 'solved':
            for check, name in calls(source):
                with pytest.raises(NotImplementedError): space[check](space[name])
        exec(compile(source, f'{page}: {kind}', 'exec'), space)


@pytest.mark.parametrize('page', pages)
def test_every_check_has_a_solution(page):
    checks = {name for kind, source in pages[page] if kind == 'asked' for name in re.findall(r'^def (check_\w+)', source, re.M)}
    assert checks == {check for kind, source in pages[page] if kind == 'solved' for check, _ in calls(source)}


@pytest.mark.parametrize('page', ['03_sam', '04_msam', '05_ssam', '06_saf', '06b_mesa'])
def test_method_pages_have_three_to_five(page):
    cells = [c.source for c in nbformat.read(nbs/f'{page}.ipynb', 4).cells if c.cell_type == 'markdown']
    numbers = [int(n) for source in cells for n in re.findall(r'^\*\*(\d)\. ', source, re.M)]
    assert numbers == [*range(1, len(numbers) + 1)] and 3 <= len(numbers) <= 5


def test_the_rule_can_fail():
    "A hole that passes, and a solution that does not"
    assert calls('def f(): pass\ncheck_f(f)\n') == [('check_f', 'f')]
    assert exercises.__doc__ and PYTHON.findall('```python\nx = 1\n```\n') == ['x = 1\n']
