"""Hessian, Gauss-Newton matrix and empirical Fisher, plain and relative to the weights, against dense ones and a library."""
import math
import sys
import warnings
from pathlib import Path

import curvlinops
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same
from scipy.sparse.linalg import eigsh
from test_sharpness import flat, made, plain, whole
from torch import nn

from sam_explained.hessian import Spectrum, hessian_spectrum, hessian_trace, top_eigenvalues
from sam_explained.sharpness import Objective, ball_sharpness

sys.path.insert(0, str(Path(__file__).parents[1] / 'benchmarks'))
from two_pass import Allocated

f64 = torch.float64
kinds = {'hessian': Objective.hvp, 'ggn': Objective.ggn, 'empirical_fisher': Objective.empirical_fisher}
layers = ['dense', 'frozen', 'picture', 'tied']         # batch norm in evaluation mode is in 'picture'


def whole_matrices(model, data):
    "Of the mean cross-entropy, entry by entry: Jacobian of all outputs, softmax, labels; and the weights, and how to cut them"
    model.eval()
    loss, w, cut = plain(model, data)
    outputs, _, _ = plain(model, data, lambda z, y: z)
    y = torch.cat([y for _, y in data])
    J, p = torch.func.jacrev(outputs)(w).detach(), outputs(w).softmax(1).detach()
    r = p - F.one_hot(y, p.shape[1])
    G = torch.einsum('nip,nij,njq->pq', J, torch.diag_embed(p) - p[:, :, None] * p[:, None], J) / len(y)
    g = torch.einsum('nip,ni->np', J, r)
    return dict(hessian=torch.autograd.functional.hessian(loss, w), ggn=G, empirical_fisher=g.T @ g / len(y)), w, cut


# Products and eigenvalues ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('sizes', [(15,), (6, 6, 3)], ids=str)
@pytest.mark.parametrize('layer', layers)
def test_against_dense_matrices(layer, sizes):
    "Products at the weights and beside them; eigenvalues, with one batch (its graph is kept) and with several"
    model, data = made(layer, sizes)
    M, w, cut = whole_matrices(model, data)
    v, e = torch.randn_like(w), .1 * torch.randn_like(w)
    O = Objective((model.train(), F.cross_entropy, data))
    for kind, product in kinds.items():
        torch.testing.assert_close(flat(product(O, cut(v))), M[kind] @ v, rtol=1e-9, atol=1e-11)
        found = top_eigenvalues(O, 3, kind=kind, tol=1e-9, progress=False)      # zero may occur many times and is found once
        assert found.values == pytest.approx(torch.linalg.eigvalsh(M[kind]).flip(0)[:3].numpy(), rel=1e-6, abs=1e-8)
    with torch.no_grad():
        for a, b in zip(O.params, cut(e)): a += b
    moved, _, _ = whole_matrices(model, data)
    with torch.no_grad():
        for a, b in zip(O.params, cut(e)): a -= b
    for kind, product in kinds.items():
        torch.testing.assert_close(flat(product(O, cut(v), cut(e))), moved[kind] @ v, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize('layer', layers)
def test_an_independent_library(layer):
    "curvlinops: products with the three matrices; and labels drawn from the model, whose mean is the Gauss-Newton matrix"
    model, data = made(layer)
    model.eval()
    O = Objective((model, F.cross_entropy, data))
    v = [torch.randn_like(w) for w in O.params]
    operator = {'hessian': 'HessianLinearOperator', 'ggn': 'GGNLinearOperator', 'empirical_fisher': 'EFLinearOperator'}
    for kind, product in kinds.items():
        op = getattr(curvlinops, operator[kind])(model, nn.CrossEntropyLoss(), O.params, data, check_deterministic=False)
        torch.testing.assert_close(flat(product(O, v)), flat(op @ [x.clone() for x in v]), rtol=1e-8, atol=1e-10)
        top = eigsh(op.to_scipy(), k=2, which='LA', return_eigenvectors=False)[::-1]
        assert top_eigenvalues(O, 2, kind=kind, tol=1e-8, progress=False).values == pytest.approx(top, rel=1e-6, abs=1e-9)
    drawn = curvlinops.FisherMCLinearOperator(model, nn.CrossEntropyLoss(), O.params, data, check_deterministic=False, mc_samples=4000)
    theirs, ours, other = flat(drawn @ [x.clone() for x in v]), flat(O.ggn(v)), flat(O.empirical_fisher(v))
    assert (ours - theirs).norm() < .05 * ours.norm() and (other - theirs).norm() > .15 * ours.norm()


class Sequence(nn.Module):
    "Outputs (rows, classes, places)"
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 5)
    def forward(self, x): return self.b(self.a(x).tanh()).transpose(1, 2)


losses = {
    'a label per place': (Sequence, lambda n: torch.randint(0, 5, (n, 6)), F.cross_entropy),
    'several outputs': (Sequence, lambda n: torch.randn(n, 5, 6, dtype=f64), F.mse_loss),
    'one number': (lambda: nn.Sequential(nn.Flatten(), nn.Linear(18, 1), nn.Flatten(0)),
                   lambda n: torch.randint(0, 2, (n,)).double(), F.binary_cross_entropy_with_logits),
}


@pytest.mark.parametrize('case', losses)
def test_outputs_of_any_shape(case):
    "The gradients of single rows, one after the other, in a plain loop"
    make, target, loss = losses[case]
    torch.manual_seed(0)
    model, x, y = make().double(), torch.randn(7, 6, 3, dtype=f64), target(7)
    O = Objective((model, loss, list(zip(x.split(4), y.split(4)))))
    g = torch.stack([flat(torch.autograd.grad(loss(model(x[i:i + 1]), y[i:i + 1]), O.params)) for i in range(7)])
    v = [torch.randn_like(w) for w in O.params]
    torch.testing.assert_close(flat(O.empirical_fisher(v)), g.T @ (g @ flat(v)) / 7, rtol=1e-9, atol=1e-12)


def test_a_linear_loss_has_no_gauss_newton_part():
    model, data = made('dense')
    v = [torch.randn_like(w) for w in model.parameters()]
    assert not flat(Objective((model, lambda z, y: z.mean(), data)).ggn(v)).any()
    assert top_eigenvalues((model, lambda z, y: z.mean(), data), kind='ggn', progress=False).values == 0


# What a row of its own needs ------------------------------------------------------------------------------------------

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 3).double()
    def forward(self, x): return self.a(x), x


def normed(kind, **kwargs): return nn.Sequential(nn.Linear(5, 4), nn.Unflatten(1, (2, 2)), kind(2, **kwargs), nn.Flatten(), nn.Linear(4, 3)).double()
def contrast(z, y): return F.cross_entropy(z @ z.T, torch.arange(len(z)))


def test_rows_that_do_not_stand_alone():
    _, data = made('dense')
    dense, batch = made('dense')[0], normed(nn.BatchNorm1d)
    v = lambda m: [torch.ones_like(w) for w in m.parameters()]
    for model, loss, told, kw in ((batch, F.cross_entropy, 'statistics of the batch', dict(batch_stats=True)),
                                  (normed(nn.BatchNorm1d, track_running_stats=False), F.cross_entropy, 'statistics of the batch', {}),
                                  (dense, contrast, 'mean over rows', {}),
                                  (nn.Sequential(dense, nn.Flatten(0)), lambda z, y: z.square().mean(), 'one line of outputs per row', {}),
                                  (nn.Sequential(dense, nn.Flatten(0)), lambda z, y: z.square().mean(), r'\(18,\)', {})):
        O, before = Objective((model, loss, data), **kw), whole(model)
        with pytest.raises(ValueError, match=told): O.empirical_fisher(v(model))
        with pytest.raises(ValueError, match=told): top_eigenvalues(O, kind='empirical_fisher', progress=False)
        assert_same(before, whole(model))
    for model, kw in ((batch, {}), (dense, dict(batch_stats=True)), (normed(nn.InstanceNorm1d), {})):
        assert flat(Objective((model, F.cross_entropy, data), **kw).empirical_fisher(v(model))).any()
    with pytest.raises(TypeError, match='one tensor.*tuple'):
        Objective((Two(), lambda z, y: F.cross_entropy(z[0], y), data)).ggn(v(Two()))
    with pytest.raises(ValueError, match="'hessian', 'ggn', 'empirical_fisher'"): top_eigenvalues((dense, F.cross_entropy, data), kind='fisher')
    for f in (top_eigenvalues, hessian_trace, hessian_spectrum):
        with pytest.raises(ValueError, match='eta=-1'): f((dense, F.cross_entropy, data), adaptive=True, eta=-1)


@pytest.mark.parametrize('kind', kinds)
def test_one_forward_and_nothing_left_behind(kind):
    "With one batch the graph serves all products; also after an interrupt the model is as it was"
    for sizes in ((15,), (6, 9)):
        model, data = made('dense', sizes)
        seen = []
        model.register_forward_hook(lambda *_: seen.append(1))
        before = whole(model)
        found = top_eigenvalues((model, F.cross_entropy, data), kind=kind, progress=False)
        assert len(seen) == (1 if len(sizes) == 1 else 2 * found.products)
        def loss(z, y):
            if len(seen) > 1: raise KeyboardInterrupt
            seen.append(1)
            return F.cross_entropy(z, y)
        seen.clear()
        with pytest.raises(KeyboardInterrupt): top_eigenvalues((model, loss, [*data, *data]), kind=kind, progress=False)
        assert_same(before, whole(model))


@pytest.mark.parametrize('kind', kinds)
def test_memory_does_not_grow_with_the_number_of_batches(kind):
    most = []
    for n in (3, 30):
        model, data = made('dense', (600,) * n)
        O = Objective((model, F.cross_entropy, data))
        v = [torch.ones_like(w) for w in O.params]
        with Allocated() as memory: kinds[kind](O, v)
        most.append(memory.most)
    assert most[1] <= 1.05 * most[0]


def test_half_precision():
    model, data = made('dense')
    O = Objective((model, F.cross_entropy, data))
    half = Objective((made('dense')[0].bfloat16(), F.cross_entropy, [(x.bfloat16(), y) for x, y in data]))
    for kind in kinds:
        for kw in ({}, dict(adaptive=True)):
            fine, rough = (top_eigenvalues(o, kind=kind, tol=.05, progress=False, **kw).values[0] for o in (O, half))
            assert rough == pytest.approx(fine, rel=.15)


# Relative to the weights ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('sizes', [(15,), (6, 6, 3)], ids=str)
@pytest.mark.parametrize('eta', [0, .3])
@pytest.mark.parametrize('kind', kinds)
def test_adaptive_against_dense(kind, eta, sizes):
    model, data = made('dense', sizes)
    M, w, _ = whole_matrices(model, data)
    D = w.detach().abs() + eta
    A = D[:, None] * M[kind] * D
    lam, kw = torch.linalg.eigvalsh(A), dict(kind=kind, adaptive=True, eta=eta, progress=False)
    O = Objective((model, F.cross_entropy, data))
    found = top_eigenvalues(O, 3, tol=1e-9, **kw)
    assert found.values == pytest.approx(lam.flip(0)[:3].numpy(), rel=1e-6)
    for value, u in zip(found.values, found.vectors): assert (A @ flat(u) - value * flat(u)).norm() < 1e-4 * found.values[0]
    t = hessian_trace(O, tol=0, most=300, **kw)
    assert abs(t.value - A.trace()) < 4 * t.error and t.error < .5 * abs(A.trace())     # fails by chance for one seed in 10,000
    s = hessian_spectrum(O, 1, 6, **kw)
    q = torch.randn(len(w), generator=torch.Generator().manual_seed(0)).double()
    q /= q.norm()
    for k in (1, 2, 5): assert (s.weights * s.nodes**k).sum() == pytest.approx((q @ torch.linalg.matrix_power(A, k) @ q).item(), rel=1e-9)


@pytest.mark.parametrize('a', [1/4, 2, 8])
def test_what_survives_a_rescaling(a):
    "The same function with other weights (Dinh et al. 2017): layers of a ReLU net times `a` and `1/a`, a channel by itself too"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    _, data = made('dense', (15,))
    def measured():
        O = Objective((model, F.cross_entropy, data))
        found = {(kind, adaptive): top_eigenvalues(O, 2, kind=kind, tol=1e-9, adaptive=adaptive, eta=0, progress=False).values
                 for kind in kinds for adaptive in (True, False)}
        return O.value(), found, hessian_trace(O, tol=0, most=20, adaptive=True, eta=0, progress=False).value
    value, before, trace = measured()
    with torch.no_grad():
        for i, factor in ((0, a), (2, 1 / a)): model[i].weight *= factor
        model[0].bias *= a
        model[2].bias[1] *= a
        model[2].weight[1] *= a
        model[4].weight[:, 1] /= a
    again, after, trace_after = measured()
    assert again == pytest.approx(value, rel=1e-12) and trace_after == pytest.approx(trace, rel=1e-9)
    for kind in kinds:
        assert after[kind, True] == pytest.approx(before[kind, True], rel=1e-6, abs=1e-9)
        assert abs(after[kind, False][0] / before[kind, False][0] - 1) > .05


def test_it_is_the_curvature_of_the_adaptive_ball():
    "At a minimum the worst rise is half of it times the radius squared"
    torch.manual_seed(0)
    A = torch.diag(torch.tensor([3., 1., .5, 7.], dtype=f64))
    class Bowl(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([4., -1., 2., .1], dtype=f64))
            self.register_buffer('home', self.w.detach().clone())
        def forward(self, x): return (d := self.w - self.home + 1e-9) @ A @ d / 2
    of = Bowl(), lambda z, y: z, [(torch.zeros(1), torch.zeros(1))]
    lam = top_eigenvalues(of, tol=1e-9, adaptive=True, eta=.1, progress=False).values[0]
    assert lam == pytest.approx(3 * 4.1**2, rel=1e-6)
    assert ball_sharpness(of, .01, 60, 1e-9, adaptive=True, eta=.1, progress=False).rise == pytest.approx(lam * .01**2 / 2, rel=1e-4)


# The error of a spectrum ----------------------------------------------------------------------------------------------

def test_the_error_of_a_spectrum_is_what_many_runs_differ_by():
    "A bowl with a known spectrum, 250 runs of four starts: spread of shares and densities, and how often the truth is near"
    lam = np.array([-1., -.2, 0., .01, .02, .1, .15, .3, .5, 1., 2., 4.])
    class Bowl(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(12, dtype=f64))
        def forward(self, x): return self.w @ (torch.tensor(lam) * self.w) / 2
    of, n, at, width = (Bowl(), lambda z, y: z, [(torch.zeros(1), torch.zeros(1))]), 12, np.array([0., .3, 2.]), .2
    runs = [hessian_spectrum(of, 4, n, seed=s, progress=False) for s in range(250)]
    exact = Spectrum(lam, np.full(n, 1 / n), n)
    def near(values, errors, truth):
        "Errors of the size of the spread (a quarter is four deviations), no bias, the share of hits for Student's t"
        assert np.sqrt((errors**2).mean(0)) == pytest.approx(values.std(0), rel=.25)
        assert (abs(values.mean(0) - truth) < 4 * values.std(0) / len(values)**.5).all()
        assert (.8 < (abs(values - truth) < 3.18 * errors).mean(0)).all()     # 95 % if normal; one eigenvalue's share is skewed
    for level in (-.5, .05, .75):
        assert exact.above(level) == pytest.approx((lam > level).mean())
        near(*np.array([(r.above(level), r.above_error(level)) for r in runs]).T, (lam > level).mean())
    near(np.array([r(at, width) for r in runs]), np.array([r.error(at, width) for r in runs]), exact(at, width))


def test_the_shares_of_each_start():
    model, data = made('dense', (15,))
    O = Objective((model, F.cross_entropy, data))
    three, one = (hessian_spectrum(O, k, 7, progress=False) for k in (3, 1))
    assert three.weights.sum() == pytest.approx(1) and len(three.nodes) == 21
    first = Spectrum(three.nodes[:7], 3 * three.weights[:7], three.n)
    assert first.above(.01) == pytest.approx(one.above(.01))
    with warnings.catch_warnings():                                  # one start has no error, and nobody is warned of it
        warnings.simplefilter('error')
        assert math.isnan(one.above_error(.01)) and np.isnan(one.error([0, 1], .1)).all()
    each = [3 * three.weights[i:i + 7][three.nodes[i:i + 7] > .01].sum() for i in (0, 7, 14)]
    assert three.above(.01) == pytest.approx(np.mean(each)) and three.above_error(.01) == pytest.approx(np.std(each, ddof=1) / 3**.5)
    grid = np.linspace(-.5, 1.5, 4001)
    assert three(grid, .02).sum() * (grid[1] - grid[0]) == pytest.approx(1, abs=.01) and isinstance(float(three(0., .1)), float)
