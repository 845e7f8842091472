"""Loaders whose data say which they are: the value of a picture, or what it stands for, is the index of its row."""
import random
import time
from functools import partial

import numpy as np
import torch
from fastai.basics import DataLoader, Datasets, Transform
from fastai.callback.data import PartialDL
from fastai.data.block import DataBlock, TransformBlock
from fastai.data.load import SkipItemException
from fastai.data.transforms import IndexSplitter
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import IterableDataset, Subset, WeightedRandomSampler

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


def data_block(skip=False):
    "A real DataBlock with augmentation of items and batches: the training items are not the first ones, and not in order"
    train = [i for i in reversed(range(N + 10)) if i % 6]
    splitter = lambda items: (train, [i for i in range(N + 10) if i % 6 == 0])
    return DataBlock(blocks=(TransformBlock(type_tfms=Picture()), TransformBlock(type_tfms=Number())), splitter=splitter,
                     item_tfms=[Brighter()] + [Unreadable()] * skip, batch_tfms=Noise())


def block(workers=0, skip=False, **kwargs):
    return data_block(skip).dataloaders(VALUES, bs=8, num_workers=workers, device='cpu', **kwargs)


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
    assert len(ids) == len(x) == len(y) and x.min() >= 0, f'{len(ids)} ids for {len(x)} pictures and {len(y)} numbers'
    shown = x[:, 0, 0, 0].floor().long().numpy()
    assert (shown == want).all() and (y.numpy() == want).all(), f'pictures {shown}, numbers {y.numpy()}, by their ids {want}'


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


class Stream(IterableDataset):
    def __iter__(self): return iter(torch_data())
