"""What a SAM step costs, beside plain SGD and beside the least that two passes can cost.

    python benchmarks/two_pass.py [--models resnet deep mlp] [--steps 150] [--threads 1] [--device cpu] [--json OUT]

All methods run in one process and take turns step by step, in an order drawn anew for each round, so that no method
always follows the same other one (a step is slower after one that has used much memory). A ratio is taken inside each
round, this method's step over the SGD step of the same round, and the table shows the median and the quartiles of these
ratios. Two rows say how far to trust the others:

- `SGD again` is SGD against itself. How far its ratio is from 1, and how wide its quartiles are, is the noise.
- `two-pass floor` is two forwards, two backwards and one optimizer step, and none of SAM's arithmetic. Its first
  gradient is taken by `torch.autograd.grad` with respect to all weights and thrown away, its second by
  `loss.backward()`. What a method costs above the floor is all that a better implementation could save; the column
  `over floor` is that ratio, minus one.

The callback has a table of its own, relative to a plain Learner driven in the same way, with a floor that is a callback
too. `--clock cpu` counts processor time in place of wall time: on a machine shared with others it leaves out waiting
for a turn (not the slower memory), and with one thread it is otherwise the same. On a GPU only wall time is offered.

Everything is eager; every model, optimizer and batch is built once, so the time of loading data is not in it. Memory is
the peak within one step above SGD's peak, in copies of the perturbed weights.
"""
import argparse
import gc
import json
import platform
import time
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fastai.basics import (SGD, Callback, CancelBackwardException, DataLoaders, Learner, Recorder, TrainEvalCallback,
                           noop)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sam_explained.core import two_pass
from sam_explained.sam import SAM as SAMCallback

try: from pytorch_optimizer import SAM as PeerSAM
except ImportError: PeerSAM = None

LR, RHO = 1e-3, 0.05


# Models and one batch for each ------------------------------------------------------------------------------------

class Block(nn.Module):
    "Two 3x3 convolutions with batch norm and a shortcut"
    def __init__(self, n_in, n, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n_in, n, 3, stride, 1, bias=False), nn.BatchNorm2d(n)
        self.conv2, self.bn2 = nn.Conv2d(n, n, 3, 1, 1, bias=False), nn.BatchNorm2d(n)
        fit = [] if n_in == n and stride == 1 else [nn.Conv2d(n_in, n, 1, stride, bias=False), nn.BatchNorm2d(n)]
        self.short = nn.Sequential(*fit)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.short(x))


def resnet(width=16, depth=3):
    "A CIFAR ResNet: three stages of `depth` blocks"
    layers, n_in = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()], width
    for stage in range(3):
        for i in range(depth):
            n = width * 2**stage
            layers.append(Block(n_in, n, 2 if stage and not i else 1))
            n_in = n
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, 10))


def mlp(*sizes):
    layers = [l for a, b in zip(sizes, sizes[1:]) for l in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


models = {  # name: (the model, the shape of a batch)
    'resnet': (resnet, (32, 3, 32, 32)),
    'deep': (lambda: mlp(*[32] * 62, 10), (64, 32)),
    'mlp': (lambda: mlp(784, 256, 256, 256, 10), (64, 784)),
}


def build(name, device):
    "A model, always with the same weights, and a batch"
    torch.manual_seed(0)
    make, shape = models[name]
    model = make().to(device).train()
    return model, torch.randn(shape, device=device), torch.randint(0, 10, shape[:1], device=device)


# Methods: a function that takes one step ----------------------------------------------------------------------------

def plain(name, device, kind):
    "A step in plain PyTorch: 'sgd', 'floor', 'two_pass', or a peer"
    model, x, y = build(name, device)
    ws = list(model.parameters())
    opt = torch.optim.SGD(ws, LR, momentum=0.9)

    def loss(): return F.cross_entropy(model(x), y)

    def sgd():
        loss().backward()
        opt.step()
        opt.zero_grad()

    def floor():
        torch.autograd.grad(loss(), ws)
        sgd()

    def ours():
        two_pass(loss, ws, RHO, model=model)
        opt.step()
        opt.zero_grad()

    return {'sgd': sgd, 'floor': floor, 'two_pass': ours}[kind]


def peer(name, device, foreach):
    "pytorch_optimizer's SAM by its two-call interface; it does not look after batch norm or dropout"
    model, x, y = build(name, device)
    opt = PeerSAM(model.parameters(), torch.optim.SGD, rho=RHO, foreach=foreach, lr=LR, momentum=0.9)

    def step():
        F.cross_entropy(model(x), y).backward()
        opt.first_step(zero_grad=True)
        F.cross_entropy(model(x), y).backward()
        opt.second_step(zero_grad=True)
    return step


class Floor(Callback):
    "Two passes in a Learner, and nothing else"
    order, run_valid = SAMCallback.order, False
    def before_backward(self):
        torch.autograd.grad(self.learn.loss_grad, list(self.model.parameters()))
        self.learn.loss_grad = self.learn.loss_func(self.learn.model(*self.learn.xb), *self.learn.yb)
        self.learn._backward()
        raise CancelBackwardException


def in_learner(name, device, *cbs):
    "One batch of a Learner that has been brought to the middle of an epoch"
    model, x, y = build(name, device)
    dls = DataLoaders([(x, y)], [(x, y)], device=device)
    learn = Learner(dls, model, nn.CrossEntropyLoss(), partial(SGD, mom=0.9), lr=LR, wd=0., default_cbs=False,
                    cbs=[TrainEvalCallback(), Recorder(), *cbs])
    learn.logger, learn.n_epoch, learn.n_iter = noop, 1, 10**6
    learn.create_opt()
    learn.opt.set_hypers(lr=LR)
    for event in ('before_fit', 'before_epoch', 'before_train'): learn(event)
    return partial(learn.one_batch, 0, (x, y))


def plain_methods(name, device):
    "Row name -> step; the first row is what the others are compared with, the third is the floor"
    steps = {'SGD': plain(name, device, 'sgd'), 'SGD again': plain(name, device, 'sgd'),
             'two-pass floor': plain(name, device, 'floor'), 'two_pass': plain(name, device, 'two_pass')}
    if PeerSAM:
        steps['pytorch_optimizer SAM'] = peer(name, device, False)
        steps['pytorch_optimizer SAM, foreach'] = peer(name, device, True)
    return steps


def learner_methods(name, device):
    return {'Learner': in_learner(name, device), 'Learner again': in_learner(name, device),
            'two-pass floor in a Learner': in_learner(name, device, Floor()),
            'SAM callback': in_learner(name, device, SAMCallback(RHO))}


# Time and memory ----------------------------------------------------------------------------------------------------

def wait(device):
    if device.type == 'cuda': torch.cuda.synchronize(device)


clocks = {'wall': time.perf_counter, 'cpu': time.process_time}


def seconds(step, device, clock):
    wait(device)
    start = clock()
    step()
    wait(device)
    return clock() - start


def interleave(methods, rounds, warmup, device, clock):
    "Seconds of every step, an array of shape (rounds, methods)"
    steps = list(methods.values())
    for _ in range(warmup):
        for step in steps: step()
    times = np.zeros((rounds, len(steps)))
    turns = np.random.default_rng(0)
    for r in range(rounds):
        for k in turns.permutation(len(steps)): times[r, k] = seconds(steps[k], device, clock)
    return times


class Allocated(TorchDispatchMode):
    "Bytes of the tensors made inside, now and at most; what a kernel takes and returns within itself is not seen"
    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = set()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if torch.is_tensor(t) and t.untyped_storage()._cdata not in old | self.seen: self._made(t.untyped_storage())
        return out
    def _made(self, storage):
        self.seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
    def _freed(self, key, n):
        self.seen.discard(key)
        self.now -= n


def peak(step, device):
    "The most bytes that one step holds above what it found"
    gc.collect()
    if device.type != 'cuda':
        with Allocated() as memory: step()
        return memory.most
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before


def measure(name, methods, rounds, warmup, device, clock):
    "The rows of one table"
    n_bytes = sum(w.numel() * w.element_size() for w in build(name, device)[0].parameters())
    times = interleave(methods, rounds, warmup, device, clock)
    peaks = [peak(step, device) for step in methods.values()]
    ratios, above = times / times[:, :1], times / times[:, 2:3] - 1
    quartiles = lambda x: [float(q) for q in np.percentile(x, [25, 50, 75])]
    return [dict(model=name, method=m, ms=1e3 * float(np.median(times[:, k])),
                 ratio=quartiles(ratios[:, k]), over_floor=quartiles(above[:, k]),
                 copies=(peaks[k] - peaks[0]) / n_bytes, peak_mb=peaks[k] / 2**20) for k, m in enumerate(methods)]


# Report -------------------------------------------------------------------------------------------------------------

def show(rows):
    print(f"{'':31}{'ms':>8}{'ratio':>7} (quartiles)  {'over floor':>11} {'(quartiles)':19}"
          f"{'peak MB':>8}{'extra copies':>14}")
    for k, r in enumerate(rows):
        low, mid, high = r['ratio']
        over = '{1:>+11.1%} ({0:+.1%} to {2:+.1%})'.format(*r['over_floor']) if k > 2 else ''
        time = f"{r['method']:31}{r['ms']:8.2f}{mid:7.3f} ({low:.2f}-{high:.2f})"
        print(f"{time:60}{over:31}{r['peak_mb']:8.2f}{r['copies']:14.2f}")


def facts(device, args):
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor() or platform.machine()
    return dict(torch=torch.__version__, python=platform.python_version(), device=f'{device.type} ({name})',
                threads=torch.get_num_threads(), clock=args.clock, rounds=args.steps, warmup=args.warmup,
                mode='eager', dtype='float32', momentum=0.9, lr=LR, rho=RHO)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--models', nargs='+', choices=models, default=list(models))
    parser.add_argument('--steps', type=int, default=150, help='rounds; every method takes one step in each')
    parser.add_argument('--warmup', type=int, default=10, help='rounds before the clock runs')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--clock', choices=clocks, default='wall')
    parser.add_argument('--json', type=Path, metavar='OUT', help='write the numbers here')
    args = parser.parse_args(argv)
    if min(args.steps, args.threads, args.warmup + 1) < 1:
        parser.error('--steps and --threads must be at least 1, --warmup at least 0')
    if args.clock == 'cpu' and args.device.startswith('cuda'):
        parser.error('--clock cpu does not see the work of a GPU')
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    about, rows = facts(device, args), []
    print(', '.join(f'{k} {v}' for k, v in about.items()))
    if not PeerSAM: print('pytorch_optimizer: not installed, so not in the table')
    for name in args.models:
        model, x, _ = build(name, device)
        ws = list(model.parameters())
        print(f'\n{name}: {sum(w.numel() for w in ws):,} parameters in {len(ws)} tensors, batch {tuple(x.shape)}')
        for methods in (plain_methods, learner_methods):
            table = measure(name, methods(name, device), args.steps, args.warmup, device, clocks[args.clock])
            show(table)
            rows += table
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(dict(about=about, rows=rows), indent=1) + '\n')
    return rows


if __name__ == '__main__': main()
