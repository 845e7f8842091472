"""The judging runs of the ledger: what plan.yml compares, with the settings chosen by run.py, once, on the judging seeds.

    python benchmarks/claims/judge.py runs [--settings q40,long]  # train and look: results/judge.jsonl
    python benchmarks/claims/judge.py shards                      # sharpness of shards and the gap: results/shards.jsonl
    python benchmarks/claims/judge.py rate                        # the exponents of the rate: results/rate.jsonl

Written line by line and resumable, as run.py is. Nothing here decides: the page of the ledger reads the files.
"""
import argparse
import time
from functools import partial
from itertools import product

import numpy as np
import torch
from scipy.stats import kendalltau
from torch.nn import functional as F

from run import HERE, PLAN, choosing, journal, looked, trained, wanted
from sam_explained.claims import Ledger
from sam_explained.compare import _own_luck
from sam_explained.hessian import top_eigenvalues
from sam_explained.sharpness import Objective, ball_sharpness
from sam_explained.stacked import stack_norm, stack_plus, stack_times

SEEDS = range(PLAN['protocol']['judge']['seeds'][0], PLAN['protocol']['judge']['seeds'][1] + 1)
CURVED = 'clean', 'q40', 'long', 'text'      # settings in which some claim is about sharpness
SHARDS = 1, 8, 24, 240                       # rows of a shard


def cells(setting, ledger):
    "All runs `(method, lr, strength, renorm)` that judging needs in a setting, each once: each method as chosen, what claims compare, what is run beside"
    found = [(m, *ledger.chosen(setting, m), False) for m in wanted(setting) if (setting, m) in ledger.choose]
    for c in PLAN['claims']:
        if 'compare' in c and setting in c['settings']: found += [run for pair in ledger.pairs(c, setting) for run in pair]
    found += [(o['method'], o['lr'], 0., False) for b in PLAN['beside'] for o in b['runs'] if o['setting'] == setting]
    return list(dict.fromkeys(found))


def curvatures(model, x, y):
    "Of the loss on the training rows as labelled; nothing of a run that diverged"
    names = 'lambda_1', 'lambda_5', 'ball', 'adaptive'
    try:
        on = Objective((model, F.cross_entropy, [(x, y)]))
        values = top_eigenvalues(on, k=5, tol=0.01, progress=False).values
        ball = ball_sharpness(on, rho=0.05, steps=20, progress=False).rise
        adaptive = top_eigenvalues(on, adaptive=True, eta=0.01, tol=0.01, progress=False).values[0]
    except ValueError: return dict.fromkeys(names)
    return {k: float(f'{float(v):.5g}') for k, v in zip(names, (values[0], values[4], ball, adaptive))}


def judged(setting, cell, seeds=SEEDS, curved=None):
    "What came out of one cell, a list over seeds for each measure"
    method, lr, strength, renorm = cell
    stack, loaders = trained(setting, method, [(i, lr, strength) for i in range(len(seeds))], seeds, 'test', renorm)
    accuracy, train, loss = looked(stack, loaders)
    found = {'accuracy': np.round(accuracy, 2).tolist(), 'train': np.round(train, 2).tolist(), 'loss': np.round(loss, 5).tolist()}
    if setting in CURVED if curved is None else curved:
        each = [curvatures(stack.unstacked(r), dls.train_ds.x, dls.train_ds.y) for r, dls in enumerate(loaders)]
        found |= {k: [e[k] for e in each] for k in each[0]}
    return found


def shard_rises(stack, x, y, m):
    "For each run the mean rise over shards of m rows, each shard with SAM's one step of its own, radius 0.05"
    x, y = (b.unflatten(1, (-1, m)) for b in (x, y))
    rises = []
    for r in range(len(x)):
        ws = [w[r].expand(len(x[r]), *w.shape[1:]) for w in stack.ws]
        def losses(ws): return F.cross_entropy(stack.outputs(ws, x[r]).flatten(0, 1), y[r].flatten())
        g = stack.gradient(ws, x[r], y[r])[0]
        norm = stack_norm(g)
        up = stack_plus(ws, stack_times(g, torch.where(norm > 0, 0.05 / norm, 0.)))
        with torch.no_grad(): rises.append((losses(up) - losses(ws)).item())
    return rises


def shards(setting, seed):
    "Sharpness by shards and gap of the networks of SGD and SAM with all step sizes and radii; Kendall's tau of each with the gap"
    grid = choosing(setting)
    gaps, rises = [], {m: [] for m in SHARDS}
    for method, strengths in (('SGD', [0.]), ('SAM', grid['rho'])):
        cases = [(0, lr, s) for lr, s in product(grid['lr'], strengths)]
        stack, loaders = trained(setting, method, cases, [seed], 'test')
        x, y = (torch.stack([getattr(dls.train_ds, k) for dls in loaders]) for k in 'xy')
        valid = loaders[0].valid_ds
        with torch.no_grad():
            for r in range(len(cases)):
                model = stack.unstacked(r)
                gaps.append((F.cross_entropy(model(valid.x), valid.y) - F.cross_entropy(model(x[r]), y[r])).item())
        for m in SHARDS: rises[m] += shard_rises(stack, x, y, m)
    fine = np.isfinite([gaps, *rises.values()]).all(0)
    return {'rows': SHARDS, 'tau': [round(kendalltau(np.array(rises[m])[fine], np.array(gaps)[fine])[0], 5) for m in SHARDS],
            'networks': len(gaps), 'finite': int(fine.sum())}


def rate(mask, seed, most=14, d=20, eta=0.25, rho=0.5):
    """Mean squared gradient norm up to T = 2^6 ... 2^14 and its exponent, on sum(1 - cos w) with noise in the gradient

    Step size eta / sqrt(t) and radius rho / sqrt(t), as the theorem asks; `mask`: all, random half, Fisher half."""
    gen = torch.Generator().manual_seed(seed)
    w, total, memory, means = 3 * torch.rand(d, generator=gen).double(), 0., torch.zeros(d).double(), []
    chance = torch.Generator().manual_seed(seed + 1_000_000)          # the noise is the same for all masks
    for t in range(1, 2**most + 1):
        total += w.sin().square().sum().item()
        if t >= 2**6 and t & (t - 1) == 0: means.append(total / t)
        noise = torch.randn(d, generator=gen).double() / d**0.5
        g = w.sin() + noise
        memory = 0.9 * memory + 0.1 * g**2
        m = {'all': torch.ones(d), 'random half': torch.rand(d, generator=chance) < 0.5, 'Fisher half': memory > memory.median()}[mask]
        eps = rho / t**0.5 * m * g / g.norm()
        w = w - eta / t**0.5 * ((w + eps).sin() + noise)
    slope = np.polyfit(np.log(2.) * np.arange(6, most + 1), np.log(means), 1)[0]
    return {'means': np.round(means, 6).tolist(), 'exponent': round(float(slope), 5)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('phase', choices=['runs', 'shards', 'rate'])
    parser.add_argument('--settings', default=','.join(PLAN['settings']))
    parser.add_argument('--seeds', default=None, help='FIRST-LAST, others than those of the plan; then the file is results/judge-FIRST-LAST.jsonl')
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.phase == 'runs':
        book, ledger, seeds = journal(f'judge-{args.seeds}' if args.seeds else 'judge'), Ledger(HERE), SEEDS
        if args.seeds: seeds = range(int(args.seeds.split('-')[0]), int(args.seeds.split('-')[1]) + 1)
        jobs = [([s, *cell], partial(judged, s, cell, seeds)) for s in args.settings.split(',') for cell in cells(s, ledger)]
    elif args.phase == 'shards':
        book = journal('shards')
        of, = (c for c in PLAN['claims'] if c['id'] == 'shards-correlate')
        jobs = [([s, seed], partial(shards, s, seed)) for s in of['settings'] for seed in SEEDS]
    else:
        book = journal('rate')
        jobs = [([mask, seed], partial(rate, mask, seed)) for mask in ('all', 'random half', 'Fisher half') for seed in SEEDS]
    for key, job in jobs:
        with book.claim(key) as mine:
            if not mine: continue
            start = time.perf_counter()
            with _own_luck(): found = job()
            book.add(key, {**found, 'seconds': round(time.perf_counter() - start, 1)})
            print(*key, f'{time.perf_counter() - start:.0f} s', *(f'{k} {np.mean(found[k]):.2f}' for k in ('accuracy', 'tau', 'exponent') if k in found), flush=True)


if __name__ == '__main__': main()
