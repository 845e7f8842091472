"""The `SAM` callback is right under everything fastai puts around it; the other side is `reference.train`."""
import contextlib
import copy
import functools
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from conftest import (CPUMixedPrecision, Seed, assert_close, assert_same, batches, halves, learner, mlp, same_bits,
                      snapshot)
from fastai.basics import (SGD, Adam, Callback, CancelFitException, CrossEntropyLossFlat, Datasets, L, Learner,
                           OptimWrapper, load_learner)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.rnn import ModelResetter, RNNCallback, RNNRegularizer
from fastai.callback.schedule import LRFinder, ParamScheduler, SchedCos, SchedLin, combined_cos
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from reference import train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.multiprocessing.reductions import StorageWeakRef

from sam_explained.sam import SAM, norm_params

CE = nn.CrossEntropyLoss()
f32, f64 = torch.float32, torch.float64
sgd = partial(SGD, mom=.9)


class Record(Callback):
    "Keeps what other callbacks and the logger see after each batch."
    order, run_valid = 55, False
    def before_fit(self): self.clean, self.preds = [], []
    def after_batch(self):
        self.clean.append(float(self.learn.loss.detach()))
        self.preds.append(self.learn.pred.detach().clone())


def twins(make, opt_func=sgd, lr=.1, **hypers):
    "A model for fastai, its copy for the reference, and the reference's optimizer."
    model = make()
    ref = copy.deepcopy(model)
    return model, ref, opt_func([p for p in ref.parameters() if p.requires_grad], lr=lr, **hypers)


def check_gaps(sam, log, rtol=1e-7, atol=1e-9):
    assert isinstance(sam.gaps, list) and all(type(g) is float for g in sam.gaps)
    np.testing.assert_allclose(sam.gaps, [r['gap'] for r in log], rtol=rtol, atol=atol)


def note(when, f):
    "For hooks: do it when asked, and return None whatever f returns."
    if when: f()


# The plain thing --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kw', [dict(), dict(rho=.5), dict(p=math.inf), dict(p=1.), dict(p=3.),
                                dict(rho=.5, adaptive=True),
                                dict(rho=.5, adaptive=True, eta=0., p=math.inf)], ids=str)
def test_plain_sam(kw):
    "Twelve steps of SAM with momentum: weights, the loss that is logged, and the gap L(w + eps) - L(w)."
    bs = batches()
    model, ref, opt = twins(mlp)
    sam, rec = SAM(**kw), Record()
    learn = learner(model, bs, [sam, rec], opt_func=sgd)
    learn.fit(3)
    log = train(ref, bs, CE, opt, kw.get('rho', .05), epochs=3, **{k: v for k, v in kw.items() if k != 'rho'})
    assert_close(model, ref)
    np.testing.assert_allclose(rec.clean, [r['clean'] for r in log[-len(rec.clean):]], rtol=1e-9)
    check_gaps(sam, log)
    assert min(sam.gaps) > 0 or kw, 'a convex-enough start: uphill is up'


def test_place_in_fastai():
    sam = SAM()
    assert sam.order == MixedPrecision.order - 1 and sam.run_valid is False and isinstance(sam, Callback)
    assert learner(mlp(), batches(), sam).sam is sam


def test_reference_can_tell_the_difference():
    "The comparisons below are worth something only if SAM, plain training and a wrong radius end apart."
    ends = []
    for rho in (0., .05, .1):
        model, ref, opt = twins(mlp)
        train(ref, batches(), CE, opt, rho, epochs=3)
        ends.append(ref[0].weight.detach())
    assert min((ends[0] - ends[1]).abs().max(), (ends[1] - ends[2]).abs().max()) > 1e-4


def test_learn_loss_and_pred_are_those_of_the_clean_pass():
    bs, rec = batches(), Record()
    model, ref, opt = twins(mlp)
    learner(model, bs, [SAM(rho=.5), rec], opt_func=sgd).fit(1)
    clean = copy.deepcopy(mlp())
    with torch.no_grad(): torch.testing.assert_close(rec.preds[0], clean(bs[0][0]))
    log = train(ref, bs, CE, opt, .5)
    np.testing.assert_allclose(rec.clean, [r['clean'] for r in log], rtol=1e-9)


def test_recorder_logs_the_clean_loss():
    bs = batches(dtype=f32)
    model, ref, opt = twins(partial(mlp, f32))
    learn = learner(model, bs, SAM(rho=.5), opt_func=sgd, recorder=True)
    learn.fit(2)
    log = train(ref, bs, CE, opt, .5, epochs=2)
    smooth, out = 0., []
    for i, r in enumerate(log):
        smooth = .98 * smooth + .02 * r['clean']
        out.append(smooth / (1 - .98 ** (i + 1)))
    np.testing.assert_allclose([float(x) for x in learn.recorder.losses[:4]], out[:4], rtol=1e-5)


@pytest.mark.parametrize('lr', [.1, slice(.001, .1)], ids=['one lr', 'discriminative'])
def test_several_groups_share_one_radius(lr):
    "T16 in the learner: the move in pass 2 has norm rho over all groups jointly, whatever their learning rates."
    bs, seen = batches(), []
    model, ref, _ = twins(mlp)
    opt = sgd(halves(ref), lr=.1)
    if lr != .1: opt.set_hyper('lr', [.001, .1])
    def look(m, args): seen.append([p.detach().clone() for p in m.parameters()])
    handle = model.register_forward_pre_hook(look)
    learn = learner(model, bs, SAM(rho=.3), opt_func=sgd, splitter=halves)
    learn.fit(2, lr)
    handle.remove()
    train(ref, bs, CE, opt, .3, epochs=2)
    assert_close(model, ref)
    moves = [sum(((x - y) ** 2).sum() for x, y in zip(a, b)).sqrt() for a, b in train_pairs(seen, 4, 1, 2)]
    torch.testing.assert_close(torch.stack(moves), torch.full((8,), .3, dtype=f64), rtol=1e-9, atol=0)


def train_pairs(seen, n_train, n_valid, epochs):
    "The (clean, perturbed) forwards of training: each epoch has 2 n_train of them, then n_valid."
    out, k = [], 0
    for _ in range(epochs):
        out += [(seen[k + 2 * i], seen[k + 2 * i + 1]) for i in range(n_train)]
        k += 2 * n_train + n_valid
    assert k == len(seen), f'{len(seen)} forwards, expected {k}'
    return out


# rho = 0 ----------------------------------------------------------------------------------------------------------

optimizers = dict(sgd=SGD, momentum=sgd, wd=partial(SGD, mom=.9, wd=.1),
                  l2=partial(SGD, mom=.9, wd=.1, decouple_wd=False),
                  adam=Adam, adamw=partial(Adam, wd=.1),
                  torch_sgd=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9),
                  torch_adamw=partial(OptimWrapper, opt=torch.optim.AdamW, weight_decay=.1))


def opt_state(learn):
    "All tensors of the optimizer's state, in a fixed order."
    def walk(o):
        if isinstance(o, torch.Tensor): yield o
        elif isinstance(o, dict):
            for k in sorted(o, key=str): yield from walk(o[k])
        elif isinstance(o, (list, tuple, L)):
            for x in o: yield from walk(x)
        elif isinstance(o, float): yield torch.tensor(o, dtype=f64)
    return list(walk(learn.opt.state_dict()))


@pytest.mark.parametrize('name', optimizers)
def test_rho_zero_is_plain_fastai_bit_for_bit(name):
    "T2: weights, buffers, optimizer state and the random stream, with batch norm and dropout."
    ends = []
    for cbs in ([], [SAM(rho=0.)]):
        torch.manual_seed(11)
        learn = learner(mlp(f32, nn.BatchNorm1d, .3), batches(dtype=f32), cbs, opt_func=optimizers[name], lr=.01)
        learn.fit(3, wd=None)
        ends.append((snapshot(learn.model), opt_state(learn), torch.get_rng_state()))
    assert_same(ends[0][0], ends[1][0], 'weights')
    assert len(ends[0][1]) > 0 or name == 'sgd'
    assert same_bits(ends[0][1], ends[1][1]), 'optimizer state differs'
    assert torch.equal(ends[0][2], ends[1][2]), 'the random stream differs'


def test_random_stream_is_that_of_plain_training():
    "Pass 2 draws what pass 1 drew and puts the stream back: the next batch sees the same numbers as without SAM."
    states = []
    for cbs in ([], [SAM(rho=.5)]):
        learn = learner(mlp(f32, drop=.5), batches(dtype=f32), cbs)
        torch.manual_seed(11)
        learn.fit(2)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


# Optimizers, weight decay -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', optimizers)
def test_optimizers(name):
    "Every optimizer just sees the SAM gradient; weight decay stays in the optimizer and out of the ascent (T7)."
    bs = batches()
    model, ref, opt = twins(mlp, optimizers[name], .01)
    learner(model, bs, SAM(rho=.2), opt_func=optimizers[name], lr=.01).fit(3)
    train(ref, bs, CE, opt, .2, epochs=3)
    assert_close(model, ref, 1e-8, 1e-10)


def test_one_optimizer_step_per_batch():
    "T22: Adam counts one step, and the first momentum buffer is the SAM gradient."
    bs = batches()
    learn = learner(mlp(), bs, SAM(), opt_func=Adam)
    learn.fit(2)
    assert {s['step'] for s in learn.opt.state.values()} == {8}
    model, ref, opt = twins(mlp)
    learn = learner(model, bs[:1], SAM(rho=.5), opt_func=sgd)
    learn.fit(1)
    train(ref, bs[:1], CE, opt, .5)
    for p, q in zip(model.parameters(), ref.parameters()):
        torch.testing.assert_close(learn.opt.state[p]['grad_avg'], opt.state[q]['grad_avg'])


# Clipping, accumulation -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('clip', [.05, .5, 100.])
def test_gradient_clip(clip):
    bs = batches()
    model, ref, opt = twins(mlp)
    learner(model, bs, [GradientClip(clip), SAM(rho=.2)], opt_func=sgd).fit(3)
    train(ref, bs, CE, opt, .2, epochs=3, clip=clip)
    assert_close(model, ref)


@pytest.mark.parametrize('n_acc', [6, 12, 18, 20])
@pytest.mark.parametrize('clip', [None, .1])
def test_gradient_accumulation_is_msam_over_micro_batches(n_acc, clip):
    "n_acc = 18 and 20 leave windows that cross epochs and a last one that is never full."
    bs = batches()
    model, ref, opt = twins(mlp)
    sam = SAM(rho=.2)
    learner(model, bs, [GradientAccumulation(n_acc), sam] + ([GradientClip(clip)] if clip else []), opt_func=sgd).fit(3)
    log = train(ref, bs, CE, opt, .2, epochs=3, n_acc=n_acc, clip=clip)
    assert_close(model, ref)
    check_gaps(sam, log)
    left = 72 % (6 * math.ceil(n_acc / 6))                                   # examples in the window left open
    if left:
        for p, q in zip(model.parameters(), ref.parameters()): torch.testing.assert_close(p.grad, q.grad)


class Point(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=f64))
    def forward(self, x): return self.w - x


@pytest.mark.parametrize('bs,n_acc,want', [(2, None, .6 - .2), (1, 2, .6 - .1), (2, 2, .6 - .2)])
def test_accumulation_fixture(bs, n_acc, want):
    "T9: at w = 0.6 the losses w^2/2 and (w-1)^2/2 have SAM gradient 0.2 together and 0.1 as two micro-batches."
    data = [(x, torch.zeros(len(x), dtype=torch.long)) for x in torch.tensor([0., 1.], dtype=f64).split(bs)]
    cbs = [SAM(rho=.1)] + ([GradientAccumulation(n_acc)] if n_acc else [])
    learn = learner(Point(.6), data, cbs, loss_func=lambda p, y: .5 * (p ** 2).mean(), lr=1.)
    learn.fit(1)
    assert abs(learn.model.w.item() - want) < 1e-12


def test_grad_of_earlier_micro_batches_is_not_touched():
    "Inside the ascent the accumulated .grad must be what it was before this micro-batch."
    seen = []
    class Look(Callback):
        order, run_valid = 5, False
        def before_backward(self):
            seen.append([None if p.grad is None else p.grad.clone() for p in self.model.parameters()])
    learner(mlp(), batches(), [Look(), GradientAccumulation(12), SAM(rho=.2)]).fit(1)
    assert len(seen) == 8                                                    # once per pass
    for clean, perturbed in zip(seen[0::2], seen[1::2]):
        for a, b in zip(clean, perturbed): assert (a is None and b is None) or torch.equal(a, b)


# Mixed precision --------------------------------------------------------------------------------------------------

class Watch(Callback):
    order, run_valid = 70, False
    def before_fit(self): self.seen, self.ws = [], []
    def after_batch(self):
        self.seen.append(self.learn.scaler.get_scale())
        self.ws.append(snapshot(self.learn.model))


MixedNamed = type('MixedPrecision', (CPUMixedPrecision,), {})                # becomes learn.mixed_precision


@pytest.mark.parametrize('amp', [CPUMixedPrecision, MixedNamed],
                         ids=['learn.cpu_mixed_precision', 'learn.mixed_precision'])
@pytest.mark.parametrize('extra', ['none', 'clip', 'acc', 'clip+acc'])
def test_loss_scaling_changes_nothing(amp, extra):
    "T21: with the loss scaled by 2^16 in both passes the update is that of fp32, not 2^-16 of it."
    bs = batches(dtype=f32)
    model, ref, opt = twins(partial(mlp, f32))
    sam = SAM(rho=.2)
    clip, n_acc = .1 if 'clip' in extra else None, 12 if 'acc' in extra else None
    start = snapshot(model)
    cbs = [amp(), sam] + ([GradientClip(clip)] if clip else []) + ([GradientAccumulation(n_acc)] if n_acc else [])
    learner(model, bs, cbs, opt_func=sgd).fit(3)
    log = train(ref, bs, CE, opt, .2, epochs=3, clip=clip, n_acc=n_acc)
    assert_close(model, ref, 1e-4, 1e-6)
    assert max((start[k] - v).abs().max() for k, v in snapshot(model).items()) > 1e-2
    check_gaps(sam, log, 1e-3, 1e-6)


class Blow(torch.autograd.Function):
    "Identity whose gradient is infinite when told so."
    @staticmethod
    def forward(ctx, x, bad):
        ctx.bad = bad
        return x.view_as(x)
    @staticmethod
    def backward(ctx, g): return (g * math.inf if ctx.bad else g), None


class Overflows(nn.Module):
    "A net whose gradient overflows in the forwards named in `bad` (counted over training forwards)."
    def __init__(self, bad):
        super().__init__()
        self.net, self.bad, self.calls = mlp(f32, nn.BatchNorm1d), bad, 0
    def forward(self, x):
        self.calls += self.training
        return Blow.apply(self.net(x), self.training and self.calls in self.bad)


@pytest.mark.parametrize('bad', [{5}, {6}, {5, 6}], ids=['pass 1', 'pass 2', 'both'])
def test_overflow_skips_the_step_and_halves_the_scale_once(bad):
    "Step 3 (forwards 5 and 6) overflows in one pass or both: weights intact, the scale halves once, then all goes on."
    bs = batches(dtype=f32)
    model = Overflows(bad)
    ref, sc = copy.deepcopy(model.net), Watch()
    learner(model, bs, [CPUMixedPrecision(), SAM(rho=.2), sc], opt_func=sgd).fit(2)
    ws = [{k: v for k, v in w.items() if 'running' not in k and 'num_b' not in k} for w in sc.ws]
    assert_same(ws[1], ws[2], 'weights of the skipped step')
    assert not same_bits(ws[0], ws[1]) and not same_bits(ws[2], ws[3])
    assert sc.seen == [2. ** 16] * 2 + [2. ** 15] * 6
    opt = sgd(list(ref.parameters()), lr=.1)
    train(ref, bs, CE, opt, .2, epochs=2, skip={2})
    assert_close(model.net, ref, 1e-4, 1e-5)                                 # buffers too: finite, one update per batch


def test_overflow_of_every_step_ends_in_intact_weights():
    model, sc = Overflows(set(range(1, 17, 2))), Watch()
    before = {k: v for k, v in snapshot(model).items() if 'running' not in k and 'num_b' not in k}
    learner(model, batches(dtype=f32), [CPUMixedPrecision(), SAM(rho=.2), sc], opt_func=sgd).fit(2)
    after = snapshot(model)
    assert_same(before, {k: after[k] for k in before})
    assert sc.seen == [2. ** (15 - i) for i in range(8)]


@pytest.mark.parametrize('dtype,scaled', [(torch.bfloat16, False), (torch.float16, True)], ids=['bf16', 'fp16 scaled'])
def test_both_passes_run_under_autocast(dtype, scaled):
    "Recorded by hooks: the linear layers give half-precision outputs in both passes; the result is the reference's."
    bs, seen = batches(dtype=f32), []
    model, ref, opt = twins(partial(mlp, f32))
    model[0].register_forward_hook(lambda m, i, o: note(m.training, lambda: seen.append(o.dtype)))
    learner(model, bs, [CPUMixedPrecision(dtype, scaled), SAM(rho=.2)], opt_func=sgd).fit(2)
    assert seen == [dtype] * 16
    assert not torch.is_autocast_enabled('cpu')
    assert all(p.dtype == f32 and p.grad.dtype == f32 for p in model.parameters())
    plain = copy.deepcopy(ref)
    train(plain, bs, CE, sgd(list(plain.parameters()), lr=.1), .2, epochs=2)
    train(ref, bs, CE, opt, .2, epochs=2, context=lambda: torch.autocast('cpu', dtype=dtype))
    if dtype is torch.bfloat16: assert_close(model, ref, 1e-4, 1e-5)
    else: assert_close(model, ref, 2e-2, 2e-3)                               # scaling changes fp16's rounding
    far = lambda a: max((x - y).abs().max() for x, y in zip(a.parameters(), ref.parameters()))
    assert far(plain) > 5 * far(model)


# Frozen, unused parameters ----------------------------------------------------------------------------------------

def test_freeze_and_unfreeze():
    "A frozen group neither moves nor counts in the norm; after unfreeze all of them do."
    bs, moved = batches(), []
    model, ref, _ = twins(mlp)
    opt = sgd(halves(ref), lr=.1)
    learn = learner(model, bs, SAM(rho=.2), opt_func=sgd, splitter=halves)
    model.register_forward_pre_hook(lambda m, a: moved.append(m[0].weight.detach().clone()))
    learn.freeze()
    learn.fit(2)
    assert same_bits(moved, [moved[0]] * len(moved)), 'a frozen weight was perturbed'
    for p in list(ref.parameters())[:2]: p.requires_grad_(False)
    train(ref, bs, CE, opt, .2, epochs=2)
    assert_close(model, ref)
    learn.unfreeze()                                                         # fastai forgets the momentum here
    learn.fit(2)
    opt.clear_state()
    for p in ref.parameters(): p.requires_grad_(True)
    train(ref, bs, CE, opt, .2, epochs=2)
    assert_close(model, ref)
    assert all(p.requires_grad for p in model.parameters())


def test_freeze_keeps_batch_norm_training_and_perturbed():
    "fastai keeps norm layers of frozen groups trainable (train_bn): they are perturbed like the rest."
    bs = batches()
    model, ref, _ = twins(partial(mlp, norm=nn.BatchNorm1d))
    learn = learner(model, bs, SAM(rho=.2), opt_func=sgd, splitter=halves)
    learn.freeze()
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True]
    learn.fit(2)
    for p in list(ref.parameters())[:2]: p.requires_grad_(False)
    train(ref, bs, CE, sgd(halves(ref), lr=.1), .2, epochs=2)
    assert_close(model, ref)


class Depth(nn.Module):
    "Stochastic depth by a Python flag: the middle layer is used in the forwards for which `use(n)` is true."
    def __init__(self, use):
        super().__init__()
        torch.manual_seed(5)
        self.a, self.mid, self.b = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.use, self.n = use, 0
        self.double()
    def forward(self, x):
        h = torch.tanh(self.a(x))
        if self.use(self.n) or not self.training: h = h + torch.tanh(self.mid(h))
        self.n += self.training
        return self.b(h)


def only_pass(k): return lambda n: n % 2 == k
def never(n): return False
def alternate(n): return (n // 2 + n % 2) % 2 == 0                           # in one pass of each batch, in turns


@pytest.mark.parametrize('use', [only_pass(0), only_pass(1), never, alternate],
                         ids=['pass 1', 'pass 2', 'neither', 'turns'])
@pytest.mark.parametrize('opt_func', [sgd, optimizers['torch_sgd']], ids=['fastai', 'torch'])
def test_parameters_without_gradient_in_a_pass(use, opt_func):
    "They are perturbed only if pass 1 used them, always put back, and stepped only by pass 2's gradient."
    bs = batches()
    model, ref, opt = twins(partial(Depth, use), opt_func)
    mid, where = snapshot(model.mid), [p.data_ptr() for p in model.parameters()]
    learner(model, bs, SAM(rho=.3), opt_func=opt_func).fit(3)
    train(ref, bs, CE, opt, .3, epochs=3)
    assert_close(model, ref)
    assert [p.data_ptr() for p in model.parameters()] == where
    if use is never or use(0) and not use(1) and use(2): assert_same(mid, snapshot(model.mid), 'unused weights')


# Which parameters are perturbed -----------------------------------------------------------------------------------

def make_norms(): return nn.Sequential(*mlp(norm=nn.BatchNorm1d), nn.LayerNorm(3).double())


def test_norm_params_are_those_of_normalisation_layers():
    "By type, not by name: every family of PyTorch's norm layers, nothing else."
    m = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.BatchNorm3d(4), nn.SyncBatchNorm(4),
                      nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True),
                      nn.InstanceNorm2d(4), nn.RMSNorm(4),
                      nn.Sequential(nn.Conv1d(4, 4, 1), nn.LayerNorm(4)))
    got = [id(p) for p in norm_params(m)]
    want = [id(p) for i in (1, 2, 3, 4, 5, 6, 7, 9) for p in m[i].parameters()] + [id(p) for p in m[10][1].parameters()]
    assert len(got) == len(set(got)) and set(got) == set(want)


@pytest.mark.parametrize('how', ['callable', 'list', 'generator', 'own function'])
def test_params_restricts_the_ascent_not_the_descent(how):
    "SAM-ON: only norm layers are perturbed, by a joint rho; every parameter gets the gradient at that point."
    bs, seen = batches(), []
    model, ref, opt = twins(make_norms)
    def mine(m): return (p for l in m if isinstance(l, (nn.BatchNorm1d, nn.LayerNorm)) for p in l.parameters())
    which = {'callable': norm_params, 'list': list(norm_params(model)), 'generator': iter(list(norm_params(model))),
             'own function': mine}[how]
    model.register_forward_pre_hook(lambda m, a: note(m.training, lambda: seen.append(m[0].weight.detach().clone())))
    learn = learner(model, bs, SAM(rho=1., params=which), opt_func=sgd)
    learn.fit(2)
    learn.fit(1)                                                             # a generator must last for a second fit
    train(ref, bs, CE, opt, 1., epochs=3, perturb=lambda k: k[0] in '14')
    assert_close(model, ref, 1e-8, 1e-10)
    assert all(torch.equal(a, b) for a, b in zip(seen[0::2], seen[1::2]))


def test_params_of_one_layer_and_frozen_ones():
    "`params` may name frozen parameters: those stay out."
    bs = batches()
    model, ref, _ = twins(mlp)
    learn = learner(model, bs, SAM(rho=.3, params=lambda m: m.parameters()), opt_func=sgd, splitter=halves)
    learn.freeze()
    learn.fit(2)
    for p in list(ref.parameters())[:2]: p.requires_grad_(False)
    train(ref, bs, CE, sgd(halves(ref), lr=.1), .3, epochs=2)
    assert_close(model, ref)


class Tied(nn.Module):
    "Two layers share one weight, as embedding and decoder of a language model do."
    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.a, self.b, self.out = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.b.weight = self.a.weight
        self.double()
    def forward(self, x): return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))


@pytest.mark.parametrize('params', [None, lambda m: [*m.a.parameters(), *m.b.parameters(), *m.out.parameters()]],
                         ids=['all', 'listed twice'])
def test_a_tied_weight_moves_once(params):
    bs = batches()
    model, ref, opt = twins(Tied)
    assert model.a.weight is model.b.weight and ref.a.weight is ref.b.weight
    learner(model, bs, SAM(rho=.3, params=params), opt_func=sgd).fit(2)
    train(ref, bs, CE, opt, .3, epochs=2)
    assert_close(model, ref)


# Layers with state or randomness ----------------------------------------------------------------------------------

norms = dict(bn=nn.BatchNorm1d, bn_none=partial(nn.BatchNorm1d, momentum=None), gn=lambda n: nn.GroupNorm(1, n),
             ln=nn.LayerNorm,
             bn_plain=partial(nn.BatchNorm1d, affine=False, track_running_stats=False))


@pytest.mark.parametrize('norm', norms)
def test_normalisation_layers(norm):
    "T19: statistics are those of the clean pass alone, one count per batch, also for the cumulative average."
    bs = batches()
    model, ref, opt = twins(partial(mlp, norm=norms[norm]))
    ids = {k: (id(b), b.data_ptr()) for k, b in model.named_buffers()}
    learner(model, bs, SAM(rho=.3), opt_func=sgd).fit(3)
    train(ref, bs, CE, opt, .3, epochs=3)
    assert_close(model, ref)
    assert {k: (id(b), b.data_ptr()) for k, b in model.named_buffers()} == ids
    if norm.startswith('bn') and norm != 'bn_plain': assert int(model[1].num_batches_tracked) == 12


def test_dropout_equals_reference_with_the_same_masks():
    "T20"
    bs = batches()
    model, ref, opt = twins(partial(mlp, drop=.4))
    learner(model, bs, [Seed(100), SAM(rho=.3)], opt_func=sgd).fit(3)
    train(ref, bs, CE, opt, .3, epochs=3, seed=100)
    assert_close(model, ref)


def masks_of(sam, cbs=(), steps=4):
    "The dropout masks of the two passes of each batch."
    torch.manual_seed(3)
    model = nn.Sequential(nn.Dropout(.5), nn.Linear(40, 3))
    seen = []
    model[0].register_forward_hook(lambda m, i, o: note(m.training, lambda: seen.append((o != 0))))
    bs = [(torch.ones(6, 40), y) for _, y in batches(steps, dtype=f32)]
    learner(model, bs, [sam, *cbs]).fit(1)
    assert len(seen) == 2 * steps
    return list(zip(seen[0::2], seen[1::2]))


def test_dropout_masks_are_shared_or_not():
    assert all(torch.equal(a, b) for a, b in masks_of(SAM()))
    assert not any(torch.equal(a, b) for a, b in masks_of(SAM(same_rng=False)))
    assert not torch.equal(masks_of(SAM())[0][0], masks_of(SAM())[1][0])     # but each batch has its own


class Draws(Callback):
    "A callback that draws random numbers at an event (augmentation on the batch, noise on the prediction)."
    run_valid = False
    def __init__(self, event, order):
        self.order = order
        setattr(self, event, self.go)
    def go(self): torch.rand(3)


@pytest.mark.parametrize('event,order', [(e, o) for e in ('before_batch', 'after_pred', 'after_loss', 'before_backward')
                                         for o in (-20, 5, 20, 80) if e != 'before_batch' or o < SAM.order])
def test_dropout_masks_are_shared_whatever_other_callbacks_draw(event, order):
    "The start of both passes is remembered in SAM's `before_batch`: what draws there must have a lower order (documented)"
    assert all(torch.equal(a, b) for a, b in masks_of(SAM(), [Draws(event, order)]))


def test_stream_goes_on_as_in_plain_training_with_drawing_callbacks():
    ends = []
    for sam in ([], [SAM()]):
        torch.manual_seed(3)
        learn = learner(mlp(f32, drop=.5), batches(dtype=f32),
                        [*sam, Draws('before_batch', 30), Draws('after_pred', 30)])
        learn.fit(1)
        ends.append(torch.get_rng_state())
    assert torch.equal(*ends)


# Recurrent models -------------------------------------------------------------------------------------------------

class Stateful(nn.Module):
    "A small language model as fastai builds them: hidden state from batch to batch, `reset`, three outputs."
    def __init__(self, drop=.3):
        super().__init__()
        torch.manual_seed(7)
        self.emb, self.rnn = nn.Embedding(9, 4), nn.GRU(4, 6, batch_first=True)
        self.drop, self.decoder = nn.Dropout(drop), nn.Linear(6, 9)
        self.reset()
    def reset(self): self.hidden = None
    def forward(self, x):
        raw, h = self.rnn(self.emb(x), self.hidden)
        self.hidden = h.detach()
        return self.decoder(self.drop(raw)), raw, self.drop(raw)


def tokens(n=4, bs=3, sl=5, vocab=9):
    gen = torch.Generator().manual_seed(2)
    t = torch.randint(0, vocab, (n, bs, sl + 1), generator=gen)
    return [(a[:, :-1].contiguous(), a[:, 1:].contiguous()) for a in t]


def lm_loss(pred, y): return nn.functional.cross_entropy(pred.reshape(-1, pred.shape[-1]), y.reshape(-1))


def reference_lm_loss(alpha, beta):
    "What RNNCallback and RNNRegularizer make of the three outputs: decoded, raw, dropped out."
    def f(outs, y):
        pred, raw, out = [o[-1] if isinstance(o, (list, tuple)) else o for o in outs]
        ar, tar = out.float().pow(2).mean(), (raw[:, 1:] - raw[:, :-1]).float().pow(2).mean()
        return lm_loss(pred, y) + alpha * ar + beta * tar
    return f


def copy_hidden(h):
    return h if h is None else h.clone() if isinstance(h, torch.Tensor) else type(h)(copy_hidden(x) for x in h)


@pytest.mark.parametrize('alpha,beta', [(0., 0.), (2., 1.)])
def test_recurrent_model_with_state_and_penalties(alpha, beta):
    """Pass 2 starts from the hidden state pass 1 started from and leaves the one pass 1 left; the AR and TAR
    penalties are in both passes."""
    bs = tokens()
    model, ref, opt = twins(Stateful)
    seen = []
    model.rnn.register_forward_pre_hook(lambda m, a: note(m.training, lambda: seen.append(copy_hidden(a[1]))))
    cbs = [ModelResetter(), RNNCallback(), Seed(50), SAM(rho=.3)] + ([RNNRegularizer(alpha, beta)] if alpha else [])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        learner(model, bs, cbs, loss_func=lm_loss, opt_func=sgd).fit(1)
    keep = (lambda m: m.hidden, lambda m, h: setattr(m, 'hidden', h))
    train(ref, bs, reference_lm_loss(alpha, beta), opt, .3, seed=50, second=Stateful(), keep=keep)
    assert_close(model, ref, 1e-4, 1e-6)
    assert len(seen) == 8 and seen[0] is None and seen[1] is None
    for a, b in zip(seen[2::2], seen[3::2]): assert a is not None and torch.equal(a, b)
    # the batches follow each other: what batch 2 starts from is what clean pass 1 left
    with torch.no_grad():
        m = Stateful()
        torch.testing.assert_close(seen[2], m.rnn(m.emb(bs[0][0]))[1])
    assert not [w for w in said if 'shadowing' in str(w.message)], 'an attribute of the callback hides one of the model'


def test_awd_lstm():
    "fastai's own language model, with its lists of hidden states and weight dropout."
    from fastai.text.models.awdlstm import AWD_LSTM
    from fastai.text.models.core import LinearDecoder, SequentialRNN
    def make():
        torch.manual_seed(4)
        enc = AWD_LSTM(9, 4, 5, 2, pad_token=0, hidden_p=.1, input_p=.1, embed_p=.1, weight_p=.2)
        return SequentialRNN(enc, LinearDecoder(9, 4, .1)).double()      # the penalties stay in single precision
    bs = tokens()
    model, ref = make(), make()
    opt = sgd([p for p in ref.parameters()], lr=.1)
    learner(model, bs, [ModelResetter(), RNNCallback(), RNNRegularizer(2., 1.), Seed(50), SAM(rho=.3)],
            loss_func=lm_loss, opt_func=sgd).fit(1)
    def get(m): return copy_hidden(m[0].hidden), m[0].bs
    def put(m, state): m[0].hidden, m[0].bs = copy_hidden(state[0]), state[1]
    ref.reset()
    train(ref, bs, reference_lm_loss(2., 1.), opt, .3, seed=50, second=make(), keep=(get, put))
    assert_close(model, ref, 1e-6, 1e-7)


# MixUp, other callbacks -------------------------------------------------------------------------------------------

def test_mixup_swaps_inputs_and_loss_once_per_batch():
    bs = batches(dtype=f32)
    model, ref, opt = twins(partial(mlp, f32))
    lf = CrossEntropyLossFlat()
    learn = learner(model, bs, [Seed(30), MixUp(.4), SAM(rho=.3)], loss_func=lf, opt_func=sgd)
    learn.fit(3)
    def mix(x, y):
        lam = torch.distributions.Beta(torch.tensor(.4), torch.tensor(.4)).sample((len(y),))
        lam = torch.maximum(lam, 1 - lam)
        other = torch.randperm(len(y))
        ce = partial(nn.functional.cross_entropy, reduction='none')
        mixed = lambda p, y: (ce(p, y[other]) * (1 - lam) + ce(p, y) * lam).mean()
        return x[other] + lam[:, None] * (x - x[other]), mixed
    train(ref, bs, CE, opt, .3, epochs=3, seed=30, mix=mix)
    assert_close(model, ref, 1e-4, 1e-6)
    assert learn.loss_func is lf


class Penalty(Callback):
    "Adds to the loss in `after_loss` and changes the prediction in `after_pred`, as a user's callback may."
    run_valid = False
    def __init__(self, order): self.order, self.calls = order, []
    def after_pred(self):
        self.calls.append('after_pred')
        self.learn.pred = 2 * self.learn.pred
    def after_loss(self):
        self.calls.append('after_loss')
        self.learn.loss_grad = self.learn.loss_grad + .7 * self.learn.pred.pow(2).mean()
    def before_backward(self):
        self.calls.append('before_backward')
        self.learn.loss_grad = 3 * self.learn.loss_grad
    def after_backward(self): self.calls.append('after_backward')


@pytest.mark.parametrize('order', [0, 8, 10, 30])
def test_events_of_other_callbacks_are_part_of_both_losses(order):
    """after_pred, after_loss and before_backward act on pass 2 exactly once, whichever side of SAM the callback is.
    Scaling the loss leaves the direction of the ascent alone."""
    bs, pen = batches(), Penalty(order)
    model, ref, opt = twins(mlp)
    learner(model, bs, [pen, SAM(rho=.3)], opt_func=sgd, lr=.02).fit(2)
    opt.set_hyper('lr', .02)
    train(ref, bs, lambda p, y: 3 * (CE(2 * p, y) + .7 * (2 * p).pow(2).mean()), opt, .3, epochs=2)
    assert_close(model, ref)
    per_batch = pen.calls[:len(pen.calls) // 8]
    counts = {e: per_batch.count(e) for e in ('after_pred', 'after_loss', 'before_backward', 'after_backward')}
    assert counts == dict(after_pred=2, after_loss=2, before_backward=2 if order < SAM.order else 1, after_backward=1)


def test_batch_and_labels_of_pass_2_are_those_of_pass_1():
    bs, seen = batches(), []
    model = mlp()
    model.register_forward_pre_hook(lambda m, a: note(m.training, lambda: seen.append(a[0])))
    learner(model, bs, SAM()).fit(1)
    assert all(a is b or torch.equal(a, b) for a, b in zip(seen[0::2], seen[1::2])) and len(seen) == 8


# The learner's other verbs ----------------------------------------------------------------------------------------

def counted(model, box):
    model.register_forward_pre_hook(lambda m, a: box.append(m.training))
    return model


def test_validate_and_get_preds_run_one_forward_and_no_sam():
    box, bs = [], batches()
    model = counted(mlp(f32), box)
    learn = learner(model, batches(dtype=f32), SAM(), valid=batches(3, dtype=f32, seed=8), recorder=True)
    learn.fit(1)
    gaps, before = list(learn.sam.gaps), snapshot(model)
    assert box == [True] * 8 + [False] * 3
    box.clear()
    learn.validate()
    assert box == [False] * 3
    box.clear()
    preds, targs = learn.get_preds()
    assert box == [False] * 3 and len(preds) == 18
    x = torch.cat([x for x, _ in batches(3, dtype=f32, seed=8)])
    with torch.no_grad(): torch.testing.assert_close(preds, model(x))
    assert learn.sam.gaps == gaps
    assert_same(before, snapshot(model))


def test_lr_find_puts_the_weights_back(tmp_path):
    learn = learner(mlp(f32, nn.BatchNorm1d), batches(dtype=f32), SAM(rho=.2), recorder=True, path=tmp_path)
    before = snapshot(learn.model)
    learn.fit(1, cbs=LRFinder(num_it=12))
    assert_same(before, snapshot(learn.model))
    assert len(learn.recorder.lrs) >= 4 and np.isfinite(float(learn.recorder.losses[0]))
    learn.fit(1)
    assert not same_bits(before, snapshot(learn.model)) and all(np.isfinite(learn.sam.gaps))


def test_lr_find_method_runs(tmp_path):
    learn = learner(mlp(f32), batches(dtype=f32), SAM(rho=.2), recorder=True, path=tmp_path)
    before = snapshot(learn.model)
    learn.lr_find(num_it=12, show_plot=False, suggest_funcs=())
    assert_same(before, snapshot(learn.model))


def test_fit_one_cycle():
    bs = batches()
    model, ref, opt = twins(mlp, Adam, .05)
    learner(model, bs, SAM(rho=.2), opt_func=Adam, lr=.05).fit_one_cycle(3, .05)
    lr, mom = combined_cos(.25, .05 / 25, .05, .05 / 1e5), combined_cos(.25, .95, .85, .95)
    train(ref, bs, CE, opt, .2, epochs=3, schedule=lambda pct: dict(lr=lr(pct), mom=mom(pct)))
    assert_close(model, ref, 1e-8, 1e-10)


@pytest.mark.parametrize('opt_func', [partial(SGD, mom=.9), Adam, optimizers['torch_adamw']],
                         ids=['sgd', 'adam', 'torch'])
def test_saved_and_resumed_equals_uninterrupted(opt_func, tmp_path):
    "T23: two epochs, a file, a new learner, two more epochs. And a learner without SAM can read the file."
    bs = batches(dtype=f32)
    make = lambda cbs: learner(mlp(f32, nn.BatchNorm1d), bs, cbs, opt_func=opt_func, lr=.01, recorder=True,
                               path=tmp_path)
    whole = make([SAM(rho=.2)])
    whole.fit(4)
    a = make([SAM(rho=.2), SaveModelCallback(every_epoch=True, with_opt=True, fname='m')])
    a.fit(2)
    b = make([SAM(rho=.2)])
    b.load('m_1', with_opt=True, weights_only=False)
    b.fit(2)
    assert_same(snapshot(whole.model), snapshot(b.model))
    assert same_bits(opt_state(whole), opt_state(b))
    c, plain = make([]), make([])
    c.load('m_1', with_opt=True, weights_only=False)
    c.fit(1)
    plain.fit(1)
    plain.save('plain', with_opt=True)
    def size(name):
        state = torch.load(tmp_path / f'models/{name}.pth', weights_only=False)
        return sum(t.numel() for t in tensors_in(state))
    assert size('m_1') == size('plain'), 'the file holds more tensors than one of plain training'


def tensors_in(o):
    if isinstance(o, torch.Tensor): yield o
    inside = o.values() if isinstance(o, dict) else o if isinstance(o, (list, tuple, L)) else ()
    for x in inside: yield from tensors_in(x)


def test_save_best_model_is_unperturbed(tmp_path):
    "SaveModelCallback's file holds weights the optimizer made."
    learn = learner(mlp(f32), batches(dtype=f32), [SAM(rho=5.), SaveModelCallback(with_opt=True, at_end=True)],
                    recorder=True, path=tmp_path)
    learn.fit(2)
    saved = torch.load(tmp_path / 'models/model.pth', weights_only=False)['model']
    assert_same(dict(saved), snapshot(learn.model))


class OfIndex(nn.Module):
    "A net on rows of a fixed table: its data set is range(n), which `export` can write without any transform."
    def __init__(self):
        super().__init__()
        self.net = mlp(f32)
        self.register_buffer('rows', torch.randn(24, 5, generator=torch.Generator().manual_seed(2)))
    def forward(self, i): return self.net(self.rows[i])


def mod_three(pred, i): return nn.functional.cross_entropy(pred, i % 3)


@pytest.mark.parametrize('fitted', [False, True])
@pytest.mark.parametrize('rho', [.2, SchedLin(.1, .3)], ids=['number', 'schedule'])
def test_export_and_load_learner(fitted, rho, tmp_path):
    dls = Datasets(list(range(24)), [[], []], splits=[list(range(18)), list(range(18, 24))]).dataloaders(
        bs=6, device=torch.device('cpu'), num_workers=0, shuffle=False)
    learn = Learner(dls, OfIndex(), loss_func=mod_three, opt_func=sgd, path=tmp_path, cbs=SAM(rho=rho))
    with learn.no_bar(), learn.no_logging():
        if fitted: learn.fit(1, .1)
        learn.export('x.pkl')
        again = load_learner(tmp_path / 'x.pkl')
        with again.no_bar(), again.no_logging():
            assert_same(snapshot(learn.model), snapshot(again.model))
            assert again.sam.order == SAM.order and (callable(again.sam.rho) or again.sam.rho == .2)
            again.dls = learn.dls
            torch.manual_seed(0)
            again.fit(1, .1)
        torch.manual_seed(0)
        learn.opt = None
        learn.fit(1, .1)
    assert_same(snapshot(learn.model), snapshot(again.model))


def test_callback_keeps_no_tensors_after_fit():
    "They would be pickled by export and hold memory."
    learn = learner(mlp(), batches(), SAM(adaptive=True))
    learn.fit(1)
    def holds(v): return any(True for _ in tensors_in(v if torch.is_tensor(v) else getattr(v, '__dict__', v)))
    held = [k for k, v in vars(learn.sam).items() if k != 'learn' and holds(v)]
    assert not held, held


# rho ----------------------------------------------------------------------------------------------------------------

def test_rho_as_a_function_of_progress():
    bs = batches()
    for opt_func in (sgd, optimizers['torch_sgd']):
        model, ref, opt = twins(mlp, opt_func)
        learner(model, bs, SAM(rho=SchedLin(.01, .6)), opt_func=opt_func).fit(3)
        train(ref, bs, CE, opt, lambda pct: .01 + .59 * pct, epochs=3)
        assert_close(model, ref, 1e-8, 1e-10)


def test_rho_by_param_scheduler_for_that_fit_only():
    "ParamScheduler overrides the callback's rho while it runs; the next fit has the callback's own again."
    bs = batches()
    model, ref, opt = twins(mlp)
    learn = learner(model, bs, SAM(rho=.05), opt_func=sgd)
    learn.fit(2, cbs=ParamScheduler({'rho': SchedCos(.6, .1)}))
    train(ref, bs, CE, opt, lambda pct: SchedCos(.6, .1)(pct), epochs=2)
    assert_close(model, ref, 1e-8, 1e-10)
    learn.fit(2)
    train(ref, bs, CE, opt, .05, epochs=2)
    assert_close(model, ref, 1e-8, 1e-10)


def test_own_rho_is_back_after_an_interrupted_scheduled_fit():
    class Stop(Callback):
        def after_step(self): raise self.error
    for error in (RuntimeError('stop'), CancelFitException()):
        bs = batches()
        model, ref, _ = twins(mlp)
        learn, stop = learner(model, bs, SAM(rho=.05), opt_func=sgd), Stop()
        stop.error = error
        with contextlib.suppress(RuntimeError): learn.fit(2, cbs=[ParamScheduler({'rho': SchedLin(.6, .6)}), stop])
        ref.load_state_dict(model.state_dict())
        for p in model.parameters(): p.grad = None
        learn.create_opt()
        learn.fit(1)
        train(ref, bs, CE, sgd(list(ref.parameters()), lr=.1), .05)
        assert_close(model, ref, 1e-8, 1e-10)


def test_rho_in_fit_one_cycle_beside_its_own_scheduler():
    "Two ParamSchedulers at once: fit_one_cycle's and the one for rho."
    bs = batches()
    model, ref, opt = twins(mlp, Adam, .05)
    learn = learner(model, bs, SAM(rho=.05), opt_func=Adam, lr=.05)
    learn.fit_one_cycle(2, .05, cbs=ParamScheduler({'rho': SchedLin(.1, .5)}))
    lr, mom = combined_cos(.25, .05 / 25, .05, .05 / 1e5), combined_cos(.25, .95, .85, .95)
    train(ref, bs, CE, opt, lambda pct: .1 + .4 * pct, epochs=2, schedule=lambda pct: dict(lr=lr(pct), mom=mom(pct)))
    assert_close(model, ref, 1e-8, 1e-10)


# Compiled models ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('norm', [None, nn.BatchNorm1d], ids=['plain', 'batch norm'])
def test_compiled_model(norm):
    "torch.compile with the eager backend: the same numbers, and no new graph after the first steps."
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters
    dynamo.reset()
    counters.clear()
    bs = batches()
    model, ref, opt = twins(partial(mlp, norm=norm))
    learn = learner(torch.compile(model, backend='eager'), bs, SAM(rho=.3), opt_func=sgd)
    learn.fit(1)
    graphs = counters['stats']['unique_graphs']
    learn.fit(3)
    train(ref, bs, CE, opt, .3, epochs=4)
    assert_close(model, ref)
    assert counters['stats']['unique_graphs'] == graphs
    plain = counters_of_plain_training(norm)
    assert graphs <= plain, f'{graphs} graphs where plain training needs {plain}'
    dynamo.reset()


def counters_of_plain_training(norm):
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters
    dynamo.reset()
    counters.clear()
    learner(torch.compile(mlp(norm=norm), backend='eager'), batches(), opt_func=sgd).fit(1)
    return counters['stats']['unique_graphs']


# Cost ---------------------------------------------------------------------------------------------------------------

class Count(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, box):
        ctx.box = box
        box['forward'] += 1
        return x.view_as(x)
    @staticmethod
    def backward(ctx, g):
        ctx.box['backward'] += 1
        return g, None


class Counting(nn.Module):
    def __init__(self, **kw):
        super().__init__()
        self.net, self.box = mlp(**kw), dict(forward=0, backward=0)
    def forward(self, x): return self.net[-1](Count.apply(self.net[:-1](x), self.box))


@pytest.mark.parametrize('acc', [False, True])
def test_two_forwards_and_two_backwards_per_step(acc):
    "T25"
    model = Counting()
    learn = learner(model, batches(), [SAM()] + ([GradientAccumulation(12)] if acc else []))
    learn.fit(1)
    assert model.box == dict(forward=9, backward=8)                          # 4 batches, and one forward of validation


class Syncs(TorchDispatchMode):
    "Notes every operation that makes the host wait for a device: reading a value, or a shape that depends on one."
    waits = ('_local_scalar_dense', 'nonzero', 'masked_select', 'is_nonzero', 'unique', 'equal', 'allclose')
    def __init__(self):
        super().__init__()
        self.seen = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        dtypes = {t.dtype for t in args if torch.is_tensor(t)}
        if name in self.waits and dtypes != {torch.uint8}: self.seen.append(name)   # bytes: states of generators, on the host
        by_mask = name.startswith('index') and any(getattr(t, 'dtype', None) == torch.bool for t in args[1])
        if name in ('index', 'index_put', 'index_put_') and by_mask:
            self.seen.append(f'{name} by a mask')
        return func(*args, **(kwargs or {}))


def in_short(value):
    "A name for a case that is the same in every process: no addresses"
    if isinstance(value, dict): return ','.join(f'{k}={in_short(v)}' for k, v in value.items()) or 'defaults'
    return getattr(value, '__name__', type(value).__name__) if callable(value) else str(value)


@pytest.mark.parametrize('kw', [dict(), dict(adaptive=True), dict(p=math.inf), dict(p=3.), dict(same_rng=False),
                                dict(params=norm_params),
                                dict(rho=SchedLin(.1, .2))], ids=in_short)
def test_no_host_sync_during_a_step(kw, monkeypatch):
    "Between the first event of a training batch and its last, no tensor is read back: a GPU's queue never drains."
    calls, active = [], [False]
    for name in ('item', '__bool__', '__float__', '__int__', 'tolist', 'cpu', 'numpy', '__index__', '__format__',
                 '__repr__'):
        old = getattr(torch.Tensor, name)
        @functools.wraps(old)
        def spy(self, *a, _old=old, _name=name, **k):
            if active[0]: calls.append(_name)
            return _old(self, *a, **k)
        monkeypatch.setattr(torch.Tensor, name, spy)
    mode = Syncs()
    class Start(Callback):
        order, run_valid = -1000, False
        def before_batch(self):
            mode.__enter__()
            active[0] = True
    class Stop(Callback):
        order, run_valid = 1000, False
        def after_batch(self):
            active[0] = False
            mode.__exit__(None, None, None)
    learner(mlp(f32, nn.BatchNorm1d, .2), batches(dtype=f32), [Start(), SAM(**kw), Stop()], opt_func=sgd).fit(2)
    assert not calls and not mode.seen, (calls, mode.seen)


def test_the_spies_see_a_sync():
    "The test above can fail."
    mode = Syncs()
    with mode:
        torch.ones(3).sum().item()
        torch.ones(3)[torch.tensor([True, False, True])]
    assert mode.seen == ['_local_scalar_dense', 'index by a mask']


class LiveBytes(TorchDispatchMode):
    "Adds up the storages alive after every operation and remembers the peak (views counted once)."
    def __init__(self, start):
        super().__init__()
        self.refs, self.peak = {}, 0
        for t in start: self.add(t)
    def add(self, t):
        s = t.untyped_storage()
        known = self.refs.get(s._cdata)
        if known is None or known[0].expired(): self.refs[s._cdata] = (StorageWeakRef(s), s.nbytes())
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(torch.Tensor, self.add, out)
        self.refs = {k: r for k, r in self.refs.items() if not r[0].expired()}
        self.peak = max(self.peak, sum(n for _, n in self.refs.values()))
        return out


def conv_net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
                         nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3))


def peak_of_a_step(cbs):
    "Peak bytes of the third step of a fit (by then .grad and the optimizer's state exist)."
    bs, out = batches(3, 32, f32, shape=(3, 16, 16)), {}
    class Measure(Callback):
        order, run_valid = -1000, False
        def before_batch(self):
            if self.train_iter != 2: return
            opt = [t for t in tensors_in(self.opt.state_dict())]
            grads = [p.grad for p in self.learn.model.parameters()]
            out['mode'] = LiveBytes([*self.learn.model.parameters(), *self.learn.model.buffers(), *grads, *opt,
                                     *self.xb, *self.yb])
            out['mode'].__enter__()
        def after_batch(self):
            if self.train_iter != 2: return
            out['mode'].__exit__(None, None, None)
    learn = learner(conv_net(), bs, [Measure(), *cbs], opt_func=sgd)
    learn.fit(1)
    bytes_of = lambda ts: sum(t.numel() * t.element_size() for t in ts)
    return out['mode'].peak, bytes_of(learn.model.parameters()), bytes_of(learn.model.buffers())


@pytest.mark.parametrize('kw,copies', [(dict(), 1), (dict(params=norm_params), 0), (dict(adaptive=True), 1),
                                       (dict(p=math.inf), 1)], ids=in_short)
def test_peak_memory_is_one_copy_of_the_perturbed_weights_above_sgd(kw, copies):
    "Live storages, tracked through the dispatcher: SAM - SGD <= one copy of what is perturbed + buffers + 16 KB."
    plain, weights, buffers = peak_of_a_step([])
    sam, *_ = peak_of_a_step([SAM(**kw)])
    print(f'{kw}: SGD {plain:,} B, SAM {sam:,} B, difference {sam - plain:,} B; one copy of the weights {weights:,} B')
    assert sam - plain <= copies * weights + buffers + 16_000, (sam - plain, weights)


# Bad input ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kw,error,name', [(dict(rho=-.1), ValueError, 'rho'), (dict(rho=math.nan), ValueError, 'rho'),
                                           (dict(rho=math.inf), ValueError, 'rho'),
                                           (dict(rho='large'), TypeError, 'rho'), (dict(rho=True), TypeError, 'rho'),
                                           (dict(rho=None), TypeError, 'rho'),
                                           (dict(p=.5), ValueError, 'p'), (dict(p=math.nan), ValueError, 'p'),
                                           (dict(eta=-1.), ValueError, 'eta'),
                                           (dict(eta=math.nan), ValueError, 'eta')], ids=str)
def test_bad_arguments_are_refused_at_construction(kw, error, name):
    with pytest.raises(error) as e: SAM(**kw)
    assert name in str(e.value) and str(list(kw.values())[0]) in str(e.value), str(e.value)


def test_unknown_arguments_are_refused():
    with pytest.raises((TypeError, AssertionError)): SAM(roh=.1)


@pytest.mark.parametrize('params', [lambda m: [], [], norm_params, [nn.Parameter(torch.ones(2))], 3, 'norm', [3],
                                    lambda m: ['norm']],
                         ids=['nothing', 'empty list', 'no norm layer', 'foreign', 'number', 'text', 'list of numbers',
                              'list of text'])
def test_params_that_match_nothing_are_named_before_a_weight_moves(params):
    model = mlp()
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match='params'): learner(model, batches(), SAM(params=params)).fit(1)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize('rho,error', [(lambda pct: -1., ValueError), (lambda pct: math.nan, ValueError),
                                       (lambda pct: 'x', TypeError)], ids=['negative', 'nan', 'text'])
def test_a_schedule_that_leaves_the_range_is_named(rho, error):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(error, match='rho'): learner(model, batches(), SAM(rho=rho)).fit(1)
    assert_same(before, snapshot(model))


def test_param_scheduler_out_of_range_is_named():
    model = mlp()
    before = snapshot(model)
    learn = learner(model, batches(), SAM())
    with pytest.raises(ValueError, match='rho'): learn.fit(1, cbs=ParamScheduler({'rho': SchedLin(-1., -1.)}))
    assert_same(before, snapshot(model))
