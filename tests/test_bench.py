"""The benchmark runs and its rows are what they say; its times are printed and never asserted."""
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

path = Path(__file__).parents[1] / 'benchmarks' / 'two_pass.py'
spec = importlib.util.spec_from_file_location('two_pass_benchmark', path)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

cpu = torch.device('cpu')
ROWS = ['SGD', 'SGD again', 'two-pass floor', 'two_pass',
        'Learner', 'Learner again', 'two-pass floor in a Learner', 'SAM callback']


def test_the_table_has_its_rows(tmp_path, capsys):
    out = tmp_path / 'here' / 'cpu.json'
    rows = bench.main(f'--models mlp deep --steps 2 --warmup 1 --device cpu --json {out}'.split())
    printed = capsys.readouterr().out
    assert 'in 124 tensors' in printed and 'in 8 tensors' in printed and 'threads 1' in printed
    for model in ('mlp', 'deep'):
        assert [r['method'] for r in rows if r['model'] == model and 'pytorch_optimizer' not in r['method']] == ROWS
    for name in ROWS: assert sum(line.startswith(name + '  ') for line in printed.splitlines()) == 2, name
    for r in rows: assert r['ms'] > 0 and all(math.isfinite(v) for v in (*r['ratio'], *r['over_floor'], r['copies']))
    assert json.loads(out.read_text())['rows'] == rows


@pytest.mark.parametrize('make, passes', [(bench.plain_methods, [1, 1, 2, 2]), (bench.learner_methods, [1, 1, 2, 2])])
def test_every_row_makes_the_passes_it_says_and_moves_the_weights(make, passes):
    seen = []
    def note(module, args, out):
        if type(module) is nn.Linear: seen.append(module.weight)
    found, handle = {}, register_module_forward_hook(note)
    try:
        for name, step in make('mlp', cpu).items():
            step()
            last, before = seen[-1], seen[-1].detach().clone()
            seen.clear()
            step()
            assert not torch.equal(before, last), name
            found[name] = len(seen) / 4                              # four linear layers
    finally: handle.remove()
    assert [n for name, n in found.items() if 'pytorch_optimizer' not in name] == passes


def test_the_resnet_is_the_one_described():
    model, x, y = bench.build('resnet', cpu)
    ws = list(model.parameters())
    assert (sum(w.numel() for w in ws), len(ws), tuple(x.shape)) == (272_474, 65, (32, 3, 32, 32))
    assert model(x).shape == (32, 10)


def test_memory_is_counted_and_given_back():
    with bench.Allocated() as memory:
        a = torch.zeros(1000)                       # 4,000 bytes
        b = a + 1                                   # 8,000
        b.add_(a), b.view(10, 100)                  # nothing new
        del b
        c = torch.ones(500)                         # 6,000
    assert (memory.most, memory.now) == (8000, 6000)
    del a, c
    assert memory.now == 0
