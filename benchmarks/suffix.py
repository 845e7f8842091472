"""What a step costs when only a suffix of the network is perturbed and the rest is not computed twice.

    python benchmarks/suffix.py [--rounds 8] [--warmup 1] [--threads 1] [--net NAME] [--json OUT]

A ResNet-18 for CIFAR and a ViT-S/16. All methods take turns step by step, as in `two_pass.py`, whose `times` this uses;
a ratio is taken inside each round, and the table shows the median and the quartiles. `SGD again` is SGD against itself,
the noise. `predicted` is 1 + f with f counted (`suffix_for`), for the norm layers 5/3 (the weight gradients of the first
pass are the only unit saved). The clock counts processor time.
"""
import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import two_pass as bench

from sam_explained.core import two_pass
from sam_explained.prices import cost_models
from sam_explained.reuse import Prefix, _work_before
from sam_explained.sam import norm_params


def half_of_all(model, weights):
    "A random 0/1 mask on `weights` that keeps half as many entries as the whole model has"
    keep = sum(w.numel() for w in model.parameters()) / 2 / sum(w.numel() for w in weights)
    gen = torch.Generator().manual_seed(0)
    return [(torch.rand(w.shape, generator=gen) < keep).to(w.dtype) for w in weights]


def since(first, model): return model[first:].parameters()


kinds = {  # of the ResNet, whose stages begin at 3, 5, 7 and 9; name: (what is perturbed, first child perturbed, masked?)
    'SAM': (partial(since, 0), 0, False),
    'last two stages': (partial(since, 7), 7, False),
    'last stage': (partial(since, 9), 9, False),
    'half of all weights, inside the last stage': (partial(since, 9), 9, True),
    'normalisation layers': (norm_params, None, False),
}
blocks = {  # of the ViT
    'SAM': (partial(since, 0), 0, False),
    'last four blocks': (partial(since, 9), 9, False),
    'last block': (partial(since, 12), 12, False),
    'normalisation layers': (norm_params, None, False),
}
nets = {  # name: (maker, shape of a batch, kinds)
    'ResNet-18 for CIFAR': (cost_models['resnet18'][0], (32, 3, 32, 32), kinds),
    'ViT-S/16': (cost_models['vit_s'][0], (4, 3, 224, 224), blocks),
}


def step(net, kind, batch=None):
    "A function that takes one step of `kind` on one batch; a `kind` that is not in the table is SGD"
    make, (usual, *shape), kinds = nets[net]
    torch.manual_seed(0)
    model, x, y = make(), torch.randn(batch or usual, *shape), torch.randint(0, 10, (batch or usual,))
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


def perturbed_share(net, kind):
    "Of all weights"
    make, _, kinds = nets[net]
    if kind not in kinds: return 0.
    if kinds[kind][2]: return .5
    model = make()
    return sum(w.numel() for w in kinds[kind][0](model)) / sum(w.numel() for w in model.parameters())


def predicted(net, kind):
    make, (_, *shape), kinds = nets[net]
    if kind not in kinds: return 1.
    first = kinds[kind][1]
    if first is None: return 5 / 3
    before = _work_before(make(), (torch.randn(2, *shape),))
    return 2 - min(share for name, share in before.items() if int(name.split('.')[0]) >= first)


def measure(net, rounds, warmup, threads, batch=None):
    make, (usual, *_), kinds = nets[net]
    steps = {kind: step(net, kind, batch) for kind in ('SGD', 'SGD again', *kinds)}
    times = bench.times(steps, rounds, warmup, torch.device('cpu'), bench.clocks['cpu'])
    n = sum(w.numel() for w in make().parameters())
    what = (f'{net}, {n:,} parameters, batch {batch or usual}, {threads} thread(s), processor time, {rounds} rounds, '
            f'torch {torch.__version__}, float32')
    rows = [dict(method=kind, ms=1e3 * float(np.median(times[:, k])),
                 predicted=predicted(net, kind), perturbed=perturbed_share(net, kind),
                 ratio=[float(q) for q in np.percentile(times[:, k] / times[:, 0], [25, 50, 75])])
            for k, kind in enumerate(steps)]
    print(what)
    for r in rows:
        low, mid, high = r['ratio']
        print(f"{r['method']:44}{r['ms']:8.0f} ms {mid:6.3f} ({low:.3f}-{high:.3f})  predicted {r['predicted']:.3f}")
    return dict(net=net, what=what, rho=bench.RHO, lr=bench.LR, momentum=0.9, seed=0, warmup=warmup, rows=rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=int, default=8)
    parser.add_argument('--warmup', type=int, default=1)
    parser.add_argument('--batch', type=int, help='default: 32 for the ResNet, 4 for the ViT')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--net', choices=nets, action='append', help='default: all')
    parser.add_argument('--json', type=Path, metavar='OUT', help='write the numbers here')
    args = parser.parse_args(argv)
    if min(args.rounds, args.threads, 1 if args.batch is None else args.batch, args.warmup + 1) < 1:
        parser.error('--rounds, --threads and --batch must be at least 1, --warmup at least 0')
    torch.set_num_threads(args.threads)
    found = [measure(net, args.rounds, args.warmup, args.threads, args.batch) for net in args.net or nets]
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + '\n')
    return found


if __name__ == '__main__': main()
