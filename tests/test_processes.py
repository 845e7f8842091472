"""Two processes (gloo, CPU), a DDP model and its own data shard in each; every result against one process."""
import multiprocessing
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from conftest import batches, learner, mlp, snapshot
from fastai.basics import SGD, Callback, CancelBatchException, CancelFitException
from fastai.callback.training import GradientAccumulation, GradientClip
from functools import partial
from processes import in_processes
from reference import sam_gradient
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

CE, RHO, WORLD = nn.CrossEntropyLoss(), .3, 2
sgd = partial(SGD, mom=.9)
f64 = torch.float64


def shard(rank): return batches(n=5, bs=4, seed=100 + rank)


class AtStep(Callback):
    "Raises once, at an event of the third batch."
    run_valid = False
    def __init__(self, event, error, order):
        self.order, self.left = order, 1
        def go():
            if self.train_iter == 2 and self.left:
                self.left = 0
                raise error('on purpose')
        setattr(self, event, go)


class Spare(nn.Module):
    "A layer that no forward uses: DDP needs `find_unused_parameters`."
    def __init__(self):
        super().__init__()
        self.net, self.spare = mlp(), nn.Linear(2, 2).double()
    def forward(self, x): return self.net(x)


def scenarios():
    "name -> (callbacks, model, number of fits)"
    from sam_explained.sam import SAM, norm_params
    bn = lambda: mlp(norm=nn.BatchNorm1d)
    res = dict(local=([SAM(RHO)], mlp), synced=([SAM(RHO, sync=True)], mlp), plain=([], mlp), zero=([SAM(0.)], mlp),
               local_bn=([SAM(RHO)], bn), synced_bn=([SAM(RHO, sync=True)], bn),
               local_acc=([SAM(RHO), GradientAccumulation(8)], mlp), clip=([SAM(RHO), GradientClip(.1)], mlp),
               norm_only=([SAM(RHO, params=norm_params, sync=True)], bn),
               synced_adaptive=([SAM(RHO, sync=True, adaptive=True)], mlp),
               synced_inf=([SAM(RHO, sync=True, p=float('inf'))], mlp),
               unused=([SAM(RHO)], Spare), unused_synced=([SAM(RHO, sync=True)], Spare))
    for error in (RuntimeError, CancelBatchException, CancelFitException):
        for event in ('before_batch', 'after_pred', 'after_loss', 'before_backward', 'before_step'):
            for side, order in (('low', 0), ('high', 20)):
                res[f'{error.__name__} {event} {side}'] = ([SAM(RHO), AtStep(event, error, order)], mlp)
    return res


def run_all(rank):
    "One process: every scenario in turn, and what it saw."
    seen = {}
    for name, (cbs, make) in scenarios().items():
        model = DDP(make(), find_unused_parameters=make is Spare)
        reduced = [0]
        def hook(state, bucket):
            reduced[0] += 1
            t = bucket.buffer().div_(WORLD)
            return dist.all_reduce(t, async_op=True).get_future().then(lambda f: f.value()[0])
        model.register_comm_hook(None, hook)
        learn = learner(model, shard(rank), cbs, opt_func=sgd)
        error = None
        try: learn.fit(1)
        except Exception as e: error = type(e).__name__
        note = dict(error=error, sync=model.require_backward_grad_sync, buckets=reduced[0])
        note['first'] = snapshot(model.module)
        for p in model.parameters(): p.grad = None
        learn.create_opt()
        learn.fit(1)
        note.update(second=snapshot(model.module), sync_at_end=model.require_backward_grad_sync)
        if hasattr(learn, 'sam'): note['gaps'] = learn.sam.gaps
        seen[name] = note
    return seen


def fails(rank, how):
    if rank == 0: dist.barrier()                                             # waits for the other until it is gone
    if how == 'error': raise ValueError('on purpose')
    if how == 'killed': os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


told = {'error': r'\Aprocess 1 of 2 failed:\nTraceback(.|\n)*ValueError: on purpose',
        'killed': r'\Aprocess 1 of 2 failed:\nit ended with exit code -9',
        'hangs': r'process \[0, 1\] of 2 did not end within 8 s'}


@pytest.mark.parametrize('how', told)
def test_a_process_that_fails_is_named(tmp_path, how):
    "The helper of all these tests: an error is the first one's, and nobody is waited for or left behind."
    start = time.monotonic()
    with pytest.raises(AssertionError, match=told[how]):
        in_processes(fails, 2, tmp_path, how, seconds=8 if how == 'hangs' else 120)
    assert time.monotonic() - start < 50 and not multiprocessing.active_children()


@pytest.fixture(scope='module')
def seen(tmp_path_factory):
    "Both processes' notes."
    return in_processes(run_all, WORLD, tmp_path_factory.mktemp('ranks'))


def reference(make, synced, skip=(), adaptive=False, p=2, perturb=None, clip=None, n_acc=1):
    """One process that plays both: per batch the mean over ranks of each rank's SAM gradient (`synced=False`), or the
    SAM gradient of the mean loss over both shards. Each rank has its own buffers."""
    ranks = [make() for _ in range(WORLD)]
    opt = sgd(list(ranks[0].parameters()), lr=.1)
    kw, gaps = dict(adaptive=adaptive, p=p, perturb=perturb), [[], []]
    for i, pair in enumerate(zip(*[shard(r) for r in range(WORLD)])):
        for m in ranks: m.train()
        if i in skip: continue
        if synced:
            class Both(nn.Module):                                           # one set of weights, two sets of buffers
                def __init__(self):
                    super().__init__()
                    self.a, self.b = ranks
                    for q, w in zip(self.b.modules(), self.a.modules()): q._parameters.update(w._parameters)
                def forward(self, x): return self.a(x[0]), self.b(x[1])
            both = Both()
            def mean_loss(call): return sum(CE(o, y) for o, (_, y) in zip(call([x for x, _ in pair]), pair)) / 2
            inner = perturb and (lambda k: perturb(k.split('.', 1)[1]))
            gs, *_ = sam_gradient(both, mean_loss, RHO, **{**kw, 'perturb': inner})
        else:
            per_rank = [sam_gradient(m, lambda call, x=x, y=y: CE(call(x), y), RHO, **kw)
                        for m, (x, y) in zip(ranks, pair)]
            gs = [None if a is None else (a + b) / 2 for a, b in zip(*[g for g, *_ in per_rank])]
            for r in range(WORLD): gaps[r].append(per_rank[r][2] - per_rank[r][1])
        for w, g in zip(ranks[0].parameters(), gs):
            if g is not None: w.grad = g / n_acc + (0 if w.grad is None else w.grad)
        if (i + 1) % n_acc: continue
        if clip: nn.utils.clip_grad_norm_(ranks[0].parameters(), clip)
        opt.step()
        opt.zero_grad()
        for w, v in zip(ranks[1].parameters(), ranks[0].parameters()):
            if w is not v: w.data.copy_(v.data)
    return ranks[0], gaps


def test_every_scenario_ran_in_both_processes(seen):
    assert seen[0].keys() == seen[1].keys() == scenarios().keys()


def test_ranks_end_bit_equal(seen):
    "After every scenario, interrupted or not, and after the fit that followed it."
    for name in seen[0]:
        for when in ('first', 'second'):
            a, b = seen[0][name][when], seen[1][name][when]
            for k in a:
                if 'running' in k: continue                                  # those of the own shard
                assert torch.equal(a[k], b[k]), (name, when, k)


def expect(seen, name, ref, rtol=1e-9, atol=1e-11):
    got, want = seen[0][name]['first'], ref.state_dict()
    assert got.keys() == want.keys()
    for k, v in want.items():
        torch.testing.assert_close(got[k], v, rtol=rtol, atol=atol, msg=lambda m: f'{name} {k}: {m}')


def test_unsynchronised_ascent_is_msam_with_one_shard_per_process(seen):
    "T13. And pass 1 is not reduced: as many all-reduces as plain training."
    ref, _ = reference(mlp, False)
    expect(seen, 'local', ref)
    assert seen[0]['local']['buckets'] == seen[0]['plain']['buckets'] == 5


def test_synchronised_ascent_is_sam_on_the_global_batch(seen):
    "T13: the same two shards as one batch; and it is not the same as mSAM."
    ref, _ = reference(mlp, True)
    expect(seen, 'synced', ref)
    other, _ = reference(mlp, False)
    assert max((a - b).abs().max() for a, b in zip(ref.parameters(), other.parameters())) > 1e-3
    # the ascent does not go through DDP's buckets
    assert seen[0]['synced']['buckets'] == 5


def test_synchronised_other_norms(seen):
    expect(seen, 'synced_adaptive', reference(mlp, True, adaptive=True)[0])
    expect(seen, 'synced_inf', reference(mlp, True, p=float('inf'))[0])


def test_batch_norm(seen):
    "Statistics of the own shard's clean pass, counted once."
    for name, synced in (('local_bn', False), ('synced_bn', True)):
        ref, _ = reference(lambda: mlp(norm=nn.BatchNorm1d), synced)
        expect(seen, name, ref)
        assert int(seen[0][name]['first']['1.num_batches_tracked']) == 5


def test_norm_layers_only(seen):
    expect(seen, 'norm_only', reference(lambda: mlp(norm=nn.BatchNorm1d), True,
                                        perturb=lambda k: k.startswith('1.'))[0])


def test_unused_parameters(seen):
    expect(seen, 'unused', reference(Spare, False)[0])
    expect(seen, 'unused_synced', reference(Spare, True)[0])


def test_accumulation_is_msam_over_micro_batches_and_processes(seen):
    "Windows of two micro-batches of four; the fifth batch waits in .grad."
    expect(seen, 'local_acc', reference(mlp, False, n_acc=2)[0])


def test_clipping_after_the_reduction(seen): expect(seen, 'clip', reference(mlp, False, clip=.1)[0])


def test_rho_zero_is_plain_ddp(seen):
    for k, v in seen[0]['plain']['second'].items(): assert torch.equal(v, seen[0]['zero']['second'][k])


def test_gaps_are_those_of_the_own_shard(seen):
    for r in range(WORLD):
        got = torch.tensor(seen[r]['local']['gaps'])                         # of the second fit
        _, gaps = reference(lambda: load(seen[r]['local']['first']), False)
        torch.testing.assert_close(got, torch.tensor(gaps[r]), rtol=1e-5, atol=1e-7)


def load(state):
    model = mlp()
    model.load_state_dict(state)
    return model


errors = [f'{e} {ev} {side}' for e in ('RuntimeError', 'CancelBatchException', 'CancelFitException')
          for ev in ('before_batch', 'after_pred', 'after_loss', 'before_backward', 'before_step')
          for side in ('low', 'high')]


@pytest.mark.parametrize('name', errors)
def test_gradient_synchronisation_is_on_again_after_an_error(seen, name):
    "Both ranks fail in the same batch. DDP's no_sync must not outlive it: not right after, and not in the next fit."
    for r in range(WORLD):
        assert seen[r][name]['error'] == ('RuntimeError' if name.startswith('RuntimeError') else None)
        assert seen[r][name]['sync'], f'rank {r}: the model was left in no_sync'
        assert seen[r][name]['sync_at_end']


@pytest.mark.parametrize('name', [n for n in errors if not n.startswith('CancelBatch') and 'before_step' not in n])
def test_weights_after_an_error_are_those_of_the_last_step(seen, name):
    "Two steps were made. And the fit after it is that of a fresh start from there."
    ref, _ = reference(mlp, False, skip={2, 3, 4})
    expect(seen, name, ref)
    again, _ = reference(lambda: load(seen[0][name]['first']), False)
    for k, v in again.state_dict().items():
        torch.testing.assert_close(seen[0][name]['second'][k], v, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('name', [n for n in errors if n.startswith('CancelBatch') and 'before_step' not in n])
def test_a_cancelled_batch_is_left_out(seen, name): expect(seen, name, reference(mlp, False, skip={2})[0])
