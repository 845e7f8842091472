"""The index of a row belongs to its row, whatever loads it; the table gives back what was written `lag` epochs ago, and
nothing else. A batch is checked against data whose value is the index; the table against a dictionary."""
import io
import itertools
import os
import pickle
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import assert_same, snapshot
from fastai.basics import (Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Datasets, Learner, Pipeline, TfmdDL,
                           Transform, load_learner)
from fastai.callback.data import PartialDL, WeightedDL
from fastai.callback.progress import ProgressCallback
from fastai.data.block import DataBlock, TransformBlock
from fastai.data.load import SkipItemException
from fastai.data.transforms import IndexSplitter
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import in_processes
from torch import nn
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import IterableDataset, Subset, WeightedRandomSampler
from torch.utils.data._utils import pin_memory as pinning

from sam_explained import history
from sam_explained.history import History, _Double, _Split, _Tagged, forget_ids, track_ids, with_ids

pytestmark = pytest.mark.filterwarnings('ignore:.*pin_memory.*')


# Loaders whose data say which they are -----------------------------------------------------------------------------

N = 57


def seed(s):
    random.seed(s)
    np.random.seed(s)
    torch.manual_seed(s)


def draws(): return random.random(), float(np.random.rand()), float(torch.rand(1))


class Picture(Transform):
    "The value v as a picture of 2 x 2; a third of an even number more here and there"
    def encodes(self, v): return torch.full((1, 2, 2), float(v))


class Number(Transform):
    def encodes(self, v): return torch.tensor(v)


class Unreadable(Transform):
    "Every seventh picture cannot be read"
    def encodes(self, x: torch.Tensor):
        if x.ndim == 3 and int(x.flatten()[0]) % 7 == 3: raise SkipItemException
        return x


class Brighter(Transform):
    "Per item, in the worker: up to .3 brighter, at random"
    split_idx = 0
    def encodes(self, x: torch.Tensor): return x + .3 * torch.rand(1) if x.ndim == 3 else x


class Noise(Transform):
    "Per batch, in the main process: up to .3 more in each pixel, and notes what it was given"
    split_idx, given = 0, []
    def encodes(self, x: torch.Tensor):
        self.given.append(type(x))
        return x + .3 * torch.rand_like(x) if x.ndim == 4 else x


VALUES = [3 * i + 1 for i in range(N + 10)]         # an item is not its index: it must be looked up


def block(workers=0, skip=False, **kwargs):
    "Through a real DataBlock: the training items are not the first ones, and not in order"
    train = [i for i in reversed(range(N + 10)) if i % 6]
    splitter = lambda items: (train, [i for i in range(N + 10) if i % 6 == 0])
    db = DataBlock(blocks=(TransformBlock(type_tfms=Picture()), TransformBlock(type_tfms=Number())), splitter=splitter,
                   item_tfms=[Brighter()] + [Unreadable()] * skip, batch_tfms=Noise())
    return db.dataloaders(VALUES, bs=8, num_workers=workers, device='cpu', **kwargs)


def values(dl):
    "index -> value, from the data set behind `dl`"
    return np.array([int(v) for v in dl.dataset.items])


def torch_data(): return [(torch.full((1, 2, 2), float(i)), i) for i in range(N)]


class Slow(torch.utils.data.Dataset):
    "Random brightness, drawn in the worker; even items take longer, so that workers do not finish in order"
    def __init__(self, n=N): self.n, self.note = n, 'mine'
    def __len__(self): return self.n
    def __getitem__(self, i):
        if i % 2 == 0: time.sleep(.001)
        return torch.full((1, 2, 2), float(i)) + .3 * torch.rand(1), i


class ByTheBatch(Slow):
    def __getitems__(self, ids): return [self[i] for i in ids]


def agree(ids, batch, of=None):
    "Every row is the one that its index says"
    x, y = batch
    want = np.asarray(ids) if of is None else of[ids]
    assert len(ids) == len(x) == len(y) and x.min() >= 0
    assert (x[:, 0, 0, 0].floor().long().numpy() == want).all() and (y.numpy() == want).all()


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('skip', [False, True])
@pytest.mark.parametrize('drop_last', [False, True])
def test_ids_through_a_data_block_with_augmentation(workers, skip, drop_last):
    dl = block(workers, skip, drop_last=drop_last).train
    seen = []
    for _ in range(2):
        for ids, b in with_ids(dl):
            agree(ids, b, values(dl))
            assert type(b) is tuple and type(ids) is np.ndarray and ids.dtype == np.int64
            seen += ids.tolist()
    if skip: assert not any(values(dl)[i] % 7 == 3 for i in seen)
    elif not drop_last: assert sorted(seen) == sorted(2 * list(range(len(dl.dataset))))


def datasets_dls(workers=0, **kwargs):
    "Without functions as transforms, which fastai 2.8.7 cannot pickle (a `DataBlock` has some)"
    dsets = Datasets(VALUES, [[Picture()], [Number()]], splits=IndexSplitter(range(0, N, 5))(VALUES))
    return dsets.dataloaders(bs=8, device='cpu', after_item=Brighter(), after_batch=Noise(), num_workers=workers, **kwargs)


def datasets(workers=0, **kwargs): return datasets_dls(workers, **kwargs).train


def weighted(**kwargs):
    dsets = Datasets(VALUES, [[Picture()], [Number()]], splits=IndexSplitter(range(0, N, 5))(VALUES))
    wgts = np.arange(len(dsets.train)) % 3
    return dsets.weighted_dataloaders(wgts, bs=8, device='cpu', after_batch=Noise(), num_workers=2, **kwargs).train


def bare(**kwargs): return DataLoader(torch_data(), bs=8, shuffle=True, **kwargs)


def sampler(**kwargs): return WeightedRandomSampler(torch.arange(N) % 3 + .1, 40, generator=torch.Generator().manual_seed(5))


FAST = dict(datasets=datasets, workers=partial(datasets, 2), weighted=weighted, bare=bare,
            partial=lambda: PartialDL(torch_data(), bs=8, partial_n=20, shuffle=True),
            own=lambda: bare(after_batch=lambda b: (b[0] + .2 * torch.rand(1), b[1]), num_workers=2),
            own_batch=lambda: bare(do_batch=lambda b: (torch.stack([o[0] for o in b]), torch.tensor([o[1] for o in b]))),
            order=lambda: bare(get_idxs=lambda: [3, 3, *range(30, 9, -1)]), pinned=lambda: bare(pin_memory=True))
TORCH = dict(plain=lambda: TorchLoader(torch_data(), 8, shuffle=True), last=lambda: TorchLoader(Slow(), 8, drop_last=True),
             workers=lambda: TorchLoader(Slow(), 8, shuffle=True, num_workers=2),
             sampler=lambda: TorchLoader(Slow(), 8, sampler=sampler(), num_workers=2),
             batches=lambda: TorchLoader(Slow(), batch_sampler=[[5, 3], [1], [7, 7, 2]], num_workers=2),
             many=lambda: TorchLoader(ByTheBatch(), 8, shuffle=True, num_workers=2),
             subset=lambda: TorchLoader(Subset(Slow(), range(N)), 8, shuffle=True),
             generator=lambda: TorchLoader(Slow(), 8, shuffle=True, generator=torch.Generator().manual_seed(2)),
             lasting=lambda: TorchLoader(Slow(), 8, shuffle=True, num_workers=2, persistent_workers=True),
             spawned=lambda: TorchLoader(Slow(20), 8, num_workers=1, multiprocessing_context='spawn'),
             pinned=lambda: TorchLoader(Slow(), 8, pin_memory=True))
LOADERS = {**{f'fastai {k}': v for k, v in FAST.items()}, **{f'torch {k}': v for k, v in TORCH.items()}}


def flat(b): return list(itertools.chain(*map(flat, b))) if isinstance(b, (list, tuple)) else [b]


@pytest.mark.parametrize('name', LOADERS)
def test_an_epoch_of_the_double_is_an_epoch_of_the_loader(name):
    "Two epochs: the same batches, of the same type, every id right, and all random generators end in the same place"
    runs = []
    for tagged in (False, True):
        seed(0)
        dl = LOADERS[name]()
        found = []
        for _ in range(2):
            for b in (with_ids(dl) if tagged else dl):
                if tagged: agree(b[0], b[1], values(dl) if hasattr(dl.dataset, 'items') else None)
                found.append(b[1] if tagged else b)
        runs.append((found, draws()))
    (a, after), (b, after_too) = runs
    assert len(a) == len(b) > 2 and after == after_too
    assert [type(x) for x in a] == [type(x) for x in b]
    for x, y in zip(flat(a), flat(b)): assert torch.equal(x, y)


def test_no_transform_sees_an_id_and_the_loader_stays_as_it_is():
    dl = block(0).train
    before, Noise.given[:] = {**vars(dl)}, []
    it = iter(with_ids(dl))
    ids, b = next(it)
    assert type(dl) is TfmdDL and {k for k in vars(dl) if vars(dl)[k] is not before.get(k)} <= {'rng', '_DataLoader__idxs', 'it'}
    assert Noise.given and all(issubclass(t, torch.Tensor) for t in Noise.given)
    assert type(dl.after_batch) is Pipeline
    # whoever takes a batch apart, from either of the two, gets an ordinary one
    for other in (dl, with_ids(dl)): assert type(other.one_batch()) is tuple and len(other.one_batch()) == 2
    assert type(with_ids(dl).new()) is TfmdDL and with_ids(dl).n_inp == 1
    assert [len(b) for b in with_ids(dl).new()] == [2] * len(dl)


def test_augmentation_is_that_of_training():
    "fastai tells its transforms in `before_iter` whether they are in training; the double does not come between"
    dl = block().train
    for nm in ('after_item', 'after_batch'): getattr(dl, nm).split_idx = 1
    x = torch.cat([b[0] for _, b in with_ids(dl)])
    assert (x != x.floor()).float().mean() > .9


def test_attributes_set_on_the_double_are_those_of_the_loader():
    dl = block().train
    double = with_ids(dl)
    double.bs = 4
    double.device = torch.device('cpu')
    double.after_batch = fewer = Pipeline(Noise())
    assert dl.after_batch is fewer
    assert dl.bs == 4 and vars(dl)['bs'] == 4 and {len(ids) for ids, _ in with_ids(dl)} == {4} and with_ids(double) is double


def test_persistent_workers_persist():
    class Where(Slow):
        def __getitem__(self, i): return torch.full((1, 2, 2), float(i)), os.getpid()
    dl = TorchLoader(Where(), 8, num_workers=2, persistent_workers=True)
    pids = [{p for _, (_, ps) in with_ids(dl) for p in ps.tolist()} for _ in range(3)]
    assert pids[0] == pids[1] == pids[2] and len(pids[0]) == 2
    assert dl._iterator is None and len(next(iter(dl))) == 2, 'the loader itself has no workers that tag'
    dl.collate_fn = lambda items: (torch.stack([o[0] for o in items]), torch.zeros(len(items)))
    assert all((y == 0).all() for _, (_, y) in with_ids(dl)), 'a loader that was changed gets a new double'
    double = with_ids(dl)
    gone = __import__('weakref').ref(double)
    del double, dl
    __import__('gc').collect()
    assert gone() is None


def test_worker_init_fn_sees_the_data_set():
    def init(worker):
        ds = torch.utils.data.get_worker_info().dataset
        assert ds.note == 'mine' and len(ds) == N
        ds.n = N - 1
    for ids, b in with_ids(TorchLoader(Slow(), 8, num_workers=1, worker_init_fn=init)): agree(ids, b)


# Collate functions that leave out or move items --------------------------------------------------------------------

def leave_out(items): return torch.utils.data.default_collate([o for o in items if o is not None])
def leave_out_here(items):
    items[:] = [o for o in items if o is not None]
    return torch.utils.data.default_collate(items)
def longest_first(items):
    items.sort(key=lambda o: -o[1])
    return torch.utils.data.default_collate(items)


class Holes(Slow):
    def __getitem__(self, i): return None if i % 5 == 2 else super().__getitem__(i)


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('data, collate', [(Holes, leave_out), (Holes, leave_out_here), (Slow, longest_first)])
def test_ids_follow_a_collate_function(data, collate, workers):
    for _ in range(2):
        for ids, b in with_ids(TorchLoader(data(), 8, shuffle=True, num_workers=workers, collate_fn=collate)): agree(ids, b)


def test_fastai_before_batch_may_sort():
    def longest(items):
        items.sort(key=lambda o: -int(o[1]))
        return items
    for ids, b in with_ids(bare(before_batch=longest)):
        agree(ids, b)
        assert (np.diff(ids) < 0).all()


def test_batches_of_another_size_are_refused():
    twice = lambda b: tuple(torch.cat([t, t]) for t in b)
    with pytest.raises(ValueError, match='made of 8 items has tensors of .16. rows'): list(with_ids(bare(after_batch=twice)))
    half = lambda items: torch.utils.data.default_collate(items[::2])
    with pytest.raises(ValueError, match='made of 8 items has tensors of .4. rows'):
        list(with_ids(TorchLoader(torch_data(), 8, collate_fn=half)))
    def other(items):
        items[0] = (torch.zeros(1, 2, 2), 0)
        return torch.utils.data.default_collate(items)
    with pytest.raises(ValueError, match='other items'): list(with_ids(TorchLoader(torch_data(), 8, collate_fn=other)))


class Stream(IterableDataset):
    def __iter__(self): return iter(torch_data())


@pytest.mark.parametrize('make, match', [
    (lambda: TorchLoader(Stream(), 4), 'IterableDataset'), (lambda: DataLoader(Stream(), bs=4), 'IterableDataset'),
    (lambda: DataLoader(torch_data(), bs=4, indexed=False), 'no __getitem__'),
    (lambda: TorchLoader(torch_data(), batch_size=None), 'no batch size'), (lambda: DataLoader(torch_data()), 'no batch size'),
    (lambda: DataLoader(type('Endless', (), {'__getitem__': lambda self, i: i})(), bs=4), 'no length'),
    (lambda: bare(create_batches=lambda samps: iter([])), 'create_batches of its own')])
def test_loaders_without_indices_say_so(make, match):
    with pytest.raises(ValueError, match=match): with_ids(make())


def test_an_index_that_is_none_or_no_number():
    with pytest.raises(TypeError): list(with_ids(TorchLoader({'a': torch.zeros(2), 'b': torch.zeros(2)}, 1, sampler=['a', 'b'])))
    with pytest.raises(TypeError, match='only a fastai or PyTorch DataLoader'): with_ids(torch_data())


@pytest.mark.parametrize('old', [False, True])
def test_pinning_keeps_the_ids(old):
    "torch < 2.6 gives a pinned tuple back as a list, and calls the constructor of other sequences"
    tagged = _Tagged([np.array([4, 2]), (torch.ones(2), torch.zeros(2))])
    with patch.object(torch.Tensor, 'pin_memory', lambda self: self + 1):
        out = pinning.pin_memory(tagged)
        if old: out = type(tagged)([pinning.pin_memory(o) for o in tagged])
    assert type(out) is _Tagged and out[0].tolist() == [4, 2] and out[1][0].tolist() == [2, 2]
    dl = bare(pin_memory=True)
    assert type(with_ids(dl).after_batch(_Tagged([np.array([4, 2]), [torch.ones(2)]]))[1]) is tuple


@pytest.mark.parametrize('make', [datasets_dls, lambda: torch_dls()])
def test_a_pickled_double_is_a_double_of_a_pickled_loader(make):
    import cloudpickle
    dl = make().train
    double = pickle.loads(cloudpickle.dumps(with_ids(dl)))
    assert isinstance(double, _Double)
    for ids, b in double: agree(ids, b, values(dl) if hasattr(dl.dataset, 'items') else None)


# In the learner ----------------------------------------------------------------------------------------------------

class Check(Callback):
    "What SAF does with ids, and a check of every batch"
    order, of, slow = 50, None, None
    def before_fit(self):
        with_ids(self.dls.train)
        self.count = 0
    def before_train(self): track_ids(self.learn)
    def after_fit(self): forget_ids(self.learn)
    def before_batch(self):
        if not self.training:
            assert 'sample_ids' not in vars(self.learn)
            return
        assert type(self.xb) in (tuple, list) and len(self.xb) == len(self.yb) == 1
        agree(self.sample_ids.numpy(), (self.xb[0], self.yb[0]), self.of)
        self.count += 1


class At(Callback):
    "Ctrl-C, or another error, in a batch of an epoch"
    order = 60
    def __init__(self, epoch, batch, error=KeyboardInterrupt): self.at, self.error = (epoch, batch), error
    def after_pred(self):
        if self.training and (self.epoch, self.iter) == self.at: raise self.error('on purpose')


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(4, 3 * (N + 10))
    def forward(self, x): return self.lin(x.flatten(1).float() / 200)


def make_learner(dls, cbs=None):
    learn = Learner(dls, Net(), CrossEntropyLossFlat(), lr=1e-2, cbs=cbs)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *a: None
    return learn


def of(dls): return values(dls.train) if hasattr(dls.train.dataset, 'items') else None


def torch_dls(workers=0, **kwargs):
    return DataLoaders(TorchLoader(Slow(), 8, shuffle=True, num_workers=workers, **kwargs), TorchLoader(torch_data(), 8))


DLS = {'datasets': datasets_dls, 'datasets, workers': partial(datasets_dls, 2),
       'block': block, 'block, workers': partial(block, 2), 'filtered': partial(block, 2, True), 'torch': torch_dls,
       'torch, workers': partial(torch_dls, 2), 'lasting': partial(torch_dls, 2, persistent_workers=True)}


@pytest.mark.parametrize('name', DLS)
def test_training_with_ids_is_training_without(name):
    "Two fits with validation: the same weights, bit for bit, and the same random numbers afterwards"
    ends = []
    for cbs in ([], [Check()]):
        seed(1)
        dls = DLS[name]()
        learn = make_learner(dls, cbs)
        if cbs: learn.check.of = of(dls)
        for n in (2, 1): learn.fit(n)
        if cbs: assert learn.check.count > 4
        ends.append((snapshot(learn.model), draws(), {k for k in vars(learn)} - {'check'}))
        assert all(type(a) is type(b) for a, b in zip(learn.dls, dls))
    assert_same(ends[0][0], ends[1][0], 'weights')
    assert ends[0][1:] == ends[1][1:], 'random numbers, or something is left in the learner'


@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize('name', DLS)
def test_interrupted_exported_and_trained_again(name, error, tmp_path):
    dls = DLS[name]()
    learn = make_learner(dls, Check())
    learn.path, learn.check.of = tmp_path, of(dls)
    with pytest.raises(error): learn.fit(2, cbs=At(1, 2, error))
    assert isinstance(vars(learn)['_split'], _Split)
    check = learn.check
    if name.startswith('datasets'):
        learn.export('a.pkl')
        assert not isinstance(vars(load_learner(tmp_path/'a.pkl')).get('_split'), _Split)
    learn.fit(2)                                            # and on, with tracking
    assert check.count > 8 and not {'_split', 'sample_ids'} & set(vars(learn))
    with pytest.raises(error): learn.fit(2, cbs=At(0, 1, error))
    learn.remove_cb(check)
    start, ends = snapshot(learn.model), []
    for l in (learn, make_learner(dls)):                    # and without it, as a learner that never had it
        l.model.load_state_dict(start)
        l.create_opt()
        seed(4)
        if hasattr(dls.train, 'rng'): dls.train.rng = random.Random(5)
        l.fit(1)
        ends.append(snapshot(l.model))
    assert not {'_split', 'sample_ids'} & set(vars(learn))
    if name != 'lasting': assert_same(*ends, 'weights')     # (workers that last go on with their own random numbers)


def test_a_learner_in_the_middle_of_an_epoch_can_be_pickled():
    import cloudpickle
    learn = make_learner(datasets_dls(2), Check())      # (without workers fastai's loader keeps a generator)
    learn.check.of = of(learn.dls)
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=At(1, 2))
    again = pickle.loads(cloudpickle.dumps(learn))
    assert not isinstance(vars(again).get('_split'), _Split)
    again.fit(1)
    assert again.check.count == len(learn.dls.train)


def test_ids_are_as_late_as_the_data():
    "A loader in between that is one batch ahead. Asking the loader for its current ids, as in 1.5-11, would be wrong"
    class Ahead(Callback):
        order = 55
        def before_train(self):
            def ahead(dl):
                it = iter(dl)
                held = next(it)
                for b in it:
                    yield held
                    held = b
                yield held
            dl = self.learn.dl
            self.learn.dl = type('Prefetch', (), {'__iter__': lambda self: ahead(dl), '__len__': lambda self: len(dl)})()
    learn = make_learner(block(), [Check(), Ahead()])
    learn.check.of = of(learn.dls)
    learn.fit(2)
    assert learn.check.count == 2 * len(learn.dls.train)


def test_a_batch_that_has_lost_its_ids_is_an_error():
    class Loses(Callback):
        order = 55
        def before_train(self): type(self.learn.dl).__iter__ = lambda dl: (b[1] for b in super(type(dl), dl).__iter__())
    learn = make_learner(block(), [Check(), Loses()])
    with pytest.raises(ValueError, match='without its sample ids'): learn.fit(1)


def test_other_callbacks_take_batches_in_the_middle_of_an_epoch():
    class Curious(Callback):
        order, run_valid = 70, False
        def after_batch(self):
            if self.iter == 1:
                assert len(self.dls.one_batch()) == len(self.learn.dl.one_batch()) == 2
                assert all(len(b) == 2 for b in self.dls.train) and self.learn.dl.dataset is self.dls.train.dataset
    learn = make_learner(block(), [Check(), Curious()])
    learn.check.of = of(learn.dls)
    learn.fit(1)
    preds, targets = learn.get_preds(ds_idx=0)
    assert sorted(targets.tolist()) == sorted(values(learn.dls.train).tolist())
    learn.validate()


def test_errors_come_before_training():
    learn = make_learner(DataLoaders(TorchLoader(Stream(), 8), TorchLoader(torch_data(), 8)), Check())
    before = snapshot(learn.model)
    with pytest.raises(ValueError, match='IterableDataset'): learn.fit(1)
    assert_same(before, snapshot(learn.model), 'weights')


# The table, against a dictionary -----------------------------------------------------------------------------------

row = st.lists(st.floats(-300, 300, width=32), min_size=3, max_size=3)
bad_row = st.sampled_from([[float('nan'), 0., 0.], [0., float('inf'), 1.], [0., 1., -float('inf')]])
step = st.lists(st.tuples(st.integers(0, 5), st.one_of(row, row, bad_row)), max_size=7)


@settings(max_examples=150, deadline=None)
@given(lag=st.integers(1, 4), dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
       epochs=st.lists(st.lists(step, max_size=3), max_size=9), save=st.integers(0, 20), jump=st.integers(0, 3))
def test_the_table_is_a_dictionary(lag, dtype, epochs, save, jump):
    "(epoch, id) -> row: what was last written; read before write; saved and loaded in the middle"
    table, known, steps = History(6, 3, lag, dtype, device='cpu'), {}, 0
    for e, batches in enumerate(epochs):
        e += jump * (e > 4)                                 # some epochs are skipped
        for batch in batches:
            ids = torch.tensor([i for i, _ in batch], dtype=torch.int64)
            z = torch.tensor([r for _, r in batch]).view(len(batch), 3)
            past, weight = table.read(ids, e)
            assert past.dtype == weight.dtype == torch.float32 and past.shape == (len(ids), 3)
            for i, p, w in zip(ids.tolist(), past, weight.tolist()):
                want = known.get((e - lag, i)) if (e, i) not in known else None
                assert w == (want is not None)
                if w: assert torch.equal(p, (want - want.max()).clamp(min=torch.finfo(dtype).min).to(dtype).float())
                assert p.isfinite().all()
            table.write(ids, z, e)
            for i, r in zip(ids.tolist(), z): known[e, i] = r if r.isfinite().all() else None
            steps += 1
            if steps == save:
                file = io.BytesIO()
                torch.save(table.state_dict(), file)
                file.seek(0)
                table = History(6, 3, lag, dtype, device='cpu')
                table.load_state_dict(torch.load(file))


@pytest.mark.parametrize('lag', [1, 2, 3, 5])
@pytest.mark.parametrize('name', ['fastai workers', 'fastai weighted', 'torch workers', 'torch sampler', 'torch last'])
def test_the_past_is_lag_epochs_old_through_real_loaders(lag, name):
    "The output says (epoch, id); saved and loaded in the middle of an epoch"
    dl = LOADERS[name]()
    n = len(dl.dataset)
    table, last = History(n, 3, lag, torch.float32, device='cpu'), {}
    for e in range(lag + 3):
        for b, (ids, _) in enumerate(with_ids(dl)):
            past, weight = table.read(ids, e)
            for i, (one, then, who), w in zip(ids.tolist(), past.tolist(), weight.tolist()):
                assert w == (last.get((e % lag, i)) == e - lag)
                if w: assert (then - one, who - one) == (e - lag, i)
            z = torch.tensor([[0., e, i] for i in ids.tolist()])
            table.write(ids, z, e)
            last.update({(e % lag, i): e for i in ids.tolist()})
            if b == 1 and e == lag:
                again = History(n, 3, lag, torch.float32, device='cpu')
                again.load_state_dict(pickle.loads(pickle.dumps(table.state_dict())))
                table = again


def test_no_gradient_and_no_reference_to_the_graph():
    table = History(4, 2, 1, device='cpu')
    z = torch.randn(4, 2, requires_grad=True)
    table.write(range(4), z * 2, 0)
    past, _ = table.read(range(4), 1)
    assert not past.requires_grad and not table.logits.requires_grad
    past.add_(1.)                                           # what was read is the caller's
    assert torch.equal(table.read(range(4), 1)[0] + 1, past)


def test_what_was_sent_has_arrived_before_anything_else():
    "From a GPU rows come later; whatever looks at the table waits for them"
    class Event:
        waited = False
        def synchronize(self): self.waited = True
    looks = [lambda t: t.read([1], 2), lambda t: t.state_dict(), lambda t: pickle.dumps(t),
             lambda t: t.write([0], torch.ones(1, 2), 0), lambda t: t.load_state_dict(History(4, 2, 2, device='cpu').state_dict())]
    for look in looks:
        table, event = History(4, 2, 2, device='cpu'), Event()
        table.waiting.append((0, event, [torch.tensor([1]), torch.tensor([[0., -3.]]).half(), torch.tensor([0], dtype=torch.int32)]))
        look(table)
        assert event.waited and not table.waiting
    past, weight = pickle.loads(pickle.dumps(table)).read([1], 2)
    assert weight == 0, 'cleared by load_state_dict, and not written again afterwards'


def test_clear_forgets():
    table = History(4, 2, 2, device='cpu')
    table.write(range(4), torch.ones(4, 2), 0)
    assert table.read(range(4), 2)[1].sum() == 4
    table.clear()
    assert table.read(range(4), 2)[1].sum() == 0


@pytest.mark.parametrize('dtype, low', [(torch.float16, -65504.), (torch.float32, -2e5)])
def test_what_is_below_the_range_of_the_type_is_clamped(dtype, low):
    table = History(2, 2, 1, dtype, device='cpu')
    table.write([0, 1], torch.tensor([[1e5, -1e5], [7e4, 7e4 + 1]]), 0)
    past, weight = table.read([0, 1], 1)
    assert past.tolist() == [[0, low], [-1, 0]] and weight.tolist() == [1, 1]
    assert torch.log_softmax(past / 5, 1).isfinite().all()


@pytest.mark.parametrize('n, classes, lag', [(1, 1, 1), (50_000, 100, 3), (7, 3, 5)])
@pytest.mark.parametrize('dtype, size', [(torch.float16, 2), (torch.float32, 4), (torch.bfloat16, 2)])
def test_memory_to_the_byte(n, classes, lag, dtype, size):
    table = History(n, classes, lag, dtype, device='cpu')
    want = n * classes * lag * size + 4 * n * lag
    assert History.memory(n, classes, lag, dtype) == table.nbytes == want
    assert table.logits.nbytes == table.logits.untyped_storage().nbytes() == n * classes * lag * size
    assert table.logits.is_contiguous() and table.stamps.dtype is torch.int32


def test_the_last_of_a_repeated_id_wins_always():
    for trial in range(20):
        seed(trial)
        ids, z = torch.randint(0, 50, (4096,)), torch.randn(4096, 5)
        table = History(50, 5, 1, torch.float32, device='cpu')
        table.write(ids, z, 0)
        for i in range(50):
            last = z[(ids == i).nonzero()[-1, 0]]
            assert torch.equal(table.logits[0, i], last - last.max())


# Where it lives ----------------------------------------------------------------------------------------------------

class Crowded(History): ram_share = 0


def test_it_goes_into_a_file_when_memory_is_short(tmp_path):
    nbytes = 2 * 100 * 10 * 2
    for free, in_file in ((2 * nbytes, False), (2 * nbytes - 1, True)):
        with patch.object(history, '_free_ram', lambda: free), patch.object(history, '_in_file', wraps=history._in_file) as made:
            if in_file:
                with pytest.warns(UserWarning, match=f'0 MiB, more than 50% of the .* goes into a file in .{tmp_path}'):
                    table = History(100, 10, 2, device='cpu', folder=tmp_path)
            else: table = History(100, 10, 2, device='cpu', folder=tmp_path)
        assert made.called == in_file
    table.write(range(100), torch.eye(100)[:, :10], 0)
    assert torch.equal(table.read(range(100), 2)[0], torch.eye(100)[:, :10] - torch.eye(100)[:, :10].amax(1, keepdim=True))
    assert not list(tmp_path.iterdir()), 'the file has no name, so nothing can be left over'
    other = History(100, 10, 2, device='cpu')
    other.load_state_dict(table.state_dict())
    assert torch.equal(other.logits, table.logits) and torch.equal(other.stamps, table.stamps)


@pytest.mark.filterwarnings('ignore:the history takes')
def test_a_disk_that_is_too_small_says_so(tmp_path):
    usage = type('Usage', (), dict(free=2**20))
    with patch('shutil.disk_usage', lambda folder: usage), pytest.raises(ValueError, match='1 MiB left, the history needs 57'):
        Crowded(1_000_000, 10, 3, device='cpu', folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_gpu_is_used_if_it_has_room():
    made = []
    def zeros(shape, **kwargs):
        made.append(kwargs)
        return torch.empty(shape, dtype=kwargs['dtype'], device='meta')
    cuda = torch.device('cuda:0')
    for free, want in ((400, dict(device=cuda)), (399, dict(pin_memory=True))):
        with patch.object(history, '_free_gpu', lambda d: free), patch.object(torch, 'zeros', zeros):
            history._table((1, 10, 5), torch.float16, cuda, None, .25, .5)
        assert made.pop() == dict(dtype=torch.float16, **want)


IMAGENET = '''
import os, sys, torch, warnings
from sam_explained.history import History
def resident(): return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
class Crowded(History): ram_share = 0
warnings.simplefilter('ignore')
torch.set_num_threads(1)
before = resident()
table = Crowded(1_281_167, 1000, 3, device='cpu', folder=sys.argv[1])
made = resident()
torch.manual_seed(0)
for e in range(5):
    g = torch.Generator().manual_seed(1)
    for _ in range(8):
        ids = torch.randint(0, 1_281_167, (256,), generator=g)
        z = torch.sin(ids[:, None] + torch.arange(1000.) + e)
        past, weight = table.read(ids, e)
        want = torch.sin(ids[:, None] + torch.arange(1000.) + e - 3)
        assert weight.mean() > .99 if e >= 3 else not weight.any()
        if e >= 3: assert ((past - want + want.amax(1, keepdim=True)).abs().amax(1) * weight).max() < 2e-3
        table.write(ids, z, e)
print(table.nbytes, made - before, resident() - made)
'''


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='the resident size is read from /proc')
def test_imagenet_in_a_sparse_file(tmp_path):
    out = subprocess.run([sys.executable, '-c', IMAGENET, tmp_path], capture_output=True, text=True,
                         env={**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1])})
    assert out.returncode == 0, out.stderr
    nbytes, made, grown = map(int, out.stdout.split())
    assert nbytes == 1_281_167 * 1000 * 3 * 2 + 4 * 1_281_167 * 3
    assert made < 64 * 2**20 and grown < 512 * 2**20, (made, grown)
    assert not list(tmp_path.iterdir())


# Saving ------------------------------------------------------------------------------------------------------------

def outputs(e, ids): return torch.sin(ids[:, None] * (e + 1.) + torch.arange(4))


def go_on(table, epochs):
    "What is read in these epochs"
    seen = []
    for e in epochs:
        for ids in torch.randperm(30, generator=torch.Generator().manual_seed(e))[:27].split(7):
            seen.append(torch.cat([*table.read(ids, e)[:1], table.read(ids, e)[1][:, None]], 1))
            table.write(ids, outputs(e, ids), e)
    return torch.cat(seen)


OTHER_PROCESS = '''
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_history import History, go_on
table = History(30, 4, 3, device='cpu')
table.load_state_dict(torch.load(sys.argv[2], weights_only=True))
torch.save(go_on(table, range(5, 10)), sys.argv[2] + '.out')
'''


def test_resume_in_a_new_process_is_exact(tmp_path):
    table = History(30, 4, 3, device='cpu')
    go_on(table, range(5))
    torch.save(table.state_dict(), tmp_path/'state')
    here = Path(__file__).parent
    out = subprocess.run([sys.executable, '-c', OTHER_PROCESS, here, tmp_path/'state'], capture_output=True, text=True,
                         env={**os.environ, 'PYTHONPATH': str(here.parent)})
    assert out.returncode == 0, out.stderr
    want = go_on(table, range(5, 10))
    assert torch.equal(torch.load(tmp_path/'state.out'), want) and want[:, -1].mean() > .7


def test_resume_without_the_history_masks_by_stamp():
    "1.5-13: zeros would be uniform targets. Here the weight is 0 for `lag` epochs, and nothing of zeros is ever a target"
    table = History(30, 4, 3, device='cpu')
    weights = [go_on(table, [e])[:, -1].mean().item() for e in range(5, 10)]
    assert weights[:3] == [0, 0, 0] and min(weights[3:]) > .7


@pytest.mark.parametrize('other, match', [
    (dict(n=31), 'n=30 in the state, 31 in this'), (dict(classes=5), 'classes=4 in the state, 5 in this'),
    (dict(lag=2), 'lag=3 in the state, 2 in this'), (dict(dtype=torch.float32), 'float16.*float32')])
def test_a_state_of_another_table_is_refused(other, match):
    state = History(30, 4, 3, device='cpu').state_dict()
    table = History(**{**dict(n=30, classes=4, lag=3, device='cpu'), **other})
    table.write([1], torch.ones(1, table.classes), 0)
    before = table.logits.clone(), table.stamps.clone()
    with pytest.raises(ValueError, match=match): table.load_state_dict(state)
    assert torch.equal(before[0], table.logits) and torch.equal(before[1], table.stamps)


# Bad input: an error that names it, and nothing has changed --------------------------------------------------------

@pytest.mark.parametrize('kwargs, error, match', [
    (dict(n=0), ValueError, r'n=0 must be an int in \[1'), (dict(classes=0), ValueError, 'classes=0'),
    (dict(lag=0), ValueError, 'lag=0'), (dict(lag=-3), ValueError, 'lag=-3'), (dict(lag=1.5), TypeError, 'lag=1.5'),
    (dict(n=True), TypeError, 'n=True'), (dict(n='9'), TypeError, "n='9'"), (dict(n=2**31), ValueError, '2147483648'),
    (dict(dtype=torch.int32), ValueError, 'dtype=torch.int32'), (dict(dtype='half'), TypeError, "dtype='half'")])
def test_bad_sizes(kwargs, error, match):
    with pytest.raises(error, match=match): History(**{**dict(n=9, classes=3, lag=2, device='cpu'), **kwargs})


@pytest.mark.parametrize('ids, shape, epoch, error, match', [
    ([9], (1, 3), 0, ValueError, r'ids has 9, which must be in \[0, 9\)'), ([0, -1], (2, 3), 0, ValueError, 'ids has -1'),
    ([0.], (1, 3), 0, TypeError, 'integers'), ([True], (1, 3), 0, TypeError, 'integers'), ([[0]], (1, 3), 0, ValueError, 'shape'),
    ([0], (1, 4), 0, ValueError, r'\(1, 4\) must be \(1, 3\)'), ([0, 1], (1, 3), 0, ValueError, r'\(1, 3\) must be \(2, 3\)'),
    ([0], (3,), 0, ValueError, 'logits of shape'), ([0], (1, 3), -1, ValueError, 'epoch=-1'),
    ([0], (1, 3), 1., TypeError, 'epoch=1.0'), ([0], (1, 3), 2**31, ValueError, 'epoch=2147483648')])
def test_bad_batches(ids, shape, epoch, error, match):
    table = History(9, 3, 2, device='cpu')
    table.write(range(9), torch.randn(9, 3), 0)
    before = table.logits.clone(), table.stamps.clone()
    with pytest.raises(error, match=match): table.write(ids, torch.zeros(shape), epoch)
    if 'logits' not in match and 'must be' not in match:
        with pytest.raises(error, match=match): table.read(ids, epoch)
    assert torch.equal(before[0], table.logits) and torch.equal(before[1], table.stamps)


# Several processes -------------------------------------------------------------------------------------------------

def deal(e, world, n=60):
    "Which examples each process sees, step by step, in epoch e: shares of unequal size, and at times none"
    g = torch.Generator().manual_seed(100 + e)
    order = torch.cat([torch.randperm(n, generator=g), torch.randint(0, 9, (n,), generator=g)])     # some in one step twice
    sizes = [(s + r * (s % 3)) % 5 for s in range(12) for r in range(world)]
    order = order.repeat(2)[:sum(sizes)]
    parts = order.split(sizes)
    return [parts[s * world:(s + 1) * world] for s in range(12)]


def says(e, ids, rank):
    "Who says something about an example that another process sees in the same step says something else"
    z = torch.sin(ids[:, None] * (e + 1.) + torch.arange(5) + rank)
    z[ids % 11 == 4] = float('nan')
    return z


def one_table(rank, world, shared, dtype):
    table, hits = History(60, 5, 3, dtype, device='cpu', shared=shared), []
    for e in range(7):
        for parts in deal(e, world):
            hits.append(table.read(parts[rank], e)[1])
            table.write(parts[rank], says(e, parts[rank], rank), e)
    return table.state_dict(), torch.cat(hits)


@pytest.mark.parametrize('world, dtype', [(2, torch.float16), (4, torch.float32), (2, torch.bfloat16)])
def test_processes_share_one_table(world, dtype, tmp_path):
    alone = History(60, 5, 3, dtype, device='cpu')
    for e in range(7):
        for parts in deal(e, world):
            alone.write(torch.cat(parts), torch.cat([says(e, ids, r) for r, ids in enumerate(parts)]), e)
    for state, _ in in_processes(one_table, world, tmp_path, world, True, dtype):
        assert torch.equal(state['logits'], alone.logits) and torch.equal(state['stamps'], alone.stamps)


def fresh_deal(rank, world, shared):
    "The weight in the first epoch that has a past"
    table = History(2000, 2, 3, device='cpu', shared=shared)
    for e in range(4):
        ids = torch.randperm(2000, generator=torch.Generator().manual_seed(e)).chunk(world)[rank]
        weight = table.read(ids, e)[1]
        table.write(ids, torch.zeros(len(ids), 2), e)
    return weight.mean().item()


@pytest.mark.parametrize('world', [2, 4])
def test_private_tables_hit_one_row_in_world(world, tmp_path):
    "1.5-12, the negative control"
    for shared, want, off in ((True, 1, 0), (False, 1 / world, .06)):
        (folder := tmp_path/str(shared)).mkdir()
        for hit in in_processes(fresh_deal, world, folder, world, shared): assert abs(hit - want) <= off


def distributed_loader():
    "fastai's, which imports accelerate for another class, and sends the order of the epoch through the GPU"
    with patch.dict(sys.modules, accelerate=SimpleNamespace(Accelerator=type('Accelerator', (), {}))):
        from fastai.distributed import DistributedDL
    class OnCPU(DistributedDL):
        def _broadcast(self, t, rank):
            t = torch.tensor(t)
            dist.broadcast(t, rank)
            return t.tolist()
    return OnCPU


def distributed_epoch(rank, workers):
    seed(rank)
    dl = distributed_loader()(block(workers, drop_last=False).train, rank=rank, world_size=2)
    seen = []
    for _ in range(2):
        for ids, b in with_ids(dl):
            agree(ids, b, values(dl))
            seen.append(ids)
    return np.concatenate(seen).tolist(), len(dl.dataset)


def test_ids_through_a_distributed_loader(tmp_path):
    (a, n), (b, _) = in_processes(distributed_epoch, 2, tmp_path, 0)
    assert set(a) | set(b) == set(range(n)) and len(a) == len(b)


def test_ids_through_a_distributed_loader_with_workers():
    "As the second of two processes; they are not needed to load"
    dl = distributed_loader()(block(2, drop_last=False).train, rank=1, world_size=2)
    with patch.object(type(dl), '_broadcast', lambda self, t, rank: t):
        seen = []
        for ids, b in with_ids(dl):
            agree(ids, b, values(dl))
            seen += ids.tolist()
    assert len(seen) == (len(dl.dataset) + 1) // 2
