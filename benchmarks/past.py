"""What a step of SAF and of MESA costs beside plain SGD and SAM.

    python benchmarks/past.py [--rounds 30] [--warmup 2] [--threads 1] [--batch 128] [--json OUT]

A ResNet-20 for CIFAR in fastai Learners, after an epoch that has filled the table of SAF, so that the term counts for
every row. All methods take turns step by step, as in `two_pass.py`, whose `times` this uses; a ratio is taken inside
each round, and the table shows the median and the quartiles. A step is all that a fit does for a batch: the loader
(with the ids, for SAF), the callbacks, the passes, the optimizer. `SGD again` is SGD against itself, the noise.
`predicted` counts passes: a forward is one unit, a backward two. The clock counts processor time.
"""
import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fastai.basics import SGD, DataLoaders, Learner, Recorder, TrainEvalCallback, noop
from fastai.data.load import DataLoader
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import two_pass as bench

from sam_explained.mesa import MESA
from sam_explained.prices import cifar_resnet
from sam_explained.saf import SAF
from sam_explained.sam import SAM

methods = {  # name: (callbacks, units of work: forwards and twice the backwards)
    'SGD': (lambda: [], 3),
    'SGD again': (lambda: [], 3),
    'SAF': (lambda: [SAF(lag=1, start=1)], 3),
    'MESA': (lambda: [MESA(start=1)], 4),
    'SAM': (lambda: [SAM(bench.RHO)], 6),
}
n_batches = 4   # in an epoch


def learner(name, batch):
    "After its first epoch"
    torch.manual_seed(0)
    model, n = cifar_resnet(), batch * n_batches
    rows = list(zip(torch.randn(n, 3, 32, 32), torch.randint(0, 10, (n,))))
    dls = DataLoaders(DataLoader(rows, bs=batch, shuffle=True, num_workers=0), DataLoader(rows[:1], bs=1))
    learn = Learner(dls, model, nn.CrossEntropyLoss(), partial(SGD, mom=0.9), lr=bench.LR, wd=0., default_cbs=False,
                    cbs=[TrainEvalCallback(), Recorder(), *methods[name][0]()])
    learn.logger, learn.create_mbar = noop, False
    learn.fit(1)
    return learn


def steps(learn):
    "The epochs after the first, batch by batch"
    learn.n_epoch = 10**6
    learn('before_fit')
    learn.epoch = 1
    while True:
        learn.dl = learn.dls.train
        for event in ('before_epoch', 'before_train'): learn(event)
        for i, b in enumerate(learn.dl):
            learn.one_batch(i, b)
            yield
        learn.epoch += 1


def measure(rounds, warmup, threads, batch):
    turns = {name: partial(next, steps(learner(name, batch))) for name in methods}
    times = bench.times(turns, rounds, warmup, torch.device('cpu'), bench.clocks['cpu'])
    n = sum(w.numel() for w in cifar_resnet().parameters())
    what = (f'ResNet-20 for CIFAR, {n:,} parameters, batch {batch}, {threads} thread(s), processor time, {rounds} rounds, '
            f'torch {torch.__version__}, float32')
    rows = [dict(method=name, ms=1e3 * float(np.median(times[:, k])), predicted=units / 3,
                 ratio=[float(q) for q in np.percentile(times[:, k] / times[:, 0], [25, 50, 75])])
            for k, (name, (_, units)) in enumerate(methods.items())]
    print(what)
    for r in rows:
        low, mid, high = r['ratio']
        print(f"{r['method']:12}{r['ms']:8.0f} ms {mid:6.3f} ({low:.3f}-{high:.3f})  predicted {r['predicted']:.3f}")
    return dict(what=what, lr=bench.LR, momentum=0.9, seed=0, warmup=warmup, rows=rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=int, default=30)
    parser.add_argument('--warmup', type=int, default=2)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--json', type=Path, metavar='OUT', help='write the numbers here')
    args = parser.parse_args(argv)
    if min(args.rounds, args.threads, args.batch - 1, args.warmup + 1) < 1:
        parser.error('--rounds and --threads must be at least 1, --batch at least 2, --warmup at least 0')
    torch.set_num_threads(args.threads)
    found = measure(args.rounds, args.warmup, args.threads, args.batch)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + '\n')
    return found


if __name__ == '__main__': main()
