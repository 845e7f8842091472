"""What a step costs when only a suffix of the network is perturbed and the rest is not computed twice.

    python benchmarks/suffix.py [--rounds 8] [--warmup 1] [--batch 32] [--threads 1] [--json OUT]

A ResNet-18 for CIFAR. All methods take turns step by step, as in `two_pass.py`, whose `interleave` this uses; a ratio
is taken inside each round, and the table shows the median and the quartiles. `SGD again` is SGD against itself, the noise.
`predicted` is 1 + f with f counted (`suffix_for`), for the norm layers 5/3 (the weight gradients of the first pass are
the only unit saved). The clock counts processor time.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import two_pass as bench

from sam_explained.core import two_pass
from sam_explained.reuse import Prefix, _work_before
from sam_explained.sam import norm_params


def resnet18():
    "Four stages of two blocks behind a 3x3 stem"
    torch.manual_seed(0)
    stages = [nn.Sequential(bench.Block(a, b, s), bench.Block(b, b, 1))
              for a, b, s in [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]]
    stem = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True))
    return nn.Sequential(stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def half_of_all(model, weights):
    "A random 0/1 mask on `weights` that keeps half as many entries as the whole model has"
    keep = sum(w.numel() for w in model.parameters()) / 2 / sum(w.numel() for w in weights)
    gen = torch.Generator().manual_seed(0)
    return [(torch.rand(w.shape, generator=gen) < keep).to(w.dtype) for w in weights]


kinds = {  # name: (what is perturbed, first stage perturbed, masked?)
    'SAM': (lambda m: m.parameters(), 0, False),
    'last two stages': (lambda m: m[3:].parameters(), 3, False),
    'last stage': (lambda m: m[4:].parameters(), 4, False),
    'half of all weights, inside the last stage': (lambda m: m[4:].parameters(), 4, True),
    'normalisation layers': (norm_params, None, False),
}


def step(kind, batch):
    "A function that takes one step on one batch; a `kind` that is not in `kinds` is SGD"
    model, x, y = resnet18(), torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    opt = torch.optim.SGD(model.parameters(), bench.LR, momentum=0.9)
    def loss(): return F.cross_entropy(model(x), y)
    if kind not in kinds: gradient = lambda: loss().backward()
    else:
        choose, _, masked = kinds[kind]
        weights = list(choose(model))
        masks, prefix = half_of_all(model, weights) if masked else None, Prefix(model, weights)
        passes = (lambda: loss) if kind == 'SAM' else lambda: prefix.twice(loss)
        gradient = lambda: two_pass(passes(), weights, bench.RHO, model=model, masks=masks)
    def one():
        gradient()
        opt.step()
        opt.zero_grad()
    return one


def perturbed_share(kind):
    "Of all weights"
    if kind not in kinds: return 0.
    if kinds[kind][2]: return .5
    model = resnet18()
    return sum(w.numel() for w in kinds[kind][0](model)) / sum(w.numel() for w in model.parameters())


def predicted(kind):
    if kind not in kinds: return 1.
    stage = kinds[kind][1]
    if stage is None: return 5 / 3
    before = _work_before(resnet18(), (torch.randn(2, 3, 32, 32),))
    return 2 - min(share for name, share in before.items() if int(name.split('.')[0]) >= stage)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=int, default=8)
    parser.add_argument('--warmup', type=int, default=1)
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--json', type=Path, metavar='OUT', help='write the numbers here')
    args = parser.parse_args(argv)
    if min(args.rounds, args.threads, args.batch, args.warmup + 1) < 1:
        parser.error('--rounds, --threads and --batch must be at least 1, --warmup at least 0')
    torch.set_num_threads(args.threads)
    steps = {kind: step(kind, args.batch) for kind in ('SGD', 'SGD again', *kinds)}
    times = bench.interleave(steps, args.rounds, args.warmup, torch.device('cpu'), bench.clocks['cpu'])
    n = sum(w.numel() for w in resnet18().parameters())
    what = (f'ResNet-18 for CIFAR, {n:,} parameters, batch {args.batch}, {args.threads} thread(s), processor time, '
            f'{args.rounds} rounds, torch {torch.__version__}, float32')
    rows = [dict(method=kind, ms=1e3 * float(np.median(times[:, k])),
                 predicted=predicted(kind), perturbed=perturbed_share(kind),
                 ratio=[float(q) for q in np.percentile(times[:, k] / times[:, 0], [25, 50, 75])])
            for k, kind in enumerate(steps)]
    print(what)
    for r in rows:
        low, mid, high = r['ratio']
        print(f"{r['method']:44}{r['ms']:8.0f} ms {mid:6.3f} ({low:.3f}-{high:.3f})  predicted {r['predicted']:.3f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        about = dict(what=what, rho=bench.RHO, lr=bench.LR, momentum=0.9, seed=0, warmup=args.warmup)
        args.json.write_text(json.dumps(dict(about, rows=rows), indent=1) + '\n')
    return rows


if __name__ == '__main__': main()
