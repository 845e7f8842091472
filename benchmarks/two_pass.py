"""What a SAM step costs, beside plain SGD and beside the least that two passes can cost.

    python benchmarks/two_pass.py [--models resnet deep mlp] [--steps 150] [--threads 1] [--device cpu] [--json OUT]

All methods run in one process and take turns step by step, in orders in which each follows each other one equally
often (a step is slower after one that has used much memory); the methods, the turns and the count of bytes are those
of `sam_explained.cost`. A ratio is taken inside each round, this method's step over the SGD step of the same round, and
the table shows the median and the quartiles of these ratios. Two rows say how far to trust the others:

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
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fastai.basics import SGD, DataLoaders, Learner, Recorder, TrainEvalCallback, noop
from torch import nn

from sam_explained.cost import (Allocated, HostClock, PeerSAM, TwoPassFloor, interleave, peak_bytes, peer_sam, plain_floor,
                                plain_sam, plain_sgd)
from sam_explained.prices import cifar_resnet
from sam_explained.sam import SAM

LR, RHO = 1e-3, 0.05


# Models and one batch for each ------------------------------------------------------------------------------------

def mlp(*sizes):
    layers = [l for a, b in zip(sizes, sizes[1:]) for l in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


models = {  # name: (the model, the shape of a batch)
    'resnet': (cifar_resnet, (32, 3, 32, 32)),
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

def plain(name, device, make, **kwargs):
    "A step in plain PyTorch; `make` is a method of `sam_explained.cost`"
    model, x, y = build(name, device)
    def loss(): return F.cross_entropy(model(x), y)
    return make(model, loss, partial(torch.optim.SGD, lr=LR, momentum=0.9), **kwargs)


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
    steps = {'SGD': plain(name, device, plain_sgd), 'SGD again': plain(name, device, plain_sgd),
             'two-pass floor': plain(name, device, plain_floor), 'two_pass': plain(name, device, plain_sam, rho=RHO)}
    if PeerSAM:
        steps['pytorch_optimizer SAM'] = plain(name, device, peer_sam, rho=RHO, foreach=False)
        steps['pytorch_optimizer SAM, foreach'] = plain(name, device, peer_sam, rho=RHO)
    return steps


def learner_methods(name, device):
    return {'Learner': in_learner(name, device), 'Learner again': in_learner(name, device),
            'two-pass floor in a Learner': in_learner(name, device, TwoPassFloor()),
            'SAM callback': in_learner(name, device, SAM(RHO))}


# Time and memory ----------------------------------------------------------------------------------------------------

def wait(device):
    if device.type == 'cuda': torch.cuda.synchronize(device)


clocks = {'wall': time.perf_counter, 'cpu': time.process_time}


def times(methods, rounds, warmup, device, clock):
    "Seconds of every step, an array of shape (rounds, methods), after `warmup` steps of each"
    steps = list(methods.values())
    for _ in range(warmup):
        for step in steps: step()
    def now():
        wait(device)
        return clock()
    return np.array(list(interleave(steps, HostClock(now), rounds)))


def peak(step, device):
    gc.collect()
    return peak_bytes(step, device)


def measure(name, methods, rounds, warmup, device, clock):
    "The rows of one table"
    n_bytes = sum(w.numel() * w.element_size() for w in build(name, device)[0].parameters())
    seconds = times(methods, rounds, warmup, device, clock)
    peaks = [peak(step, device) for step in methods.values()]
    ratios, above = seconds / seconds[:, :1], seconds / seconds[:, 2:3] - 1
    quartiles = lambda x: [float(q) for q in np.percentile(x, [25, 50, 75])]
    return [dict(model=name, method=m, ms=1e3 * float(np.median(seconds[:, k])),
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
