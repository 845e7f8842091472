"""What mSAM costs beside SAM: a step of `MSAM(n)` over a step of `SAM`, one shard after the other and all at once.

    python benchmarks/shards.py [--models resnet resnet_gn mlp small deep] [--shards 1 2 4 8] [--batch 128] [--json OUT]

Callbacks in a Learner, driven as in `two_pass.py`: one process, all methods take turns step by step, and a ratio is
taken inside each round. `SAM again` is SAM against itself, the noise. A method that
a model does not allow (`vmap` with batch norm) has no row. With a GPU: `--device cuda --batch 512 --shards 1 2 4 8 16`.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import two_pass as bench

from sam_explained.msam import MSAM
from sam_explained.prices import cifar_resnet
from sam_explained.sam import SAM


def group_norm(model):
    "The same model with four groups in place of every batch norm"
    for name, m in model.named_children():
        if isinstance(m, nn.BatchNorm2d): setattr(model, name, nn.GroupNorm(4, m.num_features))
        else: group_norm(m)
    return model


about_models = {  # name: (the model, the shape of a row, what it is)
    'resnet': (cifar_resnet, (3, 32, 32), 'small ResNet, batch norm'),
    'resnet_gn': (lambda: group_norm(cifar_resnet()), (3, 32, 32), 'small ResNet, group norm'),
    'mlp': (lambda: bench.mlp(784, 256, 256, 256, 10), (784,), 'MLP 784-256-256-256-10'),
    'small': (lambda: bench.mlp(64, 64, 64, 10), (64,), 'MLP 64-64-64-10'),
    'deep': (lambda: bench.mlp(*[32] * 62, 10), (32,), 'MLP, 62 layers of 32'),
}


def methods(name, device, ns):
    "(road, shards) -> a step; the first is what the others are compared with"
    steps = {('SAM', 1): SAM(), ('SAM again', 1): SAM()}
    steps |= {('loop', n): MSAM(n) for n in ns}
    if name != 'resnet': steps |= {('vmap', n): MSAM(n, vmap=True) for n in ns if n > 1}
    return {key: bench.in_learner(name, device, cb) for key, cb in steps.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--models', nargs='+', choices=about_models, default=list(about_models))
    parser.add_argument('--shards', nargs='+', type=int, default=[1, 2, 4, 8])
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--seconds', type=float, default=60., help='measure each model for about so long')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--clock', choices=bench.clocks, default='wall')
    parser.add_argument('--json', type=Path, metavar='OUT', help='write the numbers here')
    args = parser.parse_args(argv)
    if min(*args.shards, args.threads) < 1 or args.batch < max(args.shards) or args.seconds <= 0:
        parser.error('--shards and --threads must be at least 1, --batch at least the largest of --shards, --seconds positive')
    if args.clock == 'cpu' and args.device.startswith('cuda'): parser.error('--clock cpu does not see the work of a GPU')
    torch.set_num_threads(args.threads)
    device, clock, rows = torch.device(args.device), bench.clocks[args.clock], []
    for name in args.models:
        make, shape, what = about_models[name]
        bench.models[name] = make, (args.batch, *shape)
        steps = methods(name, device, args.shards)
        first = bench.times(steps, 1, 2, device, clock).sum()
        rounds = int(min(200, max(8, args.seconds / first)))
        times = bench.times(steps, rounds, 0, device, clock)
        print(f'\n{what}, batch {args.batch}: SAM {1e3 * np.median(times[:, 0]):.1f} ms a step, {rounds} rounds')
        for k, (road, n) in enumerate(steps):
            low, mid, high = np.percentile(times[:, k] / times[:, 0], [25, 50, 75])
            print(f'  {road:10} {n:3} shards {mid:6.2f} ({low:.2f}-{high:.2f})')
            rows.append(dict(model=what, method=road, n=n, median=float(mid), low=float(low), high=float(high),
                             ms=1e3 * float(np.median(times[:, k])), rounds=rounds))
    if args.json:
        args.steps, args.warmup = None, 2
        about = bench.facts(device, args) | dict(batch=args.batch, rounds='see rows')
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(dict(about=about, rows=rows), indent=1) + '\n')
    return rows


if __name__ == '__main__': main()
