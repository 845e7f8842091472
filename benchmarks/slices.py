"""What a slice of the loss costs: 25 by 25 points around a small network on 1,000 digits, in three ways.

    python benchmarks/slices.py [--rounds 7] [--n 25] [--bs 64] [--json OUT]

`state_dict` loads the weights of a point and then runs through the data, for one point after the other; `slice_2d` loads
the data once and visits all points, 50 at once where it finds that both roads agree (as it does here); with `vmap=False`
it visits one point after the other. The data are batches from a fastai loader, or the same batches held in memory. All
take turns, as in `two_pass.py`, and a ratio is taken inside each round. The clock counts processor time.
"""
import argparse
import json
import sys
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
import two_pass as bench

from sam_explained.data import digits
from sam_explained.sharpness import Objective
from sam_explained.slices import random_direction, slice_2d


def by_state_dict(objective, directions, n, batches):
    "The usual way: load the weights of a point, run through the data, load the next; an array (n, n)"
    model, axis = objective.model.eval(), np.linspace(-1, 1, n)
    home = {k: v.clone() for k, v in model.state_dict().items()}
    names, found = [k for k, _ in model.named_parameters()], []
    with torch.no_grad():
        for a, b in product(axis.tolist(), axis.tolist()):
            moved = {k: home[k] + a * u + b * v for k, u, v in zip(names, *directions)}
            model.load_state_dict({**home, **moved})
            found.append(mean_loss(model, objective.loss_func, batches()))
    model.load_state_dict(home)
    return np.array(found).reshape(n, n)


def mean_loss(model, loss_func, batches):
    total = rows = 0
    for xb, yb in batches:
        total += len(yb) * loss_func(model(xb), yb).item()
        rows += len(yb)
    return total / rows


def methods(n, bs):
    "(data, way) -> a function that gives the slice, an array (n, n)"
    torch.manual_seed(0)
    net, dls = bench.mlp(64, 64, 64, 10), digits(bs=bs, valid_pct=797, seed=0)
    ds = dls.train_ds
    flat = [(x.flatten(1), y) for x, y in zip(ds.x.split(bs), ds.y.split(bs))]
    model = torch.nn.Sequential(torch.nn.Flatten(), net)
    loader = dls.train.new(shuffle=False, drop_last=False)
    ways = {}
    for data, batches in (('loader', loader), ('in memory', flat)):
        objective = Objective((model, F.cross_entropy, batches))
        directions = [random_direction(objective, seed) for seed in (0, 1)]
        ways |= {(data, 'state_dict'): partial(by_state_dict, objective, directions, n, lambda b=batches: b),
                 (data, 'slice_2d'): partial(plane, objective, directions, n, None),
                 (data, 'slice_2d, vmap=False'): partial(plane, objective, directions, n, False)}
    return ways


def plane(objective, directions, n, vmap): return slice_2d(objective, directions, 1., n, vmap=vmap, progress=False).loss


def measure(rounds, warmup, n, bs, threads):
    ways = methods(n, bs)
    times = bench.times(ways, rounds, warmup, torch.device('cpu'), bench.clocks['cpu'])
    what = (f'{n} x {n} points, MLP 64-64-64-10, 1,000 digits in batches of {bs}, {threads} thread(s), processor time, '
            f'{rounds} rounds, torch {torch.__version__}, float32')
    print(what)
    rows = []
    for k, (data, method) in enumerate(ways):
        ratio = times[:, k] / times[:, list(ways).index((data, 'state_dict'))]
        rows.append(dict(data=data, method=method, seconds=float(np.median(times[:, k])),
                         ratio=[float(q) for q in np.percentile(ratio, [25, 50, 75])]))
        low, mid, high = rows[-1]['ratio']
        print(f"{data:12}{method:22}{rows[-1]['seconds']:7.2f} s {mid:6.3f} ({low:.3f}-{high:.3f}) of state_dict")
    return dict(what=what, n=n, bs=bs, seed=0, rows=rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--warmup', type=int, default=1)
    parser.add_argument('--n', type=int, default=25, help='points per side')
    parser.add_argument('--bs', type=int, default=64)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--json', type=Path, metavar='OUT', help='write the numbers here')
    args = parser.parse_args(argv)
    if min(args.rounds, args.threads, args.bs, args.n - 1, args.warmup + 1) < 1:
        parser.error('--rounds, --threads and --bs must be at least 1, --n at least 2, --warmup at least 0')
    torch.set_num_threads(args.threads)
    found = measure(args.rounds, args.warmup, args.n, args.bs, args.threads)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + '\n')
    return found


if __name__ == '__main__': main()
