"""MESA against loops written from its equation, under everything that can come between loss and step."""
import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import CPUMixedPrecision, assert_close, assert_same, batches, learner, mlp, snapshot
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, OptimWrapper
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import *
from fastai.callback.training import GradientAccumulation, GradientClip
from hypothesis import given, strategies as st
from processes import in_processes
from reference import sam_gradient
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sam_explained.mesa import MESA, MeanTeacher, warm_decay
from sam_explained.msam import MSAM
from sam_explained.sam import SAM
from sam_explained.saf import trajectory_loss

f32, f64 = torch.float32, torch.float64
sgd = partial(SGD, mom=.9)
bn = partial(mlp, norm=nn.BatchNorm1d)


def term(z, past, tau):
    "The KL divergence, entry by entry"
    p, q = (past / tau).exp(), (z / tau).exp()
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    return (p * (p / q).log()).sum() / len(z)


def mesa_train(model, data, lam=.8, tau=5., decay=.9998, start=0, epochs=1, n_acc=None, rho=None, lr=.1, start_epoch=0,
               smooth=0.):
    "The definition, with the weights of the teacher as a plain list; SAM if there is a rho"
    import copy
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=.9)
    teacher, t, count = copy.deepcopy(model).eval(), 0, 0
    for epoch in range(start_epoch, epochs):
        model.train()
        for x, y in data:
            with torch.no_grad(): past = teacher(x)
            def loss(call):
                z = call(x)
                return F.cross_entropy(z, y, label_smoothing=smooth) + (lam * term(z, past, tau) if epoch >= start else 0)
            g = sam_gradient(model, loss, rho)[0] if rho else torch.autograd.grad(loss(model), list(model.parameters()))
            share = len(y) / n_acc if n_acc else 1.
            for w, o in zip(model.parameters(), g): w.grad = share * o + (0 if w.grad is None else w.grad)
            count += len(y)
            if n_acc and count < n_acc: continue
            count = 0
            opt.step()
            opt.zero_grad()
            b = min(decay, (1 + t) / (10 + t))
            with torch.no_grad():
                for v, w in zip(teacher.parameters(), model.parameters()): v.copy_(b * v + (1 - b) * w)
                for v, w in zip(teacher.buffers(), model.buffers()): v.copy_(w)
            t += 1
    return teacher


@pytest.mark.parametrize('make', [mlp, bn])
@pytest.mark.parametrize('kw', [dict(), dict(lam=3., tau=2.), dict(decay=.5), dict(start=2)], ids=str)
def test_the_definition(make, kw):
    model, ref, other = make(), make(), make()
    learn = learner(model, batches(), MESA(**dict(start=0) | kw), opt_func=sgd)
    learn.fit(3)
    teacher = mesa_train(ref, batches(), epochs=3, **kw)
    mesa_train(other, batches(), epochs=3, **dict(kw, lam=0.))
    assert_close(model, ref)
    assert_close(learn.mesa.teacher.model, teacher)
    assert max((a - b).abs().max() for a, b in zip(model.parameters(), other.parameters())) > 1e-6


def test_the_square_of_tau():
    model, ref = mlp(), mlp()
    learner(model, batches(), MESA(.8, 3., start=0, tau_sq=True), opt_func=sgd).fit(2)
    mesa_train(ref, batches(), .8 * 9, 3., epochs=2)
    assert_close(model, ref)


def test_label_smoothing():
    a, b, data = mlp(), mlp(), batches()
    learner(a, data, MESA(lam=3., start=0), opt_func=sgd, loss_func=nn.CrossEntropyLoss(label_smoothing=.2)).fit(2)
    mesa_train(b, data, lam=3., epochs=2, smooth=.2)
    assert_close(a, b)


def test_mixtures_are_asked_as_they_are():
    "What the teacher gets is the mixed batch itself"
    seen = []
    class Look(Callback):
        order, run_valid = 40, False
        def after_loss(self):
            z, past = self.pred, self.mesa.teacher.model(self.xb[0])
            seen.append((self.loss_grad - self.loss - 3 * term(z, past, 5.)).abs().item())
    learner(mlp(f32), batches(dtype=f32), [MESA(lam=3., start=0), MixUp(), Look()],
            loss_func=CrossEntropyLossFlat()).fit(2)
    assert len(seen) == 8 and max(seen) < 1e-6


def test_looking_for_a_learning_rate(tmp_path):
    "The term is off, weights and average come back, and the fit after it is the one without it"
    def fresh(*cbs, **kw): return learner(mlp(f32), batches(dtype=f32), cbs, recorder=True, path=tmp_path, **kw)
    plain, ours, other = fresh(), fresh(MESA(lam=3., start=0)), fresh(MESA(lam=3., start=0))
    found = []
    for learn in (plain, ours):
        learn.lr_find(num_it=12, show_plot=False, suggest_funcs=())
        found.append(learn.recorder.losses)
    assert torch.equal(*map(torch.stack, found))
    ours.fit(2)
    other.fit(2)
    assert_same(snapshot(ours.model), snapshot(other.model))
    assert_same(snapshot(ours.mesa.teacher.model), snapshot(other.mesa.teacher.model))


def test_with_accumulation():
    model, ref = mlp(), mlp()
    learn = learner(model, batches(), [MESA(start=0), GradientAccumulation(12)], opt_func=sgd)
    learn.fit(2)
    mesa_train(ref, batches(), epochs=2, n_acc=12)
    assert_close(model, ref)
    assert learn.mesa.teacher.t == 4


@pytest.mark.parametrize('make', [mlp, bn])
def test_with_sam(make):
    model, ref = make(), make()
    learn = learner(model, batches(), [MESA(start=1), SAM(.3)], opt_func=sgd)
    asked = []
    class Count(Callback):
        order = MESA.order + 1
        def before_fit(self): learn.mesa.teacher.model.register_forward_hook(lambda *_: asked.append(0))
    learn.add_cb(Count())
    learn.fit(3)
    mesa_train(ref, batches(), start=1, epochs=3, rho=.3)
    assert_close(model, ref)
    assert len(asked) == 2 * 4                           # once per batch, and not before the start
    assert len(learn.mesa.kls) == 4


def test_with_shards_it_is_accumulated_sam():
    "MSAM over two shards of a batch of 6 is SAM over two batches of 3 that are accumulated"
    one, two = mlp(), mlp()
    learner(one, batches(), [MESA(start=0), MSAM(2, .3)], opt_func=sgd).fit(2)
    small = [(a, b) for x, y in batches() for a, b in zip(x.split(3), y.split(3))]
    learner(two, small, [MESA(start=0), SAM(.3), GradientAccumulation(6)], opt_func=sgd).fit(2)
    assert_close(one, two)


def test_a_scaler_that_skips_steps():
    "The third of four batches overflows: its weights do not enter the average"
    calls = []
    def loss(z, y):
        calls.append(0)
        return F.cross_entropy(z, y) * (math.inf if len(calls) == 3 else 1.)
    learn = learner(mlp(f32), batches(dtype=f32), [MESA(start=0), CPUMixedPrecision()], loss_func=loss, opt_func=sgd)
    learn.fit(1)
    assert learn.mesa.teacher.t == 3
    assert all(w.isfinite().all() for w in learn.mesa.teacher.model.parameters())


def test_loss_scaling():
    model, ref = mlp(f32), mlp(f32)
    learner(model, batches(dtype=f32), [MESA(start=0), CPUMixedPrecision()], opt_func=sgd).fit(2)
    mesa_train(ref, batches(dtype=f32), epochs=2)
    assert_close(model, ref, 1e-4, 1e-6)


@pytest.mark.parametrize('kw', [dict(lam=0., start=0), dict(start=3)], ids=str)
@pytest.mark.parametrize('extra', [lambda: [], lambda: [SAM(.3)], lambda: [CPUMixedPrecision()], lambda: [GradientClip(.1)]])
def test_without_the_term_it_is_the_base_run(kw, extra):
    def end(*cbs):
        torch.manual_seed(5)
        model = bn(f32, drop=.3)
        learner(model, batches(dtype=f32), [*cbs, *extra()], opt_func=sgd).fit(3)
        return dict(snapshot(model), rng=torch.get_rng_state())
    assert_same(end(), end(MESA(**kw)))


def test_the_term_draws_nothing():
    "A teacher that draws random numbers, and a student with dropout: the generator goes on as without"
    class Noisy(nn.Linear):
        def forward(self, x): return super().forward(x + torch.randn_like(x))
    def end(lam):
        torch.manual_seed(5)
        learner(nn.Sequential(Noisy(5, 7), nn.Dropout(.2), nn.Linear(7, 3)).double(), batches(), MESA(lam, start=0)).fit(2)
        return torch.get_rng_state()
    assert torch.equal(end(0.), end(.8))


def test_validation_leaves_the_average_alone():
    learn = learner(mlp(), batches(), MESA(start=0), valid=batches(7, seed=2))
    learn.fit(2)
    assert learn.mesa.teacher.t == 8
    before = snapshot(learn.mesa.teacher.model)
    learn.validate()
    assert_same(before, snapshot(learn.mesa.teacher.model))


def test_the_logged_loss_is_the_plain_loss():
    seen = []
    class Look(Callback):
        order, run_valid = 1000, False
        def after_loss(self): seen.append((self.loss - F.cross_entropy(self.pred, *self.yb)).abs().item())
    learner(mlp(), batches(), [MESA(5., start=0), Look()]).fit(1)
    assert max(seen) < 1e-12


def test_the_column():
    learn = learner(mlp(f32), batches(dtype=f32), MESA(start=1), recorder=True)
    for _ in range(2):
        learn.fit(3)
        at = learn.recorder.metric_names.index('kl') - 1                    # the names begin with the epoch
        kl = [row[at] for row in learn.recorder.values]
        assert list(learn.recorder.metric_names).count('kl') == 1 and not len(learn.metrics)
        assert math.isnan(kl[0]) and all(k > 0 for k in kl[1:])


@pytest.mark.parametrize('opt_func', [sgd, partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9))])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path, opt_func):
    def fresh(): return learner(bn(), batches(), MESA(start=1, decay=.9), opt_func=opt_func, path=tmp_path)
    whole = fresh()
    whole.fit(4)
    first = fresh()
    first.fit(2)
    first.save('two')
    second = fresh()
    second.load('two')
    second.fit(4, start_epoch=2)
    assert_same(snapshot(whole.model), snapshot(second.model))
    assert_same(snapshot(whole.mesa.teacher.model), snapshot(second.mesa.teacher.model))
    assert second.mesa.teacher.t == 16


def test_an_average_of_another_model(tmp_path):
    first = learner(mlp(), batches(), MESA(start=1), path=tmp_path)
    first.fit(1)
    other = learner(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double(), batches(), MESA())
    other.create_opt()
    other.opt.hypers[0]['mesa'] = first.opt.hypers[0]['mesa']
    before = snapshot(other.model)
    with pytest.raises(ValueError, match='average of 0.weight'): other.fit(1)
    assert_same(before, snapshot(other.model))


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.floats(.01, .999))
def test_the_average_is_a_weighted_mean(values, decay):
    model = nn.Linear(1, 1, bias=False).double()
    teacher, shares = MeanTeacher(model, decay), [1.]
    path = [model.weight.item()]
    for t, v in enumerate(values):
        with torch.no_grad(): model.weight.fill_(v)
        teacher.update(model)
        b = min(decay, (1 + t) / (10 + t))
        shares = [b * s for s in shares] + [1 - b]
        path.append(v)
    assert abs(sum(shares) - 1) < 1e-9
    assert abs(teacher.model.weight.item() - sum(s * v for s, v in zip(shares, path))) < 1e-9


def test_counters_are_copied():
    learn = learner(bn(), batches(), MESA(start=0))
    learn.fit(2)
    assert learn.mesa.teacher.model[1].num_batches_tracked == learn.model[1].num_batches_tracked == 8


@pytest.mark.parametrize('model, data, told', [
    (nn.Sequential(nn.Linear(5, 3), nn.Unflatten(1, (3, 1))).double(), None, 'logits'),
    (nn.Linear(5, 1).double(), 'floats', 'integer class')])
@pytest.mark.parametrize('start', [0, 9])
def test_not_a_classification(model, data, told, start):
    "Said at the first batch, however late the term begins"
    bs = [(x, x[:, 0]) for x, _ in batches()] if data else batches()
    loss = nn.MSELoss() if data else lambda z, y: z.square().mean()
    before = snapshot(model)
    with pytest.raises(ValueError, match=told): learner(model, bs, MESA(start=start), loss_func=loss).fit(1)
    assert_same(before, snapshot(model))


def test_the_column_is_that_of_the_callback_that_runs():
    "After an interrupted fit with one callback, a fit with another"
    class Stop(Callback):
        def before_batch(self):
            if self.training and self.train_iter == 2: raise KeyboardInterrupt
    learn = learner(mlp(f32), batches(dtype=f32), [MESA(start=0), Stop()], recorder=True)
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    learn.remove_cbs([learn.stop, learn.mesa])
    learn.add_cb(MESA(start=0))
    learn.fit(1)
    assert list(learn.recorder.metric_names).count('kl') == 1
    kl = learn.recorder.values[-1][learn.recorder.metric_names.index('kl') - 1]
    assert kl == pytest.approx(torch.stack(learn.mesa.kls).mean().item())


def test_interrupted_and_exported():
    class Stop(Callback):
        def before_batch(self):
            if self.training and self.train_iter == 2: raise KeyboardInterrupt
    learn = learner(mlp(), batches(), [MESA(start=0), Stop()])
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    learn.remove_cb(learn.stop)
    pickle.dumps(learn.mesa.teacher)
    learn.fit(1)
    assert learn.mesa.teacher.t == 2 + 4 and not len(learn.metrics)


def together(rank):
    model = mlp()
    learn = learner(DistributedDataParallel(model), batches(seed=rank), MESA(start=0), opt_func=sgd)
    learn.fit(2)
    return snapshot(model), snapshot(learn.mesa.teacher.model)


def test_processes_have_one_average(tmp_path):
    (a, ta), (b, tb) = in_processes(together, 2, tmp_path)
    assert_same(a, b)
    assert_same(ta, tb)


# The term itself -----------------------------------------------------------------------------------------------

@given(st.integers(1, 6), st.integers(2, 5), st.floats(.2, 20), st.integers(0, 99))
def test_the_term_is_the_divergence(n, c, tau, seed):
    gen = torch.Generator().manual_seed(seed)
    z, past = (3 * torch.randn(n, c, generator=gen, dtype=f64) for _ in range(2))
    got = trajectory_loss(z, past, tau)
    assert got >= -1e-15
    torch.testing.assert_close(got, term(z, past, tau), rtol=1e-9, atol=1e-13)


def test_half_precision_is_computed_in_float32():
    z, past = torch.randn(4, 3).half(), torch.randn(4, 3).half()
    assert trajectory_loss(z, past).dtype == f32
    torch.testing.assert_close(trajectory_loss(z, past), trajectory_loss(z.float(), past.float()))


@pytest.mark.parametrize('t, decay, b', [(0, .9998, .1), (89, .9998, 90 / 99), (10**7, .9998, .9998), (5, .3, .3)])
def test_the_warm_decay(t, decay, b): assert warm_decay(t, decay) == b
