"Slices of the loss: exact at each point, on any model and loader, the model as it was; what the pictures say and refuse."
import gc
import importlib.util
import json
import math
import signal
import weakref
from pathlib import Path

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.basics import CrossEntropyLossFlat, accuracy
from torch import nn

from conftest import assert_same, batches, learner, mlp, snapshot
from sam_explained import planes as planes_module, slices, walk
from sam_explained.core import grad_norm
from sam_explained.data import docstrings
from sam_explained.hessian import top_eigenvalues
from sam_explained.landscape import method_colors
from sam_explained.planes import eigen_directions, plane_through, slice_explorer, turn_slices
from sam_explained.sharpness import Objective
from sam_explained.slices import (Direction, Slice, filter_normalized, plot_slices, random_direction, slice_1d,
                                  slice_2d)
from sam_explained.walk import losses_at

quiet = dict(progress=False)


@pytest.fixture(autouse=True)
def no_figures():
    yield
    plt.close('all')


def uneven(n=3, **kw):
    "Batches of which the last has fewer rows"
    *full, (x, y) = batches(n, **kw)
    return [*full, (x[:2], y[:2])]


def two(objective, **kw): return [random_direction(objective, s, **kw) for s in (0, 1)]


def independent(objective, directions, point):
    "The mean loss over all rows at once, by `functional_call` in eval mode; the weights are put together here"
    model = objective.model
    where = {id(w): k for k, w in enumerate(objective.params)}
    ws = {name: w if id(w) not in where else w + sum(c * d[where[id(w)]] for c, d in zip(point, directions))
          for name, w in model.named_parameters()}
    x, y = (torch.cat(t) for t in zip(*objective.data))
    model.eval()
    loss = objective.loss_func(torch.func.functional_call(model, ws, (x,)), y).item()
    model.train()
    return loss


# Exact ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('vmap', [False, True, None])
@pytest.mark.parametrize('room', [1, 2**26])
def test_every_point_equals_an_independent_evaluation(monkeypatch, vmap, room):
    monkeypatch.setattr(walk, '_room', room)
    objective = Objective((mlp().train(), F.cross_entropy, uneven()))
    ds = two(objective, vectors=True)
    found = slice_2d(objective, ds, 3., 9, center=(.5, -1.), vmap=vmap, **quiet)
    np.testing.assert_array_equal(found.coords[0], .5 + 3 * np.linspace(-1, 1, 9))
    np.testing.assert_array_equal(found.coords[1], -1 + 3 * np.linspace(-1, 1, 9))
    wanted = [[independent(objective, ds, (a, b)) for b in found.coords[1]] for a in found.coords[0]]
    np.testing.assert_allclose(found.loss, wanted, rtol=0, atol=1e-12)
    line = slice_1d(objective, ds[1], 2., 11, vmap=vmap, **quiet)
    np.testing.assert_allclose(line.loss, [independent(objective, ds[1:], (a,)) for a in line.coords[0]], rtol=0, atol=1e-12)
    assert found.rows == 14 and line.coords[0][5] == 0


class Text(nn.Module):
    "Embedding and output share their weights"
    def __init__(self, n, c):
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(n, 6), nn.GRU(6, 6, batch_first=True), nn.Linear(6, n, bias=False)
        self.out.weight, self.head = self.embed.weight, nn.Linear(n, c)
    def forward(self, x): return self.head(self.out(self.mix(self.embed(x))[0].mean(1)).tanh())


class Noisy(nn.Module):
    "Draws in each forward pass, whatever its mode"
    def __init__(self):
        super().__init__()
        self.body = mlp()
    def forward(self, x): return self.body(x + .1 * torch.randn_like(x))


class Remembers(nn.Module):
    "A hidden state that runs from batch to batch"
    def __init__(self):
        super().__init__()
        self.body, self.h = mlp(), torch.zeros(3).double()
    def reset(self): self.h = torch.zeros(3).double()
    def forward(self, x):
        out = self.body(x) + self.h
        self.h = out.mean(0).detach()
        return out


def text():
    dls = docstrings(bs=16, seed=0)
    n = 1 + max(x.max().item() for x, *_ in [*dls.train, *dls.valid])
    some = [(x, y) for x, y in dls.valid][:1]
    return Text(n, dls.train_ds.c), F.cross_entropy, [(some[0][0][:40], some[0][1][:40]), (some[0][0][40:50], some[0][1][40:50])]


def images():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.4), nn.Flatten(), nn.Linear(4 * 36, 3))
    net[0].weight.requires_grad_(False)
    return net.double(), F.cross_entropy, uneven(shape=(3, 8, 8))


def pairs(out, y): return (out - y['target']).pow(2).mean()
def regression():
    return mlp(), pairs, [(x, {'target': F.one_hot(y, 3).double()}) for x, y in uneven()]


def remembering():
    "In the middle of something: the hidden state is not zero"
    model = Remembers()
    model(torch.randn(4, 5).double())
    return model, F.cross_entropy, uneven()


roads = {
    'text, tied weights': (text, {}),
    'frozen convolution, running statistics': (images, {}),
    'statistics of each batch': (images, dict(batch_stats=True)),
    'dropout': (images, dict(dropout=True, seed=3)),
    'a part of the weights': (images, dict(params=lambda m: [m[5].weight])),
    'a loss of its own': (regression, {}),
    'noise of its own': (lambda: (Noisy(), F.cross_entropy, uneven()), dict(seed=1)),
    'a hidden state': (remembering, {}),
}

@pytest.mark.parametrize('room', [1, 2**26])
@pytest.mark.parametrize('road', roads)
def test_every_point_equals_the_objective_there(monkeypatch, road, room):
    monkeypatch.setattr(walk, '_room', room)
    make, kw = roads[road]
    objective = Objective(make(), **kw)
    ds = two(objective, norm='unit', vectors=True)
    found = slice_2d(objective, ds, 2., 3, **quiet)
    for (i, j), loss in np.ndenumerate(found.loss):
        eps = [found.coords[0][i] * a + found.coords[1][j] * b for a, b in zip(*ds)]
        assert loss == pytest.approx(objective.value(eps), rel=1e-6 if 'text' in road else 1e-12)
    assert np.ptp(found.loss) > 1e-3
    again = slice_2d(Objective(objective_of(objective), **kw), ds, 2., 3, **quiet)
    np.testing.assert_array_equal(found.loss, again.loss)


def objective_of(o): return o.model, o.loss_func, o.data


def test_a_learner_and_a_metric():
    learn = learner(mlp(torch.float32), [(x.float(), y) for x, y in batches(4)], loss_func=CrossEntropyLossFlat())
    d = random_direction(learn)
    for vmap in (False, True):
        found = slice_1d(learn, d, 1., 5, metric=accuracy, vmap=vmap, **quiet)
        for k, c in enumerate(found.coords[0]):
            right = 0
            with torch.no_grad():
                ws = {n: w + c * v for (n, w), v in zip(learn.model.named_parameters(), d)}
                for x, y in learn.dls.train: right += (torch.func.functional_call(learn.model, ws, (x,)).argmax(1) == y).sum().item()
            assert found.metric[k] == pytest.approx(right / 24)
    assert found.rows == 24 and slice_1d(learn, d, 1., 5, **quiet).metric is None


def test_the_data_are_loaded_once_and_streamed(monkeypatch):
    alive, loads, most = weakref.WeakSet(), [], []
    class Stream:
        def __iter__(self):
            loads.append(1)
            for x, y in uneven(6):
                x, y = x.clone(), y.clone()
                alive.add(x)
                gc.collect()
                most.append(len(alive))
                yield x, y
                del x, y
    objective = Objective((mlp(), F.cross_entropy, Stream()))
    slice_1d(objective, random_direction(objective), 1., 7, **quiet)
    assert len(loads) == 1 and max(most) == 6
    loads.clear(), most.clear()
    monkeypatch.setattr(walk, '_room', 1)
    slice_1d(objective, random_direction(objective), 1., 7, **quiet)
    assert len(loads) == 1 and max(most) <= 3


def test_vmap_refuses_what_it_would_get_wrong():
    for make, kw in ((images, dict(batch_stats=True)), (images, dict(dropout=True)), (remembering, {})):
        objective = Objective(make(), **kw)
        with pytest.raises(ValueError, match='vmap=True does not work'):
            slice_1d(objective, random_direction(objective), vmap=True, **quiet)


# The second road -------------------------------------------------------------------------------------------------

@pytest.fixture
def roads_taken(monkeypatch):
    "How many points each road has visited"
    seen = dict(plain=0, at_once=0)
    def spy(name, road):
        def visit(objective, directions, points, *rest):
            found = road(objective, directions, points, *rest)
            seen[name] += len(points)
            return found
        return visit
    monkeypatch.setattr(walk, '_visit', spy('plain', walk._visit))
    monkeypatch.setattr(walk, '_visit_at_once', spy('at_once', walk._visit_at_once))
    return seen


def small(model=None, loss_func=F.cross_entropy, dtype=torch.float64, **kw):
    return Objective(((model or mlp()).to(dtype), loss_func, uneven(dtype=dtype)), **kw)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_a_small_model_takes_the_second_road_and_both_agree(roads_taken, dtype, tolerance):
    objective = small(dtype=dtype)
    ds = two(objective, vectors=True)
    found = slice_2d(objective, ds, 2., 9, metric=accuracy, **quiet)
    assert roads_taken == dict(plain=2, at_once=2 + 81)
    plain = slice_2d(objective, ds, 2., 9, metric=accuracy, vmap=False, **quiet)
    np.testing.assert_allclose(found.loss, plain.loss, rtol=tolerance)
    np.testing.assert_allclose(found.metric, plain.metric, rtol=tolerance)
    again = slice_2d(objective, ds, 2., 9, metric=accuracy, **quiet)
    np.testing.assert_array_equal(found.loss, again.loss)


class Around(nn.Module):
    "A body and something that happens to its output"
    def __init__(self, then):
        super().__init__()
        self.body, self.then = mlp(), then
        self.calls, self.seen, self.mean = 0, [], torch.zeros(3)
        self.register_buffer('count', torch.zeros(()))
    def forward(self, x): return self.then(self, self.body(x))


def counts_in_a_buffer(self, out):
    self.count += 1
    return out * (1 + self.count / 100)

def counts_in_an_attribute(self, out):
    self.calls += 1
    return out * (1 + self.calls / 100)

def keeps_a_tensor(self, out):
    old, self.mean = self.mean, out.mean(0).detach()
    return out + old

def changes_a_tensor(self, out):
    if not torch._C._functorch.is_batchedtensor(out): self.mean.add_(out.detach().mean(0))
    return out + self.mean

def keeps_a_list(self, out):
    self.seen.append(1)
    return out * (1 + len(self.seen) / 100)

def branches(self, out): return out if out.mean() > .01 else 2 * out
def asks_for_a_number(self, out): return out * (1 + abs(out.sum().item()))
def draws(self, out): return out + .1 * torch.randn_like(out)

class Double(torch.autograd.Function):
    "An operation without a rule for vmap"
    @staticmethod
    def forward(ctx, x): return 2 * x
    @staticmethod
    def backward(ctx, g): return 2 * g

@torch.library.custom_op('test_slices::cube', mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor: return x**3

def own_function(self, out): return Double.apply(out)
def own_operation(self, out): return cube(out)

def hooked():
    model, seen = mlp(), []
    model[0].register_forward_hook(lambda m, i, out: seen.append(out))
    return model, seen

stay = [counts_in_a_buffer, counts_in_an_attribute, keeps_a_tensor, changes_a_tensor, keeps_a_list, branches,
        asks_for_a_number, draws, own_function, own_operation]

@pytest.mark.parametrize('then', stay, ids=lambda f: f.__name__)
def test_a_model_the_second_road_is_not_for_takes_the_first(roads_taken, capfd, then):
    def run(vmap):
        objective = small(Around(then))
        return slice_2d(objective, two(objective), 1., 8, vmap=vmap, **quiet).loss
    chosen = run(None)
    assert roads_taken['at_once'] == 0 and capfd.readouterr().err == ''
    assert torch._C._functorch._is_vmap_fallback_enabled()
    np.testing.assert_array_equal(chosen, run(False))
    assert np.ptp(chosen) > 1e-4


def test_other_reasons_to_take_the_first(roads_taken):
    model = mlp()
    def penalised(out, y): return F.cross_entropy(out, y) + .01 * sum(w.pow(2).sum() for w in model.parameters())
    def number(out, y): return (out.argmax(1) == y).double().mean().item()
    wide = nn.Sequential(nn.Linear(5, 2**13), nn.Tanh(), nn.Linear(2**13, 3)).double()
    cases = [(small(model, penalised), {}), (small(), dict(metric=number)), (small(wide), {}), (small(), dict(n=7)),
             (small(hooked()[0]), {}), (Objective(remembering()), {}), (Objective(images(), dropout=True), {}),
             (Objective(images(), batch_stats=True), {}), (small(dtype=torch.bfloat16), {})]
    for objective, kw in cases:
        roads_taken.update(plain=0, at_once=0)
        found = slice_2d(objective, two(objective), **{**dict(n=8), **kw}, **quiet)
        assert roads_taken['plain'] >= found.loss.size and roads_taken['at_once'] <= 2
        plain = slice_2d(objective, two(objective), vmap=False, **{**dict(n=8), **kw}, **quiet)
        np.testing.assert_array_equal(found.loss, plain.loss)
    big = [(torch.randn(6, 3000).double(), torch.randint(3, (6,)))]
    objective = Objective((mlp(n_in=3000), F.cross_entropy, big))
    assert 6 * 3000 * 8 > 2**16
    slice_2d(objective, two(objective), n=8, **quiet)
    assert roads_taken['at_once'] <= 2


def test_a_hook_sees_only_the_points_themselves():
    model, seen = hooked()
    objective = small(model)
    slice_2d(objective, two(objective), 1., 8, **quiet)
    assert len(seen) == 1 + 64 * 3 and not any(map(torch._C._functorch.is_batchedtensor, seen))


def test_losses_at_any_points():
    objective = Objective((mlp(), F.cross_entropy, uneven()))
    ds = [*two(objective, vectors=True), random_direction(objective, 2)]
    points = np.random.default_rng(0).normal(size=(60, 3))
    for some, vmap in ((points, None), (points.tolist(), False), (torch.tensor(points), True), (points[:1], None)):
        found = losses_at(objective, ds, some, vmap=vmap, **quiet)
        wanted = [independent(objective, ds, p) for p in points[:len(some)]]
        np.testing.assert_allclose(found.loss, wanted, rtol=0, atol=1e-12)
        assert found.metric is None and found.rows == 14
    for bad, why in (([], 'points is empty'), ([(0, 0)], 'has 2 coordinates'), ([(0, 0, math.nan)], 'points: coordinate')):
        with pytest.raises(ValueError, match=why): losses_at(objective, ds, bad, **quiet)
    with pytest.raises(ValueError, match='directions is empty'): losses_at(objective, [], [()], **quiet)


def test_along_a_direction_it_bends_as_the_hessian_says():
    objective = Objective((mlp(), F.cross_entropy, uneven()))      # tanh: without kinks
    d = random_direction(objective, vectors=True)
    s = slice_1d(objective, d, 1e-3, 3, **quiet)
    assert (s.loss[0] + s.loss[2] - 2 * s.loss[1]) / 1e-6 == pytest.approx(slices._dot(d, objective.hvp(list(d))), rel=1e-4)


# As it was ------------------------------------------------------------------------------------------------------

def stepped():
    "A model in the middle of training: gradients, running statistics, mixed modes"
    model, loss_func, data = images()
    for x, y in data: loss_func(model.train()(x), y).backward()
    model[3].eval()
    return model, loss_func, data


def traces(model):
    grads = {f'{k}.grad': w.grad.clone() for k, w in model.named_parameters() if w.grad is not None}
    assert grads
    return {**snapshot(model), **grads, 'rng': torch.get_rng_state(),
            'mode': torch.tensor([m.training for m in model.modules()]),
            'where': torch.tensor([w.data_ptr() for w in model.parameters()])}


@pytest.mark.parametrize('kw', [{}, dict(batch_stats=True, dropout=True)])
@pytest.mark.parametrize('at', [None, 0, 1, 7])
@pytest.mark.parametrize('what', [RuntimeError, KeyboardInterrupt])
def test_the_model_is_as_it_was(what, at, kw):
    model, loss_func, data = stepped()
    calls = []
    def loss(out, y):
        calls.append(1)
        if len(calls) - 1 == at: raise what('here')
        return loss_func(out, y)
    ds = two(Objective((model, loss, data)))
    before = traces(model)
    def go(): slice_2d((model, loss, data), ds, 1., 4, **kw, **quiet)
    if at is None: go()
    else:
        with pytest.raises(what, match='here'): go()
    assert_same(before, traces(model), 'model')


@pytest.mark.parametrize('vmap', [False, None])
def test_one_ctrl_c_ends_it_soon_and_the_weights_are_home(vmap):
    model, loss_func, data = stepped()
    seen = []
    def loss(out, y):
        seen.append(1)
        if len(seen) == 20: signal.raise_signal(signal.SIGINT)
        return loss_func(out, y)
    ds, before = two(Objective((model, loss, data))), traces(model)
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt): slice_2d((model, loss, data), ds, 1., 25, vmap=vmap, **quiet)
    finally: signal.signal(signal.SIGINT, usual)
    assert len(seen) < 25
    assert_same(before, traces(model), 'model')


def test_the_bar_is_shown_or_not(capsys):
    objective = Objective((mlp(), F.cross_entropy, uneven()))
    slice_1d(objective, random_direction(objective), n=5, **quiet)
    assert capsys.readouterr().out == ''
    slice_1d(objective, random_direction(objective), n=5)
    assert '5/5' in capsys.readouterr().out


# Directions -----------------------------------------------------------------------------------------------------

def test_filter_normalisation_filter_by_filter():
    torch.manual_seed(0)
    ws = [torch.randn(4, 3, 2, 2), torch.randn(5), torch.randn(6, 7), torch.tensor(2.)]
    ws[0][1] = 0
    ds = [torch.randn_like(w) for w in ws]
    ds[2][3] = 0
    still, moved = filter_normalized(ds, ws), filter_normalized(ds, ws, vectors=True)
    for found in (still, moved):
        for k, rows in ((0, 4), (2, 6)):
            for r in range(rows):
                d, w = ds[k][r], ws[k][r]
                wanted = d * (w.norm() / d.norm()) if d.norm() > 0 else d
                torch.testing.assert_close(found[k][r], wanted)
    assert not still[1].any() and not still[3].any()
    torch.testing.assert_close(moved[1], ds[1] * ws[1].norm() / ds[1].norm())
    torch.testing.assert_close(moved[3].abs(), ws[3])


def test_random_directions():
    objective = Objective((mlp(), F.cross_entropy, uneven()))
    a, b, unit = random_direction(objective, 4), random_direction(objective, 5), random_direction(objective, 4, 'unit', vectors=True)
    assert all(map(torch.equal, a, random_direction(objective, 4))) and not torch.equal(a[0], b[0])
    assert (a.norm, unit.norm, a.name) == ('filter', 'unit', 'random 4') and unit.length == pytest.approx(1)
    assert a.length == pytest.approx(grad_norm([w for w in objective.params if w.ndim > 1]).item())
    assert all(x.any() for x in unit) and not a[1].any()
    state = torch.get_rng_state()
    random_direction(objective)
    assert torch.equal(state, torch.get_rng_state())


def test_a_plane_through_three_models():
    home, one, other = mlp(seed=0), mlp(seed=1), mlp(seed=2)
    data = uneven()
    objective = Objective((home, F.cross_entropy, data))
    plane = plane_through(objective, [one, list(other.parameters())])
    gram = [[slices._dot(a, b) for b in plane.directions] for a in plane.directions]
    np.testing.assert_allclose(gram, np.eye(2), atol=1e-14)
    for k, model in enumerate((home, one, other)):
        loss = Objective((model, F.cross_entropy, data)).value()
        at = slice_2d(objective, plane.directions, 1e-9, 3, center=tuple(plane.points[k]), **quiet)
        assert at.loss[1, 1] == pytest.approx(loss, abs=1e-12)
        assert (abs(plane.points[k] - plane.center) <= plane.radius).all()
        for j, too in enumerate((home, one, other)):
            apart = math.sqrt(sum((a - b).pow(2).sum().item() for a, b in zip(model.parameters(), too.parameters())))
            assert np.linalg.norm(plane.points[k] - plane.points[j]) == pytest.approx(apart)
    line = plane_through(objective, [other])
    assert len(line.directions) == 1 and line.points.shape == (2, 1)
    part = Objective((home, F.cross_entropy, data), params=lambda m: [m[2].weight])
    assert plane_through(part, [one]).directions[0][0].shape == home[2].weight.shape
    middle = [(a + b).detach() / 2 for a, b in zip(home.parameters(), one.parameters())]
    for bad, why in (([one, middle], 'number 2 lies on the same line'), ([home], 'number 1 lies on the same line'), ([], 'one or two'),
                     ([one, other, one], 'one or two'), ([mlp(n_in=4)], 'number 1 does not fit'), ([[home[0].weight]], 'does not fit')):
        with pytest.raises(ValueError, match=why): plane_through(objective, bad)


def test_eigen_directions():
    objective = Objective((mlp(), F.cross_entropy, uneven()))       # tanh: no kinks
    ws = list(objective.model.parameters())
    flat = torch.cat([w.detach().flatten() for w in ws])
    def loss(v):
        model, x, y = objective.model, *map(torch.cat, zip(*objective.data))
        parts = {n: p.view(w.shape) for (n, w), p in zip(model.named_parameters(), v.split([w.numel() for w in ws]))}
        return F.cross_entropy(torch.func.functional_call(model, parts, (x,)), y)
    H = torch.func.hessian(loss)(flat)
    lam, U = torch.linalg.eigh(H)
    a, b = eigen_directions(objective, tol=1e-8, **quiet)
    for k, d in ((1, a), (2, b)):
        assert (d.name, d.norm) == (f'eigenvector {k}', 'unit') and d.length == pytest.approx(1)
        assert abs(torch.cat([t.flatten() for t in d]) @ U[:, -k]).item() == pytest.approx(1, abs=1e-6)
    L = slice_2d(objective, [a, b], 1e-3, 3, **quiet).loss
    assert (L[2, 1] + L[0, 1] - 2 * L[1, 1]) / 1e-6 == pytest.approx(lam[-1].item(), rel=1e-3)
    assert (L[1, 2] + L[1, 0] - 2 * L[1, 1]) / 1e-6 == pytest.approx(lam[-2].item(), rel=1e-3)
    assert abs(L[2, 2] + L[0, 0] - L[2, 0] - L[0, 2]) / 4e-6 < 1e-3 * lam[-1]
    eigen = top_eigenvalues(objective, 3, tol=1e-8, **quiet)
    again = eigen_directions(eigen, 3)
    assert len(again) == 3 and all(map(torch.equal, again[0], eigen.vectors[0])) and again[2].name == 'eigenvector 3'
    with pytest.raises(ValueError, match='has 3 eigenvectors'): eigen_directions(eigen, 4)


# Bad input ------------------------------------------------------------------------------------------------------

good = [torch.ones(7, 5), torch.ones(7), torch.ones(3, 7), torch.ones(3)]
turned = [torch.ones(7, 5).neg(), *good[1:]]
bad_slices = [
    *[(ValueError, 'radius=', dict(radius=r)) for r in (0, -1., math.inf, math.nan)], (TypeError, 'radius=', dict(radius='1')),
    *[(ValueError, 'n=', dict(n=n)) for n in (1, 0, -3)], (TypeError, 'n=', dict(n=2.5)),
    (ValueError, 'center', dict(center=(math.nan, 0))),
    (ValueError, 'must be two', dict(directions=[good])),
    (ValueError, 'parallel', dict(directions=[good, good])),
    (ValueError, 'parallel', dict(directions=[good, [-3 * x for x in good]])),
    (ValueError, 'direction 2 does not fit', dict(directions=[good, turned[:3]])),
    (ValueError, 'direction 1 does not fit', dict(directions=[[x.mT if x.ndim > 1 else x for x in good], turned])),
    (ValueError, 'direction 2 has length 0', dict(directions=[good, [0 * x for x in good]])),
    (ValueError, 'direction 1 has length nan', dict(directions=[[math.nan * x for x in good], turned])),
    (TypeError, 'direction 1 must be a list of tensors', dict(directions=[3, turned])),
    (TypeError, 'direction 1 must be a list of tensors', dict(directions=torch.ones(2, 5))),
]

@pytest.mark.parametrize('error, why, kw', bad_slices)
def test_bad_input_is_named_before_anything_is_computed(error, why, kw):
    def never(out, y): raise AssertionError('computed')
    with pytest.raises(error, match=why):
        slice_2d((mlp(), never, uneven()), **{**dict(directions=[good, turned], n=3), **kw, **quiet})


def test_other_bad_input():
    with pytest.raises(ValueError, match='batches is empty'): slice_1d((mlp(), F.cross_entropy, []), good, **quiet)
    with pytest.raises(TypeError, match='an Objective has them'): slice_1d(Objective((mlp(), F.cross_entropy, [])), good, seed=1, **quiet)
    with pytest.raises(ValueError, match="norm='layer'"): random_direction((mlp(), F.cross_entropy, []), norm='layer')
    flat = nn.BatchNorm1d(5)
    with pytest.raises(ValueError, match='vectors=True'): random_direction((flat, F.cross_entropy, []))
    with pytest.raises(ValueError, match='needs no gradient|is empty'): random_direction((mlp().requires_grad_(False), F.cross_entropy, []))


@pytest.mark.parametrize('vmap', [False, True])
def test_a_loss_that_is_not_finite_names_point_and_batch(vmap):
    data, model = uneven(), mlp()
    def log(out, y): return (1.5 - model[0].weight.new_ones(()) * out.mean() * 0 - a_weight(out)).log()
    def a_weight(out): return out.mean() / out.mean().detach() * 0 + out.abs().max() / 1e3
    with pytest.raises(ValueError, match=r'at \(-?1e\+0?6, .*\): the loss of batch 0 at distance .* from the weights is (nan|inf|-inf)'):
        slice_2d((model, log, data), [good, turned], 1e6, 3, vmap=vmap, **quiet)
    with pytest.raises(ValueError, match='must give the mean loss'):
        slice_1d((model, lambda out, y: F.cross_entropy(out, y, reduction='none'), data), good, vmap=vmap, **quiet)


# Pictures -------------------------------------------------------------------------------------------------------

def planes(radius=1., seeds=(0, 1), n=5, **kw):
    data = uneven()
    found = {}
    for k, seed in zip(('SGD', 'SAM'), (3, 4)):
        o = Objective((mlp(seed=seed), F.cross_entropy, data))
        found[k] = slice_2d(o, [random_direction(o, s, **kw) for s in seeds], radius, n, **quiet)
    return found


def words(fig):
    fig.canvas.draw()
    return [t for t in fig.findobj(matplotlib.text.Text) if t.get_text()]


def test_planes_have_the_same_levels_and_say_their_scale():
    found = planes()
    fig = plot_slices(found, levels=6)
    sets = [[c for c in ax.collections if isinstance(c, matplotlib.contour.QuadContourSet)] for ax in fig.axes[:2]]
    (hills, lines), (hills2, lines2) = sets
    np.testing.assert_array_equal(hills.levels, hills2.levels)
    np.testing.assert_array_equal(lines.levels, lines2.levels)
    np.testing.assert_array_equal(lines.levels, hills.levels[1:])
    low = min(s.loss.min() for s in found.values())
    np.testing.assert_allclose(hills.levels[[0, -1]], [low, min(s.loss.max() for s in found.values())])
    assert len(hills.levels) == 7 and (np.diff(hills.levels, 2) > 0).all()
    assert [matplotlib.colors.to_hex(c.get_edgecolor()[0]) for c in (lines, lines2)] == [method_colors[k] for k in ('SGD', 'SAM')]
    said = ' '.join(t.get_text() for t in words(fig))
    for part in ('SGD', 'SAM', 'random 0', 'random 1', 'loss', 'radius 1, filter-normalised', '5 x 5 points, 14 rows', '1 unit in weight space: SGD:'):
        assert part in said, part
    assert min(t.get_fontsize() for t in words(fig)) >= 9
    np.testing.assert_allclose(plot_slices(found, top=3., levels=4).axes[0].collections[0].levels[-1], 3.)


def test_figures_fit_a_phone():
    found = planes()
    line = slice_1d((mlp(), F.cross_entropy, uneven()), good, **quiet)
    for draw, *args in ((plot_slices, found), (plot_slices, line), (planes_module._surfaces, found, None, 0)):
        fig = draw(*args)
        assert fig.get_figwidth() <= 4.8 and min(t.get_fontsize() for t in words(fig)) >= 9
        if len(fig.axes) > 1:
            (_, low), (_, high) = (ax.get_position().p0 for ax in fig.axes[1::-1])
            assert low < high, 'panels below each other'
    quiet_colours = {slices._color(f'{k}', k) for k in range(9)}
    assert quiet_colours.isdisjoint(method_colors.values())


def test_lines_share_their_axes():
    found = {k: Slice([s.coords[0]], s.loss[2], None, s.radius, s.center[:1], s.names[:1], s.norms[:1], s.lengths[:1], s.rows)
             for k, s in planes(norm='unit').items()}
    fig = plot_slices(found)
    drawn = fig.axes[0].lines
    for line, (k, s) in zip(drawn, found.items()):
        np.testing.assert_array_equal(line.get_ydata(), s.loss)
        assert (line.get_label(), line.get_color()) == (k, method_colors[k])
    assert drawn[0].get_linestyle() != drawn[1].get_linestyle()
    assert 'unit directions; 1 unit = 1 in weight space' in ' '.join(t.get_text() for t in words(fig))


def test_what_is_not_comparable_is_refused():
    one, wide, unit, few = planes()['SGD'], planes(radius=2.)['SGD'], planes(norm='unit')['SGD'], planes()['SGD']
    few.rows = 3
    line = slice_1d((mlp(), F.cross_entropy, uneven()), good, **quiet)
    side = slice_2d((mlp(), F.cross_entropy, uneven()), [Direction(good, norm='filter'), Direction(turned, norm='filter')], n=3, center=(1, 0), **quiet)
    for other, what in ((wide, 'radius'), (unit, 'norm'), (few, 'number of rows'), (line, 'number of directions'), (side, 'center|number')):
        for draw in (plot_slices, turn_slices):
            with pytest.raises(ValueError, match=f'must have the same ({what})'): draw({'a': one, 'b': other})
    with pytest.raises(ValueError, match='is empty'): plot_slices([])
    with pytest.raises(TypeError, match='must hold `Slice`s'): plot_slices({'SGD': 3})
    with pytest.raises(TypeError, match='levels'): plot_slices(one, levels=2.5)
    with pytest.raises(ValueError, match='above the lowest loss'): plot_slices(one, top=0.)
    with pytest.raises(ValueError, match='must be planes'): turn_slices(line)
    with pytest.raises(ValueError, match='azimuths=0'): turn_slices(one, azimuths=0)


def test_surfaces_turn():
    frames = turn_slices(planes(), azimuths=3, alt='Two bowls')
    assert frames.labels == ['0°', '120°', '240°'] and len(set(frames.pictures)) == 3
    assert all('Two bowls' in a for a in frames.alts) and len(frames.html()) < 200_000 / 4
    seen = [planes_module._surfaces(slices._named(planes()), None, a).axes for a in (-60, 60)]
    assert [ax.azim for axes in seen for ax in axes] == [-60, -60, 60, 60]
    assert len({ax.get_zlim() for axes in seen for ax in axes}) == 1


def test_the_explorer_follows_its_sliders(monkeypatch):
    objective = Objective((mlp(), F.cross_entropy, uneven()))
    made = []
    def spy(*args, **kw):
        made.append(slice_2d(*args, **kw))
        return made[-1]
    monkeypatch.setattr(planes_module, 'slice_2d', spy)
    box = slice_explorer(objective, n=5, **quiet)
    first, second, reach, size, picture, says = box.children
    pictures = [picture.value]
    for widget, value in ((reach, .5), (size, 7), (first, 'random 2'), (second, 'random 3')):
        widget.value = value
        pictures.append(picture.value)
    assert len(set(pictures)) == 5 and all(p[:4] == b'\x89PNG' for p in pictures)
    assert (made[-1].names, made[-1].radius, made[-1].loss.shape) == (('random 2', 'random 3'), .5, (7, 7))
    assert 'radius 0.5' in says.value
    second.value = 'random 2'
    assert 'parallel' in says.value and picture.value == pictures[-1] and len(made) == 5
    second.value = 'random 1'
    assert 'parallel' not in says.value and len(made) == 6
    mine = slice_explorer(objective, {'a': Direction(good, 'a'), 'b': Direction(turned, 'b')}, n=5, **quiet)
    assert list(mine.children[0].options) == ['a', 'b'] and made[-1].names == ('a', 'b')
    with pytest.raises(ValueError, match='at least two'): slice_explorer(objective, {'a': good})


def test_the_explorer_offers_eigenvectors_and_other_models(monkeypatch):
    objective, made, asked = Objective((mlp(), F.cross_entropy, uneven())), [], []
    def spy(*args, **kw):
        made.append((args[1], slice_2d(*args, **kw)))
        return made[-1][1]
    def steep(*args, **kw):
        asked.append(1)
        return eigen_directions(*args, **kw)
    monkeypatch.setattr(planes_module, 'slice_2d', spy)
    monkeypatch.setattr(planes_module, 'eigen_directions', steep)
    other = mlp(seed=5)
    box = slice_explorer(objective, n=5, others=[other], **quiet)
    first, second = box.children[:2]
    assert list(first.options) == [*(f'random {k}' for k in range(4)), 'eigenvector 1', 'eigenvector 2', 'distance along direction 1']
    assert not asked
    first.value, second.value = 'eigenvector 1', 'eigenvector 2'
    assert len(asked) == 1 and made[-1][1].names == ('eigenvector 1', 'eigenvector 2')
    second.value = 'distance along direction 1'
    way = made[-1][0][1]
    move = [b - a for a, b in zip(objective.params, other.parameters())]
    assert slices._dot(way, move) == pytest.approx(grad_norm(move).item())
    seen = slice_explorer(objective, {'a': Direction(good, 'a')}, n=5, others=[other], **quiet)
    assert list(seen.children[0].options) == ['a', 'distance along direction 1']
    def fails(*args, **kw): raise RuntimeError('no second derivative')
    monkeypatch.setattr(planes_module, 'eigen_directions', fails)
    box = slice_explorer(objective, n=5, **quiet)
    box.children[0].value = 'eigenvector 2'
    assert 'no second derivative' in box.children[5].value


# The benchmark --------------------------------------------------------------------------------------------------

path = Path(__file__).parents[1] / 'benchmarks' / 'slices.py'
spec = importlib.util.spec_from_file_location('slices_benchmark', path)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


def test_the_benchmark_compares_ways_to_the_same_picture(tmp_path, capsys):
    out = tmp_path / 'slices.json'
    found = bench.main(f'--rounds 1 --warmup 0 --n 2 --bs 200 --json {out}'.split())
    assert [(r['data'], r['method']) for r in found['rows']] == [
        (data, way) for data in ('loader', 'in memory') for way in ('state_dict', 'slice_2d', 'slice_2d, vmap=False')]
    for r in found['rows']:
        assert r['seconds'] > 0 and all(q > 0 for q in r['ratio'])
        if r['method'] == 'state_dict': assert r['ratio'] == [1, 1, 1]
    assert json.loads(out.read_text()) == found and '2 x 2 points' in capsys.readouterr().out
    ways = bench.methods(3, 100)
    planes = {key: way() for key, way in ways.items()}
    for key, plane in planes.items():
        np.testing.assert_allclose(plane, planes['loader', 'state_dict'], rtol=1e-5, err_msg=str(key))
        assert plane.shape == (3, 3) and np.ptp(plane) > .1


def test_the_benchmark_refuses_bad_numbers():
    for bad in ('--rounds 0', '--n 1', '--bs 0', '--warmup -1'):
        with pytest.raises(SystemExit): bench.main(bad.split())
