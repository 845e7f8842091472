"""Whatever another callback raises, at whatever moment of a step: weights, buffers, randomness and model stay whole."""
import functools
from functools import partial

import pytest
import torch
from conftest import CPUMixedPrecision, assert_same, batches, learner, reset_autocast, same_bits, snapshot
from fastai.basics import (SGD, Callback, CancelBackwardException, CancelBatchException, CancelEpochException,
                           CancelFitException, CancelStepException, CancelTrainException)
from fastai.callback.training import GradientAccumulation
from torch import nn

from sam_explained.sam import SAM

EVENTS = ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step', 'after_step',
          'after_batch']
ERRORS = [RuntimeError, KeyboardInterrupt, CancelBatchException, CancelStepException, CancelBackwardException,
          CancelTrainException,
          CancelEpochException, CancelFitException]
SAM_ORDER = 9
# on either side of SAM (and of MixedPrecision)
LOW, HIGH = SAM_ORDER - 6, SAM_ORDER + 6
# (place, forwards begun in this batch): the events of the clean pass, of the replay, and those after it
POINTS = [('before_batch', 0), ('after_pred', 1), ('after_loss', 1), ('before_backward', 1), ('after_pred', 2),
          ('after_loss', 2),
          ('before_backward', 2), ('after_backward', 2), ('before_step', 2), ('after_step', 2), ('after_batch', 2)]
INSIDE = [('forward', 1), ('backward', 1), ('forward', 2), ('backward', 2)]  # in the model itself
# the third of four batches of the first of two epochs
STEP = 2


class Bomb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, net):
        ctx.net, ctx.passes = net, net.passes
        return x.view_as(x)
    @staticmethod
    def backward(ctx, g):
        ctx.net.maybe('backward', ctx.passes)
        return g, None


class Net(nn.Module):
    "Linear, batch norm, dropout, linear; notes buffers and randomness when the clean pass has used them."
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.a, self.bn, self.drop, self.b = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(.3), nn.Linear(6, 3)
        self.passes, self.clean, self.plan, self.notes = 0, 0, None, {}
    def maybe(self, where, n):
        if self.plan and self.plan.hits(where, n): self.plan.go()
    def forward(self, x):
        if self.training: self.passes += 1
        h = self.drop(self.bn(self.a(x)))
        if self.training and self.passes == 1:
            self.clean += 1
            self.notes.update(buffers={k: v.clone() for k, v in self.bn.named_buffers()}, rng=torch.get_rng_state())
        if self.training: self.maybe('forward', self.passes)
        return self.b(Bomb.apply(h, self))


class Plan:
    "What to raise, where, in which batch; once."
    def __init__(self, place, n, error, net):
        self.place, self.n, self.error, self.net = place, n, error, net
        self.fired = self.armed = False
    def hits(self, place, n): return self.armed and not self.fired and (place, n) == (self.place, self.n)
    def go(self):
        self.fired = True
        raise self.error('on purpose')


class Begin(Callback):
    "Starts the count of a batch's forwards, arms the plan, and checks that the optimizer's weights are in the model."
    order, run_valid = -100, False
    def __init__(self, net, plan, history):
        self.net, self.plan, self.history, self.wrong, self.seen = net, plan, history, [], 0
    def before_batch(self):
        self.net.passes, self.plan.armed = 0, self.seen == STEP
        self.seen += 1
        self.compare('before_batch')
    def before_validate(self): self.compare('before_validate')
    def compare(self, when):
        now, last = params_of(self.net), self.history[-1]
        if not same_bits(now, last): self.wrong.append((self.seen, when))


class Raiser(Callback):
    run_valid = False
    def __init__(self, plan, order): self.plan, self.order = plan, order
    def at(self, event):
        if self.plan.hits(event, self.plan.net.passes): self.plan.go()


for _e in EVENTS: setattr(Raiser, _e, lambda self, e=_e: self.at(e))


def params_of(net): return {k: p.detach().clone() for k, p in net.named_parameters()}


def hooks_of(net):
    "All hooks on modules and parameters, and all names of attributes."
    kinds = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks', '_state_dict_hooks')
    return ([(n, k, len(getattr(m, k))) for n, m in net.named_modules() for k in kinds],
            [(n, sorted(vars(m))) for n, m in net.named_modules()],
            [(n, p.requires_grad, p.is_leaf, len(p._backward_hooks or ()), len(p._post_accumulate_grad_hooks or ()),
              sorted(vars(p)))
             for n, p in net.named_parameters()])


def scenario(place, n, error, order, cbs):
    "One interrupted fit. Returns the learner, what is known about it, and the exception that came out of `fit`."
    net, history = Net(), []
    plan = Plan(place, n, error, net)
    begin = Begin(net, plan, history)
    learn = learner(net, batches(dtype=torch.float32), [begin, Raiser(plan, order), *cbs],
                    opt_func=partial(SGD, mom=.9), lr=.05)
    net.plan = plan
    learn.create_opt()
    learn.opt.set_hypers(lr=.05)
    history.append(params_of(net))
    step = learn.opt.step
    def stepping(*a, **k):
        begin.compare('opt.step')
        step(*a, **k)
        history.append(params_of(net))
    learn.opt.step = stepping
    torch.manual_seed(21)
    out = None
    try: learn.fit(2)
    except BaseException as e: out = e
    return learn, net, plan, begin, history, out


@functools.lru_cache(None)
def plain(place, error, order, amp):
    "The same exception in the same event without SAM: how many steps are made, and what comes out of `fit`."
    *_, plan, _, history, out = scenario(place, n_plain(place), error, order, [CPUMixedPrecision()] if amp else [])
    reset_autocast()
    assert plan.fired
    return len(history), type(out)


def n_plain(place): return 0 if place == 'before_batch' else 1


def check(place, n, error, order, amp):
    learn, net, plan, begin, history, out = scenario_with_sam(place, n, error, order, amp)
    autocast = torch.is_autocast_enabled('cpu')
    rng = torch.get_rng_state()
    reset_autocast()
    assert plan.fired, 'the exception was never raised'

    # weights: those of the last optimizer step, in the same memory, at every batch, at every step and at the end
    begin.compare('end')
    assert not begin.wrong, f'weights the optimizer never made: (batch, moment) {begin.wrong}'
    assert [p.data_ptr() for p in net.parameters()] == learn.where, 'other storage'

    # buffers: one count per clean pass, the statistics of the last one
    assert int(net.bn.num_batches_tracked) == net.clean
    assert_same(net.notes['buffers'], dict(net.bn.named_buffers()), 'buffers')

    # the exception did what it does in plain fastai at this place (in the replay: what it does in `before_backward`)
    inside = n == 2 and (place in ('forward', 'backward') or place in EVENTS[1:4])
    same_as = 'before_backward' if inside or place == 'backward' else place
    if place != 'forward' or n == 2: assert (len(history), type(out)) == plain(same_as, error, order, amp)
    if error in (RuntimeError, KeyboardInterrupt):
        assert type(out) is error and 'on purpose' in str(out)
        assert torch.equal(rng, net.notes['rng']), 'the random stream is not where the clean pass left it'

    # nothing stays behind on the model, the learner or in the autocast state
    assert hooks_of(net) == learn.hooks
    patched = {'_backward', '_step', '_do_one_batch', '_do_grad_opt', 'one_batch'} & set(vars(learn))
    assert learn.model is net and not patched
    assert not autocast

    # and the next fit is that of a fresh learner with these weights
    learn.remove_cbs([c for c in learn.cbs if isinstance(c, (Raiser, Begin))])
    net.plan = None
    net.passes = 0
    for p in net.parameters(): p.grad = None
    ends = []
    fresh = Net()
    fresh.load_state_dict(net.state_dict())
    other = learner(fresh, batches(dtype=torch.float32), ([CPUMixedPrecision()] if amp else []) + [SAM(rho=.3)],
                    opt_func=partial(SGD, mom=.9), lr=.05)
    for l in (learn, other):
        l.create_opt()
        torch.manual_seed(8)
        start = snapshot(l.model)
        l.fit(2)
        assert not same_bits(start, snapshot(l.model)), 'the next fit did not train'
        ends.append(snapshot(l.model))
    assert_same(*ends, 'weights after the next fit')
    assert len(learn.sam.gaps) == 8 and learn.sam.gaps == other.sam.gaps


def scenario_with_sam(place, n, error, order, amp):
    "`scenario` with SAM, with notes on memory and hooks taken before the fit."
    made = {}
    class Before(Callback):
        order = -99
        def before_fit(self):
            net = self.learn.model
            made.update(where=[p.data_ptr() for p in net.parameters()], hooks=hooks_of(net))
    sam = SAM(rho=.3)
    assert LOW < sam.order < HIGH
    res = scenario(place, n, error, order, ([CPUMixedPrecision()] if amp else []) + [sam, Before()])
    res[0].where, res[0].hooks = made['where'], made['hooks']
    res[0].remove_cbs([c for c in res[0].cbs if isinstance(c, Before)])
    return res


cases = [(*p, o) for p in POINTS for o in (LOW, HIGH) if (p, o) != (('before_backward', 1), HIGH)]
# (a callback behind SAM has its before_backward called once per step: in the replay)
cases += [(*p, LOW) for p in INSIDE]
names = [f'{place} {n} {"low" if o == LOW else "high"}' for place, n, o in cases]      # event, forwards so far, side


@pytest.mark.parametrize('amp', [False, True], ids=['fp32', 'scaled'])
@pytest.mark.parametrize('error', ERRORS, ids=lambda e: e.__name__)
@pytest.mark.parametrize('place,n,order', cases, ids=names)
def test_any_exception_at_any_event(place, n, order, error, amp): check(place, n, error, order, amp)


def test_the_scenario_trains_when_nothing_is_raised():
    "Eight steps, two epochs; the loss goes down. The comparisons above are not about a dead network."
    net = Net()
    learn = learner(net, batches(dtype=torch.float32), SAM(rho=.05), lr=.1)
    losses = []
    class Note(Callback):
        run_valid = False
        def after_batch(self): losses.append(self.learn.loss.item())
        def before_batch(self): self.learn.model.passes = 0
    learn.add_cb(Note())
    learn.fit(60)
    assert sum(losses[-8:]) < .6 * sum(losses[:8])


def autocast_after(point, order):
    "Is autocast on after an error at this point, with bf16 autocast on the CPU?"
    *_, plan, _, _, out = scenario_bf16(*point, order)
    on = torch.is_autocast_enabled('cpu')
    reset_autocast()
    assert plan.fired and type(out) is RuntimeError
    return on


def scenario_bf16(place, n, order):
    return scenario(place, n, RuntimeError, order, [CPUMixedPrecision(torch.bfloat16, scaled=False), SAM(rho=.3)])


@pytest.mark.parametrize('place,n,order', [c for c in cases if c[1] == 2 or c[0] in ('before_backward', 'backward')],
                         ids=str)
def test_autocast_is_off_after_an_error_in_the_replay_or_later(place, n, order):
    "fastai itself leaves it on when an error strikes between before_batch and after_loss of the clean pass."
    assert not autocast_after((place, n), order)


@pytest.mark.parametrize('place,n,order', [c for c in cases if c[1] == 2], ids=str)
def test_weights_and_buffers_under_bf16_autocast(place, n, order):
    learn, net, plan, begin, history, out = scenario_bf16(place, n, order)
    reset_autocast()
    begin.compare('end')
    assert plan.fired and not begin.wrong
    assert int(net.bn.num_batches_tracked) == net.clean
    assert_same(net.notes['buffers'], dict(net.bn.named_buffers()), 'buffers')


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, CancelBatchException, CancelFitException],
                         ids=lambda e: e.__name__)
@pytest.mark.parametrize('place', ['forward', 'backward', 'after_loss'])
def test_micro_batches_of_an_open_window_keep_their_gradient(place, error):
    "With accumulation: an error in the second pass of a micro-batch leaves whole weights and a finite .grad."
    learn, net, plan, begin, history, out = scenario(place, 2, error, LOW, [GradientAccumulation(12), SAM(rho=.3)])
    begin.compare('end')
    assert plan.fired and not begin.wrong
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters())


def test_an_error_in_the_loss_function_of_pass_2():
    "Not a callback, not the model: the loss function raises."
    net, calls = Net(), [0]
    def loss(pred, y):
        calls[0] += 1
        if calls[0] == 6: raise RuntimeError('on purpose')
        return nn.functional.cross_entropy(pred, y)
    history = []
    learn = learner(net, batches(dtype=torch.float32), [Begin(net, Plan('', 0, None, net), history), SAM(rho=.3)],
                    loss_func=loss)
    learn.create_opt()
    step = learn.opt.step
    learn.opt.step = lambda: (step(), history.append(params_of(net)))
    history.append(params_of(net))
    with pytest.raises(RuntimeError, match='on purpose'): learn.fit(1)
    assert calls == [6] and same_bits(list(params_of(net).values()), list(history[-1].values()))
    assert len(history) == 3 and int(net.bn.num_batches_tracked) == 3
