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


# benchmarks/shards.py ----------------------------------------------------------------------------------------------

shards_path = path.with_name('shards.py')
shards_spec = importlib.util.spec_from_file_location('shards_benchmark', shards_path)
shards = importlib.util.module_from_spec(shards_spec)
shards_spec.loader.exec_module(shards)


def test_the_shards_table_has_its_rows(tmp_path, capsys):
    out = tmp_path / 'shards.json'
    rows = shards.main(f'--models small resnet --shards 1 2 --batch 8 --seconds .01 --device cpu --json {out}'.split())
    found = [(r['model'], r['method'], r['n']) for r in rows]
    small, resnet = 'MLP 64-64-64-10', 'small ResNet, batch norm'
    assert found == [(small, 'SAM', 1), (small, 'SAM again', 1), (small, 'loop', 1), (small, 'loop', 2), (small, 'vmap', 2),
                     (resnet, 'SAM', 1), (resnet, 'SAM again', 1), (resnet, 'loop', 1), (resnet, 'loop', 2)]
    assert all(r['ms'] > 0 and 0 < r['low'] <= r['median'] <= r['high'] for r in rows)
    assert json.loads(out.read_text())['rows'] == rows and 'SAM again' in capsys.readouterr().out


def test_its_steps_see_each_row_twice_in_as_many_shards():
    shards.bench.models['small'] = shards.about_models['small'][0], (8, 64)
    for (road, n), step in shards.methods('small', cpu, [1, 2, 4]).items():
        seen = []
        def note(module, args, out):
            if type(module) is nn.Sequential: seen.append(len(args[0]))
        handle = register_module_forward_hook(note)
        try: step()
        finally: handle.remove()
        want = [8, 8] if n == 1 else [8 // n] * 2 * n if road == 'loop' else [8 // n] + [8 // n] * 2
        assert seen == want, (road, n, seen)


# benchmarks/suffix.py ----------------------------------------------------------------------------------------------

suffix_spec = importlib.util.spec_from_file_location('suffix_benchmark', path.with_name('suffix.py'))
suffix = importlib.util.module_from_spec(suffix_spec)
suffix_spec.loader.exec_module(suffix)


def test_the_suffix_table_has_its_rows(tmp_path):
    out = tmp_path / 'suffix.json'
    found = suffix.main(f'--rounds 1 --warmup 0 --batch 2 --json {out}'.split())
    assert json.loads(out.read_text()) == found and [f['net'] for f in found] == list(suffix.nets)
    for f in found:
        kinds = suffix.nets[f['net']][2]
        assert [r['method'] for r in f['rows']] == ['SGD', 'SGD again', *kinds]
        assert f['rows'][0]['ratio'] == [1, 1, 1] and all(r['ms'] > 0 for r in f['rows'])
    predicted = {(f['net'], r['method']): r['predicted'] for f in found for r in f['rows']}
    assert predicted['ResNet-18 for CIFAR', 'SAM'] == 2 and 1.24 < predicted['ResNet-18 for CIFAR', 'last stage'] < 1.25
    assert 1.32 < predicted['ViT-S/16', 'last four blocks'] < 1.34


def test_its_networks_have_the_known_size():
    count = {net: sum(w.numel() for w in make().parameters()) for net, (make, *_) in suffix.nets.items()}
    assert count == {'ResNet-18 for CIFAR': 11_173_962, 'ViT-S/16': 21_669_514}


# benchmarks/past.py ------------------------------------------------------------------------------------------------

past_spec = importlib.util.spec_from_file_location('past_benchmark', path.with_name('past.py'))
past = importlib.util.module_from_spec(past_spec)
past_spec.loader.exec_module(past)


def test_the_past_table_has_its_rows(tmp_path):
    out = tmp_path / 'past.json'
    found = past.main(f'--rounds 1 --warmup 0 --batch 4 --json {out}'.split())
    assert json.loads(out.read_text()) == found and [r['method'] for r in found['rows']] == list(past.methods)
    assert found['rows'][0]['ratio'] == [1, 1, 1] and all(r['ms'] > 0 for r in found['rows'])


@pytest.mark.parametrize('name, passes', [('SGD', (1, 0)), ('SAF', (1, 0)), ('MESA', (1, 1)), ('SAM', (2, 0))])
def test_the_past_costs_the_passes_it_says(name, passes):
    "Forwards in training and in evaluation mode; from the second epoch on the term is there for every row"
    learn, seen = past.learner(name, 4), []
    if name == 'SAF': assert (learn.saf.history.read(torch.arange(16), 1)[1] == 1).all()
    turns = past.steps(learn)
    for _ in range(2): next(turns)
    def note(module, args, out):
        if type(module) is nn.Linear: seen.append((module.training, torch.is_grad_enabled()))
    handle = register_module_forward_hook(note)
    try: next(turns)
    finally: handle.remove()
    assert (seen.count((True, True)), seen.count((False, False)), len(seen)) == (*passes, sum(passes))
    if name in ('SAF', 'MESA'):
        kls = getattr(learn, name.lower()).kls
        assert len(kls) == 3 and min(kls) > 0
