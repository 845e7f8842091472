"""SAF against loops written from its equation; the past is really the past, whatever comes in between."""
import math
import pickle
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torch.utils.data as tud
from conftest import CPUMixedPrecision, assert_close, assert_same, mlp, snapshot
from fastai.basics import (SGD, Callback, CategoryBlock, CrossEntropyLossFlat, DataBlock, DataLoaders, IndexSplitter, L,
                           Learner, OptimWrapper, Recorder, TrainEvalCallback, Transform, TransformBlock, noop)
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import *
from fastai.callback.training import GradientAccumulation
from fastai.data.load import DataLoader
from fastai.torch_core import TensorImage
from processes import in_processes
from reference import sam_gradient
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sam_explained.data import corpus, docstrings
from sam_explained.msam import MSAM
from sam_explained.saf import SAF, trajectory_loss
from sam_explained.sam import SAM

f32, f64 = torch.float32, torch.float64
sgd = partial(SGD, mom=.9)


class Rows(tud.Dataset):
    "22 rows; the first entry of a row tells its number"
    def __init__(self, n=22, dtype=f64):
        gen = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(n, 5, generator=gen, dtype=f64).to(dtype), torch.randint(0, 3, (n,), generator=gen)
        self.x[:, 0] = torch.arange(n)
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], self.y[i]


class Rest(nn.Module):
    "Without the number of the row"
    def forward(self, x): return x[:, 1:]


def net(dtype=f64, drop=0.):
    torch.manual_seed(3)
    return nn.Sequential(Rest(), nn.Linear(4, 7), nn.Tanh(), nn.Dropout(drop), nn.Linear(7, 3)).to(dtype)


kinds = {
    'fastai': lambda ds, **kw: DataLoader(ds, bs=4, shuffle=True, num_workers=0, **kw),
    'fastai, drop_last': lambda ds: DataLoader(ds, bs=4, shuffle=True, drop_last=True, num_workers=0),
    'fastai, workers': lambda ds: DataLoader(ds, bs=4, shuffle=True, num_workers=2),
    'torch': lambda ds: tud.DataLoader(ds, 4, shuffle=True),
    'torch, workers': lambda ds: tud.DataLoader(ds, 4, shuffle=True, num_workers=2),
    'torch, a sample': lambda ds: tud.DataLoader(ds, 4, sampler=tud.RandomSampler(ds, num_samples=12)),
}


def learner(model, cbs, kind='fastai', ds=None, loss_func=None, **kw):
    ds = ds or Rows(dtype=next(model.parameters()).dtype)
    dls = DataLoaders(kinds[kind](ds), tud.DataLoader(Rows(8, ds.x.dtype), 4))
    learn = Learner(dls, model, loss_func=loss_func or nn.CrossEntropyLoss(), opt_func=kw.pop('opt_func', sgd), lr=.1,
                    default_cbs=False, cbs=[TrainEvalCallback()] + L(cbs), wd_bn_bias=True, **kw)
    learn.logger, learn.create_mbar = noop, False
    torch.manual_seed(8)
    if hasattr(dls.train, 'rng'): dls.train.rng.seed(8)
    return learn


class Notes(Callback):
    "The batches as they came, to be told again to a plain loop"
    order, run_valid = -5, False
    def before_fit(self): self.seen = []
    def before_batch(self): self.seen.append((self.epoch, *self.learn.xb, *self.learn.yb))


def told_again(model, seen, lam=.3, tau=5., lag=3, start=3, n_acc=None, rho=None, half=True, smooth=0.):
    "The definition, with a dictionary for the past"
    opt, said, count = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9), {}, 0
    for epoch, x, y in seen:
        keys, now = [int(i) for i in x[:, 0]], []
        past = {k: said[epoch - lag, k] for k in keys if epoch >= start and (epoch - lag, k) in said}
        def loss(call):
            z = call(x)
            now.append(z.detach())
            total = F.cross_entropy(z, y, label_smoothing=smooth)
            for row, k in zip(z, keys):
                if k not in past: continue
                p = (past[k] / tau).softmax(0)
                total = total + lam * (p * (p.log() - (row / tau).log_softmax(0))).sum() / len(y)
            return total
        g = sam_gradient(model, loss, rho)[0] if rho else torch.autograd.grad(loss(model), list(model.parameters()))
        for k, row in zip(keys, now[0]):
            row = row.float() - row.float().max()
            said[epoch, k] = (row.half() if half else row).to(now[0].dtype)
        share = len(y) / n_acc if n_acc else 1.
        for w, o in zip(model.parameters(), g): w.grad = share * o + (0 if w.grad is None else w.grad)
        count += len(y)
        if n_acc and count < n_acc: continue
        count = 0
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize('kind', kinds)
def test_the_definition(kind):
    model, ref, other = net(), net(), net()
    notes = Notes()
    learner(model, [SAF(5., lag=2, start=2), notes], kind).fit(6)
    told_again(ref, notes.seen, 5., lag=2, start=2)
    told_again(other, notes.seen, 0., lag=2, start=2)
    assert_close(model, ref)
    assert max((a - b).abs().max() for a, b in zip(model.parameters(), other.parameters())) > 1e-5


@pytest.mark.parametrize('kw', [dict(lag=1, start=1), dict(lag=3, start=4), dict(tau=1.), dict(dtype=f32)], ids=str)
def test_its_arguments(kw):
    model, ref, notes = net(), net(), Notes()
    kw = dict(lam=5., lag=2, start=2) | kw
    learner(model, [SAF(**kw), notes]).fit(7)
    told_again(ref, notes.seen, half=kw.pop('dtype', None) is None, **kw)
    assert_close(model, ref, 1e-6, 1e-8) if 'dtype' in kw else assert_close(model, ref)


def test_label_smoothing():
    model, ref, notes = net(), net(), Notes()
    learner(model, [SAF(5., lag=1, start=1), notes], loss_func=nn.CrossEntropyLoss(label_smoothing=.2)).fit(4)
    told_again(ref, notes.seen, 5., lag=1, start=1, smooth=.2)
    assert_close(model, ref)


def test_with_accumulation():
    model, ref, notes = net(), net(), Notes()
    learner(model, [SAF(5., lag=1, start=1), notes, GradientAccumulation(8)]).fit(4)
    told_again(ref, notes.seen, 5., lag=1, start=1, n_acc=8)
    assert_close(model, ref)


def test_with_sam():
    model, ref, notes = net(), net(), Notes()
    learner(model, [SAF(5., lag=1, start=1), notes, SAM(.3)]).fit(4)
    told_again(ref, notes.seen, 5., lag=1, start=1, rho=.3)
    assert_close(model, ref)


def test_looking_for_a_learning_rate(tmp_path):
    "The term is off, nothing is recorded, the past that there was is still there"
    def trained():
        learn = learner(net(f32), [Recorder(), SAF(5., lag=1, start=1)], path=tmp_path)
        learn.fit(3)
        return learn
    ours, plain = trained(), trained()
    plain.remove_cb(plain.saf)
    before = {k: v.clone() for k, v in ours.saf.history.state_dict().items() if torch.is_tensor(v)}
    weights, found = snapshot(ours.model), []
    for learn in (plain, ours):
        torch.manual_seed(3)
        learn.dls.train.rng.seed(3)
        learn.lr_find(num_it=12, show_plot=False, suggest_funcs=())
        found.append(learn.recorder.losses)
    assert torch.equal(*map(torch.stack, found))
    assert_same(weights, snapshot(ours.model))
    assert_same(before, {k: v for k, v in ours.saf.history.state_dict().items() if torch.is_tensor(v)})
    notes = Notes()
    ours.add_cb(notes)
    ours.fit(5, start_epoch=3)
    assert torch.stack(ours.saf.kls).mean() > 0 and (ours.saf.history.stamps == 4).all()


def test_loss_scaling():
    model, ref, notes = net(f32), net(f32), Notes()
    learner(model, [SAF(5., lag=1, start=1), notes, CPUMixedPrecision()]).fit(4)
    told_again(ref, notes.seen, 5., lag=1, start=1)
    assert_close(model, ref, 1e-4, 1e-6)


@pytest.mark.parametrize('kw', [dict(lam=0., lag=1, start=1), dict(start=5)], ids=str)
@pytest.mark.parametrize('kind', ['fastai', 'torch', 'fastai, workers'])
def test_without_the_term_it_is_the_base_run(kw, kind):
    def end(*cbs):
        torch.manual_seed(5)
        model = net(f32, .3)
        learner(model, cbs, kind).fit(5)
        return dict(snapshot(model), rng=torch.get_rng_state())
    assert_same(end(), end(SAF(**kw)))


def test_one_forward_per_step_and_none_recorded_in_validation():
    model, passes = net(), []
    model.register_forward_hook(lambda *_: passes.append(model.training))
    learn = learner(model, SAF(lag=1, start=1))
    learn.fit(3)
    assert passes.count(True) == 3 * 6 and passes.count(False) == 3 * 2
    before = {k: v.clone() for k, v in learn.saf.history.state_dict().items() if torch.is_tensor(v)}
    learn.validate()
    assert_same(before, {k: v for k, v in learn.saf.history.state_dict().items() if torch.is_tensor(v)})


def test_the_logged_loss_is_the_plain_loss():
    seen = []
    class Look(Callback):
        order, run_valid = 1000, False
        def after_loss(self): seen.append((self.loss - F.cross_entropy(self.pred, *self.yb)).abs().item())
    learner(net(), [SAF(5., lag=1, start=1), Look()]).fit(3)
    assert max(seen) < 1e-12


@pytest.mark.parametrize('opt_func', [sgd, partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9))])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path, opt_func):
    "The order of the batches is fixed here, so that the two runs see the same"
    def fresh():
        learn = learner(net(), SAF(5., lag=2, start=2), opt_func=opt_func, path=tmp_path)
        learn.dls.loaders[0] = DataLoader(Rows(), bs=4, shuffle=False, num_workers=0)
        return learn
    whole, first, second = fresh(), fresh(), fresh()
    whole.fit(6)
    first.fit(3)
    first.save('three')
    second.load('three')
    second.fit(6, start_epoch=3)
    assert_same(snapshot(whole.model), snapshot(second.model))
    a, b = whole.saf.history.state_dict(), second.saf.history.state_dict()
    assert torch.equal(a['logits'], b['logits']) and torch.equal(a['stamps'], b['stamps'])


def test_resuming_without_the_history_is_the_base_run_until_there_is_one(tmp_path):
    def fresh(*cbs):
        learn = learner(net(), cbs, path=tmp_path)
        learn.dls.loaders[0] = DataLoader(Rows(), bs=4, shuffle=False, num_workers=0)
        return learn
    first = fresh(SAF(5., lag=2, start=2))
    first.fit(3)
    first.save('weights', with_opt=False)
    ends = []
    for cbs in ([SAF(5., lag=2, start=2)], []):
        for epochs in (5, 6):
            learn = fresh(*cbs)
            learn.load('weights', with_opt=False)
            learn.fit(epochs, start_epoch=3)
            ends.append(snapshot(learn.model))
    assert_same(ends[0], ends[2])                                            # epochs 3 and 4 have no past
    assert not torch.equal(ends[1]['1.weight'], ends[3]['1.weight'])         # epoch 5 has


def test_a_new_fit_begins_without_a_past():
    "Two rows are left out in each epoch: what the fit before has said about them in its epoch 0 is no past"
    learn = learner(net(), SAF(5., lag=1, start=1), 'fastai, drop_last')
    learn.fit(1)
    notes = Notes()
    learn.add_cb(notes)
    learn.model.load_state_dict(net().state_dict())
    learn.opt.clear_state()
    ref = net()
    learn.fit(3)
    told_again(ref, notes.seen, 5., lag=1, start=1)
    assert_close(learn.model, ref)


# Real loaders --------------------------------------------------------------------------------------------------

class Echo(nn.Module):
    "Its outputs name the picture, whatever has been done to it; there is a weight, but it does not matter"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
    def forward(self, x): return x.amax((1, 2, 3))[:, None] * torch.tensor([1., 0, -1]) + 0 * self.w


class Turn(Transform):
    "One of eight ways to lay the picture, drawn anew for each item"
    split_idx = 0
    def encodes(self, x: TensorImage):
        k = random.randrange(8)
        return torch.rot90(x.flip(-1) if k > 3 else x, k % 4, (-2, -1))


def square(i):
    "A dark picture with a bright corner: the number of the row over 8"
    x = torch.zeros(1, 3, 3)
    x[0, 0, 0] = i / 8
    return TensorImage(x)


def label(i): return int(i) % 3


@pytest.mark.parametrize('workers', [0, 2])
def test_a_data_block_with_augmentation_and_workers(workers):
    "With any past that is not the row's own the term would not be 0"
    block = DataBlock((TransformBlock, CategoryBlock), get_items=noop, get_x=square, get_y=label,
                      splitter=IndexSplitter(range(40, 50)), item_tfms=Turn(), batch_tfms=Turn())
    dls = block.dataloaders(list(range(50)), bs=7, num_workers=workers)
    learn = Learner(dls, Echo(), CrossEntropyLossFlat(), cbs=SAF(lag=1, start=1), lr=0., default_cbs=False)
    learn.add_cbs([TrainEvalCallback(), Counted()])
    learn.logger, learn.create_mbar = noop, False
    learn.fit(3)
    assert [learn.counted.rows[e] for e in range(3)] == [0, pytest.approx(35 * .875, abs=4), pytest.approx(35 * .875, abs=4)]
    assert max(learn.counted.kls) < 1e-6
    then, weight = learn.saf.history.read(torch.arange(40), 3)
    seen = weight > 0
    assert seen.sum() == 35                                                  # drop_last: five of forty rows are not seen
    assert torch.equal(then[seen][:, 0] - then[seen][:, 1], torch.arange(40)[seen] / 8)


class Counted(Callback):
    "How many rows had a past, and what the term was"
    order, run_valid = 40, False
    def before_fit(self): self.rows, self.kls = {}, []
    def before_epoch(self): self.rows[self.epoch] = 0
    def after_loss(self):
        self.rows[self.epoch] += self.saf.asked[2].sum().item()
        if self.epoch: self.kls.append(trajectory_loss(self.pred, *self.saf.asked[1:2], weight=self.saf.asked[2]).item())


def test_text():
    "Rows of padded word numbers, with their own words as keys"
    dls = docstrings(bs=40, valid_pct=len(corpus()) - 120, vocab_size=30)
    torch.manual_seed(0)
    make = partial(nn.Sequential, nn.EmbeddingBag(32, 6), nn.Linear(6, 8))
    model, seen = make(), []
    ref = make()
    ref.load_state_dict(model.state_dict())
    class Keep(Callback):
        order, run_valid = -5, False
        def before_batch(self): seen.append((self.epoch, *self.xb, *self.yb))
    learn = Learner(dls, model, CrossEntropyLossFlat(), opt_func=partial(SGD, mom=.9), lr=.5,
                    cbs=[SAF(20., lag=1, start=1), Keep()], default_cbs=False)
    learn.add_cb(TrainEvalCallback())
    learn.logger, learn.create_mbar = noop, False
    learn.fit(3)
    opt, said = torch.optim.SGD(ref.parameters(), lr=.5, momentum=.9), {}
    assert len(seen) == 9 and len({tuple(row) for _, x, _ in seen for row in x.tolist()}) > 110
    for epoch, x, y in seen:
        z = ref(x)
        loss = F.cross_entropy(z, y)
        if epoch:
            past = torch.stack([said[epoch - 1, tuple(row)] for row in x.tolist()])
            loss = loss + 20 * F.kl_div((z / 5).log_softmax(1), (past / 5).softmax(1), reduction='batchmean')
        for row, o in zip(x.tolist(), z.detach()): said[epoch, tuple(row)] = o - o.max()
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert_close(model, ref, 1e-3, 1e-5)


# Errors --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('mixed', [MixUp, CutMix])
def test_mixtures_have_no_past(mixed):
    with pytest.raises(ValueError, match='use MESA'): learner(net(), [SAF(), mixed()]).fit(1)


class Stream(tud.IterableDataset):
    def __iter__(self): return iter(Rows())
    def __len__(self): return 22


def test_a_stream_has_no_ids():
    learn = learner(net(), SAF())
    learn.dls = DataLoaders(tud.DataLoader(Stream(), 4), tud.DataLoader(Rows(), 4))
    before = snapshot(learn.model)
    with pytest.raises(ValueError, match='no sample ids'): learn.fit(1)
    assert_same(before, snapshot(learn.model))


def test_a_training_set_that_grows():
    class Grow(Callback):
        def after_epoch(self): self.dls.loaders[0] = DataLoader(Rows(23), bs=4, num_workers=0)
    with pytest.raises(ValueError, match='22 rows in the epoch before, now it has 23'):
        learner(net(), [SAF(), Grow()]).fit(2)


def test_a_number_of_classes_that_changes(tmp_path):
    first = learner(net(), SAF(lag=1, start=1), path=tmp_path)
    first.fit(2)
    torch.manual_seed(0)
    other = learner(nn.Sequential(nn.Linear(5, 4)).double(), SAF(lag=1, start=1))
    other.create_opt()
    other.opt.hypers[0]['saf'] = first.opt.hypers[0]['saf']
    with pytest.raises(ValueError, match='classes=3 in the state, 4'): other.fit(4, start_epoch=2)


def test_shards_are_not_whole_batches():
    with pytest.raises(ValueError, match='whole batches'): learner(net(), [SAF(), MSAM(2, .1)]).fit(1)


def test_not_a_classification():
    model = nn.Linear(5, 3).double()
    with pytest.raises(ValueError, match='integer class'):
        learner(model, SAF(), ds=type('D', (Rows,), {'__getitem__': lambda self, i: (self.x[i], self.x[i, :3])})(),
                loss_func=nn.MSELoss()).fit(1)


def test_interrupted_exported_and_trained_again(tmp_path):
    class Stop(Callback):
        def before_batch(self):
            if self.training and (self.epoch, self.train_iter) == (1, 8): raise KeyboardInterrupt
    learn = learner(mlp(), [SAF(lag=1, start=1), Stop()], path=tmp_path)
    with pytest.raises(KeyboardInterrupt): learn.fit(2)
    learn.remove_cb(learn.stop)
    pickle.dumps(learn.dls)
    learn.fit(2)
    assert sum(type(cb).__name__ == '_Track' for cb in learn.cbs) == 0 and not len(learn.metrics)
    assert (learn.saf.history.stamps == 1).all()


# Several processes ---------------------------------------------------------------------------------------------

def together(rank, world):
    "Each process reads its part of the one training set"
    model, ds = net(), Rows(24)
    learn = learner(DistributedDataParallel(model) if world > 1 else model, SAF(5., lag=1, start=1), ds=ds)
    sampler = tud.DistributedSampler(ds, world, rank, shuffle=True, seed=2)
    class Shuffle(Callback):
        def before_epoch(self): sampler.set_epoch(self.epoch)
    learn.add_cb(Shuffle())
    learn.dls.loaders[0] = tud.DataLoader(ds, 8 // world, sampler=sampler)
    weights = []
    class Count(Callback):
        order, run_valid = 40, False
        def after_loss(self): weights.append(self.saf.asked[2].mean().item())
    learn.add_cb(Count())
    learn.fit(4)
    return snapshot(model), learn.saf.history.state_dict(), weights


@pytest.mark.parametrize('world', [2, 4])
def test_processes_share_one_past(tmp_path, world):
    "Equal to one process that reads the same batches, and no row is without its past"
    found = in_processes(partial(together, world=world), world, tmp_path)
    for state, table, weights in found:
        assert weights == [0.] * 3 + [1.] * 9
        assert_same(found[0][0], state)
        assert torch.equal(found[0][1]['logits'], table['logits']) and torch.equal(found[0][1]['stamps'], table['stamps'])
    model, notes = net(), Notes()
    alone = learner(model, [SAF(5., lag=1, start=1), notes], ds=Rows(24))
    class Same(tud.Sampler):
        epoch = 0
        def __iter__(self):
            parts = []
            for r in range(world):
                s = tud.DistributedSampler(Rows(24), world, r, shuffle=True, seed=2)
                s.set_epoch(self.epoch)
                parts.append(list(s))
            step = 8 // world
            return iter([i for k in range(0, 24 // world, step) for p in parts for i in p[k:k + step]])
        def __len__(self): return 24
    same = Same()
    class Shuffle(Callback):
        def before_epoch(self): same.epoch = self.epoch
    alone.add_cb(Shuffle())
    alone.dls.loaders[0] = tud.DataLoader(Rows(24), 8, sampler=same)
    alone.fit(4)
    for k, w in snapshot(model).items(): torch.testing.assert_close(found[0][0][k], w, rtol=1e-6, atol=1e-8)
