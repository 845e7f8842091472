"""Sparse SAM against a loop written from its definition, and each fault of the published code as a test that sees it."""
import datetime
import random
import traceback
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import CPUMixedPrecision, assert_close, assert_same, batches, learner, mlp, snapshot
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, Learner
from fastai.callback.training import GradientAccumulation
from hypothesis import given, strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel as DDP

from sam_explained.sam import SAM
from sam_explained.ssam import (SSAM, DSTMask, FisherMask, MagnitudeMask, Mask, RandomMask, TopGradMask, fisher, moved_mask,
                                top_mask)

CE, f32, f64 = nn.CrossEntropyLoss(), torch.float32, torch.float64
sgd = partial(SGD, mom=.9)


class Fixed(Mask):
    "Masks that are given"
    def __init__(self, masks): super().__init__(); self.given = masks
    def masks(self, ssam, weights, old=None): return [m.clone() for m in self.given]


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


@pytest.mark.parametrize('renorm', [False, True])
@pytest.mark.parametrize('norm', [None, nn.BatchNorm1d])
def test_the_definition(renorm, norm):
    model, ref = mlp(norm=norm), mlp(norm=norm)
    masks = half(model)
    learner(model, batches(), SSAM(Fixed(masks), .3, renorm), opt_func=sgd).fit(2)
    ssam_train(ref, batches(), masks, .3, renorm, epochs=2)
    assert_close(model, ref)
    other = mlp(norm=norm)
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
    assert_same(end(SSAM(Fixed([torch.ones_like(w, dtype=torch.bool) for w in ws]), .3, renorm)), end(SAM(.3)))


# Masks -----------------------------------------------------------------------------------------------------------

shapes = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4)


@given(shapes, st.floats(0, .999), st.integers(0, 2**30), st.booleans())
def test_density_of_the_unstructured_mask(shapes, s, seed, ties):
    gen = torch.Generator().manual_seed(seed)
    scores = [torch.randint(0, 2, sh, generator=gen).float() if ties else torch.rand(sh, generator=gen) for sh in shapes]
    masks, total = top_mask(scores, s), sum(x.numel() for x in scores)
    kept = sum(int(m.sum()) for m in masks)
    assert kept == round((1 - s) * total) and all(m.dtype == torch.bool and m.shape == x.shape for m, x in zip(masks, scores))
    if 0 < kept < total:
        low = min(float(x[m].min()) for x, m in zip(scores, masks) if m.any())
        high = max(float(x[~m].max()) for x, m in zip(scores, masks) if not m.all())
        assert low >= high


@given(st.floats(0, .999), st.floats(0, 1), st.integers(0, 2**30))
def test_moving_never_changes_the_density(s, share, seed):
    "Fault 5 of the published code: with s=.2, alpha=.5 its density falls from .8 to .6."
    gen = torch.Generator().manual_seed(seed)
    shapes = [(7, 5), (11,)]
    masks = top_mask([torch.rand(sh, generator=gen) for sh in shapes], s)
    for _ in range(3):
        new = moved_mask(masks, [torch.rand(sh, generator=gen) for sh in shapes], share, gen)
        a, b = (torch.cat([m.flatten() for m in ms]) for ms in (masks, new))
        assert a.sum() == b.sum() and set(b.unique().tolist()) <= {True, False}
        n = min(int(share * int(a.sum())), int((~a).sum()))
        assert int((a ^ b).sum()) == 2 * n
        masks = new


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
        for w in self.model.parameters(): w.grad = torch.full_like(w, 100.)
    def before_batch(self):
        if self.train_iter == 0:
            for w in self.model.parameters():
                assert (w.grad == 100).all(), 'making a mask changed .grad'
                w.grad = None


def test_fisher_does_not_depend_on_grad():
    "Fault 2: the first sample's gradient was added to what the last step had left. Fault 3: fewer than ten samples."
    for n in (1, 3, 128):
        a, b = (train_of(FisherMask(.5, n), 1, cbs=cbs).ssam.masks.values() for cbs in ([], [Soil()]))
        assert all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize('norm', [None, nn.BatchNorm1d, nn.LayerNorm])
def test_fisher_is_the_sum_of_squares_row_by_row(norm):
    model = mlp(norm=norm, drop=.5)
    (x, y), *_ = batches(bs=9)
    got = fisher(model, CE, (x,), (y,))
    model.eval()
    want = [torch.zeros_like(w) for w in model.parameters()]
    for i in range(9):
        for t, g in zip(want, torch.autograd.grad(CE(model(x[i:i + 1]), y[i:i + 1]), list(model.parameters()))): t += g ** 2
    for a, b in zip(got, want): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    whole = torch.autograd.grad(CE(model(x), y), list(model.parameters()))
    assert float(sum(b.sum() for b in want) / sum((9 * g ** 2).sum() for g in whole)) > 2, 'and not the square of a sum'


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


@pytest.mark.parametrize('mask', [FisherMask, TopGradMask, DSTMask, RandomMask, MagnitudeMask])
def test_making_a_mask_leaves_no_trace(mask):
    "Mode, buffers, random state, the order of the batches."
    ends = []
    for cbs in ([SAM(0.)], [SSAM(mask(), 0.)]):
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        model = mlp(norm=nn.BatchNorm1d, drop=.3)
        learn = learner(model, batches(), cbs, opt_func=sgd)
        learn.dls.train.shuffle = True
        learn.dls.train.rng.seed(5)
        learn.fit(3)
        ends.append((snapshot(model), torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()))
    assert_same(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1]) and ends[0][2:] == ends[1][2:]


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
        other = learner(mlp(seed=8), batches(), SSAM(RandomMask(.5, every=4, seed=9), .1), opt_func=opt_func, path=tmp_path)
        other.load('two')
        other.fit(3, start_epoch=2)
        for a, b in zip(first.ssam.masks.values(), other.ssam.masks.values()): assert torch.equal(a, b)


# Processes ---------------------------------------------------------------------------------------------------------

def process(rank, folder):
    "One of two processes with its own data and its own random state; what masks does it use?"
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2,
                            timeout=datetime.timedelta(seconds=60))
    try:
        seen = {}
        for mask in (FisherMask(.5), DSTMask(.5, every=1), RandomMask(.5, seed=rank)):
            torch.manual_seed(rank)
            learn = learner(DDP(mlp()), batches(seed=50 + rank), SSAM(mask, .1), opt_func=sgd)
            learn.fit(2)
            seen[type(mask).__name__] = [m.clone() for m in learn.ssam.masks.values()], snapshot(learn.model.module)
        torch.save(seen, f'{folder}/rank{rank}.pt')
        dist.barrier()
    except BaseException:
        with open(f'{folder}/error{rank}', 'w') as f: traceback.print_exc(file=f)
        raise
    finally: dist.destroy_process_group()


def test_all_processes_use_one_mask(tmp_path):
    "Fault 9: in the published code every process draws its own."
    ctx = mp.spawn(process, args=(str(tmp_path),), nprocs=2, join=False)
    try:
        ends = datetime.datetime.now() + datetime.timedelta(seconds=180)
        while not ctx.join(timeout=1):
            if datetime.datetime.now() > ends: pytest.fail('the processes did not end')
    finally:
        for p in ctx.processes:
            if p.is_alive(): p.kill()
            p.join()
    a, b = (torch.load(tmp_path / f'rank{r}.pt', weights_only=False) for r in (0, 1))
    for name in a:
        assert all(torch.equal(x, y) for x, y in zip(a[name][0], b[name][0])), name
        assert_same(a[name][1], b[name][1], name)
    gen = [RandomMask(.5, seed=r) for r in (0, 1)]
    assert not all(torch.equal(x, y) for x, y in zip(*[train_of(m, 1).ssam.masks.values() for m in gen])), 'alone they differ'
