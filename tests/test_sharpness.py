"""Measures of sharpness against dense Hessians and an independent library; and a model that comes back as it was."""
import copy
import math
import random
import sys
from pathlib import Path

import curvlinops
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.data as tud
from conftest import assert_same, batches, learner, snapshot
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner
from fastai.callback.rnn import rnn_cbs
from fastai.data.load import DataLoader
from fastai.text.models import AWD_LSTM, awd_lstm_clas_config, awd_lstm_lm_config, get_language_model, get_text_classifier
from fastai.text.models.awdlstm import EmbeddingDropout, RNNDropout, WeightDropout
from hypothesis import given, strategies as st
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from sam_explained import objective, sharpness
from sam_explained.core import ascent, grad_norm
from sam_explained.data import docstrings
from sam_explained.hessian import hessian_spectrum, hessian_trace, top_eigenvalues
from sam_explained.sharpness import Objective, ball_sharpness, m_sharpness

sys.path.insert(0, str(Path(__file__).parents[1] / 'benchmarks'))
from two_pass import Allocated

f64 = torch.float64


# Models: every kind of layer that has its own way of going wrong ----------------------------------------------------

class Tied(nn.Module):
    "Words in, words out, one table for both"
    def __init__(self):
        super().__init__()
        self.table, self.mid = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.table.weight
    def forward(self, x): return self.out(self.mid(self.table(x).mean(1)).tanh())


def frozen():
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    model[2].requires_grad_(False)
    return model


def picture(): return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Softplus(), nn.Flatten(), nn.Linear(12, 3))
def dense(): return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(.4), nn.Linear(6, 3))


class Unused(nn.Module):
    "A weight that nothing depends on"
    def __init__(self):
        super().__init__()
        self.a, self.idle = nn.Linear(5, 3), nn.Parameter(torch.ones(2))
    def forward(self, x): return self.a(x)


kinds = {'dense': (dense, (5,)), 'unused': (Unused, (5,)), 'frozen': (frozen, (5,)), 'picture': (picture, (1, 4, 4)), 'tied': (Tied, None)}


def made(kind, sizes=(6, 6, 3), seed=0):
    "Model, list of batches of these sizes"
    make, shape = kinds[kind]
    torch.manual_seed(seed)
    model = make().double()
    n = sum(sizes)
    x = torch.randn(n, *shape, dtype=f64) if shape else torch.randint(0, 7, (n, 3))
    y = torch.randint(0, 7 if kind == 'tied' else 3, (n,))
    return model, list(zip(x.split(sizes), y.split(sizes)))


def flat(ts): return torch.cat([t.detach().flatten() for t in ts])


def plain(model, data, of_loss=F.cross_entropy):
    "The mean loss as a function of one flat vector of the weights that need a gradient, and how to cut it"
    named = {k: w for k, w in model.named_parameters() if w.requires_grad}
    rest = {k: w for k, w in model.state_dict(keep_vars=True).items() if not any(w is o for o in named.values())}
    x, y = (torch.cat(o) for o in zip(*data))
    def cut(v): return dict(zip(named, (p.view(w.shape) for p, w in zip(v.split([w.numel() for w in named.values()]), named.values()))))
    def loss(v): return of_loss(functional_call(model, rest | cut(v), (x,), tie_weights=True), y)
    return loss, flat(named.values()), lambda v: list(cut(v).values())


@pytest.mark.parametrize('kind', kinds)
def test_value_gradient_and_product(kind):
    model, data = made(kind)
    O = Objective((model.train(), F.cross_entropy, data))
    f, w, cut = plain(model.eval(), data)
    e, v = .1 * torch.randn_like(w), torch.randn_like(w)
    truth = [f(u) for u in (w, w + e)] + [torch.func.grad(f)(u) for u in (w, w + e)]
    truth += [torch.autograd.functional.hessian(f, u) @ v for u in (w, w + e)]
    for mode in (True, False):
        model.train(mode)
        ours = [torch.tensor(O.value(d), dtype=f64) for d in (None, cut(e))] + [flat(O.gradient(d)[1]) for d in (None, cut(e))]
        ours += [flat(O.hvp(cut(v), d)) for d in (None, cut(e))]
        for a, b in zip(ours, truth, strict=True): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('kind', [k for k in kinds if k != 'unused'])     # curvlinops needs each weight to be used
def test_an_independent_library(kind):
    "curvlinops: products of Hessian and Gauss-Newton matrix, and scipy's eigenvalues of them"
    model, data = made(kind)
    model.eval()
    O = Objective((model, F.cross_entropy, data))
    for name, kw, product in (('HessianLinearOperator', 'hessian', O.hvp), ('GGNLinearOperator', 'ggn', O.ggn)):
        op = getattr(curvlinops, name)(model, nn.CrossEntropyLoss(), O.params, data, check_deterministic=False)
        v = [torch.randn_like(w) for w in O.params]
        theirs = op @ [x.clone() for x in v]
        torch.testing.assert_close(flat(product(v)), flat(theirs), rtol=1e-8, atol=1e-10)
        top = eigsh(op.to_scipy(), k=3, which='LA', return_eigenvectors=False)[::-1]
        found = top_eigenvalues(O, k=3, kind=kw, tol=1e-8, progress=False)
        assert found.values == pytest.approx(top, rel=1e-6, abs=1e-9)


@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from(['largest', 'smallest', 'both']),
       st.lists(st.floats(-3, 5), min_size=4, max_size=12))
def test_lanczos_on_any_spectrum(seed, k, which, lam):
    "Whatever it is; but an eigenvalue that occurs twice is found once, so they differ"
    torch.manual_seed(seed)
    lam = torch.tensor(sorted({round(v, 2) for v in lam} | {-4., 6., 7., 8.})).double()
    n = len(lam)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=f64))[0]
    A = Q @ lam.diag() @ Q.T
    class Bowl(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(n, dtype=f64))
        def forward(self, x): return self.w @ A @ self.w / 2
    found = top_eigenvalues((Bowl(), lambda z, y: z, [(torch.zeros(1), torch.zeros(1))]), k, which, tol=1e-9, progress=False)
    top, bottom = lam.flip(0)[:k].tolist(), lam[:k].flip(0).tolist()
    truth = {'largest': top, 'smallest': bottom, 'both': top + bottom}[which]
    size = max(abs(lam).max().item(), 1e-12)
    assert len(found.values) == len(truth) and found.products <= n
    assert found.values == pytest.approx(truth, abs=1e-7 * size + 1e-12)
    for value, u in zip(found.values, found.vectors):
        assert (A @ u[0] - value * u[0]).norm() < 1e-4 * size + 1e-10 and u[0].norm().item() == pytest.approx(1)


def test_the_graph_of_a_single_batch_is_used_again():
    "One forward for all products of one batch; one per product and batch of several"
    for sizes, forwards in (((15,), 1), ((6, 9), 2)):
        model, data = made('dense', sizes)
        seen = []
        model.register_forward_hook(lambda *_: seen.append(1))
        found = top_eigenvalues((model, F.cross_entropy, data), k=2, progress=False)
        assert len(seen) == forwards * (1 if len(sizes) == 1 else found.products)
        f, w, _ = plain(model.eval(), data)
        assert found.values == pytest.approx(torch.linalg.eigvalsh(torch.autograd.functional.hessian(f, w)).flip(0)[:2], rel=2e-3)


def test_trace_and_spectrum_of_the_gauss_newton_matrix():
    "Four standard errors: fails by chance for one seed in 10,000; the seed is fixed"
    model, data = made('dense', (15,))
    O = Objective((model, F.cross_entropy, data))
    n = sum(w.numel() for w in O.params)
    basis = torch.eye(n, dtype=f64)
    _, _, cut = plain(model, data)
    G = torch.stack([flat(O.ggn(cut(v))) for v in basis])
    t = hessian_trace(O, tol=0, most=300, kind='ggn', progress=False)
    assert t.products == 300 and abs(t.value - G.trace()) < 4 * t.error < .5 * G.trace()
    s = hessian_spectrum(O, starts=16, steps=n, kind='ggn', progress=False)
    assert s.weights.sum() == pytest.approx(1) and (s.weights * s.nodes).sum() * n == pytest.approx(G.trace().item(), rel=.2)
    grid = np.linspace(-.5, 1.5, 4001)
    assert s(grid, .02).sum() * (grid[1] - grid[0]) == pytest.approx(1, abs=.01)


def test_a_weight_that_nothing_depends_on():
    model, data = made('unused')
    O, part = (Objective((model, F.cross_entropy, data), params=p) for p in (None, lambda m: m.a.parameters()))
    v = [torch.randn_like(w) for w in O.params]
    i = next(k for k, w in enumerate(O.params) if w is model.idle)
    for all_, some in ((O.hvp(v), part.hvp(v[:i] + v[i + 1:])), (O.ggn(v), part.ggn(v[:i] + v[i + 1:]))):
        assert (all_.pop(i) == 0).all()
        assert torch.equal(flat(all_), flat(some))


def test_a_linear_loss_has_no_curvature():
    model, data = made('unused')
    O = Objective((model, lambda z, y: z.mean(), data))
    assert top_eigenvalues(O, progress=False).values == 0
    assert all((x == 0).all() for x in O.hvp([torch.ones_like(w) for w in O.params]))


# Batch norm and dropout ---------------------------------------------------------------------------------------------

def test_the_statistics_of_the_batch():
    model, data = made('picture')
    with torch.no_grad():
        model[1].running_mean += 1
    for mode in (False, True):
        model.train(mode)
        by_hand = sum(len(y) * F.cross_entropy(model(x), y).item() for x, y in data) / 15
        model.train(not mode)
        model[1].running_mean.fill_(1), model[1].running_var.fill_(1)
        assert Objective((model, F.cross_entropy, data), batch_stats=mode).value() == pytest.approx(by_hand, abs=1e-12)


def test_dropout_draws_the_same_mask_at_each_evaluation():
    model, data = made('dense')
    O = Objective((model.eval(), F.cross_entropy, data), dropout=True)
    a, b = O.value(), O.value()
    assert a == b != Objective((model, F.cross_entropy, data)).value()
    assert a != Objective((model, F.cross_entropy, data), dropout=True, seed=1).value()
    e, h = [torch.randn_like(w) for w in O.params], 1e-5
    up, down = (O.gradient([s * h * x for x in e])[1] for s in (1, -1))
    torch.testing.assert_close(flat(O.hvp(e)), (flat(up) - flat(down)) / (2 * h), rtol=1e-6, atol=1e-6)


def test_masks_do_not_depend_on_what_the_loader_draws():
    model, data = made('dense')
    class Drawing:
        def __iter__(self):
            for b in data:
                torch.rand(3)
                yield b
    a, b = (Objective((model, F.cross_entropy, d), dropout=True).value() for d in (data, Drawing()))
    assert a == b


# Everything that draws, and only if asked for -----------------------------------------------------------------------

class Own(nn.Module):
    "Dropout without a module"
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
    def forward(self, x): return F.dropout(self.a(x), .5, self.training)

class Part(nn.Module):
    "The output of a layer that gives several"
    def __init__(self, layer, *more):
        super().__init__()
        self.layer, self.more = layer, more
    def forward(self, x): return self.layer(x, *(x for _ in self.more))[0]

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = EmbeddingDropout(nn.Embedding(7, 4), .5)
    def forward(self, x): return self.table(x[..., 0].abs().mul(2).long().clamp(0, 6))

drawing = {
    'lstm': lambda: Part(nn.LSTM(4, 4, 2, dropout=.5, batch_first=True)), 'gru': lambda: Part(nn.GRU(4, 4, 2, dropout=.5, batch_first=True)),
    'attention': lambda: Part(nn.MultiheadAttention(4, 2, .5, batch_first=True), 'key', 'value'),
    'transformer': lambda: nn.TransformerEncoderLayer(4, 2, 8, .5, batch_first=True), 'own': Own,
    'fastai': lambda: nn.Sequential(Words(), RNNDropout(.5), Part(WeightDropout(nn.LSTM(4, 4, batch_first=True), .5))),
    'drop': lambda: nn.Sequential(nn.Dropout1d(.5), nn.AlphaDropout(.5), nn.FeatureAlphaDropout(.5), nn.RReLU(), nn.Linear(4, 4)),
}


class Averaged(nn.Module):
    "A batch norm of one's own"
    def __init__(self):
        super().__init__()
        self.register_buffer('running_mean', torch.ones(4))
    def forward(self, x): return x - (x.mean((0, 1)) if self.training else self.running_mean)


@pytest.mark.parametrize('stats', [False, True])
@pytest.mark.parametrize('name', drawing)
def test_as_in_training_and_as_in_use(name, stats):
    "The same numbers as a plain loop in the same mode with the same seeds, with any layer that draws"
    torch.manual_seed(0)
    norms = nn.BatchNorm1d(5), Averaged()
    model = nn.Sequential(drawing[name](), *norms, nn.Flatten(), nn.Linear(20, 3))
    x, y = torch.randn(9, 5, 4), torch.randint(0, 3, (9,))
    data = list(zip(x.split(5), y.split(5)))
    for on in (False, True):
        for mode in (False, True):
            model.train(on)
            for m in norms: m.train(stats)
            before, by_hand = whole(model), 0.
            for i, (a, b) in enumerate(data):
                torch.manual_seed(7 + i)
                by_hand += len(b) * F.cross_entropy(model(a), b).item() / 9
            model.load_state_dict({k: before[k] for k in model.state_dict()})
            model.train(mode)
            O = Objective((model, F.cross_entropy, data), dropout=on, batch_stats=stats, seed=7)
            assert [O.value(), O.gradient()[0]] == pytest.approx([by_hand] * 2, rel=1e-6)
    assert O.value() != pytest.approx(Objective((model, F.cross_entropy, data), batch_stats=stats).value(), rel=1e-5)


def test_value_and_gradient_are_of_one_function():
    "PyTorch's fast path for transformers returns zeros where a text is padded, and is taken without a gradient only"
    torch.manual_seed(0)
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2)
            self.out = nn.Linear(4, 3)
        def forward(self, x, pad): return self.out(self.body(x, src_key_padding_mask=pad).mean(1))
    pad = torch.arange(5) >= torch.tensor([5, 3, 2, 4])[:, None]
    O = Objective((Reader(), F.cross_entropy, [(torch.randn(4, 5, 4), pad, torch.randint(0, 3, (4,)))]))
    was = torch.backends.mha.get_fastpath_enabled()
    assert O.value() == O.gradient()[0] and was is torch.backends.mha.get_fastpath_enabled() is True


class Cards:
    "Two GPUs: their random states, and what was set where"
    def __init__(self): self.states, self.put = {0: torch.arange(3), 1: torch.arange(4)}, []
    def get_rng_state(self, device): return self.states[device.index]
    def set_rng_state(self, state, device):
        self.states[device.index] = state
        self.put.append((device.index, state))


@pytest.mark.parametrize('kind', ['cuda:1', 'mps'])
def test_the_other_devices_are_not_reseeded(kind, monkeypatch):
    model, data = made('dense')
    cards, everywhere = Cards(), []
    if kind == 'mps':
        monkeypatch.setattr(cards, 'get_rng_state', lambda: cards.states[1])
        monkeypatch.setattr(cards, 'set_rng_state', lambda state: Cards.set_rng_state(cards, state, torch.device('mps:1')))
    class Anywhere(torch.Generator):
        "There is no such device here"
        def __new__(cls, device='cpu'): return super().__new__(cls)
    for module in (torch.cuda, torch.mps, torch.xpu):
        monkeypatch.setattr(module, 'manual_seed_all' if module is not torch.mps else 'manual_seed', everywhere.append)
    monkeypatch.setattr(torch, 'get_device_module', lambda device: cards)
    monkeypatch.setattr(torch, 'Generator', Anywhere)
    monkeypatch.setattr(objective, 'to_device', lambda b, device: b)
    O = Objective((model, F.cross_entropy, data), dropout=True, seed=3)
    usual, O.device = O.value(), torch.device(kind)
    for _ in range(2):
        cards.put.clear()
        assert O.value() == usual
        seeds = [torch.Generator().manual_seed(s).get_state() for s in (3, 3, 4, 5)]
        assert {i for i, _ in cards.put} == {1} and len(cards.put) == 6
        assert all(map(torch.equal, seeds, [state for _, state in cards.put[1:-1]]))
    assert torch.equal(cards.states[1], torch.arange(4)) and torch.equal(cards.states[0], torch.arange(3)) and not everywhere


# Text -----------------------------------------------------------------------------------------------------------------

small = dict(emb_sz=4, n_hid=6, n_layers=2)

def untrained():
    torch.manual_seed(0)
    model = get_language_model(AWD_LSTM, 9, config=dict(awd_lstm_lm_config, **small)).double()
    model.reset()
    return model


def twin_of(model):
    twin = untrained()
    twin.load_state_dict(model.state_dict())
    return twin


def reader():
    "A trained language model: it returns three things, and remembers where it has been"
    model = untrained()
    words = torch.randint(0, 9, (12, 6))
    data = [(words[i:i + 4, :-1], words[i:i + 4, 1:]) for i in (0, 4, 8)]
    learn = learner(model, data, rnn_cbs(alpha=2., beta=1.), loss_func=per_word)
    learn.fit(2)
    model(data[0][0])
    return learn, model, data


def per_word(z, y): return F.cross_entropy(z.flatten(0, -2), y.flatten())      # CrossEntropyLossFlat rounds to single precision
def memories(model): return [h for pair in model[0].hidden for h in pair]


def loop(model, data):
    "The mean loss by hand, with a graph; hidden states run on from batch to batch"
    model.eval(), model.reset()
    return sum(len(y) * per_word(model(x)[0], y) for x, y in data) / sum(len(y) for _, y in data)


def test_a_language_model():
    "Loss, gradient and products of its first output, from a fresh memory, which is afterwards what it was"
    learn, model, data = reader()
    by_hand, O = loop(twin_of(model), data), Objective(learn)
    v = [torch.randn_like(w) for w in O.params]
    for x, _ in data[:2]:
        model.train()(x)
        before, kept = [h.clone() for h in memories(model)], memories(model)
        value, (loss, g), Hv = O.value(), O.gradient(), O.hvp(v)
        assert value == loss == pytest.approx(by_hand.item(), rel=1e-9)
        assert all(map(torch.equal, before, memories(model))) and max(h.abs().max() for h in before) > 0
        assert model.training and not model._forward_hooks
        assert O.value([.1 * x for x in v]) != value
        for rnn in model[0].rnns: assert torch.equal(rnn.module.weight_hh_l0, rnn.weight_hh_l0_raw)
    twin = twin_of(model)
    expected = torch.autograd.grad(loop(twin, data), list(twin.parameters()), create_graph=True)
    product = torch.autograd.grad(expected, list(twin.parameters()), v)
    for a, b in ((g, expected), (Hv, product)): torch.testing.assert_close(flat(a), flat(b), rtol=1e-9, atol=1e-11)
    assert Objective((learn, data[:1])).value() == pytest.approx(loop(twin, data[:1]).item(), rel=1e-9)


def test_a_tuple_takes_its_output_as_told():
    "Shards go into `held` twice; the output is picked once. The Gauss-Newton matrix sees it too"
    learn, model, data = reader()
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model
        def forward(self, x):
            model.reset()
            return model(x)[0]
    model.reset()
    one, loss = data[:1], per_word
    plain_, ours = Objective((First(), loss, one)), Objective((model, loss, one), output=lambda out: out[0])
    v = [torch.randn_like(w) for w in ours.params]
    for a, b in ((plain_.ggn(v), ours.ggn(v)), (plain_.hvp(v), ours.hvp(v)), (plain_.ggn(v), Objective((learn, one)).ggn(v))):
        torch.testing.assert_close(flat(a), flat(b), rtol=1e-9, atol=1e-12)
    found = [m_sharpness(o, 2, progress=False).rise for o in (plain_, ours, Objective((learn, one)))]
    assert found == pytest.approx([found[0]] * 3, rel=1e-9) and found[0] > 0
    assert top_eigenvalues(ours, progress=False).values == pytest.approx(top_eigenvalues(plain_, progress=False).values)
    class Named(nn.Linear):
        def forward(self, x): return {'logits': super().forward(x)}
    torch.manual_seed(0)
    named, rows = Named(5, 3), [(torch.randn(4, 5), torch.randint(0, 3, (4,)))]
    by_name = Objective((named, F.cross_entropy, rows), output=lambda out: out['logits'])
    assert by_name.value() == pytest.approx(F.cross_entropy(F.linear(rows[0][0], *named.parameters()), rows[0][1]).item())
    assert m_sharpness(by_name, 2, progress=False).rise > 0 and isinstance(named(rows[0][0]), dict)
    with pytest.raises(KeyError): Objective((named, F.cross_entropy, rows), output=lambda out: out['no']).value()
    assert not named._forward_hooks


def test_a_text_classifier():
    "Docstrings, padded; batch norm in its head"
    dls = docstrings(bs=16, packages=('numpy', 'torch'), per_package=20, vocab_size=50, seq_len=12, device='cpu')
    torch.manual_seed(0)
    model = get_text_classifier(AWD_LSTM, len(dls.vocab[0]), 2, config=dict(awd_lstm_clas_config, **small), pad_idx=0)
    learn = Learner(dls, model, CrossEntropyLossFlat(), cbs=rnn_cbs(alpha=2., beta=1.))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    O, ds, model = Objective(learn), dls.train_ds, model.eval()
    assert len(ds) == 32
    value, (_, ours) = O.value(), O.gradient()
    by_hand = F.cross_entropy(model(ds.x)[0], ds.y)
    assert value == pytest.approx(by_hand.item(), rel=1e-5)
    g = torch.autograd.grad(by_hand, O.params, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(flat(ours), flat(g), rtol=1e-3, atol=1e-6)
    found = ball_sharpness(learn, .1, progress=False)
    with torch.no_grad():
        for w, e in zip(O.params, found.eps): w += e
    assert found.rise == pytest.approx(F.cross_entropy(model(ds.x)[0], ds.y).item() - by_hand.item(), rel=1e-4) and found.rise > 0


# Wrapped, compiled, of several types ------------------------------------------------------------------------------------

@pytest.fixture
def group(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_wrappers_for_several_devices_are_taken_off(group):
    "A Learner's model and one in a tuple: the wrapper would wait for other processes, which need not measure"
    for wrap in (nn.DataParallel, DistributedDataParallel):
        model, data = made('dense')
        truth, wrapped = Objective((model, F.cross_entropy, data)), wrap(model)
        v, calls = [torch.randn_like(w) for w in truth.params], []
        hook = wrapped.register_forward_pre_hook(lambda *_: calls.append(1))
        for O in (Objective((wrapped, F.cross_entropy, data)), Objective(learner(wrapped, data, loss_func=F.cross_entropy))):
            assert O.value() == pytest.approx(truth.value(), rel=1e-9)
            torch.testing.assert_close(flat(O.hvp(v)), flat(truth.hvp(v)), rtol=1e-9, atol=1e-11)
        assert not calls
        hook.remove()
        F.cross_entropy(wrapped(data[0][0]), data[0][1]).backward()


@pytest.mark.parametrize('where', ['whole', 'part', 'in place'])
def test_a_compiled_model(where):
    "By a backend without a second derivative; the measure does without it, and the model stays compiled"
    model, data = made('tied' if where == 'in place' else 'dense')     # what is in place is compiled for own classes only
    truth = Objective((copy.deepcopy(model), F.cross_entropy, data))
    if where == 'whole': model = torch.compile(model, backend='aot_eager')
    elif where == 'part': model[3] = torch.compile(model[3], backend='aot_eager')
    else: model.compile(backend='aot_eager')
    with pytest.raises(RuntimeError, match='double backward|donated buffers'):      # depends on what was compiled before
        loss = F.cross_entropy(model(data[0][0]), data[0][1])
        g = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        torch.autograd.grad(sum(x.sum() for x in g), list(model.parameters()))
    v = [torch.randn_like(w) for w in truth.params]
    O = Objective((model, F.cross_entropy, data), output=lambda out: out)
    torch.testing.assert_close(flat(O.hvp(v)), flat(truth.hvp(v)), rtol=1e-9, atol=1e-11)
    assert O.value() == pytest.approx(truth.value(), rel=1e-9)


def test_weights_of_two_types():
    "Single and double precision in one model"
    torch.manual_seed(0)
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3).double()
        def forward(self, x): return self.b(self.a(x.to(self.a.weight.dtype)).tanh().double())
    model, (_, data) = Mixed(), made('dense')
    O, fine = Objective((model, F.cross_entropy, data)), Objective((copy.deepcopy(model).double(), F.cross_entropy, data))
    ball, exact = (ball_sharpness(o, .1, progress=False) for o in (O, fine))
    assert ball.rise == pytest.approx(exact.rise, rel=1e-4) and ball.passes == exact.passes
    assert [w.dtype for w in model.parameters()] == [torch.float32] * 2 + [f64] * 2
    v = [torch.randn_like(w) for w in O.params]
    torch.testing.assert_close(flat(O.hvp(v)), flat(fine.hvp([x.double() for x in v])), rtol=1e-4, atol=1e-5)


def test_half_precision_weights():
    "Each weight moves in its own coarse steps, so the rise is good to some per cent; the weights come back to the bit"
    model, data = made('dense')
    half = [(x.bfloat16(), y) for x, y in data]
    fine = ball_sharpness((model, F.cross_entropy, data), .5, progress=False)
    model.bfloat16()
    before = whole(model)
    O = Objective((model, F.cross_entropy, half))
    coarse = ball_sharpness(O, .5, progress=False)
    assert coarse.rise == pytest.approx(fine.rise, rel=.05)
    assert {e.dtype for e in coarse.eps} == {torch.float32} and grad_norm(coarse.eps).item() == pytest.approx(.5, rel=1e-3)
    assert_same(before, whole(model))


# As it was ----------------------------------------------------------------------------------------------------------

measures = {
    'ball': lambda o: ball_sharpness(o, .1, progress=False), 'shards': lambda o: m_sharpness(o, 2, progress=False),
    'eigenvalues': lambda o: top_eigenvalues(o, 2, progress=False), 'trace': lambda o: hessian_trace(o, most=3, progress=False),
    'spectrum': lambda o: hessian_spectrum(o, 1, 3, progress=False),
    'gauss-newton': lambda o: top_eigenvalues(o, kind='ggn', progress=False),
}


def whole(model):
    return dict(snapshot(model), **{f'grad {k}': w.grad.clone() for k, w in model.named_parameters() if w.grad is not None},
                rng=torch.get_rng_state(), modes=torch.tensor([m.training for m in model.modules()]),
                np=torch.tensor(np.random.get_state()[1].astype('int64')), py=torch.tensor(random.getstate()[1]),
                hooks=torch.tensor([len(m._forward_hooks) for m in model.modules()]))


@pytest.mark.parametrize('flags', [{}, dict(batch_stats=True, dropout=True)], ids=str)
@pytest.mark.parametrize('kind', kinds)
@pytest.mark.parametrize('name', measures)
def test_nobody_can_tell(name, kind, flags):
    "Not even when it is interrupted, early or late"
    model, data = made(kind)
    for x, y in data: F.cross_entropy(model(x), y).backward()
    list(model.modules())[1].eval()
    before, storage = whole(model), [w.data_ptr() for w in model.parameters()]
    first = measures[name](Objective((model, F.cross_entropy, data), **flags))
    assert_same(before, whole(model))
    again = measures[name](Objective((model, F.cross_entropy, data), **flags))
    assert np.array_equal(np.asarray(getattr(first, 'rise', first if isinstance(first, float) else 0)),
                          np.asarray(getattr(again, 'rise', again if isinstance(again, float) else 0)))
    for stop in (1, 5):
        calls = []
        def loss(z, y):
            calls.append(1)
            if len(calls) == stop: raise KeyboardInterrupt
            return F.cross_entropy(z, y)
        if name in ('eigenvalues', 'trace', 'spectrum', 'ball', 'shards', 'gauss-newton'):
            with pytest.raises(KeyboardInterrupt): measures[name](Objective((model, loss, data), **flags))
        assert_same(before, whole(model))
    assert storage == [w.data_ptr() for w in model.parameters()]


class Measure(Callback):
    "Between the epochs"
    def after_epoch(self):
        O = Objective(self.learn)
        self.found = getattr(self, 'found', []) + [(O.value(), top_eigenvalues(O, progress=False).values[0])]


def test_training_goes_on_as_if_nobody_had_looked():
    "Shuffled batches, dropout, momentum; measured in the middle"
    def end(*cbs):
        torch.manual_seed(5)
        learn = learner(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(.3), nn.Linear(7, 3)), batches(dtype=torch.float32), cbs)
        items = [(x, y) for xs, ys in batches(dtype=torch.float32) for x, y in zip(xs, ys)]
        learn.dls.loaders[0] = DataLoader(items, bs=5, shuffle=True, num_workers=0)
        learn.dls.train.rng.seed(3)
        learn.fit(3)
        return dict(snapshot(learn.model), rng=torch.get_rng_state()), learn
    (plain_end, _), (ours, learn) = end(), end(Measure())
    assert_same(plain_end, ours)
    assert len(learn.measure.found) == 3 and len({v for v, _ in learn.measure.found}) == 3
    rows = [(torch.stack([x for x, _ in learn.dls.train.dataset]), torch.stack([y for _, y in learn.dls.train.dataset]))]
    assert learn.measure.found[-1][0] == pytest.approx(F.cross_entropy(learn.model.eval()(rows[0][0]), rows[0][1]).item(), abs=1e-6)


def test_the_generator_of_a_loader_is_not_used_up():
    model, data = made('dense')
    gen = torch.Generator().manual_seed(1)
    rows = tud.TensorDataset(*(torch.cat(o) for o in zip(*data)))
    dl = tud.DataLoader(rows, 4, shuffle=True, generator=gen)
    before = gen.get_state()
    O = Objective((model, F.cross_entropy, dl))
    assert O.value() == pytest.approx(Objective((model, F.cross_entropy, data)).value(), abs=1e-12)
    O.gradient()
    assert torch.equal(before, gen.get_state())


def test_memory_does_not_grow_with_the_number_of_batches():
    most = []
    for n in (3, 30):
        model, data = made('dense', (6,) * n)
        with Allocated() as memory:
            O = Objective((model, F.cross_entropy, data))
            O.hvp([torch.ones_like(w) for w in O.params])
        most.append(memory.most)
    assert most[1] <= 1.05 * most[0]


# Whatever the data look like ------------------------------------------------------------------------------------------

def test_several_inputs_and_any_loss():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 1).double()
        def forward(self, x, z): return self.a(x * z).squeeze(1)
    torch.manual_seed(0)
    x, z, y = torch.randn(9, 3, dtype=f64), torch.randn(9, 3, dtype=f64), torch.randn(9, dtype=f64)
    model = Two()
    O = Objective((model, nn.MSELoss(), list(zip(x.split(4), z.split(4), y.split(4)))))
    X = torch.cat([x * z, torch.ones(9, 1)], 1)
    assert O.value() == pytest.approx(F.mse_loss(model(x, z), y).item(), abs=1e-12)
    assert top_eigenvalues(O, 4, tol=1e-9, progress=False).values == pytest.approx(torch.linalg.eigvalsh(2 * X.T @ X / 9).flip(0), rel=1e-8)


def test_a_part_of_the_weights():
    "Each counts once, even if it is named twice"
    model, data = made('dense')
    O = Objective((model, F.cross_entropy, data), params=lambda m: [*m[3].parameters(), m[3].bias])
    f, w, _ = plain(model.eval(), data)
    H = torch.autograd.functional.hessian(f, w)[36:, 36:]
    assert top_eigenvalues(O, 2, tol=1e-8, progress=False).values == pytest.approx(torch.linalg.eigvalsh(H).flip(0)[:2], rel=1e-6)
    assert [len(v) for v in (O.params, ball_sharpness(O, progress=False).eps)] == [2, 2]


def test_a_learner_whose_last_batch_is_dropped():
    "One batch in training, two when all rows count; two targets"
    torch.manual_seed(0)
    model = dense()
    rows = [(torch.randn(5), torch.randint(0, 3, ()), torch.tensor(1.)) for _ in range(10)]
    dl = DataLoader(rows, bs=8, shuffle=True, drop_last=True, num_workers=0)
    dl.n_inp = 1
    learn = Learner(DataLoaders(dl, dl), model, loss_func=lambda z, y, w: F.cross_entropy(z, y) * w.mean())
    found = top_eigenvalues(learn, tol=1e-5, progress=False).values
    whole = [tuple(torch.stack(o) for o in zip(*rows))]
    O = Objective((model, learn.loss_func, dl))
    z = model.eval()(whole[0][0])
    assert O.value() == pytest.approx(F.cross_entropy(z, whole[0][1]).item(), abs=1e-6)
    two = [(x, y) for x, y, _ in (tuple(torch.stack(o) for o in zip(*rows[i:i + 5])) for i in (0, 5))]
    assert found == pytest.approx(top_eigenvalues((model, F.cross_entropy, two), tol=1e-5, progress=False).values, rel=1e-3)


@pytest.mark.parametrize('n', [1, 2])
def test_attention_and_half_precision(n):
    "Kernels without a second derivative are not used; one batch and two"
    torch.manual_seed(0)
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.out = nn.TransformerEncoderLayer(4, 2, 8, 0., batch_first=True), nn.Linear(4, 3)
        def forward(self, x): return self.out(self.layer(x).mean(1))
    model, x, y = Reader().double(), torch.randn(6, 5, 4, dtype=f64), torch.randint(0, 3, (6,))
    data = list(zip(x.split(6 // n), y.split(6 // n)))
    O = Objective((model, F.cross_entropy, data))
    e, h = [torch.randn_like(w) for w in O.params], 1e-5
    up, down = (O.gradient([s * h * d for d in e])[1] for s in (1, -1))
    torch.testing.assert_close(flat(O.hvp(e)), (flat(up) - flat(down)) / (2 * h), rtol=1e-5, atol=1e-6)
    fine = top_eigenvalues(O, progress=False).values[0]
    half = top_eigenvalues((model.bfloat16(), F.cross_entropy, [(a.bfloat16(), b) for a, b in data]), tol=.1, progress=False)
    assert half.values[0] == pytest.approx(fine, rel=.2)
    with torch.no_grad(): assert hessian_trace((model.double(), F.cross_entropy, data), most=3, progress=False).products == 3


def test_the_ball_contains_its_centre():
    class Hill(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3, dtype=f64))
        def forward(self, x): return .1 * self.w[0] - 5 * self.w.square().sum()
    found = ball_sharpness((Hill(), lambda z, y: z, [(torch.zeros(1), torch.zeros(1))]), 1., progress=False)
    assert found.rise == 0 and found.one_step < 0 and all((e == 0).all() for e in found.eps)


def test_shards_see_their_own_rows():
    "By hand: the mean over shards, weighted by their rows"
    model, data = made('dense', (6, 5))
    parts = [(x[i:i + 2], y[i:i + 2]) for x, y in data for i in range(0, len(y), 2)]
    total = sum(len(p[1]) * ball_sharpness((model, F.cross_entropy, [p]), .1, 1, progress=False).rise for p in parts)
    ours = m_sharpness((model, F.cross_entropy, data), 2, .1, progress=False)
    assert ours.rise == pytest.approx(total / 11, rel=1e-9) and ours.n == 6
    assert ours.rise > ball_sharpness((model, F.cross_entropy, data), .1, progress=False).rise


def test_the_error_of_the_mean_over_shards():
    "Equal shards: the usual standard error; unequal ones: as often as the mean of random shards says; one: no number"
    model, data = made('dense', (12,))
    def m(k, data): return m_sharpness((model, F.cross_entropy, data), k, .1, progress=False)
    each = [m(3, [(data[0][0][i:i + 3], data[0][1][i:i + 3])]) for i in range(0, 12, 3)]
    assert all(math.isnan(e.error) and e.n == 1 for e in each)
    rises = [e.rise for e in each]
    assert m(3, data).error == pytest.approx(np.std(rises, ddof=1) / 2, rel=1e-6)
    rows, gen = np.array([3, 3, 2, 3, 1, 2] * 5), np.random.default_rng(0)
    found = [sharpness._over_shards(gen.normal(size=30), rows) for _ in range(3000)]
    assert np.mean([f.error**2 for f in found]) == pytest.approx(np.var([f.rise for f in found]), rel=.1)


@pytest.mark.parametrize('ball', [dict(p=math.inf), dict(adaptive=True), dict(adaptive=True, eta=.5), dict(steps=4)], ids=str)
def test_shards_in_other_balls(ball):
    model, data = made('dense', (3, 3))
    parts = [ball_sharpness((model, F.cross_entropy, [d]), .1, progress=False, **dict(dict(steps=1), **ball)).rise for d in data]
    ours = m_sharpness((model, F.cross_entropy, data), 3, .1, progress=False, **ball).rise
    assert ours == pytest.approx(np.mean(parts), rel=1e-9)
    assert ours != pytest.approx(m_sharpness((model, F.cross_entropy, data), 3, .1, progress=False).rise, rel=1e-6)
    with pytest.raises(ValueError, match='eta'): m_sharpness((model, F.cross_entropy, data), 3, adaptive=True, eta=-1, progress=False)


def test_what_ended_the_search():
    "The tolerance; the step limit; a step that went down; a point without a gradient"
    model, data = made('dense')
    O = Objective((model, F.cross_entropy, data))
    done, cut_off = (ball_sharpness(O, .5, steps=k, progress=False) for k in (50, 2))
    assert done.converged and done.passes < 50 and not cut_off.converged and cut_off.passes == 3
    by_hand, g = [], O.gradient()[1]
    for _ in range(done.passes - 1):
        loss, g = O.gradient(ascent(g, .5))
        by_hand.append(loss - O.value())
    gains = [(b - a) / b for a, b in zip(by_hand, by_hand[1:])]
    assert abs(gains[-1]) <= 1e-3 < min(gains[:-1], default=1) and done.rise == pytest.approx(max(by_hand), rel=1e-9)
    class Wave(nn.Module):
        "Its slope at 2 points back, to where it has been"
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros((), dtype=f64))
        def forward(self, x): return (self.w + .1).sin()
    flat_, up = (ball_sharpness((m, lambda z, y: z, [(torch.zeros(1), torch.zeros(1))]), 2., progress=False)
                 for m in (nn.Sequential(Wave(), nn.Hardtanh(-1, 0)), Wave()))
    assert not flat_.converged and flat_.rise == 0 and not up.converged
    with pytest.raises(ValueError, match='tol=-1'): ball_sharpness(O, tol=-1)


# Errors ---------------------------------------------------------------------------------------------------------------

def test_what_cannot_be_measured():
    (model, data), ice = made('dense'), frozen()
    cases = [
        ('no weight', lambda: Objective((model, F.cross_entropy, data), params=lambda m: [])),
        ('needs no gradient', lambda: Objective((ice, F.cross_entropy, data), params=lambda m: list(m.parameters()))),
        ('a number', lambda: Objective((model, lambda z, y: F.cross_entropy(z, y, reduction='none'), data)).value()),
        ('batches is empty', lambda: top_eigenvalues((model, F.cross_entropy, []), progress=False)),
        ('batch 1 at the weights is nan', lambda: Objective((model, F.cross_entropy, [data[0], (data[1][0] * math.nan, data[1][1])])).value()),
        ('once only', lambda: Objective((model, F.cross_entropy, iter(data)))),
        ('not one of the model', lambda: Objective((model, F.cross_entropy, data), params=lambda m: list(ice[0].parameters()))),
        ('rho=0', lambda: ball_sharpness((model, F.cross_entropy, data), 0)),
        ('k=0', lambda: top_eigenvalues((model, F.cross_entropy, data), 0)),
        ('most=1', lambda: hessian_trace((model, F.cross_entropy, data), most=1)),
        ('starts=0', lambda: hessian_spectrum((model, F.cross_entropy, data), 0)),
    ]
    with pytest.raises(TypeError, match='model whose forward'): Objective((model, F.cross_entropy, [dict(x=data[0][0], y=data[0][1])])).value()
    two, before = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, device='meta')]), whole(model)
    for told, f in cases:
        with pytest.raises(ValueError, match=told): f()
    with pytest.raises(ValueError, match='2 devices'): Objective((two, F.cross_entropy, data))
    assert_same(before, whole(model))


def test_too_few_products_are_said():
    model, data = made('dense')
    with pytest.warns(UserWarning, match='errors are above'):
        found = top_eigenvalues((model, F.cross_entropy, data), 3, most=3, progress=False)
    assert found.products == 3 and (found.errors > 1e-3 * abs(found.values)).any()


def test_data_without_a_length_and_bars(capsys):
    "A loader that does not know how many batches it has; the bar is shown if asked for, and leaves nothing behind"
    model, data = made('dense')
    class Stream(tud.IterableDataset):
        def __iter__(self): return (row for x, y in data for row in zip(x, y))
    O = Objective((model, F.cross_entropy, tud.DataLoader(Stream(), 4)))
    assert O.value() == pytest.approx(Objective((model, F.cross_entropy, data)).value(), abs=1e-12)
    quiet = m_sharpness(O, 2, progress=False), top_eigenvalues(O, progress=False).values
    assert capsys.readouterr().out == ''
    shown = m_sharpness(O, 2), top_eigenvalues(O).values
    assert quiet == shown and capsys.readouterr().out != ''


def test_the_objective_is_still_in_the_module_it_came_from():
    space = {}
    exec('from sam_explained.sharpness import *', space)
    assert space['Objective'] is Objective is objective.Objective
