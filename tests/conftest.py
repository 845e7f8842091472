"""What the tests of the callback share: one thread, quiet learners, small models and data."""
import pytest
import torch
from fastai.basics import (DataLoaders, Callback, L, Learner, Recorder, SGD, TrainEvalCallback, noop)
from fastai.callback.fp16 import MixedPrecision
from fastai.data.load import DataLoader
from hypothesis import HealthCheck, settings
from torch import nn

torch.set_num_threads(1)
settings.register_profile('tests', deadline=None, derandomize=True, max_examples=60, print_blob=True,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('tests')


@pytest.fixture(autouse=True)
def clean_state():
    "Every test starts from the same seed and leaves no autocast behind (fastai does, after some exceptions)."
    torch.manual_seed(0)
    yield
    reset_autocast()


@pytest.fixture
def one_thread():
    "For tests of code that may set the number of threads"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def reset_autocast():
    torch.set_autocast_enabled('cpu', False)
    while torch.autocast_decrement_nesting() >= 0: pass      # an autocast that was never left keeps old casts of weights
    torch.autocast_increment_nesting()
    torch.clear_autocast_cache()


# Data and learners ---------------------------------------------------------------------------------------------

def batches(n=4, bs=6, dtype=torch.float64, seed=1, n_in=5, n_out=3, shape=None):
    "n batches of random inputs and classes."
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n * bs, *(shape or (n_in,)), generator=gen, dtype=torch.float64).to(dtype)
    y = torch.randint(0, n_out, (n * bs,), generator=gen)
    return list(zip(x.split(bs), y.split(bs)))


def loader(bs):
    items = [(x, y) for xs, ys in bs for x, y in zip(xs, ys)]
    return DataLoader(items, bs=len(bs[0][1]), shuffle=False, num_workers=0)


def learner(model, train, cbs=(), valid=None, loss_func=None, opt_func=SGD, lr=.1, recorder=False, **kw):
    "A learner that prints nothing, on the CPU. The Recorder is left out by default: fastai's works in float32 only."
    dls = DataLoaders(loader(train), loader(valid or train[:1]), device=torch.device('cpu'), path=kw.get('path', '.'))
    learn = Learner(dls, model, loss_func=loss_func or nn.CrossEntropyLoss(), opt_func=opt_func, lr=lr,
                    default_cbs=False, cbs=[TrainEvalCallback()] + ([Recorder()] if recorder else []) + L(cbs),
                    wd_bn_bias=True, **kw)
    learn.logger, learn.create_mbar = noop, False
    return learn


class Seed(Callback):
    "Seeds batch i of a fit with `start` + i, before anything draws."
    order = -5
    run_valid = False
    def __init__(self, start): self.start = start
    def before_batch(self): torch.manual_seed(self.start + self.train_iter)


class CPUMixedPrecision(MixedPrecision):
    "fastai's MixedPrecision with the scaler and the autocast of the CPU; `dtype=None` scales only."
    def __init__(self, dtype=None, scaled=True, init_scale=2.**16, **kw):
        super().__init__()
        self.amp_dtype, self.scaled, self.init_scale, self.kw = dtype, scaled, init_scale, kw
    def before_fit(self):
        self.autocast = torch.autocast('cpu', dtype=self.amp_dtype or torch.bfloat16,
                                       enabled=self.amp_dtype is not None)
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=self.init_scale, enabled=self.scaled, **self.kw)
        self.scales = L()


# Models --------------------------------------------------------------------------------------------------------

def mlp(dtype=torch.float64, norm=None, drop=0., seed=3, n_in=5, n_out=3):
    torch.manual_seed(seed)
    body = [nn.Linear(n_in, 7)] + ([norm(7)] if norm else []) + [nn.Tanh()] + ([nn.Dropout(drop)] if drop else [])
    return nn.Sequential(*body, nn.Linear(7, n_out)).to(dtype)


def halves(model):
    "Two parameter groups: everything but the last layer, and the last layer."
    return [L(p for m in list(model)[:-1] for p in m.parameters()), L(model[-1].parameters())]


def snapshot(module):
    "Independent copies of all parameters and buffers."
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def bits(t):
    "A tensor's bytes: equal for equal NaNs, different for 0. and -0."
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def same_bits(a, b):
    "Are two state dicts (or lists of tensors) equal bit for bit?"
    if isinstance(a, dict): return a.keys() == b.keys() and same_bits(list(a.values()), list(b.values()))
    return len(a) == len(b) and all(s.shape == t.shape and s.dtype == t.dtype and torch.equal(bits(s), bits(t))
                                    for s, t in zip(a, b))


def assert_same(a, b, what=''):
    bad = [k for k in a if not same_bits([a[k]], [b[k]])]
    assert a.keys() == b.keys() and not bad, f'{what} differ in {bad}'


def assert_close(model, ref, rtol=1e-9, atol=1e-11):
    "Do two models agree in every parameter and buffer?"
    for (k, a), (_, b) in zip(model.state_dict().items(), ref.state_dict().items()):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m, k=k: f'{k}: {m}')
