"""The index of a row belongs to its row, whatever loads it. A batch is checked against data whose value is the index."""
import itertools
import os
import pickle
import random
import sys
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import assert_same, snapshot
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, Pipeline, TfmdDL, load_learner
from fastai.callback.progress import ProgressCallback
from loaders import (LOADERS, N, VALUES, Noise, Slow, Stream, agree, bare, block, data_block, datasets_dls, draws, seed,
                     torch_data, values)
from processes import in_processes
from torch import nn
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import Subset
from torch.utils.data._utils import pin_memory as pinning

from sam_explained.ids import _Double, _Split, _Tagged, forget_ids, track_ids, with_ids

pytestmark = pytest.mark.filterwarnings('ignore:.*pin_memory.*')


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('skip', [False, True])
@pytest.mark.parametrize('drop_last', [False, True])
def test_ids_through_a_data_block_with_augmentation(workers, skip, drop_last):
    dl = block(workers, skip, drop_last=drop_last).train
    seen, sizes = [], set()
    for _ in range(2):
        for ids, b in with_ids(dl):
            sizes.add(len(ids))
            agree(ids, b, values(dl))
            assert type(b) is tuple and type(ids) is np.ndarray and ids.dtype == np.int64
            seen += ids.tolist()
    if skip: assert not any(values(dl)[i] % 7 == 3 for i in seen)
    if drop_last: assert sizes == {8}
    else: assert min(sizes) < 8 == max(sizes), 'the last batch is not full'
    if not (skip or drop_last): assert sorted(seen) == sorted(2 * list(range(len(dl.dataset))))


@pytest.mark.parametrize('workers', [0, 2])
def test_ids_through_a_weighted_data_block(workers):
    "Some rows come often, some never"
    wgts = np.where(np.arange(len(VALUES)) % 2, 0, np.arange(len(VALUES)) + 1.)
    dl = data_block().weighted_dataloaders(VALUES, wgts, bs=8, num_workers=workers, device='cpu', drop_last=False).train
    seen = []
    for _ in range(2):
        for ids, b in with_ids(dl):
            agree(ids, b, values(dl))
            seen += ids.tolist()
    assert len(seen) == 2 * len(dl.dataset) > 3 * len(set(seen)) and all(VALUES.index(values(dl)[i]) % 2 == 0 for i in seen)


@pytest.mark.parametrize('workers', [0, 2])
def test_the_index_is_that_of_the_filtered_data_set(workers):
    "Of the subset that is trained on, not of the data it is taken from; and it may grow between two epochs"
    rows = [i for i in reversed(range(N)) if i % 3]
    dl = TorchLoader(Subset(Slow(), rows), 8, shuffle=True, num_workers=workers)
    seen = [ids for ids, b in with_ids(dl) if agree(ids, b, np.array(rows)) is None]
    rows += [0, 3]
    more = [ids for ids, b in with_ids(dl) if agree(ids, b, np.array(rows)) is None]
    assert sorted(np.concatenate(seen)) == list(range(len(rows) - 2)) and sorted(np.concatenate(more)) == list(range(len(rows)))


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


@pytest.mark.parametrize('workers', [0, 2])
def test_data_held_back_without_their_ids_are_noticed(workers):
    "The negative control, 1.5-11: the check of these tests fails on the data of batch k with the ids of batch k+1"
    def skewed(dl):
        held = None
        for ids, b in dl:
            if held is not None: yield _Tagged([ids[:len(held[0])], held])
            held = b
    dl, wrong, rows = block(workers).train, 0, 0
    for ids, b in skewed(with_ids(dl)):
        wrong += (values(dl)[ids] != b[1].numpy()).sum()
        rows += len(ids)
        with pytest.raises(AssertionError, match='by their ids'): agree(ids, b, values(dl))
    assert wrong == rows > 30
    class Skew(Callback):
        order = 55
        def before_train(self):
            dl = self.learn.dl
            self.learn.dl = type('Skewed', (), {'__iter__': lambda self: skewed(dl), '__len__': lambda self: len(dl) - 1})()
    learn = make_learner(block(workers), [Check(), Skew()])
    learn.check.of = of(learn.dls)
    with pytest.raises(AssertionError, match='by their ids'): learn.fit(1)


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


# Several processes --------------------------------------------------------------------------------------------------

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
