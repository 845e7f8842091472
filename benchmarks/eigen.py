"""How many products, and how long, for the largest eigenvalues of a Hessian: Lanczos beside power iteration.

    python benchmarks/eigen.py [--rounds 3] [--threads 1] [--rows 32] [--json OUT]

A ResNet-20 for CIFAR after twenty steps on one batch of random pictures, evaluation mode, all weights. PyHessian
(`pip install pyhessian`; its rows are left out without it) uses power iteration with deflation. Both are asked for a
relative tolerance of a thousandth. The methods take turns; a ratio is taken inside each round. The errors are relative
to a run of Lanczos with a tolerance of 1e-7. The clock counts processor time.
"""
import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sam_explained.cost import HostClock, interleave
from sam_explained.hessian import top_eigenvalues
from sam_explained.prices import cifar_resnet

try: import pyhessian
except ImportError: pyhessian = None


def trained(rows, steps=20):
    "The network and its one batch"
    torch.manual_seed(0)
    model, x, y = cifar_resnet(), torch.randn(rows, 3, 32, 32), torch.randint(0, 10, (rows,))
    opt = torch.optim.SGD(model.parameters(), .1, momentum=.9)
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return model.eval(), x, y


def ours(model, x, y, k):
    "Values and products"
    found = top_eigenvalues((model, F.cross_entropy, [(x, y)]), k, progress=False)
    return found.values, found.products


def theirs(model, x, y, k):
    module = sys.modules['pyhessian.hessian']           # the package has a class of that name
    count, product = [], module.hessian_vector_product
    def counted(*args):
        count.append(1)
        return product(*args)
    module.hessian_vector_product = counted
    torch.manual_seed(0)
    try: values, _ = pyhessian.hessian(model, F.cross_entropy, data=(x, y), cuda=False).eigenvalues(top_n=k)
    finally:
        module.hessian_vector_product = product
        model.zero_grad()
    return np.array(values), len(count)


def measure(rounds, threads, rows):
    model, x, y = trained(rows)
    methods = {('Lanczos', k): partial(ours, model, x, y, k) for k in (1, 5)}
    if pyhessian: methods |= {('PyHessian', k): partial(theirs, model, x, y, k) for k in (1, 5)}
    exact = top_eigenvalues((model, F.cross_entropy, [(x, y)]), 6, tol=1e-7, progress=False).values
    found = {}
    def run(name): found[name] = methods[name]()
    times = np.array(list(interleave([partial(run, name) for name in methods], HostClock(time.process_time), rounds)))
    times = dict(zip(methods, times.T))
    table = [dict(method=name, k=k, products=found[name, k][1], seconds=float(np.median(times[name, k])),
                  error=float(max(abs(found[name, k][0] / exact[:k] - 1))),
                  ratio=float(np.median(times[name, k] / times['Lanczos', k]))) for name, k in methods]
    what = (f'ResNet-20 for CIFAR, {sum(w.numel() for w in model.parameters()):,} weights, {rows} rows, {threads} thread(s), '
            f'processor time, {rounds} rounds, torch {torch.__version__}, float32')
    print(what), print('eigenvalues', exact.round(3))
    for r in table: print(f"{r['method']:10} k={r['k']}  {r['products']:4} products  {r['seconds']:7.2f} s  {r['ratio']:5.2f} x Lanczos  error {r['error']:.1e}")
    return dict(what=what, eigenvalues=exact.tolist(), rows=table)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--rows', type=int, default=32)
    parser.add_argument('--json', type=Path, metavar='OUT', help='write the numbers here')
    args = parser.parse_args(argv)
    if min(args.rounds, args.threads, args.rows) < 1: parser.error('--rounds, --threads and --rows must be at least 1')
    torch.set_num_threads(args.threads)
    found = measure(args.rounds, args.threads, args.rows)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + '\n')
    return found


if __name__ == '__main__': main()
