"""The runs of the ledger, as plan.yml lays them down.

    python benchmarks/claims/run.py choose [--settings q40,long] [--methods "SAM;SGD"]    # the grids, on the choosing seeds

One line of JSON per setting and method, written when it is done, in results/PHASE.jsonl; started again, it goes on where
it stopped. `choose` trains the whole grid of step sizes and strengths of a method and looks at the rows to choose by.
Runs that differ in seed, step size or strength train as one stack (`sam_explained.stacked`), in one thread.
"""
import argparse
import json
import os
import platform
import sys
import time
from copy import copy
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import yaml
from torch import nn

import sam_explained
from sam_explained.claims import Ledger
from sam_explained.compare import _own_luck, _set_all
from sam_explained.journal import Journal
from sam_explained.mesa import MESA
from sam_explained.msam import MSAM
from sam_explained.saf import SAF
from sam_explained.sam import SAM, norm_params
from sam_explained.scores import top_mask
from sam_explained.ssam import SSAM, DSTMask, FisherMask, Mask, RandomMask
from sam_explained.stacked import Stack, StackData, _kinds, _Sam, _Ssam, fit_stack, stack_norm, stack_times
from sam_explained.tasks import task

HERE = Path(__file__).parent
PLAN = yaml.safe_load((HERE/'plan.yml').read_text())
WIDTH = 400       # rows of a stack: runs times shards; wider ones leave the cache


class Fixed(Mask):
    "Always the same weights: those that `params` chooses of a model"
    def __init__(self, params):
        super().__init__(0., every=10**6)
        self.params = params

    def masks(self, ssam, weights, old=None):
        chosen = {id(w) for w in self.params(ssam.model)}
        return [torch.full(w.shape, id(w) in chosen) for w in weights]


def last_layer(model): return list([m for m in model.modules() if isinstance(m, nn.Linear)][-1].parameters())


class SecondOrder(SAM):
    "The gradient of w -> L(w + eps(w)), with the derivative of eps; for stacks only"


class StackedSecondOrder(_Sam):
    "g2 + rho / |g| H (g2 - (g2 . u) u), u = g / |g|, g2 the gradient at w + eps: one Hessian-vector product more"
    grads = 3

    def gradient(self, stack, x, y, rows, step, epoch):
        def g(*ws): return stack.gradient(list(ws), x, y)[0]
        first = g(*stack.ws)
        norm = stack_norm(first)
        second = g(*self.uphill(stack.ws, first, self.rho))
        u = stack_times(first, 1 / norm)
        along = sum((a * b).flatten(1).sum(1) for a, b in zip(second, u))
        v = stack_times([a - b for a, b in zip(second, stack_times(u, along))], self.rho / norm)
        Hv = torch.func.jvp(g, tuple(stack.ws), tuple(v))[1]
        return [a + b for a, b in zip(second, Hv)]


_kinds[SecondOrder] = StackedSecondOrder


class OwnFisher(FisherMask):
    "The Fisher mask of a run that may have diverged"
    def scores(self, ssam, weights): return [s.nan_to_num() for s in super().scores(ssam, weights)]


class AtOnce(SSAM):
    "SSAM with random masks, or Fisher masks of linear layers, of all runs at once; for stacks only"


class StackedAtOnce(_Ssam):
    """For linear layers the squared gradients of single rows need not be made: theirs is the product of what came in, a, and
    of what comes back, d, so that their sum is (d * d)' (a * a)."""
    def refresh(self, stack, epoch):
        mask, runs = self.cbs[0].mask, len(stack.ws[0])
        generator = mask.generator(SimpleNamespace(epoch=epoch))
        if isinstance(mask, RandomMask):
            scores = [torch.rand(w.shape[1:], generator=generator) for w in stack.ws]
            return [m.expand(runs, *m.shape) for m in top_mask(scores, mask.sparsity, mask.pattern)]
        rows = torch.randperm(self.data.x.shape[1], generator=generator)[:mask.n_samples]
        scores = linear_fisher(stack.ws, self.data.x[:, rows], self.data.y[:, rows])
        each = [top_mask([t.nan_to_num() for t in run], mask.sparsity, mask.pattern) for run in zip(*scores)]
        return [torch.stack(m) for m in zip(*each)]


def linear_fisher(ws, x, y):
    "Summed squared gradients of the rows of each run, for linear layers with biases and ReLU between"
    ins, layers = [x.flatten(2)], list(zip(ws[::2], ws[1::2]))
    for W, b in layers: ins.append((ins[-1] @ W.mT + b[:, None]).relu())
    W, b = layers[-1]
    d = (ins[-2] @ W.mT + b[:, None]).softmax(-1) - nn.functional.one_hot(y, W.shape[1])
    found = []
    for a, (W, b) in zip(reversed(ins[:-1]), reversed(layers)):
        found += [d.square().sum(1), d.square().mT @ a.square()]
        d = (d @ W) * (a > 0)
    return found[::-1]


_kinds[AtOnce] = StackedAtOnce


def callback(method, strength, epochs, renorm=False, linear=False):
    "The callback of a method of the plan; None for SGD. `linear`: the network has linear layers only"
    m, start = PLAN['methods'][method], max(3, epochs // 10)
    if 'lam' in m:
        if method == 'SAF': return SAF(strength, lag=3, start=start, tau_sq=True, dtype=torch.float32)
        return MESA(strength, decay=0.99, start=start, tau_sq=True)
    if 'rho' not in m: return None
    if 'term' in m: return SecondOrder(strength)
    if 'shards' in m: return MSAM(m['shards'], rho=strength)
    if 'params' in m: return SSAM(Fixed({'norm_params': norm_params, 'last': last_layer}[m['params']]), strength, renorm=True)
    if 'mask' in m:
        s = m['sparsity']
        made = {'fisher': lambda: OwnFisher(s, n_samples=64, pattern=m.get('pattern', 'unstructured')),
                'dst': lambda: DSTMask(s, every=2, n_samples=64), 'random': lambda: RandomMask(s)}[m['mask']]()
        return (AtOnce if m['mask'] == 'random' or linear and m['mask'] == 'fisher' else SSAM)(made, strength, renorm=renorm)
    return SAM(strength)


def choosing(setting):
    "Seeds, step sizes and radii to choose from: those of the protocol, or what was added for this setting"
    protocol, (first, last) = PLAN['protocol'], PLAN['protocol']['choose']['seeds']
    found = {'seeds': [first, last], 'lr': protocol['lr'][PLAN['settings'][setting]['lr']], 'rho': protocol['rho'], 'lam': protocol['lam']}
    for a in PLAN['added']: found |= a.get('choose', {}).get(setting, {})
    first, last = found['seeds']
    return found | {'seeds': range(first, last + 1)}


def strengths(setting, method):
    m = PLAN['methods'][method]
    return choosing(setting)['lam' if 'lam' in m else 'rho'] if 'lam' in m or 'rho' in m else [0.]


def epochs_of(setting, method): return max(1, round(PLAN['settings'][setting]['epochs'] * PLAN['methods'][method].get('epochs', 1)))


def prepared(setting, seeds, part, epochs):
    "Models, training data and rows to look at, for each seed"
    s = PLAN['settings'][setting]
    t = task(s['data'], s['model'], noise=s['noise'], n_train=s['n_train'], bs=s['bs'], part=part)
    models, loaders = [], []
    for seed in seeds:
        _set_all(seed)
        loaders.append(t.dls(seed))
        _set_all(seed)
        models.append(t.model())
    return models, StackData(loaders, epochs), loaders


def part_of(data, runs):
    "The data of `runs`, indices of seeds, which may repeat"
    new = copy(data)
    new.x, new.y, new.rows = data.x[runs], data.y[runs], data.rows[runs]
    new.loaders = [data.loaders[r] for r in runs]
    return new


def trained(setting, method, cases, seeds, part, renorm=False, look=None):
    """The stack of `cases`, triples (index of the seed, step size, strength), trained; and the loaders of all seeds"""
    epochs = epochs_of(setting, method)
    runs, lr, strength = zip(*cases)
    used = sorted(set(runs))
    models, data, loaders = prepared(setting, [seeds[r] for r in used], part, epochs)
    runs = [used.index(r) for r in runs]
    stack = Stack([models[r] for r in runs])
    cbs = [callback(method, s, epochs, renorm, PLAN['settings'][setting]['model'] == 'mlp') for s in strength]
    fit_stack(stack, part_of(data, list(runs)), cbs if cbs[0] else None, epochs, torch.tensor(lr), 0.9, 5e-4)
    return stack, [loaders[r] for r in runs]


@torch.no_grad()
def looked(stack, loaders):
    "Accuracy on the rows to look at and on the training rows in %, training loss, of each run"
    found = []
    for k in (1, 0):
        sets = [dls.loaders[k].dataset for dls in loaders]
        if len({ds.x.shape for ds in sets}) == 1: outs = list(stack.outputs(stack.ws, torch.stack([ds.x for ds in sets])))
        else: outs = [stack.unstacked(r)(ds.x) for r, ds in enumerate(sets)]
        found.append([100 * (z.argmax(1) == ds.y).float().mean().item() for z, ds in zip(outs, sets)])
    return *found, [nn.functional.cross_entropy(z, ds.y).item() for z, ds in zip(outs, sets)]


def chance(setting): return 100 / {'digits': 10, 'docstrings': 8, 'breast_cancer': 2}[PLAN['settings'][setting]['data']]


def grid(setting, method, lrs, ss, seeds, part, renorm=False):
    "Accuracies, an array (step size, strength, seed), with training accuracy and loss; in stacks of about WIDTH runs"
    cases = list(product(range(len(seeds)), lrs, ss))
    found = []
    width = max(1, WIDTH // PLAN['methods'][method].get('shards', 1))
    for k in range(0, len(cases), width):
        found += zip(*looked(*trained(setting, method, cases[k:k + width], seeds, part, renorm)))
    table = np.array(found).reshape(len(seeds), len(lrs), len(ss), 3).transpose(3, 1, 2, 0)
    return [np.round(t, d).tolist() for t, d in zip(table, (2, 2, 4))]


def choose(setting, method):
    "The whole grid of a method"
    lrs, seeds, ss = choosing(setting)['lr'], choosing(setting)['seeds'], strengths(setting, method)
    accuracy, train, loss = grid(setting, method, lrs, ss, seeds, 'choose')
    return {'lr': lrs, 'strength': ss, 'accuracy': accuracy, 'train': np.mean(train, -1).round(2).tolist(),
            'loss': np.mean(loss, -1).round(4).tolist()}


def wanted(setting):
    "The methods that a claim compares in this setting, in the order of the plan"
    told = [name for c in PLAN['claims'] if setting in c['settings'] for name in c.get('compare', [])]
    named = {n.strip().removeprefix('best of ') for t in told for n in (t.split(';') if ';' in t else [t] if t in PLAN['methods'] else t.split(', '))}
    if unknown := named - set(PLAN['methods']): raise ValueError(f'plan.yml compares {unknown}, which is no method')
    unfit = {m for a in PLAN['added'] for m in a.get('leave_out', {}).get(setting, [])}
    return [m for m in PLAN['methods'] if m in (named | {'SGD', 'SAM'}) - unfit]


def journal(name):
    "The file of a phase; which command wrote into it, with which versions and on what machine, is noted beside it"
    about = {'torch': torch.__version__, 'sam_explained': sam_explained.__version__}
    found = Journal(HERE/'results'/f'{name}.jsonl', about)
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30
    told = {'command': ' '.join(['python', *map(os.path.relpath, sys.argv[:1]), *sys.argv[1:]]), **about, 'cores': os.cpu_count(),
            'GiB': round(memory), 'python': platform.python_version(), 'date': time.strftime('%Y-%m-%d')}
    commands, line = HERE/'results'/'commands.jsonl', json.dumps(told) + '\n'
    if not commands.exists() or line not in commands.read_text():
        with open(commands, 'a') as f: f.write(line)
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('phase', choices=['choose'])
    parser.add_argument('--settings', default=','.join(PLAN['settings']))
    parser.add_argument('--methods', default=None, help='separated by semicolons')
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    book = journal(args.phase)
    for setting in args.settings.split(','):
        for method in wanted(setting):
            if args.methods and method not in args.methods.split(';'): continue
            with book.claim([setting, method]) as mine:
                if not mine: continue
                start = time.perf_counter()
                with _own_luck(): found = choose(setting, method)
                book.add([setting, method], {**found, 'seconds': round(time.perf_counter() - start)})
                print(f'{setting:8}{method:22}{time.perf_counter() - start:6.0f} s   lr, strength', *Ledger(HERE).chosen(setting, method),
                      f'{np.mean(found["accuracy"], -1).max():.2f} %', flush=True)


if __name__ == '__main__': main()
