"""`MSAM` and `shards` are right under everything fastai puts around them; the other side is `msam_train`, written from
the definition: g = sum_j |S_j|/|B| grad L_{S_j}(w + rho g_j/||g_j||), each shard with an ascent of its own."""
import collections
import copy
import inspect
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from conftest import (CPUMixedPrecision, Seed, assert_close, assert_same, batches, halves, learner, loader, mlp,
                      same_bits, snapshot)
from fastai.basics import (SGD, Adam, Callback, CancelBatchException, CancelFitException, CrossEntropyLossFlat, L,
                           Learner, Recorder, accuracy)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.rnn import ModelResetter, RNNCallback, RNNRegularizer
from fastai.callback.schedule import SchedLin
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.losses import LabelSmoothingCrossEntropy
from fastai.torch_core import TensorBase
from hypothesis import given
from hypothesis import strategies as st
from reference import np_ascent, sam_gradient, widened
from test_callback import (Draws, Overflows, Point, Record, Stateful, Tied, Watch, check_gaps, copy_hidden, lm_loss,
                           norms, opt_state, reference_lm_loss, tensors_in, tokens, twins)
from test_interrupts import HIGH, LOW, params_of, plain, scenario
from torch import nn

from sam_explained.msam import MSAM, shards
from sam_explained.sam import SAM

CE = nn.CrossEntropyLoss()
f32, f64 = torch.float32, torch.float64
sgd = partial(SGD, mom=.9)


# The reference ----------------------------------------------------------------------------------------------------

def even(rows, n):
    "n sizes that differ by at most one, larger first."
    return [len(a) for a in np.array_split(np.arange(rows), n)]


def msam_train(model, batches, loss_func, opt, n, rho, epochs=1, seed=None, n_acc=None, clip=None, mix=None, skip=(),
               drop=(), context=None, reduction='mean', keep=None, **kw):
    """Train with mSAM; returns one dict per batch.

    `n`: how many shards, or a function rows -> sizes. `mix(x, y)` -> x and a loss
    function (pred, y, slice of the rows).
    `skip`: batches whose step does not happen, `drop`: batches that are not seen at all. `keep`: (get, put) of the
    hidden state, of which every shard has its own. The other arguments are those of `reference.train`.
    """
    context = context or (lambda: torch.autocast('cpu', enabled=False))
    model.train()
    count, log = 0, []
    params = [w for w in model.parameters() if w.requires_grad]
    for i in range(epochs * len(batches)):
        if i % len(batches) == 0: memory = {}
        if i in drop: continue
        x, y = batches[i % len(batches)]
        if seed is not None: torch.manual_seed(seed + i)
        loss_fn = lambda out, y, rows: loss_func(out, y)
        if mix: x, loss_fn = mix(x, y)
        sizes = n(len(y)) if callable(n) else even(len(y), n)
        assert sum(sizes) == len(y)
        total, clean, perturbed, preds, a = [None] * len(params), 0., 0., [], 0
        if keep and not memory: fresh = keep[0](model)
        for j, size in enumerate(sizes):
            rows, a, share = slice(a, a + size), a + size, size / len(y) if reduction == 'mean' else 1.
            def loss_of(call):
                with context():
                    out = call(x[rows])
                    preds.append(out)
                    if isinstance(out, dict): return loss_fn(out, y[rows], rows)
                    return loss_fn(tuple(map(widened, out)) if isinstance(out, tuple) else widened(out), y[rows], rows)
            if keep: keep[1](model, memory.get(j, fresh))
            grads, c, p = sam_gradient(model, loss_of, rho, keep=keep, **kw)
            if keep: memory[j] = keep[0](model)
            clean, perturbed = clean + share * c, perturbed + share * p
            total = [t if g is None else share * g if t is None else t + share * g for t, g in zip(total, grads)]
        log.append(dict(clean=clean, perturbed=perturbed, gap=perturbed - clean, preds=preds[::2],
                        rng=torch.get_rng_state()))
        weight = len(y) / n_acc if n_acc else 1.
        with torch.no_grad():
            for w, g in zip(params, total):
                if g is not None: w.grad = weight * g if w.grad is None else w.grad + weight * g
        count += len(y)
        if n_acc and count < n_acc: continue
        count = 0
        if clip: torch.nn.utils.clip_grad_norm_([w for w in params if w.grad is not None], clip)
        if i not in skip: opt.step()
        opt.zero_grad()
    return log


def ragged(*sizes, **kw):
    "One batch of each size."
    (x, y), = batches(1, sum(sizes), **kw)
    return list(zip(x.split(sizes), y.split(sizes)))


def note_rng(out):
    class Rng(Callback):
        "The random stream after each batch."
        order, run_valid = 56, False
        def after_batch(self): out.append(torch.get_rng_state())
    return Rng()


def apart(a, b): return max((x - y).abs().max().item() for x, y in zip(a.parameters(), b.parameters()))


def compare(cb, n, make=mlp, bs=None, cbs=(), opt_func=sgd, lr=.1, loss_func=CE, epochs=2, tol=(1e-9, 1e-11),
            gap_tol=(1e-7, 1e-9), **kw):
    "Train by `cb` and by the reference; weights, buffers, losses and gaps have to agree."
    bs = batches(bs=7) if bs is None else bs
    model, ref, opt = twins(make, opt_func, lr)
    rec, rng = Record(), []
    learn = learner(model, bs, [*cbs, cb, rec, note_rng(rng)], opt_func=opt_func, lr=lr, loss_func=loss_func)
    learn.fit(epochs)
    log = msam_train(ref, bs, kw.pop('ref_loss', loss_func), opt, n, kw.pop('rho', .3), epochs=epochs, **kw)
    assert_close(model, ref, *tol)
    check_gaps(cb, log, *gap_tol)
    np.testing.assert_allclose(rec.clean, [r['clean'] for r in log], rtol=max(gap_tol[0], 1e-9))
    for a, b in zip(rec.preds, log):
        b = torch.cat([p[0] if isinstance(p, tuple) else p for p in b['preds']]).detach()
        torch.testing.assert_close(a, b, rtol=max(tol[0], 1e-9), atol=max(tol[1], 1e-11), check_dtype=False)
    assert len(rec.preds) == len(rng) == len(log) > 0
    if 'seed' in kw: assert all(torch.equal(a, b['rng']) for a, b in zip(rng, log)), 'the random stream differs'
    return learn, model, ref


# 1. The definition ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('opt_func,lr', [(sgd, .1), (Adam, .01)], ids=['momentum', 'adam'])
@pytest.mark.parametrize('n', [1, 2, 3, 4, 7])
def test_msam_is_the_definition(n, opt_func, lr):
    "Batches of seven rows: 7, 4+3, 3+2+2, 2+2+2+1, and one row per shard."
    compare(MSAM(n, rho=.3), n, opt_func=opt_func, lr=lr, tol=(1e-8, 1e-10))


@pytest.mark.parametrize('size,sizes', [(1, [1] * 7), (2, [2, 2, 2, 1]), (3, [3, 2, 2]), (4, [4, 3]), (6, [4, 3]),
                                        (7, [7])])
def test_shard_size(size, sizes): compare(MSAM(shard_size=size, rho=.3), lambda rows: sizes)


def test_default_is_four_shards():
    compare(MSAM(rho=.3), 4)
    assert MSAM().rho == .05 and MSAM().n_shards == 4 and MSAM().shard_size is None
    assert MSAM(shard_size=3).shard_size == 3 and MSAM(shard_size=3).n_shards is None
    assert MSAM().order == MixedPrecision.order - 1 and MSAM().run_valid is False and isinstance(MSAM(), SAM)
    assert 'adaptive' in inspect.signature(MSAM).parameters                  # delegated arguments can be seen


@pytest.mark.parametrize('kw', [dict(p=math.inf), dict(p=1.), dict(p=3.), dict(adaptive=True),
                                dict(adaptive=True, eta=0., p=math.inf)], ids=str)
def test_arguments_of_sam(kw): compare(MSAM(3, rho=.3, **kw), 3, **kw)


def test_params_of_a_part_and_frozen_layers():
    compare(MSAM(3, rho=1., params=lambda m: m[0].parameters()), 3, rho=1., perturb=lambda k: k[0] == '0')
    bs = batches(bs=7)
    model, ref, _ = twins(mlp)
    learn = learner(model, bs, MSAM(3, rho=.3), opt_func=sgd, splitter=halves)
    learn.freeze()
    learn.fit(2)
    for w in list(ref.parameters())[:2]: w.requires_grad_(False)
    msam_train(ref, bs, CE, sgd(halves(ref), lr=.1), 3, .3, epochs=2)
    assert_close(model, ref)


def test_nothing_perturbed_is_plain_training():
    "`params` may name frozen weights only."
    ends, some = [], dict(rho=.3, params=lambda m: m[0].parameters())
    for cbs in ([], MSAM(3, **some), MSAM(3, vmap=True, **some)):
        learn = learner(mlp(), batches(bs=6), cbs, opt_func=sgd, splitter=halves)
        learn.freeze()
        learn.fit(2)
        ends.append(learn.model)
    for m in ends[1:]: assert_close(m, ends[0], 1e-10, 1e-12)


def test_rho_as_a_function_of_progress():
    bs, seen = batches(bs=6), []
    class See(Callback):
        order, run_valid = 60, False
        def before_step(self): seen.append(self.learn.msam.radius())
    learner(mlp(), bs, [MSAM(3, rho=SchedLin(0, .4)), See()]).fit(1)
    np.testing.assert_allclose(seen, [0., .1, .2, .3])
    cb = MSAM(3, rho=SchedLin(0, .4))
    learner(mlp(), bs, cb).fit(1)
    assert cb.gaps[0] == 0 < min(cb.gaps[1:])


def test_tied_weights(): compare(MSAM(3, rho=.3), 3, make=Tied)


@pytest.mark.parametrize('opt_func', [sgd, Adam], ids=['momentum', 'adam'])
def test_one_shard_is_sam_bit_for_bit(opt_func):
    "With batch norm and dropout: weights, buffers, optimizer, random stream, gaps, losses, predictions."
    ends = []
    for cb in (SAM(.2), MSAM(1, .2), MSAM(shard_size=6, rho=.2)):
        rec, rng = Record(), []
        learn = learner(mlp(f32, nn.BatchNorm1d, .3), batches(dtype=f32), [Seed(9), cb, rec, note_rng(rng)],
                        opt_func=opt_func, lr=.01)
        learn.fit(3)
        ends.append((snapshot(learn.model), opt_state(learn) + rng + rec.preds, cb.gaps, rec.clean))
    for e in ends[1:]:
        assert_same(ends[0][0], e[0])
        assert same_bits(ends[0][1], e[1]) and ends[0][2:] == e[2:]


@pytest.mark.parametrize('n', [1, 2, 3, 5])
@pytest.mark.parametrize('vmap', [False, True])
def test_rho_zero_is_plain_training(n, vmap):
    for bs in (batches(bs=7), batches(bs=6)):
        ends = []
        for cbs in ([], MSAM(n, rho=0., vmap=vmap)):
            learn = learner(mlp(), bs, cbs, opt_func=sgd)
            learn.fit(3)
            ends.append(learn.model)
        assert_close(*ends, 1e-10, 1e-12)
        assert learn.msam.gaps == [0.] * 12


@pytest.mark.parametrize('n', [2, 3])
def test_identical_shards_give_sam_and_order_does_not_matter(n):
    same = [(x.repeat(n, 1), y.repeat(n)) for x, y in batches(bs=4)]
    ends = []
    for cb in (SAM(.3), MSAM(n, .3)):
        learn = learner(mlp(), same, cb, opt_func=sgd)
        learn.fit(2)
        ends.append(learn.model)
    assert_close(*ends, 1e-10, 1e-12)
    bs, ends = batches(bs=12), []
    turned = [(torch.cat(x.split(12 // n)[::-1]), torch.cat(y.split(12 // n)[::-1])) for x, y in bs]
    for b in (bs, turned):
        learn = learner(mlp(), b, MSAM(n, .3), opt_func=sgd)
        learn.fit(2)
        ends.append(learn.model)
    assert_close(*ends, 1e-10, 1e-12)


def test_the_reference_tells_methods_apart():
    ends = []
    for n, rho in [(1, 0.), (1, .3), (2, .3), (3, .3), (7, .3)]:
        _, ref, opt = twins(mlp)
        msam_train(ref, batches(bs=7), CE, opt, n, rho, epochs=3)
        ends.append(ref)
    assert min(apart(a, b) for i, a in enumerate(ends) for b in ends[:i]) > 1e-3


@pytest.mark.parametrize('vmap', [False, True])
@pytest.mark.parametrize('cb,want', [(SAM(.1), .2), (MSAM(1, .1), .2), (MSAM(2, .1), .1),
                                     (MSAM(shard_size=1, rho=.1), .1)])
def test_two_point_fixture(cb, want, vmap):
    "T9: at w = 0.6 the losses w^2/2 and (w-1)^2/2 have SAM gradient 0.2 and mSAM(2) 0.1; at w = 2 both have 1.6."
    data = [(torch.tensor([0., 1.], dtype=f64), torch.zeros(2, dtype=torch.long))]
    cb.vmap = vmap
    for w, g in ((.6, want), (2., 1.6)):
        learn = learner(Point(w), data, cb, loss_func=lambda p, y: .5 * (p ** 2).mean(), lr=1.)
        learn.fit(1)
        assert abs(learn.model.w.item() - (w - g)) < 1e-12


def test_one_dimension_closed_form():
    "T9: g = (w - mean x) + rho sum_j |S_j|/|B| sign(w - mean of S_j), also for unequal shards; the gap in closed form."
    x = torch.tensor([.3, -1., 2., 5., .9, .8, 1.1], dtype=f64)
    for w in (.6, 1., -3.):
        learn = learner(Point(w), [(x, torch.zeros(7, dtype=torch.long))], MSAM(3, .1), lr=1.,
                        loss_func=lambda p, y: .5 * (p ** 2).mean())
        learn.fit(1)
        parts = np.array_split(x.numpy(), 3)
        g = sum(len(s) / 7 * (w - s.mean() + .1 * np.sign(w - s.mean())) for s in parts)
        gap = sum(len(s) / 7 * (.1 * abs(w - s.mean()) + .005) for s in parts)
        assert abs(learn.model.w.item() - (w - g)) < 1e-12 and abs(learn.msam.gaps[0] - gap) < 1e-12


class Quadratics(nn.Module):
    "Row with number j has the loss (w - c_j)' A_j (w - c_j) / 2."
    def __init__(self, A, c, w):
        super().__init__()
        self.w = nn.Parameter(w.clone())
        self.register_buffer('A', A), self.register_buffer('c', c)
    def forward(self, j):
        d = self.w - self.c[j]
        return .5 * torch.einsum('ri,rik,rk->r', d, self.A[j], d)


@pytest.mark.parametrize('vmap', [False, True])
@pytest.mark.parametrize('seed', range(4))
def test_quadratic_shards(seed, vmap):
    "T10, with the three wrong readings as controls: a shared norm, descent on the full batch, sum instead of mean."
    gen, m, k, rho = np.random.default_rng(seed), 4, 5, .3
    R, c, w = gen.normal(size=(m, k, k)), gen.normal(size=(m, k)), gen.normal(size=k)
    A, d = R @ R.transpose(0, 2, 1) + np.eye(k), w - c
    g = np.einsum('jik,jk->ji', A, d)
    eps = np.stack([np_ascent(v, rho) for v in g])
    want = np.mean([A[j] @ (d[j] + eps[j]) for j in range(m)], 0)
    wrong = [np.mean([A[j] @ (d[j] + rho * g[j] / np.linalg.norm(g.mean(0))) for j in range(m)], 0),
             np.mean([A[i] @ (d[i] + e) for i in range(m) for e in eps], 0),
             m * want]
    j = torch.arange(m).repeat_interleave(3)                                 # three equal rows per shard
    model = Quadratics(*map(torch.from_numpy, (A, c, w)))
    learn = learner(model, [(j, j)], MSAM(m, rho, vmap=vmap), lr=1., loss_func=lambda p, y: p.mean())
    learn.fit(1)
    got = w - model.w.detach().numpy()
    np.testing.assert_allclose(got, want, rtol=1e-10)
    assert min(np.linalg.norm(got - v) for v in wrong) > 1e-3


def test_the_ordering_of_objectives():
    "T12, to first order: the gap of mSAM on a linear loss is rho mean_j ||g_j||, and grows with n."
    (x, y), = batches(1, 12)
    lin = lambda p, y: p.mean()
    gaps = []
    for n in (1, 2, 4, 12):
        learn = learner(nn.Linear(5, 1, bias=False).double(), [(x, y)], MSAM(n, .3), loss_func=lin)
        learn.fit(1)
        gaps.append(learn.msam.gaps[0])
        want = .3 * np.mean([np.linalg.norm(s.mean(0)) for s in np.array_split(x.numpy(), n)])
        assert abs(gaps[-1] - want) < 1e-12
    assert gaps == sorted(gaps) and gaps[-1] > 1.2 * gaps[0]


# 2. What a step costs ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n', [1, 2, 3, 4, 7])
@pytest.mark.parametrize('acc', [None, 14])
def test_counts(n, acc, monkeypatch):
    "T25: 2n forwards on the shards' rows, none of the whole batch, n ascent and n descent gradients, one step."
    bs, seen, grads, backs, steps = batches(bs=7), [], [], [], []
    model = mlp()
    model.register_forward_pre_hook(lambda m, a: seen.append(len(a[0])) if m.training else None)
    grad, back = torch.autograd.grad, torch.Tensor.backward
    monkeypatch.setattr(torch.autograd, 'grad', lambda *a, **k: grads.append(1) or grad(*a, **k))
    monkeypatch.setattr(torch.Tensor, 'backward', lambda *a, **k: backs.append(1) or back(*a, **k))
    learn = learner(model, bs, [MSAM(n)] + ([GradientAccumulation(acc)] if acc else []), opt_func=Adam)
    learn.create_opt()
    step = learn.opt.step
    learn.opt.step = lambda *a, **k: steps.append(1) or step(*a, **k)
    learn.fit(2)
    assert seen == [s for s in even(7, n) for _ in range(2)] * 8 and sum(seen) == 8 * 2 * 7
    assert len(grads) == len(backs) == 8 * n
    assert len(steps) == (4 if acc else 8) and {s['step'] for s in learn.opt.state.values()} == {len(steps)}


def test_validation_and_prediction_see_whole_batches():
    box = []
    model = mlp(f32)
    model.register_forward_pre_hook(lambda m, a: box.append((m.training, len(a[0]))))
    learn = learner(model, batches(bs=7, dtype=f32), MSAM(3, .2), valid=batches(3, dtype=f32, seed=8), recorder=True)
    learn.fit(1)
    train = [(True, s) for s in (3, 3, 2, 2, 2, 2)] * 4
    assert box == train + [(False, 6)] * 3
    gaps, before = list(learn.msam.gaps), snapshot(model)
    box.clear()
    learn.validate()
    preds, _ = learn.get_preds()
    assert box == [(False, 6)] * 6 and len(preds) == 18
    assert learn.msam.gaps == gaps and len(gaps) == 4
    assert_same(before, snapshot(model))


# 3. What others see -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('vmap,bs', [(False, 7), (True, 6)])
def test_recorder_and_training_metrics_see_the_clean_batch(vmap, bs):
    bs = batches(bs=bs, dtype=f32)
    model, ref, opt = twins(partial(mlp, f32))
    rec = Recorder(train_metrics=True)
    learn = learner(model, bs, [rec, MSAM(3, .5, vmap=vmap)], opt_func=sgd, metrics=accuracy)
    learn.fit(1)
    log = msam_train(ref, bs, CE, opt, 3, .5)
    smooth, out = 0., []
    for i, r in enumerate(log):
        smooth = .98 * smooth + .02 * r['clean']
        out.append(smooth / (1 - .98 ** (i + 1)))
    np.testing.assert_allclose([float(v) for v in rec.losses], out, rtol=1e-5)
    right = [float((torch.cat(r['preds']).argmax(1) == y).float().mean()) for r, (_, y) in zip(log, bs)]
    names = list(rec.metric_names)
    values = dict(zip(names[1:], rec.values[-1]))
    np.testing.assert_allclose(values['train_accuracy'], np.mean(right), rtol=1e-6)
    np.testing.assert_allclose(values['train_loss'], out[-1], rtol=1e-5)          # fastai's is the smooth one


@pytest.mark.parametrize('vmap', [False, True])
@pytest.mark.parametrize('order', [8, 9, 10, 60])
def test_the_whole_batch_is_back_after_the_backward_pass(order, vmap):
    "Identity, not only equality; and at `after_backward` already, for what clips, logs or accumulates."
    first, later = {}, []
    class Early(Callback):
        run_valid = False
        def __init__(self): self.order = -20
        def before_batch(self): first['xb'], first['yb'] = self.xb, self.yb
    class Late(Callback):
        run_valid = False
        def look(self): later.append((self.xb is first['xb'] and self.yb is first['yb'], len(self.pred)))
        after_backward = before_step = after_step = after_batch = look
    late = Late()
    late.order = order
    learn = learner(mlp(), batches(bs=6), [Early(), MSAM(3, .3, vmap=vmap), late])
    learn.fit(1)
    assert later == [(True, 6)] * 16
    assert learn.msam._whole is None and not learn.msam._parts and learn.msam.rewind is None


def test_pred_is_detached_and_nothing_is_kept():
    kinds = []
    class See(Callback):
        order, run_valid = 20, False
        def before_step(self): kinds.append((self.pred.requires_grad, self.loss.requires_grad, self.loss.ndim))
    learn = learner(mlp(), batches(), [MSAM(2, .3), See()])
    learn.fit(1)
    assert kinds == [(False, False, 0)] * 4
    kept = {k: v for k, v in vars(learn.msam).items() if k not in ('learn', '_learn')}
    assert not list(tensors_in(kept)) and not kept['_memory']


def test_gaps_are_one_per_step_and_float():
    cb = MSAM(3, .3)
    learner(mlp(), batches(5, 7), cb).fit(2)
    assert len(cb.gaps) == 10 and all(type(g) is float for g in cb.gaps)
    cb.learn.fit(1)
    assert len(cb.gaps) == 5


def test_models_with_several_outputs():
    "Tuples and dicts of predictions are joined part by part."
    class Two(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.net, self.kind = mlp(), kind
        def forward(self, x):
            a = self.net(x)
            return (a, x[:, :2]) if self.kind is tuple else dict(a=a, b=x[:, :2])
    bs = batches(bs=7)
    for kind, loss in ((tuple, lambda p, y: CE(p[0], y)), (dict, lambda p, y: CE(p['a'], y))):
        seen = []
        class See(Callback):
            order, run_valid = 20, False
            def after_batch(self): seen.append(self.pred)
        model, ref, opt = twins(partial(Two, kind))
        learner(model, bs, [MSAM(3, .3), See()], loss_func=loss, opt_func=sgd).fit(1)
        with torch.no_grad(): want = ref(bs[0][0])
        msam_train(ref, bs, loss, opt, 3, .3)
        assert_close(model, ref)
        for k in ((0, 1) if kind is tuple else 'ab'): torch.testing.assert_close(seen[0][k], want[k])


class Penalty(Callback):
    "Changes prediction and loss, as a user's callback may; counts its calls."
    run_valid = False
    def __init__(self, order):
        self.order, self.calls, self.late = order, collections.Counter(), .4 * (order < MSAM.order)
    def after_pred(self):
        self.calls['after_pred'] += 1
        self.learn.pred = 2 * self.learn.pred
    def after_loss(self):
        self.calls['after_loss'] += 1
        self.learn.loss_grad = self.learn.loss_grad + .7 * self.learn.pred.pow(2).mean()
    def before_backward(self):
        self.calls['before_backward'] += 1
        self.learn.loss_grad = 3 * (self.learn.loss_grad + self.late * self.learn.pred.pow(2).mean())
    def before_batch(self): self.calls['before_batch'] += 1
    def after_backward(self): self.calls['after_backward'] += 1
    def before_step(self): self.calls['before_step'] += 1
    def after_batch(self): self.calls['after_batch'] += 1


@pytest.mark.parametrize('vmap,bs', [(False, 7), (True, 6)])
@pytest.mark.parametrize('order', [0, 8, 10, 30])
def test_events_of_other_callbacks_are_part_of_every_shard(order, vmap, bs):
    "What a callback behind MSAM does in `before_backward` it does in the second passes only, as with SAM."
    bs, pen = batches(bs=bs), Penalty(order)
    model, ref, opt = twins(mlp, lr=.02)
    learner(model, bs, [pen, MSAM(3, .3, vmap=vmap)], opt_func=sgd, lr=.02).fit(2)
    msam_train(ref, bs, lambda p, y: 3 * (CE(2 * p, y) + (.7 + pen.late) * (2 * p).pow(2).mean()), opt, 3, .3, epochs=2)
    assert_close(model, ref)
    twice, each = (3, 2) if vmap else (6, 3)                             # fastai's first shard, then all at once, twice
    assert pen.calls == dict(before_batch=8, after_pred=8 * twice, after_loss=8 * twice, after_backward=8,
                             before_step=8, after_batch=8,
                             before_backward=8 * (twice if order < MSAM.order else 1 if vmap else each))


# 4. MixUp, CutMix, accumulation, clipping, losses -----------------------------------------------------------------

def mixup(alpha=.4, reduction='mean'):
    "Zhang et al. 2018 with one lambda per row, the partner drawn from the whole batch."
    def mix(x, y):
        lam = torch.distributions.Beta(torch.tensor(alpha), torch.tensor(alpha)).sample((len(y),))
        lam = torch.maximum(lam, 1 - lam)
        other = torch.randperm(len(y))
        ce = partial(nn.functional.cross_entropy, reduction='none')
        def loss(p, y_, rows):
            rows_loss = ce(p, y[other][rows]) * (1 - lam[rows]) + ce(p, y_) * lam[rows]
            return rows_loss.mean() if reduction == 'mean' else rows_loss.sum()
        return x[other] + lam[:, None] * (x - x[other]), loss
    return mix


def cutmix(alpha):
    "Yun et al. 2019: one box for the batch, lambda = what the box leaves of the picture."
    def mix(x, y):
        H, W = x.shape[-2:]
        lam = torch.distributions.Beta(torch.tensor(alpha), torch.tensor(alpha)).sample((1,))
        other = torch.randperm(len(y))
        r = torch.sqrt(1. - lam)
        w, h = (torch.round(n * r).long() for n in (W, H))
        cx, cy = torch.randint(0, W, (1,)), torch.randint(0, H, (1,))
        left, right = (cx - w // 2).clamp(0, W), (cx + w // 2).clamp(0, W)
        top, bottom = (cy - h // 2).clamp(0, H), (cy + h // 2).clamp(0, H)
        x = x.clone()
        x[..., top:bottom, left:right] = x[other][..., top:bottom, left:right]
        left_over = 1 - ((right - left) * (bottom - top)) / float(W * H)
        return x, lambda p, y_, rows: left_over * CE(p, y_) + (1 - left_over) * CE(p, y[other][rows])
    return mix


def picture_net(): return nn.Sequential(nn.Flatten(), *mlp(f32, n_in=36))


single = dict(tol=(1e-4, 1e-6), gap_tol=(1e-3, 1e-6))


class Mixture(Callback):
    "MixUp's own attributes after each batch, and at the end of its `before_batch`."
    run_valid = False
    def __init__(self, order): self.order, self.seen = order, []
    def look(self):
        cb = [c for c in self.learn.cbs if isinstance(c, (MixUp, CutMix))][0]
        self.seen.append((cb.lam, *cb.yb1))
    before_batch = after_batch = look


@pytest.mark.parametrize('vmap', [False, True])
@pytest.mark.parametrize('n,bs', [(1, 7), (2, 7), (3, 7), (7, 7), (3, 6), (2, 6)])
def test_mixup(n, bs, vmap):
    whole, lf = Mixture(7), CrossEntropyLossFlat()
    learn, *_ = compare(MSAM(n, .3, vmap=vmap), n, partial(mlp, f32), batches(bs=bs, dtype=f32),
                        [Seed(30), MixUp(.4), whole], loss_func=lf, ref_loss=CE, seed=30, mix=mixup(), **single)
    assert learn.loss_func is lf
    for a, b in zip(whole.seen[0::2], whole.seen[1::2]): assert len(a) == len(b) and all(s is t for s, t in zip(a, b))
    assert len(whole.seen) == 16 and len(whole.seen[0][0]) == bs


@pytest.mark.parametrize('vmap', [False, True])
@pytest.mark.parametrize('n,bs', [(1, 7), (2, 7), (3, 6), (6, 6)])
def test_cutmix(n, bs, vmap):
    whole, lf = Mixture(7), CrossEntropyLossFlat()
    compare(MSAM(n, .3, vmap=vmap), n, picture_net, batches(bs=bs, dtype=f32, shape=(1, 6, 6)),
            [Seed(30), CutMix(1.), whole], loss_func=lf, ref_loss=CE, seed=30, mix=cutmix(1.), **single)
    for a, b in zip(whole.seen[0::2], whole.seen[1::2]): assert all(s is t for s, t in zip(a, b))


@pytest.mark.parametrize('vmap', [False, True])
@pytest.mark.parametrize('Mix', [MixUp, CutMix])
def test_mixing_with_rho_zero_is_plain_mixing(Mix, vmap):
    ends = []
    for cbs in ([], [MSAM(3, 0., vmap=vmap)]):
        learn = learner(picture_net(), batches(dtype=f32, shape=(1, 6, 6)), [Seed(4), Mix(.7), *cbs],
                        loss_func=CrossEntropyLossFlat(), opt_func=sgd)
        learn.fit(3)
        ends.append(learn.model)
    assert_close(*ends, 1e-5, 1e-6)
    assert apart(ends[0], picture_net()) > 1e-2


def test_mixup_of_targets_that_are_no_classes():
    "Without integer targets MixUp mixes yb itself, before the batch is cut."
    bs = [(x, nn.functional.one_hot(y, 3).float()) for x, y in batches(bs=7, dtype=f32)]
    def mix(x, y):
        lam = torch.distributions.Beta(torch.tensor(.4), torch.tensor(.4)).sample((len(y),))
        lam = torch.maximum(lam, 1 - lam)
        other = torch.randperm(len(y))
        mixed = torch.lerp(y[other], y, lam[:, None])
        return torch.lerp(x[other], x, lam[:, None]), lambda p, _, rows: CE(p, mixed[rows])
    compare(MSAM(3, .3), 3, partial(mlp, f32), bs, [Seed(30), MixUp(.4)], seed=30, mix=mix, **single)


def test_mixup_with_a_summed_loss():
    "MixUp hides the loss function and its `reduction` behind its own; the shards' weights have to know it."
    compare(MSAM(3, .3), 3, partial(mlp, f32), batches(bs=7, dtype=f32), [Seed(30), MixUp(.4)], lr=.01,
            loss_func=CrossEntropyLossFlat(reduction='sum'), ref_loss=CE, reduction='sum', seed=30,
            mix=mixup(reduction='sum'), **single)


def test_mixup_that_does_not_run_is_left_alone():
    "A MixUp switched off after a fit keeps the labels of an old batch; they are not this batch's."
    mix, never = MixUp(.4), CutMix()
    learn = learner(mlp(f32), batches(bs=7, dtype=f32), [mix, never, MSAM(3, .3)], loss_func=CrossEntropyLossFlat())
    never.run = False
    learn.fit(1)
    old = mix.yb1
    learn.dls.train, mix.run, never.run = loader(batches(bs=6, dtype=f32)), False, False
    learn.fit(1)
    assert len(learn.msam.gaps) == 4 and mix.yb1 is old


def test_accumulation_that_does_not_run_changes_nothing():
    ends = []
    for cbs in ([], [GradientAccumulation(14)]):
        learn = learner(mlp(), batches(bs=7), [*cbs, MSAM(3, .3)], opt_func=sgd)
        for cb in cbs: cb.run = False
        learn.fit(1)
        ends.append(learn.model)
    assert_close(*ends)


@pytest.mark.parametrize('vmap', [False, True])
@pytest.mark.parametrize('n', [1, 3])
@pytest.mark.parametrize('n_acc', [6, 7, 12, 14, 18, 20, 100])
def test_gradient_accumulation(n_acc, n, vmap):
    "Windows that end with an epoch, that cross one, and one that is never full."
    bs = batches(bs=6) if vmap else batches(bs=7)
    learn, model, ref = compare(MSAM(n, .3, vmap=vmap), n, bs=bs, cbs=[GradientAccumulation(n_acc)], n_acc=n_acc)
    for p, q in zip(model.parameters(), ref.parameters()): torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize('first', [True, False])
@pytest.mark.parametrize('clip', [.05, .3])
def test_clip_after_averaging(clip, first):
    "And with accumulation, whichever callback was given first."
    compare(MSAM(3, .3), 3, cbs=[GradientClip(clip)], clip=clip)
    bs, cb = batches(bs=7), MSAM(3, .3)
    model, ref, opt = twins(mlp)
    others = [GradientAccumulation(14), GradientClip(clip)]
    learner(model, bs, [cb, *others] if first else [*others, cb], opt_func=sgd).fit(2)
    msam_train(ref, bs, CE, opt, 3, .3, epochs=2, clip=clip, n_acc=14)
    assert_close(model, ref)


losses = dict(label_smoothing=(nn.CrossEntropyLoss(label_smoothing=.2), 'mean'),
              fastai_smoothing=(LabelSmoothingCrossEntropy(.2), 'mean'),
              flat=(CrossEntropyLossFlat(), 'mean'), function=(nn.functional.cross_entropy, 'mean'),
              sum=(nn.CrossEntropyLoss(reduction='sum'), 'sum'),
              flat_sum=(CrossEntropyLossFlat(reduction='sum'), 'sum'))


@pytest.mark.parametrize('acc', [None, 20])
@pytest.mark.parametrize('vmap,bs', [(False, 7), (True, 6)])
@pytest.mark.parametrize('name', losses)
def test_losses(name, vmap, bs, acc):
    "A loss that sums over the rows is summed over the shards too."
    loss, reduction = losses[name]
    ref_loss = nn.CrossEntropyLoss(reduction=reduction) if 'flat' in name else loss
    compare(MSAM(3, .3, vmap=vmap), 3, bs=batches(bs=bs), loss_func=loss, ref_loss=ref_loss, reduction=reduction,
            lr=.02, cbs=[GradientAccumulation(acc)] if acc else [], n_acc=acc,
            **(single if 'flat' in name else {}))                            # fastai's flat loss rounds to float32


def test_a_summed_loss_with_rho_zero_is_plain_training():
    ends = []
    for cbs in ([], [MSAM(3, 0.)]):
        learn = learner(mlp(), batches(bs=7), cbs, loss_func=nn.CrossEntropyLoss(reduction='sum'), lr=.01)
        learn.fit(2)
        ends.append(learn.model)
    assert_close(*ends, 1e-10, 1e-12)


# 5. Batch norm, dropout -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n', [1, 2, 3])
@pytest.mark.parametrize('norm', norms)
def test_normalisation_layers(norm, n):
    "T19: statistics of the clean passes alone, shard by shard in order; also for the cumulative average."
    _, model, ref = compare(MSAM(n, .3), n, partial(mlp, norm=norms[norm]))
    if norm in ('bn', 'bn_none'): assert int(model[1].num_batches_tracked) == 8 * n


def test_running_statistics_of_one_step_by_hand():
    (x, y), = batches(1, 7)
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    learner(model, [(x, y)], MSAM(3, 5.)).fit(1)
    mean, var = torch.zeros(5, dtype=f64), torch.ones(5, dtype=f64)
    for s in x.split([3, 2, 2]): mean, var = .9 * mean + .1 * s.mean(0), .9 * var + .1 * s.var(0)
    torch.testing.assert_close(model[0].running_mean, mean)
    torch.testing.assert_close(model[0].running_var, var)
    assert int(model[0].num_batches_tracked) == 3


def test_batch_norm_after_perturbed_layers():
    "Behind a layer that moves by much, a second pass that counted would show."
    compare(MSAM(2, 3.), 2, partial(mlp, norm=nn.BatchNorm1d), rho=3., lr=.01)


@pytest.mark.parametrize('n', [1, 2, 3, 4])
def test_dropout_equals_reference_with_the_same_masks(n):
    "T20; the random stream after each batch is compared too."
    compare(MSAM(n, .3), n, partial(mlp, drop=.4), cbs=[Seed(100)], seed=100)


def test_dropout_and_batch_norm_with_masks_drawn_anew():
    compare(MSAM(3, .3, same_rng=False), 3, partial(mlp, norm=nn.BatchNorm1d, drop=.4), cbs=[Seed(100)], seed=100,
            same_rng=False)


def masks_of(cb, n, cbs=(), rows=6):
    "Dropout masks, [batch][shard][pass]."
    model, seen = nn.Sequential(nn.Dropout(.5), nn.Linear(40, 3)), []
    model[0].register_forward_hook(lambda m, i, o: seen.append(o != 0) if m.training else None)
    learner(model, [(torch.ones(rows, 40), y) for _, y in batches(3, rows, dtype=f32)], [cb, *cbs]).fit(1)
    assert len(seen) == 3 * 2 * n
    return [[seen[2 * (b * n + j):2 * (b * n + j) + 2] for j in range(n)] for b in range(3)]


def test_masks_are_drawn_once_per_shard():
    seen = masks_of(MSAM(3), 3)
    assert all(torch.equal(*pair) for b in seen for pair in b)
    clean = [pair[0] for b in seen for pair in b]
    assert not any(torch.equal(a, b) for i, a in enumerate(clean) for b in clean[:i])
    assert not any(torch.equal(*pair) for b in masks_of(MSAM(3, same_rng=False), 3) for pair in b)


@pytest.mark.parametrize('event,order', [('before_batch', 5)] + [
    (e, o) for e in ('after_pred', 'after_loss', 'before_backward') for o in (-20, 5, 20, 80)])
def test_masks_are_shared_whatever_other_callbacks_draw(event, order):
    assert all(torch.equal(*pair) for b in masks_of(MSAM(3), 3, [Draws(event, order)]) for pair in b)


# 6. Mixed precision -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('extra', ['none', 'clip', 'acc', 'clip+acc'])
@pytest.mark.parametrize('vmap,bs', [(False, 7), (True, 6)])
def test_loss_scaling_changes_nothing(extra, vmap, bs):
    "T21"
    clip, n_acc = .1 if 'clip' in extra else None, 20 if 'acc' in extra else None
    start = mlp(f32)
    _, model, _ = compare(MSAM(3, .3, vmap=vmap), 3, partial(mlp, f32), batches(bs=bs, dtype=f32),
                          [CPUMixedPrecision(), *([GradientClip(clip)] if clip else []),
                           *([GradientAccumulation(n_acc)] if n_acc else [])],
                          clip=clip, n_acc=n_acc, **single)
    assert apart(start, model) > 1e-3


@pytest.mark.parametrize('dtype,scaled', [(torch.bfloat16, False), (torch.float16, True)], ids=['bf16', 'fp16 scaled'])
def test_all_passes_run_under_autocast(dtype, scaled):
    bs, seen = batches(bs=8, dtype=f32), []                               # a share of 1/4 does not change the rounding
    model, ref, opt = twins(partial(mlp, f32))
    model[0].register_forward_hook(lambda m, i, o: seen.append(o.dtype) if m.training else None)
    learner(model, bs, [CPUMixedPrecision(dtype, scaled), MSAM(4, .3)], opt_func=sgd).fit(2)
    assert seen == [dtype] * 64 and not torch.is_autocast_enabled('cpu')
    plain = copy.deepcopy(ref)
    msam_train(plain, bs, CE, sgd(list(plain.parameters()), lr=.1), 4, .3, epochs=2)
    msam_train(ref, bs, CE, opt, 4, .3, epochs=2, context=lambda: torch.autocast('cpu', dtype=dtype))
    assert_close(model, ref, *((1e-4, 1e-5) if dtype is torch.bfloat16 else (2e-2, 2e-3)))
    assert apart(plain, ref) > 5 * apart(model, ref)


def finite_part(ws): return {k: v for k, v in ws.items() if 'running' not in k and 'num_b' not in k}


@pytest.mark.parametrize('bad', [{13}, {14}, {15}, {16}, {17}, {18}, {14, 17}, set(range(13, 19))], ids=str)
def test_overflow_in_any_pass_of_any_shard_skips_the_step(bad):
    "Step 3 has the forwards 13 to 18: clean and perturbed pass of three shards."
    bs = batches(dtype=f32)
    model = Overflows(bad)
    ref, sc = copy.deepcopy(model.net), Watch()
    learner(model, bs, [CPUMixedPrecision(), MSAM(3, .2), sc], opt_func=sgd).fit(2)
    assert_same(finite_part(sc.ws[1]), finite_part(sc.ws[2]), 'weights of the skipped step')
    assert not same_bits(sc.ws[0], sc.ws[1]) and not same_bits(sc.ws[2], sc.ws[3])
    assert sc.seen == [2. ** 16] * 2 + [2. ** 15] * 6
    msam_train(ref, bs, CE, sgd(list(ref.parameters()), lr=.1), 3, .2, epochs=2, skip={2})
    assert_close(model.net, ref, 1e-3, 1e-5)


# 7. Recurrent models ----------------------------------------------------------------------------------------------

keep = (lambda m: copy_hidden(m.hidden), lambda m, h: setattr(m, 'hidden', copy_hidden(h)))


def lm_batches(n=4, bs=5): return tokens(n, bs)


@pytest.mark.parametrize('n', [1, 2, 3])
@pytest.mark.parametrize('alpha,beta', [(0., 0.), (2., 1.)])
def test_recurrent_model_with_state_and_penalties(n, alpha, beta):
    "Each shard's rows go on from their own state, also in its second pass; the memory starts anew with an epoch."
    bs = lm_batches(bs=7)      # two rows per shard at least: for one row fastai's RNNRegularizer leaves out a penalty
    model, ref, opt = twins(Stateful)
    cbs = [ModelResetter(), RNNCallback(), Seed(50), MSAM(n, .3)] + ([RNNRegularizer(alpha, beta)] if alpha else [])
    learner(model, bs, cbs, loss_func=lm_loss, opt_func=sgd).fit(2)
    msam_train(ref, bs, reference_lm_loss(alpha, beta), opt, n, .3, epochs=1, seed=50, second=Stateful(), keep=keep)
    ref.reset()
    torch.manual_seed(0)
    msam_train(ref, bs, reference_lm_loss(alpha, beta), opt, n, .3, epochs=1, seed=54, second=Stateful(), keep=keep)
    assert_close(model, ref, 1e-4, 1e-5)


def test_rows_keep_their_own_hidden_state():
    "Against n models, each of which reads its rows alone; the second epoch starts from nothing again."
    bs, seen = lm_batches(), []
    model = Stateful(drop=0.)
    model.rnn.register_forward_pre_hook(lambda m, a: seen.append(copy_hidden(a[1])) if m.training else None)
    learner(model, bs, [ModelResetter(), RNNCallback(), MSAM(2, 0.)], loss_func=lm_loss, lr=0.).fit(2)
    streams, want = [Stateful(drop=0.) for _ in range(2)], []
    for _ in range(2):
        for s in streams: s.reset()
        for x, _ in bs:
            for s, rows in zip(streams, (slice(0, 3), slice(3, 5))):
                want += [copy_hidden(s.hidden)] * 2
                with torch.no_grad(): s(x[rows])
    assert len(seen) == len(want) == 2 * 4 * 2 * 2
    for a, b in zip(seen, want):
        if b is None: assert a is None
        else: torch.testing.assert_close(a, b)
    assert sum(a is None for a in seen) == 2 * 2 * 2


def test_rho_zero_is_n_streams_side_by_side():
    "Rows do not meet in a recurrent net: with rho = 0 cutting the batch changes nothing, whatever the memory."
    ends = []
    for cbs in ([], [MSAM(2, 0.)], [MSAM(3, 0.)], [MSAM(5, 0.)]):
        torch.manual_seed(5)
        learn = learner(Stateful(drop=0.), lm_batches(), [ModelResetter(), RNNCallback(), *cbs],
                        loss_func=lm_loss, opt_func=sgd, lr=.5)
        learn.fit(3)
        ends.append(learn.model)
    for m in ends[1:]: assert_close(m, ends[0], 1e-4, 1e-5)


@pytest.mark.parametrize('n', [1, 2, 3])
def test_awd_lstm(n):
    "fastai's own language model, with its lists of hidden states and weight dropout."
    from fastai.text.models.awdlstm import AWD_LSTM
    from fastai.text.models.core import LinearDecoder, SequentialRNN
    def make():
        torch.manual_seed(4)
        enc = AWD_LSTM(9, 4, 5, 2, pad_token=0, hidden_p=.1, input_p=.1, embed_p=.1, weight_p=.2)
        return SequentialRNN(enc, LinearDecoder(9, 4, .1)).double()
    bs = lm_batches(bs=7)
    model, ref = make(), make()
    learner(model, bs, [ModelResetter(), RNNCallback(), RNNRegularizer(2., 1.), Seed(50), MSAM(n, .3)],
            loss_func=lm_loss, opt_func=sgd).fit(1)
    def get(m): return copy_hidden(m[0].hidden), m[0].bs
    def put(m, state): m[0].hidden, m[0].bs = copy_hidden(state[0]), state[1]
    ref.reset()
    msam_train(ref, bs, reference_lm_loss(2., 1.), sgd(list(ref.parameters()), lr=.1), n, .3, seed=50,
               second=make(), keep=(get, put))
    assert_close(model, ref, 1e-6, 1e-7)


# 8. The last, smaller batch of an epoch ---------------------------------------------------------------------------

def counts(n, most):
    "As many shards as asked for, unless a smaller batch than the first would be cut into single rows."
    least = 2 if min(even(most, n)) >= 2 else 1
    def sizes(rows):
        k = min(n, rows)
        while k > 1 and min(even(rows, k)) < least: k -= 1
        return even(rows, k)
    return sizes


@pytest.mark.parametrize('norm', [None, nn.BatchNorm1d, nn.LayerNorm], ids=['plain', 'bn', 'ln'])
@pytest.mark.parametrize('n,bs,last', [(4, 8, 3), (4, 8, 2), (4, 8, 5), (4, 8, 7), (4, 9, 8), (3, 9, 4),
                                       (2, 4, 3), (2, 4, 2)])
def test_a_smaller_last_batch(n, bs, last, norm):
    "No shard of one row, on which batch norm fails."
    compare(MSAM(n, .3), counts(n, bs), partial(mlp, norm=norm), ragged(bs, bs, last))


def test_sizes_of_smaller_batches():
    "Written out: 8 rows in 4 shards, then 7, 5, 3, 1."
    for last, sizes in [(8, [2] * 4), (7, [3, 2, 2]), (6, [2] * 3), (5, [3, 2]), (4, [2, 2]), (3, [3]), (2, [2]),
                        (1, [1])]:
        seen, model = [], mlp()
        model.register_forward_pre_hook(lambda m, a: seen.append(len(a[0])) if m.training else None)
        learner(model, ragged(8, last), MSAM(4, .3)).fit(1)
        assert seen == [2] * 8 + [s for s in sizes for _ in range(2)]


@pytest.mark.parametrize('n,bs,last', [(4, 4, 3), (4, 4, 1), (8, 8, 5), (3, 4, 2), (3, 5, 1)])
def test_a_smaller_last_batch_of_single_rows(n, bs, last):
    "Shards of one row are what was asked for: then the last batch has them too."
    compare(MSAM(n, .3), counts(n, bs), bs=ragged(bs, bs, last))


@pytest.mark.parametrize('size,bs,last,sizes', [(3, 9, 4, [2, 2]), (3, 9, 2, [2]), (3, 9, 1, [1]), (3, 9, 7, [3, 2, 2]),
                                                (4, 8, 6, [3, 3]), (1, 4, 3, [1] * 3)])
def test_shard_size_in_a_smaller_last_batch(size, bs, last, sizes):
    full = [size] * (bs // size)
    compare(MSAM(shard_size=size, rho=.3), lambda rows: full if rows == bs else sizes, bs=ragged(bs, bs, last))


def test_smaller_than_in_an_earlier_epoch_of_this_fit():
    "The largest batch of a fit counts, so that a later epoch may begin with the small one; the next fit starts afresh."
    seen, model = [], mlp()
    model.register_forward_pre_hook(lambda m, a: seen.append(len(a[0])) if m.training else None)
    class Swap(Callback):
        def before_epoch(self): self.learn.dls.train = loader(ragged(8) if self.epoch == 0 else ragged(3))
    learn = learner(model, ragged(8), [Swap(), MSAM(4, .3)])
    learn.fit(2)
    assert seen == [2] * 8 + [3] * 2
    learn.remove_cb(learn.swap)
    with pytest.raises(ValueError, match=r'n_shards=4\b.*\b3\b'): learn.fit(1)


def test_accumulation_over_a_smaller_last_batch():
    compare(MSAM(4, .3), counts(4, 8), bs=ragged(8, 8, 3), cbs=[GradientAccumulation(11)], n_acc=11)


def test_vmap_and_a_smaller_last_batch():
    compare(MSAM(4, .3, vmap=True), counts(4, 8), bs=ragged(8, 8, 3))


# 9. Bad input, strange batches ------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['n_shards', 'shard_size'])
@pytest.mark.parametrize('value,error', [(0, ValueError), (-1, ValueError), (2.5, TypeError), (2., TypeError),
                                         (True, TypeError), (False, TypeError), ('4', TypeError), ([2], TypeError)])
def test_bad_counts_are_refused_at_construction(name, value, error):
    with pytest.raises(error, match=re.escape(f'{name}={value!r}')) as e: MSAM(**{name: value})
    assert '1' in str(e.value)                                               # where the range starts
    with pytest.raises(error, match=re.escape(f'n={value!r}')): shards(torch.zeros(4, 2), value)


def test_both_counts_are_refused():
    with pytest.raises(ValueError, match='n_shards=4.*shard_size=2'): MSAM(4, shard_size=2)
    with pytest.raises((ValueError, TypeError)): MSAM(0, shard_size=2)


@pytest.mark.parametrize('kw,error,name', [(dict(rho=-1), ValueError, 'rho'), (dict(p=.5), ValueError, 'p'),
                                           (dict(eta=-1), ValueError, 'eta'), (dict(nope=1), TypeError, 'nope')])
def test_arguments_of_sam_are_checked_too(kw, error, name):
    with pytest.raises(error, match=name): MSAM(2, **kw)


def test_whole_numbers_of_numpy_are_fine(): compare(MSAM(np.int64(3), .3), 3)


@pytest.mark.parametrize('kw', [dict(n_shards=7), dict(shard_size=7), dict(n_shards=100)], ids=str)
def test_more_shards_than_rows(kw):
    "The message has both numbers; nothing has changed, and a fit with another callback goes on."
    learn = learner(mlp(f32, nn.BatchNorm1d, .3), batches(dtype=f32), MSAM(**kw), opt_func=Adam, lr=.01)
    learn.create_opt()
    before, state, steps = snapshot(learn.model), opt_state(learn), []
    learn.model.register_forward_pre_hook(lambda m, a: steps.append(1))
    want = next(iter(kw.values()))
    with pytest.raises(ValueError, match=rf'{next(iter(kw))}={want}\b.*\b6\b'): learn.fit(1)
    assert_same(before, snapshot(learn.model))
    assert not steps and same_bits(state, opt_state(learn)) and all(p.grad is None for p in learn.model.parameters())
    learn.remove_cb(learn.msam)
    learn.add_cb(MSAM(3))
    learn.fit(1)
    assert not same_bits(before, snapshot(learn.model))


class Give(Callback):
    "Replaces the batch, as a data loader might have built it."
    order = -50
    def __init__(self, f): self.f = f
    def before_batch(self): self.learn.xb, self.learn.yb = self.f(self.learn.xb[0], self.learn.yb[0])


Pair = collections.namedtuple('Pair', 'a b')


class Thing: pass


class Nested(nn.Module):
    "Uses a dict with a named tuple inside, names, a number and None, and checks that they belong to the same rows."
    def __init__(self):
        super().__init__()
        self.net, self.sizes = mlp(), []
    def forward(self, d, names, k, none):
        x = d['pair'].a
        assert isinstance(d['pair'], Pair) and none is None and k == 2.
        assert type(names) is list and type(d['more']) is list
        assert len(x) == len(d['pair'].b) == len(names) == len(d['more'][0]) == len(d['more'][1][0])
        assert [str(float(v)) for v in x[:, 0]] == names and torch.equal(x, d['pair'].b)
        assert np.array_equal(d['more'][0], x.detach().numpy())
        self.sizes.append(len(x))
        return self.net(x) * (k / 2)


@pytest.mark.parametrize('rows', [2, 3, 4])
@pytest.mark.parametrize('make,named', [(lambda x, y: ((x, Thing()), (y,)), 'Thing'),
                                        (lambda x, y: ((x, x[:1]), (y,)), r'\(1, 5\)'),
                                        (lambda x, y: ((x, Thing()), (y, y)), 'Thing')], ids=['object', 'rows', 'two'])
def test_a_batch_with_as_many_parts_as_rows_is_not_cut_between_its_parts(rows, make, named):
    model, calls = mlp(), []
    model.register_forward_pre_hook(lambda m, a: calls.append(1))
    with pytest.raises(ValueError, match=named): learner(model, batches(bs=rows), [Give(make), MSAM(2)]).fit(1)
    assert not calls


def test_nested_batches():
    bs = batches(bs=7)
    model, ref, opt = twins(mlp)
    net = Nested()
    net.net = model
    def give(x, y):
        d = dict(pair=Pair(x, x.clone()), more=[x.numpy().copy(), (y,)])
        return (d, [str(float(v)) for v in x[:, 0]], 2., None), ((y,),)
    learner(net, bs, [Give(give), MSAM(3, .3)], loss_func=lambda p, y: CE(p, y[0]), opt_func=sgd).fit(2)
    msam_train(ref, bs, CE, opt, 3, .3, epochs=2)
    assert_close(model, ref)
    assert net.sizes[:6] == [3, 3, 2, 2, 2, 2]


@pytest.mark.parametrize('make,named', [(lambda x, y: ((x, Thing()), (y,)), 'Thing'),
                                        (lambda x, y: ((x, x[:3]), (y,)), r'\(3, 5\)'),
                                        (lambda x, y: ((dict(img=x, box=x[:2]),), (y,)), r"'box'"),
                                        (lambda x, y: ((x, ['a', 'b']), (y,)), 'str'),
                                        (lambda x, y: ((x, 'abcdef'), (y,)), 'str'),
                                        (lambda x, y: ((x,), (y, y[:1])), r'\(1,\)')],
                         ids=['object', 'rows', 'dict', 'strings', 'string', 'target'])
def test_batches_that_cannot_be_cut(make, named):
    "The message names the part; no weight has moved, and the learner has its batch."
    model = mlp()
    before, calls = snapshot(model), []
    model.register_forward_pre_hook(lambda m, a: calls.append(1))
    learn = learner(model, batches(), [Give(make), MSAM(2)])
    with pytest.raises(ValueError, match=named) as e: learn.fit(1)
    assert re.search(r'batch\[', str(e.value)) and 'rows' in str(e.value)
    assert_same(before, snapshot(model))
    assert not calls and all(p.grad is None for p in model.parameters())


def test_shards_of_what_one_meets_in_batches():
    x, y = torch.arange(10.).view(5, 2), torch.arange(5)
    a, b = shards((x, y), 2)
    assert type(a) is tuple and torch.equal(a[0], x[:3]) and torch.equal(b[1], y[3:])
    a, b = shards(L(x, y), 2)
    assert isinstance(a, L) and torch.equal(b[0], x[3:])
    a, b = shards({'x': x, 'n': None, 'k': 3, 's': list('abcde'), 't': tuple('abcde'), 'z': torch.tensor(7)}, 2)
    assert list(a) == list('xnkstz') and a['n'] is None and b['k'] == 3 and b['z'] == 7
    assert b['s'] == ['d', 'e'] and a['t'] == tuple('abc')
    a, b = shards(Pair(x, [y, (y,)]), 2)
    assert type(a) is Pair and torch.equal(b.b[1][0], y[3:])
    a, b = shards(collections.OrderedDict(x=x), 2)
    assert type(a) is collections.OrderedDict
    assert [len(s) for s in shards(x.numpy(), 5)] == [1] * 5
    assert type(shards(TensorBase(x), 2)[0]) is TensorBase
    assert {s.untyped_storage().data_ptr() for s in shards(x, 2)} == {x.untyped_storage().data_ptr()}  # no copies
    assert [len(s) for s in shards(list('abcde'), 2, rows=5)] == [3, 2]


@pytest.mark.parametrize('batch', [(None, torch.zeros(5, 2)), (3., torch.zeros(5, 2)),
                                   [list('abcde'), torch.zeros(5, 2)], {'k': None, 'x': torch.zeros(5, 2)}],
                         ids=['None', 'number', 'strings', 'dict'])
def test_rows_are_those_of_the_first_tensor_wherever_it_is(batch):
    a, b = shards(batch, 2)
    part = (lambda s: s['x']) if isinstance(batch, dict) else (lambda s: s[1])
    assert len(part(a)) == 3 and len(part(b)) == 2


def test_too_many_shards_names_both_numbers():
    with pytest.raises(ValueError, match=r'n=6\b.*\b5\b'): shards(torch.zeros(5, 2), 6)
    with pytest.raises(ValueError, match=r'n=1\b.*\b0\b'): shards(torch.zeros(0, 2), 1)


# 10. All shards at once -------------------------------------------------------------------------------------------

def both(n, make=mlp, bs=None, cbs=(), opt_func=sgd, tol=(1e-9, 1e-11), prepare=lambda l: l, loss_func=None, **kw):
    "The weights of vmap=True and vmap=False; which of the two ran is seen by the model's forwards."
    ends, bs = [], batches(bs=4 * n) if bs is None else bs
    for vmap in (False, True):
        rec, rows, model = Record(), [], make()
        model.register_forward_pre_hook(lambda m, a: rows.append(len(a[0])) if m.training else None)
        cb = MSAM(n, vmap=vmap, **{'rho': .3, **kw})
        split = dict(splitter=halves) if isinstance(model, nn.Sequential) else {}
        learn = learner(model, bs, [Seed(9), *[c() for c in cbs], cb, rec], opt_func=opt_func, loss_func=loss_func,
                        **split)
        prepare(learn).fit(2)
        ends.append((model, cb.gaps, rec, rows))
    (a, g, r, loop), (b, h, s, once) = ends
    assert_close(b, a, *tol)
    np.testing.assert_allclose(h, g, rtol=max(1e-7, tol[0]), atol=max(1e-9, tol[1]))
    np.testing.assert_allclose(s.clean, r.clean, rtol=max(1e-9, tol[0]))
    for p, q in zip(r.preds, s.preds): torch.testing.assert_close(q, p, rtol=max(1e-9, tol[0]), atol=max(1e-9, tol[1]))
    assert len(loop) == 2 * n * len(g) and len(once) == 3 * len(g), 'vmap=True: the first shard, then twice all'
    assert apart(a, make()) > 1e-2
    return ends


def gn(n): return nn.GroupNorm(1, n)


@pytest.mark.parametrize('kw', [dict(), dict(adaptive=True), dict(p=math.inf), dict(p=1.), dict(p=3.),
                                dict(params=lambda m: m[0].parameters(), rho=1.),
                                dict(params=lambda m: [m[0].bias, m[-1].weight], rho=1.),
                                dict(opt_func=partial(Adam, wd=.1)),
                                dict(make=partial(mlp, norm=gn)), dict(make=partial(mlp, norm=nn.LayerNorm)),
                                dict(make=Tied),
                                dict(make=partial(mlp, norm=norms['bn_plain'])),
                                dict(prepare=lambda l: l.freeze() or l), dict(cbs=[partial(GradientAccumulation, 20)]),
                                dict(cbs=[partial(GradientClip, .1)]),
                                dict(loss_func=nn.CrossEntropyLoss(reduction='sum')),
                                dict(loss_func=nn.CrossEntropyLoss(label_smoothing=.1))],
                         ids=['momentum', 'adaptive', 'inf', '1', '3', 'params', 'two tensors', 'adam', 'group norm',
                              'layer norm', 'tied', 'bn without stats',
                              'frozen', 'acc', 'clip', 'sum', 'smoothing'])
@pytest.mark.parametrize('n', [2, 4])
def test_vmap_gives_the_same_weights(n, kw): both(n, **kw)


@pytest.mark.parametrize('Mix', [MixUp, CutMix])
def test_vmap_with_mixup(Mix):
    both(2, picture_net, batches(bs=8, dtype=f32, shape=(1, 6, 6)), [partial(Mix, .7)],
         tol=(1e-4, 1e-6), loss_func=CrossEntropyLossFlat())


def test_vmap_with_class_weights():
    "A mean that is not over the rows: the loop takes it per shard, one call for all shards cannot, so it refuses."
    weight = torch.tensor([1., 5., .2], dtype=f64)
    for loss_func in (nn.CrossEntropyLoss(weight=weight), CrossEntropyLossFlat(weight=weight)):
        learn = learner(mlp(), batches(), MSAM(2, vmap=True), loss_func=loss_func)
        with pytest.raises(ValueError, match='vmap=True .* class weights'): learn.fit(1)
    learner(mlp(), batches(), MSAM(2), loss_func=nn.CrossEntropyLoss(weight=weight)).fit(1)


def test_vmap_with_loss_scaling():
    both(2, partial(mlp, f32), batches(bs=8, dtype=f32), [CPUMixedPrecision], tol=(1e-4, 1e-6))


def test_vmap_under_autocast():
    both(2, partial(mlp, f32), batches(bs=8, dtype=f32), [partial(CPUMixedPrecision, torch.bfloat16, False)],
         tol=(2e-2, 2e-2))


def test_vmap_is_msam(): compare(MSAM(3, .3, vmap=True), 3, bs=batches(bs=6))


def test_vmap_of_an_unequal_batch_is_the_loop():
    seen, model = [], mlp()
    model.register_forward_pre_hook(lambda m, a: seen.append(len(a[0])) if m.training else None)
    learner(model, batches(1, 7), MSAM(3, .3, vmap=True)).fit(1)
    assert seen == [3, 3, 2, 2, 2, 2]
    compare(MSAM(3, .3, vmap=True), 3, bs=batches(bs=7))


def test_vmap_dropout():
    "The masks of both passes are the same, and every shard has its own: here the shards are alike."
    same = [(x[:1].repeat(8, 1), y[:1].repeat(8)) for x, y in batches(bs=8)]
    for same_rng in (True, False):
        cb, rec = MSAM(4, 0., vmap=True, same_rng=same_rng), Record()
        learner(mlp(drop=.5), same, [cb, rec]).fit(1)
        assert (cb.gaps == [0.] * 4) is same_rng
        assert all(len(p.unique(dim=0)) > 2 for p in rec.preds)
        shards_ = rec.preds[0].view(4, 2, 3)
        assert not any(torch.equal(shards_[i], shards_[j]) for i in range(4) for j in range(i))


def test_vmap_leaves_the_random_stream_where_the_clean_pass_left_it():
    "Pass 2 does not move it: batches after each other get fresh masks."
    rec = Record()
    (x, y), = batches(1, 8)
    learner(mlp(drop=.5), [(x, y)] * 3, [MSAM(4, .3, vmap=True), rec], lr=0.).fit(1)
    assert not torch.equal(rec.preds[0], rec.preds[1]) and not torch.equal(rec.preds[1], rec.preds[2])


class Vmaps(Callback):
    "What a step of vmap=True does to the weights before the optimizer."
    order, run_valid = -30, False
    def __init__(self): self.seen = []
    def state(self): return [(p._version, p.data_ptr(), p.detach().clone()) for p in self.model.parameters()]
    def before_batch(self): self.start = self.state()
    def before_step(self):
        now = self.state()
        self.seen.append(all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(self.start, now)))


def test_vmap_moves_no_weight():
    for vmap, want in ((True, True), (False, False)):                        # the loop does move them: the spy sees it
        spy = Vmaps()
        learner(mlp(), batches(bs=8), [spy, MSAM(4, .3, vmap=vmap)]).fit(1)
        assert spy.seen == [want] * 4


@pytest.mark.parametrize('make,named', [(partial(mlp, f32, nn.BatchNorm1d), 'BatchNorm1d'), (Stateful, 'Stateful'),
                                        (partial(mlp, f32, partial(nn.InstanceNorm1d, track_running_stats=True)),
                                         'InstanceNorm1d')])
def test_vmap_is_refused_where_it_would_differ(make, named):
    model = make()
    before, calls = snapshot(model), []
    model.register_forward_pre_hook(lambda m, a: calls.append(1))
    learn = learner(model, batches(dtype=f32), MSAM(2, vmap=True))
    with pytest.raises(ValueError, match=f'vmap=True.*{named}.*vmap=False'): learn.fit(1)
    assert not calls
    assert_same(before, snapshot(model))


def test_vmap_with_batch_norm_in_eval_mode():
    "Frozen statistics are no obstacle."
    class Eval(Callback):
        order = MSAM.order - 1
        def before_train(self): self.model[1].eval()
    both(2, partial(mlp, norm=nn.BatchNorm1d), cbs=[Eval])


# 11. Interrupts ---------------------------------------------------------------------------------------------------

PASSES = range(1, 7)                                                         # three shards, clean and perturbed
INSIDE = [(place, n) for place in ('forward', 'after_pred', 'after_loss', 'before_backward', 'backward')
          for n in PASSES]
AFTER = [('before_batch', 0), ('before_step', 6), ('after_step', 6), ('after_batch', 6)]


@pytest.mark.parametrize('place,n,error', [(*p, e) for p in INSIDE + AFTER
                                           for e in (RuntimeError, KeyboardInterrupt, CancelBatchException)]
                         + [(*p, CancelFitException) for p in INSIDE[3::6] + AFTER])
def test_interrupts(place, n, error):
    "At every event of every pass: weights as after the last optimizer step, statistics finite, the next fit is normal."
    for order in (LOW, HIGH):
        if order == HIGH and (place in ('forward', 'backward') or place == 'before_backward' and n % 2): continue
        learn, net, plan, begin, history, out = scenario(place, n, error, order, [MSAM(3, .3)])
        assert plan.fired and not begin.wrong
        assert same_bits(params_of(net), history[-1])
        assert (len(history), type(out)) == plain(place, error, order, False)
        ended = out is not None or error is CancelFitException
        assert int(net.bn.num_batches_tracked) == 3 * (2 if ended else 7) + (n + 1) // 2
        # the interrupted batch's clean passes are in the statistics, its perturbed ones are not
        assert all(torch.isfinite(b).all() for b in net.buffers())
        plan.armed, steps = False, len(history)
        learn.fit(1)
        assert len(history) == steps + 4 and not begin.wrong and same_bits(params_of(net), history[-1])
        assert not same_bits(history[-1], history[-5]) and len(learn.msam.gaps) == 4
        assert learn.msam._whole is None and learn.msam.rewind is None


class At(Callback):
    "Raises once, in the k-th call of an event."
    run_valid = False
    def __init__(self, event, k, error, order=3):
        self.k, self.error, self.order, self.calls = k, error, order, 0
        setattr(self, event, self.go)
    def go(self):
        self.calls += 1
        if self.calls == self.k: raise self.error('on purpose')


@pytest.mark.parametrize('acc', [None, 21])
@pytest.mark.parametrize('shard_pass', [1, 2, 3, 4, 6])
def test_a_cancelled_batch_leaves_no_gradient_behind(shard_pass, acc):
    "What a cancelled batch has added to .grad so far must not be in the next step; with SAM it is not."
    bs = batches(6, bs=7)
    model, ref, opt = twins(mlp)
    cbs = [At('after_loss', 6 + shard_pass, CancelBatchException), MSAM(3, .3)]
    if acc: cbs.append(GradientAccumulation(acc))
    learner(model, bs, cbs, opt_func=sgd).fit(1)
    msam_train(ref, bs, CE, opt, 3, .3, drop={1}, n_acc=acc)
    assert_close(model, ref)


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, CancelFitException])
def test_the_fit_after_an_interrupted_one_starts_with_its_own_gradient(error):
    "Stopped in the second pass of the second shard, as by the stop button; the cell is run again."
    bs = batches(bs=7)
    model, ref, opt = twins(mlp)
    learn = learner(model, bs, [At('after_loss', 6 + 4, error), MSAM(3, .3)], opt_func=sgd)
    try: learn.fit(1)
    except error: pass
    learn.fit(1)
    msam_train(ref, bs[:1], CE, opt, 3, .3)
    msam_train(ref, bs, CE, opt, 3, .3)
    assert_close(model, ref)


@pytest.mark.parametrize('k', [7, 8, 9, 10, 12])
@pytest.mark.parametrize('error', [RuntimeError, CancelBatchException])
def test_mixup_and_batch_are_whole_after_an_interrupted_shard(error, k):
    "In the second batch; the first pass of the first shard (k = 7) is fastai's own."
    whole, sizes = Mixture(7), []
    class See(Callback):
        order, run_valid = 20, False
        def after_batch(self): sizes.append((len(self.xb[0]), len(self.yb[0])))
    cbs = [Seed(3), MixUp(.4), whole, See(), At('after_loss', k, error), MSAM(3, .3)]
    learn = learner(mlp(f32), batches(bs=7, dtype=f32), cbs, loss_func=CrossEntropyLossFlat())
    try: learn.fit(1)
    except error: pass
    if error is RuntimeError and k == 7: return                              # after_batch is not called then
    if k > 7: assert {len(t) for s in whole.seen for t in s} == {7}          # else put back in MSAM's after_batch
    assert set(sizes) == {(7, 7)}
    assert [len(learn.mix_up.lam), len(learn.mix_up.yb1[0])] == [7, 7]


def test_an_interrupted_fit_leaves_no_batch_for_the_next():
    "If another callback cancels the next fit's first batch before MSAM has seen it, that batch stays the learner's."
    seen = []
    class Stop(Callback):
        order, run_valid = -10, False
        def before_batch(self): raise CancelBatchException
    class See(Callback):
        order, run_valid = 20, False
        def after_batch(self): seen.append(len(self.xb[0]))
    learn = learner(mlp(), batches(2, 7), [At('after_loss', 4, KeyboardInterrupt), MSAM(3, .3), See()])
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    learn.add_cb(Stop())
    learn.dls.train = loader(batches(2, 5))
    learn.fit(1)
    assert seen == [5, 5]


def test_vmap_interrupted():
    "No weight is moved, so none has to be put back; the next fit is normal."
    for error in (RuntimeError, KeyboardInterrupt, CancelBatchException):
        for k in (4, 5, 6):
            bs = batches(bs=6)
            model, ref, opt = twins(mlp)
            learn = learner(model, bs, [At('after_loss', k, error), MSAM(3, .3, vmap=True)], opt_func=sgd)
            try: learn.fit(1)
            except error: pass
            msam_train(ref, bs[:1] if error is not CancelBatchException else bs, CE, opt, 3, .3, drop={1})
            assert_close(model, ref)
            learn.fit(1)
            msam_train(ref, bs, CE, opt, 3, .3)
            assert_close(model, ref)


# 12. Properties of `shards` ---------------------------------------------------------------------------------------

def leaves(rows):
    "Things with one entry per row, and things that go to every shard."
    shape = st.lists(st.integers(0, 3), max_size=2)
    tensor = shape.map(lambda s: torch.arange(rows * math.prod(s)).view(rows, *s))
    words = st.just([f'row {i}' for i in range(rows)])
    array = shape.map(lambda s: np.arange(rows * math.prod(s)).reshape(rows, *s))
    return st.one_of(tensor, array, words, words.map(tuple), st.none(), st.just(2.5), st.just(torch.tensor(3)),
                     st.just(np.float32(1)))


def trees(rows):
    def grow(inner):
        some = st.lists(inner, min_size=1, max_size=3)
        return st.one_of(some, some.map(tuple), st.dictionaries(st.sampled_from('abc'), inner, min_size=1),
                         st.tuples(inner, inner).map(lambda t: Pair(*t)))
    return st.recursive(leaves(rows), grow, max_leaves=6)


def join(parts, like):
    "Put shards together again."
    if isinstance(like, torch.Tensor) and like.ndim: return torch.cat(parts)
    if isinstance(like, np.ndarray) and like.ndim: return np.concatenate(parts)
    if isinstance(like, dict): return {k: join([p[k] for p in parts], v) for k, v in like.items()}
    if isinstance(like, (list, tuple)):
        if all(isinstance(v, str) for v in like): return sum(parts[1:], parts[0])
        out = [join([p[i] for p in parts], v) for i, v in enumerate(like)]
        return type(like)(*out) if hasattr(like, '_fields') else type(like)(out)
    assert all(p is like for p in parts)
    return like


def equal(a, b):
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return type(a) is type(b) and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict): return type(a) is type(b) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return a is b or a == b


def rows_of(x):
    "The numbers of rows of everything in a shard that has rows."
    if isinstance(x, (torch.Tensor, np.ndarray)): return {len(x)} if x.ndim else set()
    if isinstance(x, dict): x = list(x.values())
    if isinstance(x, (list, tuple)):
        return {len(x)} if x and all(isinstance(v, str) for v in x) else set().union(*map(rows_of, x))
    return set()


@given(st.data(), st.integers(1, 12))
def test_shards_put_together_are_the_batch(data, rows):
    batch, n = data.draw(trees(rows)), data.draw(st.integers(1, rows))
    parts = shards(batch, n, rows)
    assert len(parts) == n and equal(join(parts, batch), batch)
    sizes = even(rows, n)
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
    for p, s in zip(parts, sizes): assert rows_of(p) <= {s}


@given(st.integers(1, 40), st.data())
def test_rows_are_counted_from_the_first_tensor(rows, data):
    n, x = data.draw(st.integers(1, rows)), torch.arange(rows)
    for batch in (x, (x, None), [x, x[:, None]], {'x': x}, ((x,), 3)):
        assert [rows_of(p) for p in shards(batch, n)] == [{s} for s in even(rows, n)]
    for bad in (rows + 1, 2 * rows + 1):
        with pytest.raises(ValueError, match=rf'n={bad}\b.*\b{rows}\b'): shards(x, bad)
