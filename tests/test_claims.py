"""The machinery of the ledger: its plan can be run, and its own two methods are what they say."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sam_explained.claims import Ledger
from sam_explained.compare import _set_all
from sam_explained.sam import SAM, norm_params
from sam_explained.scores import fisher
from sam_explained.stacked import Stack, StackData, fit_stack
from sam_explained.tasks import he_mlp, task

sys.path.insert(0, str(Path(__file__).parents[1]/'benchmarks'/'claims'))
import judge
import run


pytestmark = pytest.mark.usefixtures('one_thread')


def test_second_order_is_the_gradient_of_the_perturbed_loss():
    torch.manual_seed(0)
    models = [he_mlp(5, 4, 3).double() for _ in range(2)]
    for m in models: m[1] = nn.Tanh()
    x, y, rho = torch.randn(2, 7, 5).double(), torch.randint(3, (2, 7)), [.1, .4]
    stack = Stack(models)
    data = type('Data', (), {'x': x, 'rows': torch.zeros(2, 1, 7)})
    method = run.StackedSecondOrder([run.SecondOrder(r) for r in rho], stack, data)
    method.rho = method.rho.double()
    found = method.gradient(stack, x, y, None, 0, 0)
    first = run._Sam([SAM(r) for r in rho], stack, data)
    first.rho = first.rho.double()
    plain = first.gradient(stack, x, y, None, 0, 0)
    for r, m in enumerate(models):
        ws = dict(m.named_parameters())
        def loss(ws): return F.cross_entropy(torch.func.functional_call(m, ws, (x[r],)), y[r])
        g = torch.autograd.grad(loss(ws), list(ws.values()), create_graph=True)
        norm = sum(t.square().sum() for t in g).sqrt()
        moved = {k: w + rho[r] * t / norm for (k, w), t in zip(ws.items(), g)}
        for a, b, c in zip(found, torch.autograd.grad(loss(moved), list(ws.values())), plain):
            assert torch.allclose(a[r], b, rtol=0, atol=1e-7)      # rho is a float32
            assert not torch.allclose(c[r], b, rtol=0, atol=1e-4)


@pytest.mark.parametrize('params', [norm_params, run.last_layer])
def test_a_fixed_part_is_sam_with_params(params):
    t = task('digits', 'conv_gn', noise=.4, n_train=96)
    _set_all(0)
    dls = t.dls(0)
    _set_all(0)
    model = t.model()
    stack = Stack([model])
    fit_stack(stack, StackData([dls], 2), [run.SSAM(run.Fixed(params), .3, renorm=True)], 2, .02)
    from sam_explained.compare import Protocol
    alone = Protocol(t.model, t.dls, wd=0.).run([SAM(.3, params=params)], 0, 2, .02)[1].model
    plain = Protocol(t.model, t.dls, wd=0.).run([], 0, 2, .02)[1].model
    far = [max((a[0] - b).abs().max().item() for a, b in zip(stack.ws, m.parameters())) for m in (alone, plain)]
    assert far[0] < 1e-5 < 1e-3 < far[1]


def test_the_grid_is_in_its_order(monkeypatch):
    "An array (step size, strength, seed): each cell is the run alone"
    monkeypatch.setattr(run, 'WIDTH', 5)
    monkeypatch.setitem(run.PLAN['settings'], 'tiny', {'data': 'digits', 'model': 'mlp', 'noise': .4, 'n_train': 48, 'bs': 24, 'epochs': 3, 'lr': 'mlp'})
    accuracy, train, loss = run.grid('tiny', 'SAM', [.01, .05], [.1, .3, .5], range(2), 'choose')
    for l, lr in enumerate([.01, .05]):
        for s, rho in enumerate([.1, .3, .5]):
            for r in range(2):
                one = run.looked(*run.trained('tiny', 'SAM', [(0, lr, rho)], [r], 'choose'))
                assert (accuracy[l][s][r], train[l][s][r]) == pytest.approx((one[0][0], one[1][0]), abs=.6)
                assert loss[l][s][r] == pytest.approx(one[2][0], abs=1e-3)


def test_the_plan_can_be_run():
    for name, s in run.PLAN['settings'].items():
        assert s['lr'] in run.PLAN['protocol']['lr']
        methods = run.wanted(name)
        assert 'SGD' in methods and 'SAM' in methods
        for m in methods:
            cb = run.callback(m, 1., s['epochs'])
            assert (cb is None) == m.startswith('SGD')
    for c in run.PLAN['claims']: assert {'id', 'source', 'claim', 'refuted', 'metric', 'settings'} <= set(c), c['id']
    ids = [c['id'] for c in run.PLAN['claims'] + run.PLAN['cost']]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize('method', ['SSAM Fisher 50', 'SSAM 2:4', 'SSAM channels 50', 'SSAM random 90'])
def test_masks_of_all_runs_at_once_are_those_of_the_callbacks(method):
    t = task('digits', 'mlp', noise=.4, n_train=96)
    ends = []
    for linear in (True, False):
        models, loaders = [], []
        for seed in (0, 1):
            _set_all(seed)
            loaders.append(t.dls(seed))
            _set_all(seed)
            models.append(t.model())
        cbs = [run.callback(method, rho, 3, linear=linear) for rho in (.1, .5)]
        if not linear and 'random' in method: cbs = [run.SSAM(run.RandomMask(.9), rho) for rho in (.1, .5)]
        assert isinstance(cbs[0], run.AtOnce) == linear
        stack = Stack(models)
        fit_stack(stack, StackData(loaders, 3), cbs, 3, .02)
        ends.append(stack.ws)
    for a, b in zip(*ends): assert torch.allclose(a, b, rtol=0, atol=2e-6)


def test_linear_fisher():
    "Against the scores of the library, row by row"
    torch.manual_seed(0)
    models = [he_mlp(5, 6, 4, 3).double() for _ in range(3)]
    x, y = torch.randn(3, 7, 5).double(), torch.randint(3, (3, 7))
    found = run.linear_fisher(Stack(models).ws, x, y)
    for r, m in enumerate(models):
        for a, b in zip(found, fisher(m, F.cross_entropy, (x[r],), (y[r],))): assert torch.allclose(a[r], b, rtol=0, atol=1e-12)


def test_shards_take_a_step_each():
    "Against a loop over runs and shards with autograd"
    torch.manual_seed(0)
    models = [he_mlp(5, 6, 3) for _ in range(2)]
    x, y = torch.randn(2, 12, 5), torch.randint(3, (2, 12))
    for m in (1, 4, 12):
        for r, found in enumerate(judge.shard_rises(Stack(models), x, y, m)):
            rises, model = [], models[r]
            for xb, yb in zip(x[r].split(m), y[r].split(m)):
                loss = F.cross_entropy(model(xb), yb)
                g = torch.autograd.grad(loss, list(model.parameters()))
                norm = torch.cat([t.flatten() for t in g]).norm()
                up = {k: w + .05 * t / norm for (k, w), t in zip(model.named_parameters(), g)}
                rises.append((F.cross_entropy(torch.func.functional_call(model, up, (xb,)), yb) - loss).item())
            assert found == pytest.approx(np.mean(rises), abs=1e-6)


def test_the_rate_in_numpy():
    "With no mask: sum(1 - cos w), its gradient sin w, noise and start as drawn"
    gen = torch.Generator().manual_seed(3)
    w, squares = 3 * torch.rand(20, generator=gen).double().numpy(), []
    for t in range(1, 129):
        squares.append((np.sin(w)**2).sum())
        noise = torch.randn(20, generator=gen).double().numpy() / np.sqrt(20)
        g = np.sin(w) + noise
        w = w - .25 / np.sqrt(t) * (np.sin(w + .5 / np.sqrt(t) * g / np.sqrt((g**2).sum())) + noise)
    found = judge.rate('all', 3, most=7)
    means = [np.mean(squares[:64]), np.mean(squares)]
    assert found['means'] == pytest.approx(means, abs=2e-6)
    assert found['exponent'] == pytest.approx(np.log2(means[1] / means[0]), abs=2e-5)


# On clean labels last but the slow: a loss of 0.0002 differs by a fifth from one processor to the next.
CHEAP = 'q20', 'q60', 'q80', 'tumour', 'q40', 'text0', 'text', 'clean', 'long', 'conv', 'attn'


def judged_in(claim):
    "The cheapest of its settings"
    return next(s for s in CHEAP if s in claim['settings'])


@pytest.mark.parametrize('claim', [c['id'] for c in run.PLAN['claims'] if 'compare' in c])
def test_one_cell_of_each_row_comes_out_again(claim):
    "The first run a claim compares, in the cheapest of its settings, for two seeds: what the ledger says"
    ledger = Ledger(run.HERE)
    claim = ledger.claims[claim]
    setting = judged_in(claim)
    cell = ledger.pairs(claim, setting)[0][0]
    there, found = ledger.judge[setting, *cell], judge.judged(setting, cell, judge.SEEDS[:2], curved='lambda' in claim['metric'])
    assert found['accuracy'] == pytest.approx(there['accuracy'][:2], abs=.5)          # three rows of the smaller part
    assert found['loss'] == pytest.approx(there['loss'][:2], rel=.02)
    for k in found.keys() & {'lambda_1', 'lambda_5', 'adaptive', 'ball'}: assert found[k] == pytest.approx(there[k][:2], rel=.05)


def test_rows_of_another_kind_come_out_again():
    ledger = Ledger(run.HERE)
    assert judge.shards('clean', 1000)['tau'] == pytest.approx(ledger.shards['clean', 1000]['tau'], abs=.02)
    for mask in ('all', 'Fisher half'):
        there = ledger.rate[mask, 1000]
        assert judge.rate(mask, 1000, most=10)['means'] == pytest.approx(there['means'][:5], rel=1e-4)


def test_the_files_hold_what_the_plan_says():
    "Each claim was judged in each of its settings; all runs of a row have all seeds and were chosen by the rule"
    ledger = Ledger(run.HERE)
    assert len(ledger.rows()) == 99 and ledger.missing() == []
    for setting, *cell in ledger.judge: assert tuple(cell) in judge.cells(setting, ledger), (setting, cell)
    for found in ledger.judge.values(): assert len(found['accuracy']) == len(found['loss']) == len(judge.SEEDS)
    assert len(ledger.rate) == 3 * len(judge.SEEDS) and len(ledger.shards) == 2 * len(judge.SEEDS)
    for (setting, method), grid in ledger.choose.items():
        assert np.shape(grid['accuracy']) == (len(grid['lr']), len(grid['strength']), len(run.choosing(setting)['seeds']))
