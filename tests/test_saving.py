"""The callbacks with part of the weights perturbed: what is computed once changes nothing, to the last bit."""
import copy
import pickle
import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from conftest import CPUMixedPrecision, assert_same, batches, learner, same_bits, snapshot
from fastai.basics import SGD, Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelTrainException
from fastai.callback.training import GradientAccumulation, GradientClip
from processes import in_processes
from test_reuse import Products, ResNet, ViT, mlp, under
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sam_explained.msam import MSAM
from sam_explained.sam import SAM
from sam_explained.ssam import SSAM, MagnitudeMask, Mask, RandomMask

sgd = partial(SGD, mom=.9)
nets = {'mlp': (mlp, ('4', '6')), 'resnet': (ResNet, ('layer3', 'fc')), 'vit': (ViT, ('blocks.2', 'blocks.3', 'norm', 'head'))}


class Late(Mask):
    "Half of the entries of the weights under `names`, nothing elsewhere"
    def __init__(self, *names): super().__init__(); self.names = names
    def masks(self, ssam, weights, old=None):
        model = ssam.learn.model
        late = {id(w) for w in under(*self.names)(getattr(model, 'module', model))}
        gen = self.generator(ssam)
        return [(torch.rand(w.shape, generator=gen) < .5) & (id(w) in late) for w in weights]


methods = {
    'SAM': lambda names, **kw: SAM(.3, params=under(*names), **kw),
    'ASAM': lambda names, **kw: SAM(.3, adaptive=True, params=under(*names), **kw),
    'MSAM': lambda names, **kw: MSAM(3, .3, params=under(*names), **kw),
    'SSAM, params': lambda names, **kw: SSAM(RandomMask(.5), .3, params=under(*names), **kw),
    'SSAM, late mask': lambda names, **kw: SSAM(Late(*names), .3, **kw),
    'SSAM, late mask, renorm': lambda names, **kw: SSAM(Late(*names), .3, renorm=True, **kw),
    'SSAM, implicit': lambda names, **kw: SSAM(RandomMask(.5), .3, params=under(*names), implicit=True, **kw),
}
extras = {
    'alone': lambda: [],
    'accumulation': lambda: [GradientAccumulation(12)],
    'clip': lambda: [GradientClip(.1)],
    'scaler': lambda: [CPUMixedPrecision()],
    'scaler that overflows': lambda: [CPUMixedPrecision(init_scale=2.**127)],
    'bfloat16': lambda: [CPUMixedPrecision(torch.bfloat16)],
}


class Told(list):
    def __enter__(self):
        self.catch = warnings.catch_warnings(record=True)
        self.seen = self.catch.__enter__()
        warnings.simplefilter('always')
        return self
    def __exit__(self, *error):
        self.catch.__exit__(*error)
        self += [str(w.message) for w in self.seen if 'runs in both passes' in str(w.message)]


def train(net, method, cbs=(), epochs=2, dtype=torch.float64, prepare=None, **kwargs):
    "All that training leaves behind, the products it took, and what was said"
    make, names = nets[net]
    torch.manual_seed(4)
    model = make().to(dtype)
    if prepare: prepare(model)
    cb = methods[method](names, **kwargs)
    with Told() as told, Products() as work:
        learner(model, batches(3, 6, dtype, shape=(3, 8, 8)), [cb, *cbs], opt_func=sgd).fit(epochs)
    assert not any('forward' in vars(m) for m in model.modules())
    return dict(snapshot(model), rng=torch.get_rng_state(), gaps=torch.tensor(cb.gaps)), work.flops, told


@pytest.mark.parametrize('extra', extras)
@pytest.mark.parametrize('method', methods)
@pytest.mark.parametrize('net', nets)
def test_reuse_changes_nothing_and_saves_products(net, method, extra):
    dtype = torch.float32 if extra in ('bfloat16', 'scaler that overflows') else torch.float64
    full, work, _ = train(net, method, extras[extra](), dtype=dtype, reuse=False)
    ours, less, told = train(net, method, extras[extra](), dtype=dtype)
    assert_same(full, ours)
    assert less < work and not told


def test_renormalised_late_masks_do_not_enter_the_prefix_at_all():
    "With the length of the masked gradient only, the first backward ends at the cut as well"
    (_, paper, _), (_, renormed, _), (_, sam, _) = (train('mlp', k) for k in ('SSAM, late mask', 'SSAM, late mask, renorm', 'SAM'))
    assert renormed == sam < paper


def test_everything_perturbed_arms_nothing():
    torch.manual_seed(4)
    cb = SAM(.3)
    class Look(Callback):
        order, run_valid = 1000, False
        def before_batch(self): assert cb.prefix is None and 'forward' not in vars(self.model)
    learner(mlp().double(), batches(3, 6, shape=(3, 8, 8)), [cb, Look()], opt_func=sgd).fit(1)


@pytest.mark.parametrize('make', [SAM, partial(MSAM, 3), partial(SSAM, RandomMask(.5))])
def test_a_frozen_body_is_run_once(make):
    def run(**kwargs):
        torch.manual_seed(4)
        model = ResNet().double()
        for w in under('layer1', 'layer2')(model): w.requires_grad_(False)
        for m in (model.conv1, model.bn1): m.requires_grad_(False)
        with Products() as work: learner(model, batches(3, 6, shape=(3, 8, 8)), make(rho=.3, **kwargs), opt_func=sgd).fit(2)
        return snapshot(model), work.flops
    (a, work), (b, less) = run(reuse=False), run()
    assert_same(a, b)
    assert less < work


class Growing(Late):
    "One more layer in each epoch"
    def masks(self, ssam, weights, old=None):
        self.names = ('fc', 'layer3', 'layer2', 'layer1')[:1 + ssam.epoch]
        return super().masks(ssam, weights, old)


def test_another_set_of_weights_in_each_epoch():
    "The cut moves from epoch to epoch, towards the input"
    def run(**kwargs):
        torch.manual_seed(4)
        model = ResNet().double()
        with Products() as work, Told() as told:
            learner(model, batches(3, 6, shape=(3, 8, 8)), SSAM(Growing(), .3, renorm=True, **kwargs), opt_func=sgd).fit(4)
        return snapshot(model), work.flops, told
    (a, work, _), (b, less, told) = run(reuse=False), run()
    assert_same(a, b)
    assert less < work and not told


# What cannot be reused is said once, and runs twice ------------------------------------------------------------

def test_hooks_are_respected_and_mentioned_once_per_fit():
    seen = []
    def prepare(model): model[1].register_forward_hook(lambda *_: seen.append(0))
    full, work, _ = train('mlp', 'SAM', prepare=prepare, reuse=False)
    n, ours, same, told = len(seen), *train('mlp', 'SAM', prepare=prepare)
    assert_same(full, ours)
    assert work == same and len(seen) == 2 * n and len(told) == 1 and 'hooks on a Linear' in told[0]


def test_fresh_draws_are_mentioned_and_run_twice():
    full, work, _ = train('vit', 'SAM', same_rng=False, reuse=False)
    ours, same, told = train('vit', 'SAM', same_rng=False)
    assert_same(full, ours)
    assert work == same and len(told) == 1 and 'at random is new' in told[0]


def test_compiled_models_run_twice():
    def prepare(model): model.compile(backend='eager')
    full, work, _ = train('mlp', 'SAM', prepare=prepare, reuse=False)
    ours, same, told = train('mlp', 'SAM', prepare=prepare)
    assert_same(full, ours)
    assert work == same and len(told) == 1 and 'one by one' in told[0]


def test_nothing_to_reuse_is_looked_for_once_per_epoch(monkeypatch):
    "All but the last layer perturbed: the first batch shows that there is no prefix"
    from sam_explained.reuse import Prefix
    armed = []
    arm = Prefix.arm
    monkeypatch.setattr(Prefix, 'arm', lambda self: (armed.append(0), arm(self))[1])
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    learner(model, batches(4), SAM(.3, params=lambda m: m[0].parameters()), opt_func=sgd).fit(3)
    assert len(armed) == 3


# Errors --------------------------------------------------------------------------------------------------------

class Stop(Callback):
    "Raises `error` at one moment of the second batch"
    run_valid = False
    def __init__(self, where, error, order): self.where, self.error, self.order, self.armed = where, error, order, True
    def go(self, here):
        if self.armed and (here, self.train_iter) == (self.where, 1):
            self.armed = False
            raise self.error('stop')
    def before_batch(self): self.go('before_batch')
    def after_pred(self): self.go('after_pred')
    def after_loss(self): self.go('after_loss')
    def before_backward(self): self.go('before_backward')
    def after_backward(self): self.go('after_backward')


class Fails(nn.Module):
    "Raises in its n-th training forward"
    def __init__(self, n): super().__init__(); self.left = [n]
    def forward(self, x):
        if self.training:
            self.left[0] -= 1
            if not self.left[0]: raise KeyboardInterrupt
        return x


def whole(model, learn):
    "Nothing is left in the model, it can be copied, and the next fit works"
    assert not any('forward' in vars(m) for m in model.modules())
    copy.deepcopy(model)
    pickle.dumps(model)
    learn.fit(1)


@pytest.mark.parametrize('order', [SAM.order - 4, SAM.order + 4])
@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError, CancelBatchException])
@pytest.mark.parametrize('where', ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward'])
@pytest.mark.parametrize('method', ['SAM', 'MSAM', 'SSAM, late mask', 'SSAM, implicit'])
def test_stopped_by_another_callback(method, where, error, order):
    make, names = nets['mlp']
    model = make().double()
    learn = learner(model, batches(3, 6, shape=(3, 8, 8)), [methods[method](names), Stop(where, error, order)], opt_func=sgd)
    with nullcontext() if error is CancelBatchException else pytest.raises(error): learn.fit(1)
    if where == 'before_batch' and error is not CancelBatchException and order > SAM.order:
        pickle.dumps(model), copy.deepcopy(model)           # the next call is still awaited; it takes the watch away
        model(torch.randn(6, 3, 8, 8).double())
    whole(model, learn)


@pytest.mark.parametrize('n', range(1, 9))
@pytest.mark.parametrize('at', [2, 5])
@pytest.mark.parametrize('method', ['SAM', 'MSAM', 'SSAM, late mask', 'SSAM, implicit'])
def test_stopped_inside_the_model(method, at, n):
    torch.manual_seed(0)
    make, names = nets['mlp']
    model = make().double()
    model[at] = nn.Sequential(model[at], Fails(n))
    before = snapshot(model)
    learn = learner(model, batches(3, 6, shape=(3, 8, 8)), methods[method](names), opt_func=partial(SGD, lr=0.), lr=0.)
    try: learn.fit(1)
    except KeyboardInterrupt: pass
    after = snapshot(model)
    assert_same(before, after)                               # the weights are back (the rate is 0)
    model[at][1].left[0] = -1
    whole(model, learn)


@pytest.mark.parametrize('stop', [CancelBatchException, CancelTrainException, CancelEpochException, CancelFitException])
@pytest.mark.parametrize('method', ['SAM', 'MSAM', 'SSAM, implicit'])
def test_validation_and_inference_see_the_plain_model(method, stop):
    "Also if somebody cancels between `before_batch` and the forward, in the last batch of an epoch"
    make, names = nets['mlp']
    model, seen = make().double(), []
    class Look(Callback):
        order = 1000
        def before_batch(self):
            if self.training and self.train_iter == 2: raise stop
            if not self.training: seen.append('forward' in vars(self.model))
    learner(model, batches(3, 6, shape=(3, 8, 8)), [methods[method](names), Look()], opt_func=sgd).fit(2)
    assert not any(seen) and 'forward' not in vars(model)


def test_shards_at_once_are_not_watched():
    def run(reuse):
        torch.manual_seed(4)
        model, cb = mlp().double(), MSAM(3, .3, vmap=True, params=under('6'), reuse=reuse)
        model[3] = nn.Identity()
        class Look(Callback):
            order, run_valid = 1000, False
            def before_batch(self): assert cb.prefix is None and 'forward' not in vars(self.model)
        learner(model, batches(3, 6, shape=(3, 8, 8)), [cb, Look()], opt_func=sgd).fit(1)
        return snapshot(model)
    assert_same(run(False), run(True))


# The implicit form ---------------------------------------------------------------------------------------------

def sparse_train(model, data, masks, rho, epochs, lr=.1):
    "SAM along a gradient that came back through masked weights: a net of Linear and Tanh, its backward by hand"
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=.9)
    layers = [m for m in model if isinstance(m, nn.Linear)]
    for _ in range(epochs):
        for x, y in data:
            with torch.no_grad():
                hs = [x]
                for i, l in enumerate(layers):
                    h = hs[-1] @ l.weight.T + l.bias
                    hs.append(h.tanh() if i + 1 < len(layers) else h)
                d, g = (hs[-1].softmax(1) - torch.eye(3).double()[y]) / len(y), []
                for i in reversed(range(len(layers))):
                    g = [d.T @ hs[i], d.sum(0)] + g
                    d = d @ (layers[i].weight * masks[i]) * (1 - hs[i] ** 2)
            norm = torch.sqrt(sum((t ** 2).sum() for t in g))
            at = [(w.detach() + rho / norm * t).requires_grad_() for w, t in zip(model.parameters(), g)]
            out = torch.func.functional_call(model, dict(zip(dict(model.named_parameters()), at)), (x,))
            for w, t in zip(model.parameters(), torch.autograd.grad(nn.functional.cross_entropy(out, y), at)): w.grad = t
            opt.step()
            opt.zero_grad()


class Given(Mask):
    def __init__(self, masks): super().__init__(); self.given = masks
    def masks(self, ssam, weights, old=None): return [m.clone() for m in self.given]


def deep():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3)).double()


@pytest.mark.parametrize('cbs', [(), (CPUMixedPrecision,)])
def test_implicit_is_sam_with_a_masked_backward(cbs):
    model, ref, other = deep(), deep(), deep()
    masks = [torch.rand_like(w) < .5 if w.ndim == 2 else torch.ones_like(w).bool() for w in model.parameters()]
    learner(model, batches(), [SSAM(Given(masks), .3, implicit=True), *(c() for c in cbs)], opt_func=sgd).fit(2)
    sparse_train(ref, batches(), masks[::2], .3, 2)
    sparse_train(other, batches(), [torch.ones_like(m) for m in masks[::2]], .3, 2)
    for a, b, c in zip(model.parameters(), ref.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, **(dict(rtol=1e-5, atol=1e-7) if cbs else dict(rtol=1e-9, atol=1e-11)))   # a scaler counts in float32
    assert max((a - c).abs().max() for a, c in zip(model.parameters(), other.parameters())) > 1e-3


def test_implicit_masks_lie_along_the_outputs_and_the_perturbation_is_dense():
    model = deep()
    class Look(Callback):
        order, run_valid = SAM.order - 1, False
        def before_batch(self): self.home = None
        def before_backward(self):
            now = [w.detach().clone() for w in self.model.parameters()]
            if self.home is None: self.home = now
            else:
                self.eps = [a - b for a, b in zip(now, self.home)]
                assert all((e != 0).all() for e in self.eps)
                torch.testing.assert_close(torch.cat([e.flatten() for e in self.eps]).norm().item(), .3, rtol=1e-6, atol=0)
    learn = learner(model, batches(), [SSAM(MagnitudeMask(pattern='1:3'), .3, implicit=True), Look()], opt_func=sgd)
    learn.fit(1)
    for w, m in learn.ssam.masks.items():
        if w.ndim < 2: assert m.all()
        else:
            for group in m.split(3): assert (group.sum(0) == 1).all()
    assert any((g.sum(1) != 1).any() for g in next(iter(learn.ssam.masks.values())).split(3, 1))


def test_implicit_errors():
    with pytest.raises(ValueError, match='renorm=True has no meaning'): SSAM(RandomMask(), renorm=True, implicit=True)
    compiled = deep()
    compiled[0].compile(backend='eager')
    with pytest.raises(ValueError, match='implicit=True'): learner(compiled, batches(), SSAM(RandomMask(), implicit=True)).fit(1)
    class Plain(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.randn(5, 3).double())
        def forward(self, x): return x @ self.w
    model = Plain()
    before = snapshot(model)
    with pytest.raises(ValueError, match='no linear layer'): learner(model, batches(), SSAM(RandomMask(), implicit=True)).fit(1)
    assert_same(before, snapshot(model))
    assert 'forward' not in vars(model)


# Several processes ---------------------------------------------------------------------------------------------

def trained_together(rank):
    found = {}
    for net, (make, names) in nets.items():
        for method in methods:
            for reuse in (False, True):
                torch.manual_seed(4)
                model = make().double()
                ddp = DistributedDataParallel(model)
                data = batches(3, 6, seed=rank, shape=(3, 8, 8))
                with Told() as told, Products() as work:
                    learner(ddp, data, methods[method](names, reuse=reuse), opt_func=sgd).fit(1)
                found[net, method, reuse] = snapshot(model), work.flops, list(told)
    return found


def test_two_processes(tmp_path):
    ranks = in_processes(trained_together, 2, tmp_path)
    for net in nets:
        for method in methods:
            for found in ranks:
                (a, work, _), (b, less, told) = found[net, method, False], found[net, method, True]
                assert_same(a, b, f'{net}, {method}')
                assert less < work and not told
            ws = [k for k, _ in nets[net][0]().named_parameters()]
            one, two = (r[net, method, True][0] for r in ranks)
            assert_same({k: one[k] for k in ws}, {k: two[k] for k in ws}, f'{net}, {method}: the processes')
