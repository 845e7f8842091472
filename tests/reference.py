"""Sharpness-aware minimisation written a second time, from the papers, in the plainest way that could work.

The tests compare `sam_explained` with this file, so nothing here imports it. The perturbed pass is functional
(`torch.func.functional_call` with a second set of tensors): no weight is ever moved, so nothing has to be put back.
"""
import math

import numpy as np
import torch
from torch.func import functional_call


# The inner maximum, in numpy on one flat vector ------------------------------------------------------------------

def np_flat(tensors):
    "All entries of a list of tensors as one float64 vector."
    return np.concatenate([t.detach().to(torch.float64).numpy().reshape(-1) for t in tensors] or [np.zeros(0)])


def np_norm(v, p):
    "The p-norm of a vector, 0 for an empty one; scaled by the largest entry, so that it neither under- nor overflows."
    top = np.abs(v).max() if v.size else 0.
    return top if top == 0 or p == math.inf else top * float(np.sum((np.abs(v) / top) ** p)) ** (1 / p)


def np_conjugate(p):
    "q with 1/p + 1/q = 1."
    return math.inf if p == 1 else 1. if p == math.inf else p / (p - 1)


def np_dual(g, rho, p):
    "Foret et al., eq. 2: the vector of p-norm rho that has the largest inner product with g."
    eps, q = np.zeros_like(g), np_conjugate(p)
    if not np.any(g): return eps
    if p == 1:
        i = int(np.abs(g).argmax())
        eps[i] = rho * np.sign(g[i])
        return eps
    return rho * np.sign(g) * (np.abs(g) / np_norm(g, q)) ** (q - 1)


def np_ascent(g, rho, p=2, T=None):
    "The same under Kwon et al.'s constraint ||eps/T||_p <= rho."
    return np_dual(g, rho, p) if T is None else T * np_dual(T * g, rho, p)


# One gradient and a training loop, in PyTorch ----------------------------------------------------------------------

def dual(g, rho, p=2, T=None):
    "`np_ascent` for one flat tensor."
    return torch.from_numpy(np_ascent(g.double().numpy(), rho, p, None if T is None else T.double().numpy()))


def flat(tensors): return torch.cat([t.detach().reshape(-1) for t in tensors])


def unflat(v, like):
    "Cut a flat vector into pieces with the shapes and dtypes of `like`."
    pieces = v.split([t.numel() for t in like])
    return [e.reshape(t.shape).to(t.dtype) for e, t in zip(pieces, like)]


def _dense(grads, like): return [torch.zeros_like(w) if g is None else g for g, w in zip(grads, like)]


def sam_gradient(model, loss_of, rho, p=2, adaptive=False, eta=0.01, perturb=None, same_rng=True, second=None,
                 keep=None):
    """The SAM gradient of all trainable parameters, and the two losses.

    `loss_of(call)` computes the loss from `call(*xb)`, the model at the weights in question. `perturb` says which
    parameters move (by name). Recurrent layers do not take part in `functional_call`: for them `second` is another
    instance of the model, which gets the shifted weights, and `keep` a pair (get, put) for the hidden state.
    """
    named = {k: w for k, w in model.named_parameters() if w.requires_grad}
    moved = [k for k in named if perturb is None or perturb(k)]
    start, hidden = torch.get_rng_state(), keep and keep[0](model)
    clean = loss_of(model)                                                   # pass 1: updates buffers, hidden state
    after = torch.get_rng_state()
    w = [named[k] for k in moved]
    g = flat(_dense(torch.autograd.grad(clean, w, allow_unused=True), w))
    T = flat(w).abs() + eta if adaptive else None
    eps = unflat(dual(g, rho, p, T), w)

    shifted = {k: v.detach().clone() for k, v in named.items()}
    for k, e in zip(moved, eps): shifted[k] += e
    buffers = {k: b.clone() for k, b in model.named_buffers()}              # pass 2 has its own
    if same_rng: torch.set_rng_state(start)
    if second is None:
        for v in shifted.values(): v.requires_grad_()
        perturbed = loss_of(lambda *xb: functional_call(model, {**shifted, **buffers}, xb))
    else:
        second.load_state_dict(model.state_dict())
        with torch.no_grad():
            for k, v in second.named_parameters(): v.copy_(shifted.get(k, v))  # a tied weight has one name here
        second.train()
        keep[1](second, hidden)
        perturbed = loss_of(second)
        shifted = {k: v for k, v in second.named_parameters() if k in shifted}
    if same_rng: torch.set_rng_state(after)
    grads = torch.autograd.grad(perturbed, list(shifted.values()), allow_unused=True)
    return grads, float(clean.detach()), float(perturbed.detach())


def widened(t): return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def train(model, batches, loss_func, opt, rho, epochs=1, seed=None, n_acc=None, clip=None, mix=None, context=None,
          schedule=None, skip=(), **kw):
    """Train with SAM over `batches` (a list of (x, y)); returns one dict of losses per batch.

    `rho`: a number, or a function of the fraction of training done. `n_acc`: step once that many examples were seen,
    each micro-batch loss weighted by its share of n_acc (fastai's rule). `clip`: norm to clip to before a step.
    `seed`: RNG seed of batch i is seed + i. `mix(x, y)` -> (x, loss function). `context()`: around every forward.
    `schedule(pct)`: hyper-parameters to set before the batch. `skip`: batches whose step does not happen.
    """
    context = context or (lambda: torch.autocast('cpu', enabled=False))
    model.train()
    count, log, total = 0, [], epochs * len(batches)
    for i in range(total):
        x, y = batches[i % len(batches)]
        if seed is not None: torch.manual_seed(seed + i)
        if schedule: opt.set_hypers(**schedule(i / total))
        loss_fn = loss_func
        if mix: x, loss_fn = mix(x, y)

        def loss_of(call):
            with context():
                out = call(x)
                return loss_fn(tuple(map(widened, out)) if isinstance(out, tuple) else widened(out), y)
        r = rho(i / total) if callable(rho) else rho
        grads, clean, perturbed = sam_gradient(model, loss_of, r, **kw)
        log.append(dict(clean=clean, perturbed=perturbed, gap=perturbed - clean))
        share = len(y) / n_acc if n_acc else 1.
        with torch.no_grad():
            for w, g in zip([w for w in model.parameters() if w.requires_grad], grads):
                if g is None: continue
                w.grad = share * g if w.grad is None else w.grad + share * g
        count += len(y)
        if n_acc and count < n_acc: continue
        count = 0
        if clip: torch.nn.utils.clip_grad_norm_([w for w in model.parameters() if w.grad is not None], clip)
        if i not in skip: opt.step()
        opt.zero_grad()
    return log
