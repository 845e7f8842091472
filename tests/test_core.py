"""Properties of `sam_explained.core`, against numpy and the reference of this folder."""
import copy
import math

import numpy as np
import pytest
import torch
from conftest import assert_close, assert_same, mlp, same_bits, snapshot
from hypothesis import assume, given, strategies as st
from reference import np_ascent, np_conjugate, np_flat, np_norm, sam_gradient
from torch import nn

from sam_explained.core import ascent, frozen_stats, grad_norm, perturbed, same_rng, two_pass

f64, f32, f16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
TOL = {f64: 1e-12, f32: 2e-6, f16: 2e-3, bf16: 1.6e-2}           # relative, about two roundings of the dtype
shapes = st.lists(st.sampled_from([(), (0,), (1,), (3,), (2, 3), (2, 0), (4, 1, 2)]), min_size=1, max_size=5)
powers = st.sampled_from([1., 1.2, 1.5, 2., 3., 6., math.inf])
radii = st.sampled_from([0., 1e-3, .05, 1., 7.5])


def draw(shapes, dtypes, seed, scale=1., zeros=0.):
    "Random tensors, a share `zeros` of their entries exactly zero; entries are kept away from underflow."
    gen = torch.Generator().manual_seed(seed)
    def one(s, d):
        x = torch.randn(s, generator=gen, dtype=f64) * scale
        return torch.where(torch.rand(s, generator=gen) < zeros, torch.zeros_like(x), x).to(d)
    return [one(s, d) for s, d in zip(shapes, dtypes)]


@st.composite
def tensors(draw_, dtypes=(f64, f32, f16, bf16), mixed=True):
    "Lists of tensors: scalars, empty ones, several shapes, one or several dtypes."
    ss = draw_(shapes)
    ds = [draw_(st.sampled_from(dtypes)) for _ in ss] if mixed else [draw_(st.sampled_from(dtypes))] * len(ss)
    return draw(ss, ds, draw_(st.integers(0, 999)), draw_(st.sampled_from([1e-3, 1., 10.])),
                draw_(st.sampled_from([0., .5])))


def tol(ts): return max(TOL[t.dtype] for t in ts)
def close(a, b, rtol, atol=0.): np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


# grad_norm ----------------------------------------------------------------------------------------------------

@given(tensors(), powers)
def test_grad_norm_is_the_norm_of_all_entries_together(gs, p):
    n = grad_norm(gs, p)
    assert n.shape == () and n.dtype in (f32, f64)
    close(n.item(), np_norm(np_flat(gs), p), 1e-5 if n.dtype == f32 else 1e-12, 1e-30)


@given(tensors(dtypes=(f64,)), powers)
def test_grad_norm_of_doubles_is_double(gs, p):
    n = grad_norm(gs, p)
    assert n.dtype == f64
    close(n.item(), np_norm(np_flat(gs), p), 1e-12, 1e-30)


@pytest.mark.parametrize('dtype', [f16, bf16])
@pytest.mark.parametrize('value', [1., 30000.])
def test_grad_norm_accumulates_in_fp32(dtype, value):
    "10,000 equal entries: in fp16 the sum of squares overflows, in bf16 it stops growing at 256."
    gs = [torch.full((100, 50), value, dtype=dtype), torch.full((5000,), value, dtype=dtype)]
    close(grad_norm(gs).item(), 100 * float(gs[1][0]), 1e-5)
    close(grad_norm(gs, 1).item(), 10000 * float(gs[1][0]), 1e-5)
    close(grad_norm(gs, math.inf).item(), float(gs[1][0]), 0)


# ascent -------------------------------------------------------------------------------------------------------

@given(tensors(), radii, powers)
def test_ascent_is_the_dual_vector(gs, rho, p):
    kept = [g.clone() for g in gs]
    eps = ascent(gs, rho, p=p)
    assert same_bits(gs, kept), 'ascent changed the gradients it was given'
    assert [e.shape for e in eps] == [g.shape for g in gs]
    assert all(torch.promote_types(e.dtype, g.dtype) == e.dtype for e, g in zip(eps, gs)), 'eps is coarser than g'
    g, e, t = np_flat(gs), np_flat(eps), tol(gs)
    if p > 1 or not np.any(g):
        # |g|^(q-1) multiplies a relative error of g by q-1 (at most 5 here); fp16 has subnormals below 6e-5
        atol = rho * (t if p < 1.5 else t / 10) + (6e-8 if any(x.dtype == f16 for x in gs) else 0)
        close(e, np_ascent(g, rho, p), 5 * t, atol)
    if np.any(g):
        close(np_norm(e, p), rho, 3 * t, 1e-7)
        close(e @ g, rho * np_norm(g, np_conjugate(p)), 3 * t, 1e-7 * np.abs(g).max())


@given(tensors(), st.sampled_from([.05, 1.]))
def test_p1_puts_all_mass_on_one_largest_coordinate(gs, rho):
    g, e = np_flat(gs), np_flat(ascent(gs, rho, p=1))
    assume(np.any(g))
    i = np.flatnonzero(e)
    assert len(i) == 1 and abs(g[i[0]]) == np.abs(g).max()
    close(e[i[0]], rho * np.sign(g[i[0]]), tol(gs))


def test_p1_breaks_ties_across_tensors():
    e = np_flat(ascent([torch.tensor([1., -3.]), torch.tensor([[-3.], [3.]])], .5, p=1))
    assert np.count_nonzero(e) == 1 and np.abs(e).max() == .5 and abs(e[0]) == 0


@given(tensors(dtypes=(f64, f32)), st.sampled_from([.1, 1.]), powers, st.integers(0, 999))
def test_no_feasible_point_gains_more(gs, rho, p, seed):
    "Random points of the p-ball's surface, random signs and sparse ones among them, never beat eps."
    g, e = np_flat(gs), np_flat(ascent(gs, rho, p=p))
    assume(np.any(g))
    gen = np.random.default_rng(seed)
    cand = gen.standard_normal((400, g.size))
    cand[100:200] = np.sign(cand[100:200])
    cand[200:300] *= gen.random((100, g.size)) < .3
    cand[300:] = np.sign(g) * np.abs(g) ** gen.uniform(0, 6, (100, 1))                    # other dual powers
    for c in cand:
        n = np_norm(c, p)
        if n > 0: assert rho * (c / n) @ g <= e @ g * (1 + 1e-5) + 1e-12


@given(tensors(dtypes=(f64, f32)), powers, st.integers(-20, 20))
def test_scale_of_the_loss_does_not_matter(gs, p, k):
    "T17; 2^16 is the usual loss scale."
    a, b = np_flat(ascent(gs, .3, p=p)), np_flat(ascent([g * 2. ** k for g in gs], .3, p=p))
    close(b, a, 1e-4, 1e-6)


@pytest.mark.parametrize('size', [1e-8, 1e8])
@pytest.mark.parametrize('p', [1., 1.5, 2., 3., math.inf])
def test_tiny_and_huge_gradients_get_the_full_radius(p, size):
    "T18: a gradient of norm about 1e-8 is not swallowed by a guard against division by zero."
    gs = [torch.randn(5) * size, torch.randn(2, 3) * size]
    close(np_norm(np_flat(ascent(gs, .05, p=p)), p), .05, 2e-4)


@given(shapes, st.sampled_from([f64, f32, f16, bf16]), powers, st.booleans())
def test_zero_gradient_gives_a_finite_zero(ss, dtype, p, adaptive):
    gs = [torch.zeros(s, dtype=dtype) for s in ss]
    for e in ascent(gs, .05, params=[torch.ones_like(g) for g in gs], p=p, adaptive=adaptive):
        assert torch.isfinite(e).all() and not e.any()


@given(tensors(dtypes=(f64, f32)), radii, powers, st.sampled_from([0., .01, 1.]), st.integers(0, 99))
def test_adaptive_is_the_dual_in_the_stretched_coordinates(gs, rho, p, eta, seed):
    "Kwon et al.: T = |w| + eta on every parameter, eps = T * dual(T * g), so ||eps / T||_p = rho."
    ws = draw([g.shape for g in gs], [g.dtype for g in gs], seed)
    w, g, t = np_flat(ws), np_flat(gs), tol(gs)
    T = np.abs(w) + eta
    e = np_flat(ascent(gs, rho, params=ws, p=p, adaptive=True, eta=eta))
    if p > 1: close(e, np_ascent(g, rho, p, T), 20 * t, 5 * rho * t)
    if np.any(T * g):
        close(np_norm(e / T, p), rho, 5 * t, 1e-9)
        close(e @ g, rho * np_norm(T * g, np_conjugate(p)), 10 * t, 1e-9)


def test_adaptive_p2_closed_form_and_rescaling():
    "rho T^2 g / ||T g||; and eps/T does not see (w1, w2) -> (c w1, w2 / c), the plain eps does."
    rho, w, g = .5, torch.randn(7, dtype=f64).split([4, 3]), torch.randn(7, dtype=f64).split([4, 3])
    W, G = torch.cat(w), torch.cat(g)
    e = torch.cat(ascent(g, rho, params=w, adaptive=True, eta=.01))
    T = W.abs() + .01
    torch.testing.assert_close(e, rho * T ** 2 * G / (T * G).norm(), rtol=1e-12, atol=0)
    c = 7.
    w2, g2 = [w[0] * c, w[1] / c], [g[0] / c, g[1] * c]
    a = torch.cat(ascent(g, rho, params=w, adaptive=True, eta=0.)) / W.abs()
    b = torch.cat(ascent(g2, rho, params=w2, adaptive=True, eta=0.)) / torch.cat(w2).abs()
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert (torch.cat(ascent(g2, rho)) - torch.cat(ascent(g, rho))).norm() > .1 * rho


@given(tensors(dtypes=(f64, f32), mixed=False), powers, st.booleans(), st.booleans(), st.integers(0, 99))
def test_masks(gs, p, renorm, as_bool, seed):
    "m * eps; the norm runs over all of g (the paper's formula) or, with renorm, over m * g."
    gen = torch.Generator().manual_seed(seed)
    ms = [torch.rand(g.shape, generator=gen) < .5 for g in gs]
    m, g, t = np_flat(ms), np_flat(gs), tol(gs)
    e = np_flat(ascent(gs, .3, p=p, masks=ms if as_bool else [x.to(g_.dtype) for x, g_ in zip(ms, gs)], renorm=renorm))
    assert not np.any(e[m == 0])
    if p > 1: close(e, m * np_ascent(m * g if renorm else g, .3, p), 5 * t, t)
    if np.any(m * g) and renorm: close(np_norm(e, p), .3, 3 * t)
    assert np_norm(e, p) <= .3 * (1 + 3 * t)


def test_several_groups_share_one_radius():
    "T16: the norm is joint. Per tensor it would be rho * sqrt(number of tensors)."
    gs = [torch.randn(3, 3, dtype=f64) * s for s in (1e-3, 1., 50., 2., .1, 1.)]
    e = ascent(gs, .05)
    close(np_norm(np_flat(e), 2), .05, 1e-12)
    close(float(e[0].norm() / e[2].norm()), float(gs[0].norm() / gs[2].norm()), 1e-9)


# perturbed ----------------------------------------------------------------------------------------------------

odd = [math.nan, math.inf, -math.inf, -0., 0., 1e-40, 3.5]


@given(tensors(), st.integers(0, 99), st.sampled_from([None, RuntimeError, KeyboardInterrupt, GeneratorExit]),
       st.booleans())
def test_perturbed_puts_every_bit_back(ws, seed, error, strange):
    ws = [nn.Parameter(w) for w in ws]
    if strange:
        with torch.no_grad():
            for k, w in enumerate(ws):
                if w.numel(): w.view(-1)[k % w.numel()] = odd[(seed + k) % len(odd)]
    eps = draw([w.shape for w in ws], [w.dtype for w in ws], seed, .3)
    before, where, kept = [w.detach().clone() for w in ws], [w.data_ptr() for w in ws], [e.clone() for e in eps]
    try:
        with perturbed(ws, eps):
            for w, b, e in zip(ws, before, kept):
                assert w.data_ptr() in where and w.requires_grad and w.is_leaf
                torch.testing.assert_close(w.detach(), b + e, rtol=0, atol=0, equal_nan=True)
            if error: raise error('inside')
    except BaseException as e:
        assert error and type(e) is error
    assert same_bits([w.detach() for w in ws], before) and [w.data_ptr() for w in ws] == where
    assert all(w.grad is None and w.requires_grad for w in ws)


@given(tensors(), st.integers(0, 99))
def test_the_weights_move_by_rho_and_come_back(gs, seed):
    "What `ascent` returns is what `perturbed` takes, in every dtype; the move is eps, rounded once."
    ws = [nn.Parameter(w) for w in draw([g.shape for g in gs], [g.dtype for g in gs], seed)]
    before = [w.detach().clone() for w in ws]
    eps = ascent(gs, .5)
    with perturbed(ws, eps):
        for w, b, e in zip(ws, before, eps):
            torch.testing.assert_close(w.detach(), (b.double() + e.double()).to(w.dtype), rtol=TOL[w.dtype], atol=1e-6)
    assert same_bits([w.detach() for w in ws], before)


def test_perturbed_restores_what_the_body_overwrites():
    w = nn.Parameter(torch.randn(3))
    before = w.detach().clone()
    with perturbed([w], [torch.ones(3)]):
        with torch.no_grad(): w.fill_(math.nan)
    assert same_bits([w.detach()], [before])


def test_perturbed_restores_when_the_move_itself_fails():
    "The second eps has the wrong shape: the first weight must not stay moved."
    ws = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))]
    before = [w.detach().clone() for w in ws]
    with pytest.raises(Exception):
        with perturbed(ws, [torch.ones(3), torch.ones(2)]): pass
    assert same_bits([w.detach() for w in ws], before)


def test_perturbed_nests_and_repeats():
    w = nn.Parameter(torch.randn(1000) * 1e3)
    before = w.detach().clone()
    for _ in range(200):
        with perturbed([w], [torch.full((1000,), 1e-3)]):
            with perturbed([w], [torch.randn(1000)]): pass
    assert same_bits([w.detach()], [before])


def test_perturbed_keeps_views_and_strides():
    "A parameter that is a view of a flat buffer (FSDP, fused optimisers), and one that is not contiguous."
    store = torch.randn(12)
    a, b = nn.Parameter(store[:4]), nn.Parameter(torch.randn(3, 4).t())
    before, strides = (store.clone(), b.detach().clone()), b.stride()
    with perturbed([a, b], [torch.ones(4), torch.ones(4, 3)]):
        assert torch.equal(store[:4], before[0][:4] + 1)                     # the same storage, moved in place
    assert torch.equal(store, before[0]) and torch.equal(b, before[1]) and b.stride() == strides


def test_gradients_taken_inside_perturbed_are_those_of_the_moved_point():
    w = nn.Parameter(torch.tensor([1., 2.], dtype=f64))
    with perturbed([w], [torch.tensor([.5, -.5], dtype=f64)]): (w ** 3).sum().backward()
    torch.testing.assert_close(w.grad, 3 * torch.tensor([1.5, 1.5], dtype=f64) ** 2)


# frozen_stats, same_rng ---------------------------------------------------------------------------------------

class Rebinds(nn.Module):
    "A layer that replaces its buffer by a new tensor, as hand-written running averages do."
    def __init__(self):
        super().__init__()
        self.register_buffer('mean', torch.zeros(4))
        self.register_buffer('empty', None)
    def forward(self, x):
        self.mean = .9 * self.mean + .1 * x.mean(0).detach()
        return x - self.mean


@pytest.mark.parametrize('error', [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('layer', [lambda: nn.BatchNorm1d(4), lambda: nn.BatchNorm1d(4, momentum=None), Rebinds,
                                   lambda: nn.BatchNorm1d(4, affine=False),
                                   lambda: nn.BatchNorm1d(4, track_running_stats=False)])
def test_frozen_stats_gives_back_values_and_identity(layer, error):
    model = nn.Sequential(nn.Linear(4, 4), layer())
    for _ in range(3): model(torch.randn(8, 4))
    before, ids = snapshot(model), {k: id(b) for k, b in model.named_buffers()}
    where = {k: b.data_ptr() for k, b in model.named_buffers()}
    keys, modes = [set(vars(m)) for m in model.modules()], [m.training for m in model.modules()]
    momenta = [getattr(m, 'momentum', 0) for m in model.modules()]
    x = torch.randn(8, 4) + 5
    expect = copy.deepcopy(model)(x)
    try:
        with frozen_stats(model):
            torch.testing.assert_close(model(x), expect)                     # batch statistics, as in training
            if error: raise error('inside')
    except BaseException as e: assert error and type(e) is error
    assert_same(before, snapshot(model), 'buffers')
    assert {k: id(b) for k, b in model.named_buffers()} == ids
    assert {k: b.data_ptr() for k, b in model.named_buffers()} == where
    assert [set(vars(m)) for m in model.modules()] == keys and [m.training for m in model.modules()] == modes
    assert [getattr(m, 'momentum', 0) for m in model.modules()] == momenta


def test_frozen_stats_restores_strange_values():
    bn = nn.BatchNorm1d(4)
    bn.running_mean[:] = torch.tensor([math.nan, math.inf, -0., 1e-40])
    before = snapshot(bn)
    with frozen_stats(bn): bn(torch.randn(8, 4) / 0)
    assert_same(before, snapshot(bn))


def test_frozen_stats_accepts_none_and_nothing():
    with frozen_stats(None): pass
    with frozen_stats(nn.Linear(2, 2)): pass


def test_frozen_stats_still_lets_gradients_through_the_graph():
    "Restoring in place must not invalidate what backward needs when it runs inside the context."
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with frozen_stats(model): model(torch.randn(8, 4)).pow(2).sum().backward()
    assert model[0].weight.grad.abs().sum() >= 0


def test_same_rng_rewinds_and_puts_back():
    torch.manual_seed(5)
    rng = same_rng(torch.device('cpu'))
    first = torch.rand(3)
    state = torch.get_rng_state()
    for _ in range(2):                                                       # as often as one likes
        with rng: assert torch.equal(torch.rand(3), first)
        assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)                                                            # something draws in between
    state = torch.get_rng_state()
    with rng: assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_same_rng_puts_back_after_an_error(error):
    rng = same_rng('cpu')
    torch.rand(3)
    state = torch.get_rng_state()
    with pytest.raises(error):
        with rng:
            torch.rand(11)
            raise error('inside')
    assert torch.equal(torch.get_rng_state(), state)


# two_pass -----------------------------------------------------------------------------------------------------

def spd(n, seed):
    a = torch.randn(n, n, dtype=f64, generator=torch.Generator().manual_seed(seed))
    return a @ a.t() + .1 * torch.eye(n, dtype=f64)


def test_quadratic_gives_A_at_the_moved_point():
    "T1, T4: g = A(w + rho A w / ||A w||), and not the derivative through eps."
    A, rho = spd(5, 0), .3
    w = nn.Parameter(torch.randn(5, dtype=f64))
    loss = two_pass(lambda: .5 * w @ A @ w, [w], rho)
    g, v = A @ w.detach(), w.detach()
    torch.testing.assert_close(w.grad, A @ (v + rho * g / g.norm()), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(loss, .5 * v @ A @ v, rtol=1e-12, atol=0)
    assert not loss.requires_grad and loss.shape == ()
    u = g / g.norm()
    dropped = rho ** 2 / g.norm() * A @ (A @ u - u * (u @ A @ u))
    x = w.detach().clone().requires_grad_()
    full = torch.autograd.grad((lambda h: .5 * (x + rho * h / h.norm()) @ A @ (x + rho * h / h.norm()))(A @ x), x)[0]
    torch.testing.assert_close(full - w.grad, dropped, rtol=1e-8, atol=1e-10)
    assert dropped.norm() > 1e-3


def test_one_example_squared_loss_closed_form():
    "T6: g = (r + rho sign(r) ||x||) x."
    x, y, rho = torch.randn(4, dtype=f64), 2., .2
    w = nn.Parameter(torch.randn(4, dtype=f64))
    two_pass(lambda: .5 * (x @ w - y) ** 2, [w], rho)
    r = float(x @ w.detach() - y)
    torch.testing.assert_close(w.grad, (r + rho * math.copysign(1, r) * x.norm()) * x, rtol=1e-10, atol=0)


@pytest.mark.parametrize('start,sam,msam', [(2., 1.6, 1.6), (.6, .2, .1)])
def test_msam_fixture(start, sam, msam):
    "T9: losses (w-0)^2/2 and (w-1)^2/2, rho 0.1. At 0.6 SAM and mSAM differ."
    w = nn.Parameter(torch.tensor(start, dtype=f64))
    l0, l1 = (lambda: .5 * w ** 2), (lambda: .5 * (w - 1) ** 2)
    loss = two_pass(lambda: (l0() + l1()) / 2, [w], .1)
    close(w.grad.item(), sam, 1e-12)
    clean = loss.item()
    w.grad = None
    loss = two_pass([l0, l1], [w], .1)
    close(w.grad.item(), msam, 1e-12)
    close(loss.item(), clean, 1e-12)                                         # the mean of the shards' clean losses


@pytest.mark.parametrize('order', [(0, 1, 2), (2, 0, 1)])
def test_shards_of_quadratics(order):
    "T10, T11: the mean over shards, each with its own norm, in any order."
    As, cs, rho = [spd(4, s) for s in range(3)], torch.randn(3, 4, dtype=f64), .2
    w = nn.Parameter(torch.randn(4, dtype=f64))
    closures = [lambda j=j: .5 * (w - cs[j]) @ As[j] @ (w - cs[j]) for j in order]
    two_pass(closures, [w], rho)
    d = w.detach() - cs
    want = sum(A @ (v + rho * A @ v / (A @ v).norm()) for A, v in zip(As, d)) / 3
    torch.testing.assert_close(w.grad, want, rtol=1e-11, atol=1e-12)


def test_two_pass_adds_to_grad():
    w = nn.Parameter(torch.randn(4, dtype=f64))
    A, old = spd(4, 1), torch.randn(4, dtype=f64)
    two_pass(lambda: .5 * w @ A @ w, [w], .1)
    g, w.grad = w.grad.clone(), old.clone()
    two_pass(lambda: .5 * w @ A @ w, [w], .1)
    torch.testing.assert_close(w.grad, old + g, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize('drop', [0., .4])
@pytest.mark.parametrize('kw', [dict(), dict(p=math.inf), dict(p=1.), dict(p=3.), dict(adaptive=True, eta=.05),
                                dict(adaptive=True, eta=0., p=math.inf)])
def test_network_equals_reference(kw, drop):
    "Batch norm counts the clean pass only, dropout has the same mask in both passes."
    model = mlp(norm=nn.BatchNorm1d, drop=drop)
    ref = copy.deepcopy(model)
    x, y = torch.randn(8, 5, dtype=f64), torch.randint(0, 3, (8,))
    torch.manual_seed(1)
    loss = two_pass(lambda: nn.functional.cross_entropy(model(x), y), list(model.parameters()), .1, model=model, **kw)
    torch.manual_seed(1)
    gs, clean, _ = sam_gradient(ref, lambda call: nn.functional.cross_entropy(call(x), y), .1, **kw)
    for w, g in zip(model.parameters(), gs): torch.testing.assert_close(w.grad, g, rtol=1e-9, atol=1e-12)
    close(loss.item(), clean, 1e-12)
    assert_close(model, ref)  # weights where they were, buffers of pass 1


def test_two_pass_inside_an_outer_autocast():
    "Autocast remembers the half-precision copies of the weights; pass 2 must not be given those of pass 1."
    model = mlp(f32)
    ref = copy.deepcopy(model)
    x, y = torch.randn(8, 5), torch.randint(0, 3, (8,))
    with torch.autocast('cpu', torch.bfloat16):
        two_pass(lambda: nn.functional.cross_entropy(model(x).float(), y), list(model.parameters()), 2.)
    with torch.autocast('cpu', torch.bfloat16, cache_enabled=False):
        gs, *_ = sam_gradient(ref, lambda call: nn.functional.cross_entropy(call(x).float(), y), 2.)
        plain, *_ = sam_gradient(ref, lambda call: nn.functional.cross_entropy(call(x).float(), y), 0.)
    for w, g in zip(model.parameters(), gs): torch.testing.assert_close(w.grad, g, rtol=1e-2, atol=1e-3)
    assert max((a - b).abs().max() for a, b in zip(gs, plain)) > .05


def test_two_pass_without_model_leaves_buffers_alone_once_asked():
    "Without `model=` the second pass counts in the statistics; with it, it does not."
    x = torch.randn(8, 5, dtype=f64)
    counts = []
    for given_model in (None, True):
        model = mlp(norm=nn.BatchNorm1d)
        two_pass(lambda: model(x).pow(2).mean(), list(model.parameters()), .1, model=model if given_model else None)
        counts.append(int(model[1].num_batches_tracked))
    assert counts == [2, 1]


def test_rho_zero_is_the_plain_gradient_bit_for_bit():
    model = mlp(f32)
    ref = copy.deepcopy(model)
    x, y = torch.randn(8, 5), torch.randint(0, 3, (8,))
    two_pass(lambda: nn.functional.cross_entropy(model(x), y), list(model.parameters()), 0.)
    nn.functional.cross_entropy(ref(x), y).backward()
    assert same_bits([w.grad for w in model.parameters()], [w.grad for w in ref.parameters()])


@pytest.mark.parametrize('missing', [1, 2])
def test_parameter_missing_from_one_pass(missing):
    "Stochastic depth: b is used in one pass only. It comes back to its place and gets pass 2's gradient."
    a, b = nn.Parameter(torch.tensor(1., dtype=f64)), nn.Parameter(torch.tensor(2., dtype=f64))
    before, calls = [a.detach().clone(), b.detach().clone()], [0]
    def closure():
        calls[0] += 1
        return .5 * a ** 2 + (0 if calls[0] == missing else .5 * (b - a) ** 2)
    two_pass(closure, [a, b], .1)
    assert same_bits([a.detach(), b.detach()], before) and calls == [2]
    if missing == 1: want = (1.1 - (2 - 1.1), 2 - 1.1)                       # g = (1, -): eps = (0.1, 0)
    else: want = (1., None)                                                 # g = (0, 1): eps = (0, 0.1)
    close(a.grad.item(), want[0], 1e-12)
    if want[1] is None: assert b.grad is None or b.grad.item() == 0
    else: close(b.grad.item(), want[1], 1e-12)


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('at', [1, 2])
def test_two_pass_survives_an_error_in_the_closure(error, at):
    model = mlp(norm=nn.BatchNorm1d)
    before, calls = snapshot(model), [0]
    where = [w.data_ptr() for w in model.parameters()]
    def closure():
        calls[0] += 1
        if calls[0] == 1 == at: raise error('inside')
        loss = model(torch.randn(8, 5, dtype=f64)).pow(2).mean()
        if calls[0] == at: raise error('inside')
        return loss
    with pytest.raises(error): two_pass(closure, list(model.parameters()), .1, model=model)
    after = snapshot(model)
    for k in before:
        if 'running' in k or 'num_batches' in k: continue
        assert same_bits([before[k]], [after[k]]), k
    assert int(model[1].num_batches_tracked) == at - 1
    assert [w.data_ptr() for w in model.parameters()] == where


def test_a_plain_pytorch_loop_of_ten_steps():
    model, x, y = mlp(), torch.randn(8, 5, dtype=f64), torch.randint(0, 3, (8,))
    ref = copy.deepcopy(model)
    lf = nn.functional.cross_entropy
    opt, ropt = (torch.optim.SGD(m.parameters(), .1, momentum=.9, weight_decay=.01) for m in (model, ref))
    for _ in range(10):
        two_pass(lambda: lf(model(x), y), list(model.parameters()), .1)
        opt.step()
        opt.zero_grad()
        gs, *_ = sam_gradient(ref, lambda call: lf(call(x), y), .1)
        for w, g in zip(ref.parameters(), gs): w.grad = g
        ropt.step()
    assert_close(model, ref)


# Bad input ----------------------------------------------------------------------------------------------------

G, W = [torch.ones(3)], [torch.ones(3)]
bad = [(ValueError, 'rho', '-0.1', lambda: ascent(G, -.1)), (ValueError, 'rho', 'nan', lambda: ascent(G, math.nan)),
       (ValueError, 'rho', 'inf', lambda: ascent(G, math.inf)), (TypeError, 'rho', 'big', lambda: ascent(G, 'big')),
       (TypeError, 'rho', 'True', lambda: ascent(G, True)), (ValueError, 'p', '0.5', lambda: ascent(G, .1, p=.5)),
       (ValueError, 'p', 'nan', lambda: ascent(G, .1, p=math.nan)),
       (ValueError, 'p', '-2', lambda: ascent(G, .1, p=-2)),
       (TypeError, 'p', 'two', lambda: ascent(G, .1, p='two')),
       (ValueError, 'p', '0.5', lambda: grad_norm(G, .5)), (ValueError, 'p', 'nan', lambda: grad_norm(G, math.nan)),
       (ValueError, 'eta', '-1', lambda: ascent(G, .1, params=W, adaptive=True, eta=-1)),
       (ValueError, 'eta', 'nan', lambda: ascent(G, .1, params=W, adaptive=True, eta=math.nan)),
       ((ValueError, TypeError), 'params', '', lambda: ascent(G, .1, adaptive=True)),
       (ValueError, 'params', '2', lambda: ascent(G, .1, params=W * 2, adaptive=True)),
       (ValueError, 'masks', '2', lambda: ascent(G, .1, masks=[torch.ones(3)] * 2)),
       (ValueError, 'eps', '2', lambda: perturbed(W, G * 2).__enter__())]


@pytest.mark.parametrize('error,name,value,call', bad, ids=[f'{b[1]}-{b[2]}-{i}' for i, b in enumerate(bad)])
def test_bad_arguments_are_named(error, name, value, call):
    with pytest.raises(error) as e: call()
    assert name in str(e.value) and value in str(e.value), str(e.value)


@pytest.mark.parametrize('kw,error', [(dict(rho=-1.), ValueError), (dict(rho=math.nan), ValueError),
                                      (dict(rho='a'), TypeError),
                                      (dict(rho=True), TypeError), (dict(p=.3), ValueError),
                                      (dict(adaptive=True, eta=-1.), ValueError)])
def test_two_pass_refuses_before_it_does_anything(kw, error):
    w, calls = nn.Parameter(torch.ones(2)), []
    def closure():
        calls.append(1)
        return (w ** 2).sum()
    with pytest.raises(error) as e: two_pass(closure, [w], **kw)
    assert list(kw)[-1] in str(e.value) and w.grad is None and torch.equal(w, torch.ones(2)) and not calls


def test_two_pass_refuses_no_parameters_and_no_closures():
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match='params'): two_pass(lambda: (w ** 2).sum(), [], .1)
    with pytest.raises(ValueError, match='closure'): two_pass([], [w], .1)


@pytest.mark.parametrize('what', ['no graph', 'number', 'vector', 'none'])
def test_two_pass_refuses_a_closure_without_a_scalar_graph(what):
    w = nn.Parameter(torch.ones(2))
    make = {'no graph': lambda: (w ** 2).sum().detach(), 'number': lambda: 3., 'vector': lambda: w ** 2,
            'none': lambda: None}
    with pytest.raises((ValueError, TypeError)) as e: two_pass(make[what], [w], .1)
    assert 'closure' in str(e.value), str(e.value)
    assert torch.equal(w, torch.ones(2)) and w.grad is None
