"""Sparse SAM against a loop written from its definition; each fault of the published code as a test that sees it."""
import random
import weakref
from functools import partial
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.utils.data as tud
from conftest import CPUMixedPrecision, assert_close, assert_same, batches, learner, mlp, same_bits, snapshot
from fastai.basics import SGD, Callback, DataLoaders
from fastai.callback.training import GradientAccumulation
from hypothesis import assume, example, given, strategies as st
from processes import in_processes
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel as DDP

from sam_explained.core import ascent, grad_norm
from sam_explained.sam import SAM
from sam_explained.ssam import (SSAM, DSTMask, FisherMask, MagnitudeMask, Mask, RandomMask, TopGradMask, fisher,
                                moved_mask, top_mask)

CE, f32, f64 = nn.CrossEntropyLoss(), torch.float32, torch.float64
sgd = partial(SGD, mom=.9)


class Fixed(Mask):
    "Masks that are given"
    def __init__(self, masks): super().__init__(); self.given = masks
    def masks(self, ssam, weights, old=None): return [m.clone() for m in self.given]


def at(epoch, n_epoch=1):
    "As much of the callback as masks without data look at."
    return SimpleNamespace(epoch=epoch, n_epoch=n_epoch, implicit=False)


def half(model, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [torch.rand(w.shape, generator=gen) < .5 for w in model.parameters()]


def ssam_train(model, data, masks, rho, renorm=False, epochs=1, n_acc=None, lr=.1):
    "The definition, functional: no weight is moved; the gradient of all weights at the masked perturbation."
    names = [k for k, _ in model.named_parameters()]
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=.9)
    masks, count = [m.double() for m in masks], 0
    for _ in range(epochs):
        for x, y in data:
            g = torch.autograd.grad(CE(model(x), y), list(model.parameters()))
            buffers = {k: b.clone() for k, b in model.named_buffers()}
            g = [t.double() for t in g]
            seen = [m * t for m, t in zip(masks, g)] if renorm else g
            norm = np.sqrt(sum(float((t ** 2).sum()) for t in seen))
            at = [(w.detach() + (rho / norm * m * t).to(w.dtype)).requires_grad_()
                  for w, m, t in zip(model.parameters(), masks, g)]
            loss = CE(functional_call(model, {**dict(zip(names, at)), **buffers}, (x,)), y)
            share = len(y) / n_acc if n_acc else 1.
            for w, d in zip(model.parameters(), torch.autograd.grad(loss, at)):
                w.grad = share * d if w.grad is None else w.grad + share * d
            count += len(y)
            if n_acc and count < n_acc: continue
            count = 0
            opt.step()
            opt.zero_grad()


class Tied(nn.Module):
    "Two layers with one weight."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(5, 5).double(), nn.Linear(5, 5).double(), nn.Linear(5, 3).double()
        self.b.weight = self.a.weight
    def forward(self, x): return self.c(self.b(self.a(x).tanh()).tanh())


@pytest.mark.parametrize('renorm', [False, True])
@pytest.mark.parametrize('make', [mlp, partial(mlp, norm=nn.BatchNorm1d), Tied])
def test_the_definition(renorm, make):
    model, ref = make(), make()
    masks = half(model)
    learner(model, batches(), SSAM(Fixed(masks), .3, renorm), opt_func=sgd).fit(2)
    ssam_train(ref, batches(), masks, .3, renorm, epochs=2)
    assert_close(model, ref)
    other = make()
    ssam_train(other, batches(), masks, .3, not renorm, epochs=2)
    assert max((a - b).abs().max() for a, b in zip(model.parameters(), other.parameters())) > 1e-4


def test_accumulation():
    model, ref = mlp(), mlp()
    masks = half(model)
    learner(model, batches(), [SSAM(Fixed(masks), .3), GradientAccumulation(12)], opt_func=sgd).fit(1)
    ssam_train(ref, batches(), masks, .3, n_acc=12)
    assert_close(model, ref)


def test_loss_scaling():
    model, ref = mlp(f32), mlp(f32)
    masks = half(model)
    learner(model, batches(dtype=f32), [SSAM(Fixed(masks), .3), CPUMixedPrecision()], opt_func=sgd).fit(1)
    ssam_train(ref, batches(dtype=f32), masks, .3)
    assert_close(model, ref, 1e-4, 1e-6)


@pytest.mark.parametrize('renorm', [False, True])
def test_everything_masked_is_sgd_and_nothing_masked_is_sam(renorm):
    def end(*cbs):
        model = mlp()
        learner(model, batches(), cbs, opt_func=sgd).fit(2)
        return snapshot(model)
    ws = list(mlp().parameters())
    assert_same(end(SSAM(Fixed([torch.zeros_like(w, dtype=torch.bool) for w in ws]), .3, renorm)), end())
    sam = end(SAM(.3))
    assert_same(end(SSAM(Fixed([torch.ones_like(w, dtype=torch.bool) for w in ws]), .3, renorm)), sam)
    for mask in (FisherMask(0.), DSTMask(0., every=1), RandomMask(0., pattern='channel'), MagnitudeMask(pattern='4:4')):
        assert_same(end(SSAM(mask, .3, renorm)), sam, type(mask).__name__)


@pytest.mark.parametrize('renorm', [False, True])
def test_without_a_step_the_weights_stay_to_the_last_bit(renorm):
    "`w + eps - eps`, as in the published code, does not: these weights and perturbations are of very different sizes."
    model = mlp(f32)
    with torch.no_grad():
        for w in model.parameters(): w.mul_(torch.logspace(-4, 4, w.numel()).view_as(w))
    before = snapshot(model)
    learner(model, batches(dtype=f32), SSAM(RandomMask(.5), .3, renorm), opt_func=sgd, lr=0.).fit(2)
    assert_same(before, snapshot(model))
    eps = ascent([torch.randn(w.shape) for w in model.parameters()], .3)
    assert not same_bits([w + e - e for w, e in zip(before.values(), eps)], list(before.values()))


grads = st.lists(st.floats(-5, 5), min_size=2, max_size=12).filter(lambda g: max(map(abs, g)) > .1)


@given(grads, st.integers(0, 2**30))
def test_length_of_the_perturbation_and_rise_of_the_loss(g, seed):
    "rho r and rho |g| r^2; with `renorm` rho and rho |g| r. And what a quadratic rises by, in closed form."
    gen, rho = torch.Generator().manual_seed(seed), .7
    g = torch.tensor(g, dtype=f64)
    m = torch.rand(len(g), generator=gen) < .6
    r = float((g * m).norm() / g.norm())
    assume(r > 1e-3)
    A = torch.randn(len(g), len(g), generator=gen, dtype=f64)
    A, w = A @ A.T + torch.eye(len(g)), torch.randn(len(g), generator=gen, dtype=f64)
    def loss(v): return float(.5 * v @ A @ v + (g - A @ w) @ v)                        # its gradient at w is g
    for renorm, length, rise in ((False, rho * r, rho * g.norm() * r**2), (True, rho, rho * g.norm() * r)):
        eps, = ascent([g], rho, masks=[m], renorm=renorm)
        np.testing.assert_allclose([eps.norm(), g @ eps], [length, rise], rtol=1e-9)
        assert (eps[~m] == 0).all()
        direction = (g * m) / (g * m).norm() if renorm else g * m / g.norm()
        np.testing.assert_allclose(loss(w + eps) - loss(w), rise + .5 * rho**2 * direction @ A @ direction, rtol=1e-7,
                                   atol=1e-9 * (1 + abs(loss(w))))


@pytest.mark.parametrize('s', [.5, .9])
def test_a_random_mask_leaves_one_minus_s_of_the_squared_length(s):
    "On average over draws, also for a very uneven gradient; four standard errors."
    g = [torch.logspace(-3, 3, 60, dtype=f64).view(6, 10), torch.ones(40, dtype=f64)]
    masks = [RandomMask(s, seed=i).masks(at(0), g) for i in range(600)]
    kept = torch.stack([grad_norm(ascent(g, 1., masks=m))**2 for m in masks])
    assert abs(kept.mean() - (1 - s)) < 4 * kept.std() / len(kept)**.5 < .1


@pytest.mark.parametrize('renorm', [False, True])
@pytest.mark.parametrize('kind', ['all', 'none', 'random', 'Fisher'])
def test_the_bound_of_the_page_holds_for_any_mask(kind, renorm):
    "Mean squared gradient along f = sum(1 - cos w), L = 1, with noise; step and radius shrink like 1/sqrt(t)."
    d, steps, eta, rho, sigma, gen = 20, 400, .25, .5, 1., torch.Generator().manual_seed(0)
    w = 3 * torch.rand(d, generator=gen, dtype=f64)
    start, squares, score = (1 - w.cos()).sum(), 0., torch.zeros(d, dtype=f64)
    for t in range(1, steps + 1):
        noise = sigma / d**.5 * torch.randn(d, generator=gen, dtype=f64)
        g = w.sin() + noise
        squares, score = squares + float((w.sin()**2).sum()), score + g**2
        mask = {'all': torch.ones(d), 'none': torch.zeros(d), 'random': torch.rand(d, generator=gen) < .3,
                'Fisher': top_mask([score], .9)[0]}[kind]
        eps, = ascent([g], rho / t**.5, masks=[mask], renorm=renorm)
        assert eps.norm() <= rho / t**.5 * (1 + 1e-12), 'all that the proof needs'
        w = w - eta / t**.5 * ((w + eps).sin() + noise)
    constant = 4 * start / eta + 2 * 2.6124 * rho**2 + 2 * np.pi**2 / 3 * eta * rho**2 + 4 * eta * sigma**2
    assert squares / steps <= (constant + 4 * eta * sigma**2 * np.log(steps)) / steps**.5


# Masks -----------------------------------------------------------------------------------------------------------

shapes = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4)
shares, seeds = st.integers(0, 99).map(lambda i: i / 100), st.integers(0, 2**30)
with_and_without_ties = pytest.mark.parametrize('ties', [True, False])


def scores_of(shapes, seed, ties):
    "Few different values, so that many are equal, or all different; whole numbers, whose means have no rounding error."
    gen = torch.Generator().manual_seed(seed)
    total = sum(int(np.prod(sh)) for sh in shapes)
    values = torch.randint(0, 3, (total,), generator=gen) if ties else torch.randperm(total, generator=gen)
    return [v.view(sh).double() for v, sh in zip(values.split([int(np.prod(sh)) for sh in shapes]), shapes)]


@with_and_without_ties
@given(shapes=shapes, s=shares, seed=seeds)
@example(shapes=[[6, 6]], s=.999, seed=0)
def test_density_of_the_unstructured_mask(shapes, s, seed, ties):
    scores = scores_of(shapes, seed, ties)
    masks, total = top_mask(scores, s), sum(x.numel() for x in scores)
    kept = sum(int(m.sum()) for m in masks)
    assert kept == round((1 - s) * total)
    assert all(m.dtype == torch.bool and m.shape == x.shape for m, x in zip(masks, scores))
    if 0 < kept < total:
        low = min(float(x[m].min()) for x, m in zip(scores, masks) if m.any())
        high = max(float(x[~m].max()) for x, m in zip(scores, masks) if not m.all())
        assert low >= high


@with_and_without_ties
@given(shapes=shapes, s=st.tuples(shares, shares), seed=seeds)
def test_masks_nest_and_only_the_order_of_the_scores_counts(shapes, s, seed, ties):
    scores = scores_of(shapes, seed, ties)
    small, large = (top_mask(scores, x) for x in sorted(s, reverse=True))
    assert all((b | ~a).all() for a, b in zip(small, large))
    again = top_mask([8 * x - 3 for x in scores], max(s))
    assert all(torch.equal(a, b) for a, b in zip(small, again))


@pytest.mark.parametrize('pattern', ['channel', 'tensor'])
@with_and_without_ties
@given(shapes=shapes, s=shares, seed=seeds)
def test_whole_units_by_mean_score_until_there_are_enough(shapes, s, seed, ties, pattern):
    scores = scores_of(shapes, seed, ties)
    units = [(i, j) for i, x in enumerate(scores) for j in range(len(x) if pattern == 'channel' else 1)]
    part = lambda i, j: scores[i][j] if pattern == 'channel' else scores[i]
    want = [torch.zeros_like(x, dtype=torch.bool) for x in scores]
    target = round((1 - s) * sum(x.numel() for x in scores))
    for i, j in sorted(units, key=lambda u: -part(*u).mean()):                        # a stable sort: ties by position
        if sum(int(m.sum()) for m in want) >= target: break
        want[i][j if pattern == 'channel' else slice(None)] = True
    assert all(torch.equal(a, b) for a, b in zip(top_mask(scores, s, pattern), want))


@given(shares, st.floats(0, 1), seeds)
@example(.2, .5, 0)
def test_moving_never_changes_the_density(s, share, seed):
    "Fault 5 of the published code: with s=.2, alpha=.5 its density falls from .8 to .6."
    gen = torch.Generator().manual_seed(seed)
    shapes = [(7, 5), (11,)]
    masks = top_mask([torch.rand(sh, generator=gen) for sh in shapes], s)
    for _ in range(3):
        grads = [torch.randn(sh, generator=gen) for sh in shapes]
        new = moved_mask(masks, grads, share, gen)
        a, b, g = (torch.cat([m.flatten() for m in ms]) for ms in (masks, new, grads))
        assert a.sum() == b.sum() and all(m.dtype == torch.bool for m in new)
        n = min(int(share * int(a.sum())), int((~a).sum()))
        assert int((a ^ b).sum()) == 2 * n
        if 0 < n < int(a.sum()): assert g[a & ~b].abs().max() < g[a & b].abs().min(), 'dropped are the flattest'
        masks = new


class Moved(DSTMask):
    "Its gradients are drawn."
    def scores(self, ssam, weights): return [torch.randn(w.shape, generator=self.generator(ssam)) for w in weights]


@given(shares, st.floats(0, 1), st.integers(1, 12), st.integers(1, 4), st.integers(0, 99))
@example(.2, .5, 10, 1, 0)
@example(0., 1., 3, 1, 0)
def test_density_of_the_dynamic_mask_over_a_training(s, drop, epochs, every, seed):
    "Fault 5 again, with the schedule: its worst cases end in a mask with a 2 in it."
    mask, ws, old = Moved(s, drop, every, seed=seed), [torch.zeros(7, 5), torch.zeros(11)], None
    for epoch in range(0, epochs, every):
        old = mask.masks(at(epoch, epochs), ws, old)
        assert sum(int(m.sum()) for m in old) == round((1 - s) * 46) and all(m.dtype == torch.bool for m in old)


def test_growth_is_uniform_and_repeatable():
    gen, grown = torch.Generator().manual_seed(0), torch.zeros(50)
    old, flat = [torch.arange(100).view(10, 10) % 2 == 0], [torch.ones(10, 10)]
    for _ in range(1000): grown += moved_mask(old, flat, .2, gen)[0].flatten()[1::2]
    assert ((grown - 200).square() / (200 * .8)).sum() < 50 + 5 * 100**.5              # about five standard deviations
    a, b, c = (moved_mask(old, flat, .2, torch.Generator().manual_seed(i))[0] for i in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize('shape', [(8, 12), (4, 8, 3, 3), (5, 4, 7)])
@pytest.mark.parametrize('n,m', [(2, 4), (1, 4), (1, 2), (4, 4)])
def test_n_of_m_along_the_inputs_and_by_score(shape, n, m):
    "Fault 13: for convolutions the published mask has nothing to do with the scores."
    torch.manual_seed(0)
    score = torch.rand(shape)
    mask, = top_mask([score], pattern=f'{n}:{m}')
    s, k = (t.movedim(1, -1).reshape(-1, shape[1] // m, m).numpy() for t in (score, mask))
    assert (k.sum(-1) == n).all()
    np.testing.assert_allclose((s * k).sum(-1), np.sort(s, -1)[..., -n:].sum(-1), rtol=1e-6)
    if n < m:
        other = mask.movedim(0, -1).reshape(-1, shape[0])
        assert shape[0] % m or (other.reshape(len(other), -1, m).sum(-1) != n).any(), 'not along the outputs'


@with_and_without_ties
@given(rows=st.integers(1, 6), inputs=st.integers(1, 11), side=st.integers(0, 2),
       nm=st.tuples(st.integers(1, 4), st.integers(0, 4)), seed=seeds)
def test_n_of_m_and_what_is_left_over(rows, inputs, side, nm, seed, ties):
    "A shorter group at the end keeps at most N too; ties by position; biases are kept whole."
    n, m = nm[0], sum(nm)
    assume(m <= inputs)
    score, bias = scores_of([(rows, inputs) + (2,) * side, (rows,)], seed, ties)
    mask, whole = top_mask([score, bias], pattern=f'{n}:{m}')
    want = np.zeros(score.shape, bool)
    for at in np.ndindex(rows, *score.shape[2:]):
        for first in range(0, inputs, m):
            group = [(at[0], j, *at[1:]) for j in range(first, min(first + m, inputs))]
            for entry in sorted(group, key=lambda e: -float(score[e]))[:n]: want[entry] = True
    assert (mask.numpy() == want).all() and whole.all() and whole.shape == bias.shape
    with pytest.raises(ValueError, match='at least'): top_mask([score], pattern=f'{n}:{inputs + 6}')


def train_of(mask, epochs=3, model=mlp, cbs=(), data=None):
    learn = learner(model(), data or batches(), [SSAM(mask, .1), *cbs], opt_func=sgd)
    learn.fit(epochs)
    return learn


def test_the_first_batch_has_a_mask():
    "Fault 1: there the mask starts at zero, so that the first batch is plain SGD."
    plain, masked = mlp(), mlp()
    learner(plain, batches(1), opt_func=sgd).fit(1)
    learner(masked, batches(1), SSAM(FisherMask(.5), .3), opt_func=sgd).fit(1)
    assert max((a - b).abs().max() for a, b in zip(plain.parameters(), masked.parameters())) > 1e-4


class Soil(Callback):
    "Something in `.grad` before the masks are made."
    order, run_valid = SAM.order - 1, False
    def before_train(self):
        gen = torch.Generator().manual_seed(0)
        self.soil = [100 * torch.randn(w.shape, generator=gen).to(w) for w in self.model.parameters()]
        for w, g in zip(self.model.parameters(), self.soil): w.grad = g.clone()
    def before_batch(self):
        if self.train_iter == 0:
            for w, g in zip(self.model.parameters(), self.soil):
                assert torch.equal(w.grad, g), 'making a mask changed .grad'
                w.grad = None


def test_fisher_does_not_depend_on_grad():
    "Fault 2: the first sample's gradient was added to what the last step had left. Fault 3: fewer than ten samples."
    for n, make in ((1, mlp), (3, mlp), (128, mlp), (3, Loopy)):
        a, b = (train_of(FisherMask(.5, n), 1, make, cbs).ssam.masks.values() for cbs in ([], [Soil()]))
        assert all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize('norm', [None, nn.BatchNorm1d, nn.LayerNorm])
def test_fisher_is_the_sum_of_squares_row_by_row(norm):
    model = mlp(norm=norm, drop=.5)
    (x, y), *_ = batches(bs=9)
    got = fisher(model, CE, (x,), (y,))
    model.eval()
    want = [torch.zeros_like(w) for w in model.parameters()]
    for i in range(9):
        found = torch.autograd.grad(CE(model(x[i:i + 1]), y[i:i + 1]), list(model.parameters()))
        for t, g in zip(want, found): t += g ** 2
    for a, b in zip(got, want): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    whole = torch.autograd.grad(CE(model(x), y), list(model.parameters()))
    assert float(sum(b.sum() for b in want) / sum((9 * g ** 2).sum() for g in whole)) > 2, 'and not the square of a sum'


def test_fisher_of_softmax_regression_in_closed_form():
    "With the labels of the data and, label by label with the model's probabilities, the true one."
    torch.manual_seed(1)
    model, (x, y) = nn.Linear(5, 3).double(), batches(1, 40)[0]
    p = model(x).softmax(1).detach()
    w, b = fisher(model, CE, (x,), (y,))
    d2 = (p - nn.functional.one_hot(y, 3))**2
    torch.testing.assert_close(w, torch.einsum('nc,nj->cj', d2, x**2), rtol=1e-12, atol=0.)
    torch.testing.assert_close(b, d2.sum(0), rtol=1e-12, atol=0.)
    true = sum(p[i, c] * fisher(model, CE, (x[i:i + 1],), (torch.tensor([c]),))[0] for i in range(40) for c in range(3))
    torch.testing.assert_close(true, torch.einsum('nc,nj->cj', p * (1 - p), x**2), rtol=1e-12, atol=0.)


def test_an_error_of_the_loss_is_its_own_error():
    "Not taken for a sign that vmap cannot run the model."
    def loss(pred, y): raise RuntimeError('of the loss')
    (x, y), *_ = batches()
    with pytest.raises(RuntimeError, match='^of the loss$'): fisher(mlp(), loss, (x,), (y,))


def test_fisher_of_shared_weights():
    model, ((x, y), *_) = Tied(), batches()
    want = [torch.zeros_like(w) for w in model.parameters()]
    for i in range(len(x)):
        found = torch.autograd.grad(CE(model(x[i:i + 1]), y[i:i + 1]), list(model.parameters()))
        for t, g in zip(want, found): t += g**2
    for a, b in zip(fisher(model, CE, (x,), (y,)), want): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


class Rows(FisherMask):
    "Keeps what it was scored by."
    seen = ()
    def scores(self, ssam, weights):
        self.seen += (super().scores(ssam, weights),)
        return self.seen[-1]


def test_a_sample_of_all_rows_or_of_more_is_the_whole_sum():
    model = mlp(norm=nn.BatchNorm1d, drop=.3)
    whole = tuple(torch.cat(ts) for ts in zip(*batches()))
    want = fisher(model, CE, whole[:1], whole[1:])
    for n in (24, 10**6):
        mask = Rows(.5, n)
        learner(model, batches(), SSAM(mask, .1), lr=0.).fit(1)
        model.load_state_dict(mlp(norm=nn.BatchNorm1d, drop=.3).state_dict())              # the running statistics
        for a, b in zip(mask.seen[0], want): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_a_sample_is_of_different_rows_and_another_in_every_epoch():
    "Row i alone has input i, so that column i of the Fisher information is zero unless i is in the sample."
    mask, data = Rows(.5, 5), list(zip(torch.eye(24).split(7), torch.randint(0, 3, (24,)).split(7)))
    learner(nn.Linear(24, 3, bias=False), data, SSAM(mask, .1)).fit(12)
    samples = [frozenset(w[0].sum(0).nonzero()[:, 0].tolist()) for w in mask.seen]
    assert {len(s) for s in samples} == {5} and len(set(samples)) > 9 and len(frozenset.union(*samples)) > 18


def test_the_top_gradients_are_those_of_the_mean_loss():
    "In eval mode, over batches of which the last is smaller."
    make, data = partial(mlp, norm=nn.BatchNorm1d, drop=.3), [(x, y) for x, y in batches(3, 7)] + batches(1, 3, seed=4)
    data[-1] = (5 * data[-1][0], data[-1][1])
    net, x, y = make().eval(), *(torch.cat(ts) for ts in zip(*data))
    g = torch.autograd.grad(CE(net(x), y), list(net.parameters()))
    flat, found = torch.cat([t.flatten().abs() for t in g]), {}
    for kind in (TopGradMask, FisherMask, RandomMask):
        learn = learner(make(), data, SSAM(kind(.7), 0.))
        learn.fit(1)
        found[kind] = torch.cat([m.flatten() for m in learn.ssam.masks.values()])
    assert torch.equal(found[TopGradMask].nonzero()[:, 0], flat.topk(int(found[TopGradMask].sum()))[1].sort()[0])
    assert all(flat[found[TopGradMask]].norm() > flat[found[k]].norm() for k in (FisherMask, RandomMask))


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6, unique_by=abs), st.integers(1, 5), st.booleans())
def test_no_mask_of_that_size_rises_more_than_the_largest_gradients(g, k, renorm):
    g = torch.tensor(g, dtype=f64)
    assume(k <= len(g) and g.abs().max() > .1)
    def rise(m): return float(g @ ascent([g], 1., masks=[m], renorm=renorm)[0])
    masks = [torch.isin(torch.arange(len(g)), torch.tensor(at)) for at in combinations(range(len(g)), k)]
    top, = top_mask([g.abs()], 1 - k / len(g))
    assert int(top.sum()) == k and rise(top) >= max(map(rise, masks)) * (1 - 1e-12)


class Loopy(nn.Module):
    "A forward that vmap cannot run."
    def __init__(self): super().__init__(); self.net = mlp()
    def forward(self, x):
        if float(x.abs().sum()) < 0: raise AssertionError
        return self.net(x)


def test_fisher_without_vmap():
    (x, y), *_ = batches()
    model = Loopy()
    for a, b in zip(fisher(model, CE, (x,), (y,)), fisher(model.net, CE, (x,), (y,))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


class Restless(nn.Module):
    "Counts its calls in a buffer, draws, and remembers: in eval mode too."
    def __init__(self):
        super().__init__()
        self.register_buffer('calls', torch.zeros(()))
        self.reset()
    def reset(self): self.last = torch.zeros(())
    def forward(self, x):
        self.calls += 1
        out = x + .1 * self.last + .01 * torch.rand_like(x)
        self.last = x.mean().detach()
        return out


@pytest.mark.parametrize('mask', [FisherMask, TopGradMask, partial(DSTMask, every=1), RandomMask, MagnitudeMask])
def test_making_a_mask_leaves_no_trace(mask):
    "Mode, buffers, hidden state, random state, the order of the batches."
    ends = []
    for cbs in ([SAM(0.)], [SSAM(mask(), 0.)]):
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        model = nn.Sequential(Restless(), *mlp(norm=nn.BatchNorm1d, drop=.3))
        learn = learner(model, batches(), cbs, opt_func=sgd)
        learn.dls.train.shuffle = True
        learn.dls.train.rng.seed(5)
        learn.dls.train.after_item = lambda item: (random.random(), np.random.rand(), torch.rand(1), item)[-1]
        learn.fit(3)
        ends.append((snapshot(model), torch.get_rng_state(), np.random.rand(), random.random()))
    assert_same(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1]) and ends[0][2:] == ends[1][2:]


@pytest.mark.parametrize('restless', [False, True], ids=['vmap', 'loop'])
def test_fisher_leaves_no_trace(restless):
    "Also of a module in eval mode among others in train mode, of draws in eval mode, and after an error."
    class Draws(nn.Module):
        def forward(self, x): return x + .01 * torch.rand_like(x)
    model, ((x, y), *_) = mlp(norm=nn.BatchNorm1d, drop=.3), batches()
    model = nn.Sequential(Restless() if restless else Draws(), *model)
    model[2].eval()
    for w in model.parameters(): w.grad = torch.full_like(w, 7.)
    def state(): return ([m.training for m in model.modules()], [w.requires_grad for w in model.parameters()],
                         [getattr(m, 'last', None) for m in model.modules()], torch.is_grad_enabled())
    before, seen, rng = state(), snapshot(model), torch.get_rng_state()
    def broken(pred, y): raise KeyError
    for f in (CE, broken):
        try: fisher(model, f, (x,), (y,))
        except KeyError: pass
        assert state() == before and torch.equal(rng, torch.get_rng_state())
        assert_same(seen, snapshot(model))
        assert all((w.grad == 7).all() for w in model.parameters())


def test_frozen_weights_and_a_subset():
    model = mlp()
    for w in model[0].parameters(): w.requires_grad_(False)
    learn = learner(model, batches(), SSAM(FisherMask(.5), .3), opt_func=sgd)
    learn.fit(2)
    assert len(learn.ssam.masks) == 2
    learn = learner(mlp(), batches(), SSAM(FisherMask(.5), .3, params=lambda m: m[-1].parameters()), opt_func=sgd)
    learn.fit(2)
    assert len(learn.ssam.masks) == 2


def test_torch_optimizers_and_checkpoints(tmp_path):
    from fastai.optimizer import OptimWrapper
    adam = partial(OptimWrapper, opt=torch.optim.Adam)
    for opt_func in (adam, sgd):
        first = learner(mlp(), batches(), SSAM(RandomMask(.5, every=4), .1), opt_func=opt_func, path=tmp_path)
        first.fit(2)
        first.save('two')
        ssam = SSAM(RandomMask(.5, every=4, seed=9), .1)
        other = learner(mlp(seed=8), batches(), ssam, opt_func=opt_func, path=tmp_path)
        other.load('two')
        other.fit(3, start_epoch=2)
        for a, b in zip(first.ssam.masks.values(), other.ssam.masks.values()): assert torch.equal(a, b)


class Note(Callback):
    "The masks and the weights before the first batch of each epoch."
    order, run_valid = SAM.order + 1, False
    def before_fit(self): self.masks, self.weights = [], []
    def before_train(self):
        self.masks.append(list(self.ssam.masks.values()))
        self.weights.append(snapshot(self.model))


def test_the_largest_weights():
    note = Note()
    train_of(MagnitudeMask(.6), 2, cbs=[note])
    w = torch.cat([w.flatten().abs() for w in note.weights[1].values()])
    mask = torch.cat([m.flatten() for m in note.masks[1]])
    assert torch.equal(mask.nonzero()[:, 0], w.topk(int(mask.sum()))[1].sort()[0])


def test_masks_are_renewed_before_every_so_many_epochs():
    note, mask = Note(), RandomMask(.5, every=2)
    train_of(mask, 5, cbs=[note])
    for epoch, found in enumerate(note.masks):
        want = mask.masks(at(epoch // 2 * 2), list(mlp().parameters()))
        assert all(torch.equal(a, b) for a, b in zip(found, want)), epoch


@pytest.mark.parametrize('s, drop', [(.2, .5), (.6, .6)])
def test_dynamic_masks_drop_the_flattest_on_a_cosine_and_grow_elsewhere(s, drop):
    "At the weights before the epoch, over all rows, in eval mode. The shares are alpha_t, e.g. alpha/2 in the middle."
    make, note, (x, y) = partial(mlp, norm=nn.BatchNorm1d, drop=.3), Note(), (torch.cat(t) for t in zip(*batches()))
    train_of(DSTMask(s, drop, every=2, n_samples=24), 8, make, [note])
    flat, model = [torch.cat([m.flatten() for m in ms]) for ms in note.masks], make().eval()
    for epoch in range(1, 8):
        old, new = flat[epoch - 1:epoch + 1]
        if epoch % 2:
            assert torch.equal(old, new)
            continue
        model.load_state_dict(note.weights[epoch])
        g = torch.cat([t.flatten() for t in torch.autograd.grad(CE(model(x), y), list(model.parameters()))]).abs()
        share = {2: drop * (1 + .5**.5) / 2, 4: drop / 2, 6: drop * (1 - .5**.5) / 2}[epoch]
        n = min(int(share * int(old.sum())), int((~old).sum()))
        dropped, grown = old & ~new, new & ~old
        assert int(dropped.sum()) == int(grown.sum()) == n > 0
        assert g[dropped].max() < g[old & new].min()


def test_a_mask_has_no_memory_and_serves_two_learners():
    mask = DSTMask(.5, every=1)
    before = dict(vars(mask))
    ends = [list(train_of(m, model=partial(mlp, seed=s)).ssam.masks.values())
            for m, s in ((mask, 1), (mask, 2), (DSTMask(.5, every=1), 2))]
    assert vars(mask) == before and all(torch.equal(a, b) for a, b in zip(ends[1], ends[2]))
    assert not all(torch.equal(a, b) for a, b in zip(*ends[:2]))


def test_a_saved_mask_of_another_shape():
    first, other = train_of(RandomMask(.5, every=2), 1), learner(mlp(n_in=4), batches(n_in=4), SSAM(RandomMask(.5), .3))
    other.create_opt()
    other.opt.load_state_dict({**other.opt.state_dict(), 'hypers': first.opt.state_dict()['hypers']})
    before = snapshot(other.model)
    with pytest.raises(ValueError, match=r'mask of 0.weight has shape \(7, 5\), the parameter \(7, 4\)'): other.fit(1)
    assert_same(before, snapshot(other.model))


# Processes ---------------------------------------------------------------------------------------------------------

def process(rank):
    "One of two processes with its own data and its own random state; what masks does it use?"
    seen = {}
    for mask in (FisherMask(.5), DSTMask(.5, every=1), RandomMask(.5, seed=rank)):
        torch.manual_seed(rank)
        learn = learner(DDP(mlp()), batches(seed=50 + rank), SSAM(mask, .1), opt_func=sgd)
        learn.fit(2)
        seen[type(mask).__name__] = [m.clone() for m in learn.ssam.masks.values()], snapshot(learn.model.module)
    return seen


def test_all_processes_use_one_mask(tmp_path):
    "Fault 9: in the published code every process draws its own."
    a, b = in_processes(process, 2, tmp_path)
    for name in a:
        assert all(torch.equal(x, y) for x, y in zip(a[name][0], b[name][0])), name
        assert_same(a[name][1], b[name][1], name)
    alone = [train_of(RandomMask(.5, seed=r), 1).ssam.masks.values() for r in (0, 1)]
    assert not all(torch.equal(x, y) for x, y in zip(*alone)), 'alone they differ'


def test_the_loop_has_the_memory_that_the_attempt_at_once_had():
    "After out-of-memory the row-by-row loop needs the room: nothing may hold on to the frames of the error."
    (x, y), *_ = batches()
    model, held = mlp(), []
    def loss(pred, y):
        if held: assert held[0]() is None, 'the activations of the failed attempt are still there'
        else:
            big = torch.zeros(10)
            held.append(weakref.ref(big))
            raise torch.OutOfMemoryError('CUDA out of memory')
        return CE(pred, y)
    for a, b in zip(fisher(model, loss, (x,), (y,)), fisher(model, CE, (x,), (y,))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)

class Pairs(tud.Dataset):
    def __init__(self): self.x, self.y = (torch.cat(ts) for ts in zip(*batches()))
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], self.y[i]


@pytest.mark.parametrize('kw', [dict(batch_size=6), dict(batch_size=6, sampler=tud.RandomSampler(range(24))),
                                dict(batch_sampler=tud.BatchSampler(range(24), 6, False)),
                                dict(batch_sampler=[list(range(9)), list(range(9, 24))])])
@pytest.mark.parametrize('mask', [FisherMask, TopGradMask])
def test_loaders_of_torch(mask, kw):
    "The same rows and masks as with a loader of fastai; and the random state of the training is the same as with SAM."
    ends = []
    for cb in (SAM(0.), SSAM(mask(.5, 9), 0.)):
        learn = learner(mlp(), batches(), cb)
        learn.dls = DataLoaders(tud.DataLoader(Pairs(), **kw), tud.DataLoader(Pairs(), 6))
        torch.manual_seed(1)
        learn.fit(2, lr=0.)
        ends.append(torch.get_rng_state())
    assert torch.equal(*ends)
    want = learner(mlp(), batches(), SSAM(mask(.5, 9), 0.))
    want.fit(2, lr=0.)
    assert all(torch.equal(a, b) for a, b in zip(learn.ssam.masks.values(), want.ssam.masks.values()))


class Stream(tud.IterableDataset):
    def __iter__(self): return iter(Pairs())
    def __len__(self): return 24


@pytest.mark.parametrize('data', [tud.DataLoader(Stream(), 6), batches()], ids=['a stream', 'a list of batches'])
def test_rows_that_cannot_be_sampled(data):
    "SAM trains with these, and so do masks that need no data; the others say what they need before anything changes."
    def fit(cb):
        learn = learner(mlp(), batches(), cb)
        learn.dls = DataLoaders(data, data)
        learn.fit(1)
    fit(SAM(.1))
    fit(SSAM(RandomMask(), .1))
    for mask in (FisherMask, TopGradMask):
        with pytest.raises(TypeError, match='rows of learn.dls.train'): fit(SSAM(mask(), .1))

@pytest.mark.parametrize('change, error, told', [
    (lambda ms: ms[:-1], ValueError, '3 masks for 4 parameters'),
    (lambda ms: ms + ms[:1], ValueError, '5 masks for 4 parameters'),
    (lambda ms: [m.flatten() for m in ms], ValueError, r'mask of 0.weight has shape \(35,\), the parameter \(7, 5\)'),
    (lambda ms: ms[:3] + [ms[3][:1]], ValueError, r'mask of 2.bias has shape \(1,\), the parameter \(3,\)'),
    (lambda ms: [m.double() / 2 for m in ms], TypeError, 'mask of 0.weight .* bool tensor, not torch.float64'),
    (lambda ms: ms[:3] + [None], TypeError, 'mask of 2.bias .* bool tensor, not NoneType')])
def test_a_mask_of_ones_own_that_does_not_fit(change, error, told):
    "Before anything changes; and a mask that fits then trains."
    class Own(Mask):
        def masks(self, ssam, weights, old=None): return change(half(ssam.model)) if self.wrong else half(ssam.model)
    mask, model = Own(), mlp()
    mask.wrong, before = True, snapshot(model)
    learn = learner(model, batches(), SSAM(mask, .3), opt_func=sgd)
    with pytest.raises(error, match=told): learn.fit(1)
    assert_same(before, snapshot(model))
    mask.wrong = False
    learn.fit(1)

def test_another_sparsity_is_not_continued():
    "In a second fit the old masks are moved on, but only if they are of the sparsity that is asked for."
    learn = train_of(DSTMask(.5, every=1), 2)
    for s in (.9, .2):
        learn.remove_cb(learn.ssam)
        learn.add_cb(SSAM(DSTMask(s, every=1), .1))
        learn.fit(2)
        assert sum(int(m.sum()) for m in learn.ssam.masks.values()) == round((1 - s) * 66)
