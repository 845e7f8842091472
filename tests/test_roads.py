"""One theorem, four roads: a loop over shards, accumulated micro-batches, a list of closures, and several processes
give the same weights. Each road's usual mistake, written out, does not."""
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import assert_same, batches, learner, mlp, snapshot
from fastai.basics import SGD, Callback
from fastai.callback.training import GradientAccumulation
from processes import in_processes
from reference import sam_gradient
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel as DDP

from sam_explained.core import two_pass
from sam_explained.msam import MSAM
from sam_explained.sam import SAM

CE, RHO, LR, MOM, BS, STEPS = nn.CrossEntropyLoss(), .3, .1, .9, 16, 10
sgd = partial(SGD, mom=MOM)


def data(): return batches(n=STEPS, bs=BS, seed=7)


def cut(x, y, n): return list(zip(x.chunk(n), y.chunk(n)))


# The theorem, written with the reference ---------------------------------------------------------------------------

def descend(gradient):
    "The weights after a step of SGD with momentum along `gradient(model, x, y)` for each batch."
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOM)
    for x, y in data():
        for w, g in zip(model.parameters(), gradient(model, x, y)): w.grad = g.clone()
        opt.step()
    return snapshot(model)


def mean(grads): return [sum(gs) / len(gs) for gs in zip(*grads)]


def theorem(n, parts=cut):
    "mSAM: the mean over n shards of the SAM gradient of each. With n = 1, SAM."
    def gradient(model, x, y):
        return mean([sam_gradient(model, lambda call, a=a, b=b: CE(call(a), b), RHO)[0] for a, b in parts(x, y, n)])
    return descend(gradient)


def distance(a, b):
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def same(a, b): assert distance(a, b) < 1e-9


def different(a, b): assert distance(a, b) > 1e-3


# The four roads ----------------------------------------------------------------------------------------------------

def trained(train, *cbs):
    learn = learner(mlp(), train, cbs, opt_func=sgd, lr=LR)
    learn.fit(1)
    return snapshot(learn.model)


@pytest.mark.parametrize('n', [1, 2, 4, 16])
def test_road_1_a_callback_that_loops_over_shards(n): same(trained(data(), MSAM(n, RHO)), theorem(n))


@pytest.mark.parametrize('n', [1, 2, 4, 16])
def test_road_2_sam_with_accumulated_micro_batches(n):
    micro = [part for x, y in data() for part in cut(x, y, n)]
    same(trained(micro, SAM(RHO), GradientAccumulation(n * (BS // n))), theorem(n))


@pytest.mark.parametrize('n', [1, 2, 4, 16])
def test_road_3_a_list_of_closures_in_a_plain_loop(n):
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOM)
    for x, y in data():
        two_pass([lambda a=a, b=b: CE(model(a), b) for a, b in cut(x, y, n)], model.parameters(), RHO)
        opt.step()
        opt.zero_grad()
    same(snapshot(model), theorem(n))


@pytest.mark.parametrize('world', [2, 4])
def test_road_4_a_process_per_shard(seen, world): same(seen[world][0]['SAM'], theorem(world))


@pytest.mark.parametrize('world', [2, 4])
def test_every_process_ends_with_the_same_bits(seen, world):
    first, *others = seen[world]
    for name in first:
        for other in others:
            if name.endswith('counts'): assert other[name] == first[name], name
            else: assert_same(other[name], first[name], name)


def test_the_number_of_shards_matters():
    "Otherwise the roads could not miss each other."
    ends = [theorem(n) for n in (1, 2, 4, 16)]
    for i, a in enumerate(ends):
        for b in ends[:i]: different(a, b)


@pytest.mark.parametrize('world', [2, 4])
def test_a_synchronised_ascent_is_sam_of_the_global_batch(seen, world): same(seen[world][0]['SAM sync'], theorem(1))


@pytest.mark.parametrize('world', [2, 4])
def test_shards_in_each_process_multiply(seen, world): same(seen[world][0]['MSAM'], theorem(2 * world))


@pytest.mark.parametrize('world', [2, 4])
def test_shards_in_each_process_with_a_synchronised_ascent(seen, world):
    "The processes' first shards are one shard together, and so are their second ones."
    def parts(x, y, n):
        own = cut(x, y, 2 * world)
        return [tuple(torch.cat(t) for t in zip(*own[j::2])) for j in range(2)]
    same(seen[world][0]['MSAM sync'], theorem(2, parts))


# What the processes say to each other ------------------------------------------------------------------------------

@pytest.mark.parametrize('world', [2, 4])
@pytest.mark.parametrize('name', ['plain', 'SAM', 'MSAM'])
def test_one_all_reduce_per_step(seen, world, name):
    assert seen[world][0][name + ', counts'] == [(1, 0)] * STEPS, '(reductions of a bucket, calls of all_reduce)'


@pytest.mark.parametrize('world', [2, 4])
def test_a_synchronised_ascent_reduces_one_tensor_per_parameter_besides(seen, world):
    n = len(list(mlp().parameters()))
    assert seen[world][0]['SAM sync, counts'] == [(1, n)] * STEPS
    assert seen[world][0]['MSAM sync, counts'] == [(1, 2 * n)] * STEPS


# The mistakes ------------------------------------------------------------------------------------------------------

def grad(model, x, y, eps=None):
    "The gradient at w, or at w + eps."
    ws = {k: w.detach().clone() for k, w in model.named_parameters()}
    for w, e in zip(ws.values(), eps or ()): w += e
    for w in ws.values(): w.requires_grad_()
    return torch.autograd.grad(CE(functional_call(model, ws, (x,)), y), list(ws.values()))


def uphill(g): return [RHO * t / torch.cat([t.flatten() for t in g]).norm() for t in g]


def right(model, x, y, n): return mean([grad(model, a, b, uphill(grad(model, a, b))) for a, b in cut(x, y, n)])


def descent_on_the_full_batch(model, x, y, n):
    return mean([grad(model, x, y, uphill(grad(model, a, b))) for a, b in cut(x, y, n)])


def sum_instead_of_mean(model, x, y, n): return [n * g for g in right(model, x, y, n)]


def one_norm_for_all_shards(model, x, y, n):
    "Each shard's own direction, but the length of the batch gradient below the fraction bar."
    norm = torch.cat([t.flatten() for t in grad(model, x, y)]).norm()
    return mean([grad(model, a, b, [RHO * t / norm for t in grad(model, a, b)]) for a, b in cut(x, y, n)])


def second_pass_on_the_last_micro_batch(model, x, y, n):
    "All micro-batches accumulate, then SAM takes its second pass where the loop happens to stand."
    eps = uphill(mean([grad(model, a, b) for a, b in cut(x, y, n)]))
    a, b = cut(x, y, n)[-1]
    return grad(model, a, b, eps)


@pytest.mark.parametrize('n', [2, 4])
def test_the_mistakes_below_are_the_only_ones(n): same(descend(partial(right, n=n)), theorem(n))


@pytest.mark.parametrize('n', [2, 4])
@pytest.mark.parametrize('mistake', [descent_on_the_full_batch, sum_instead_of_mean, one_norm_for_all_shards,
                                     second_pass_on_the_last_micro_batch])
def test_a_mistake_ends_elsewhere(n, mistake):
    wrong = descend(partial(mistake, n=n))
    different(wrong, theorem(n))
    different(wrong, theorem(1))


@pytest.mark.parametrize('world', [2, 4])
def test_no_sync_around_the_first_backward_only_has_no_effect(seen, world):
    "DDP decides in the forward. What was meant to be mSAM is SAM of the global batch, and reduces twice per step."
    same(seen[world][0]['no_sync around backward'], theorem(1))
    different(seen[world][0]['no_sync around backward'], theorem(world))
    assert seen[world][0]['no_sync around backward, counts'] == [(2, 0)] * STEPS
    same(seen[world][0]['no_sync around both'], theorem(world))
    assert seen[world][0]['no_sync around both, counts'] == [(1, 0)] * STEPS


# In each process ---------------------------------------------------------------------------------------------------

class Counter:
    "A DDP model's reductions of a bucket (by a communication hook) and calls of `all_reduce`, per step."
    def __init__(self, model):
        self.steps, self.now, self.all_reduce = [], [0, 0], dist.all_reduce
        model.register_comm_hook(None, self.reduce)
    def reduce(self, state, bucket):
        self.now[0] += 1
        mine = bucket.buffer().div_(dist.get_world_size())
        return self.all_reduce(mine, async_op=True).get_future().then(lambda f: f.value()[0])
    def __call__(self, *args, **kwargs):
        self.now[1] += 1
        return self.all_reduce(*args, **kwargs)
    def step(self):
        self.steps.append(tuple(self.now))
        self.now = [0, 0]
    def __enter__(self): dist.all_reduce = self
    def __exit__(self, *error): dist.all_reduce = self.all_reduce


class Ticks(Callback):
    run_valid = False
    def __init__(self, f): self.after_step = f


def by_hand(model, shard, counter, forward_too):
    "SAM under DDP with the first backward in no_sync, as some instructions say; with `forward_too`, the whole pass."
    opt = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOM)
    for x, y in shard:
        if forward_too:
            with model.no_sync(): CE(model(x), y).backward()
        else:
            loss = CE(model(x), y)
            with model.no_sync(): loss.backward()
        eps = uphill([w.grad for w in model.parameters()])
        before = [w.detach().clone() for w in model.parameters()]
        with torch.no_grad():
            for w, e in zip(model.parameters(), eps): w += e
        opt.zero_grad()
        CE(model(x), y).backward()
        with torch.no_grad():
            for w, v in zip(model.parameters(), before): w.copy_(v)          # `w -= e` would let the processes drift
        opt.step()
        opt.zero_grad()
        counter.step()


def run_all(rank, world):
    "One process: every scenario in turn, on its own shard of each batch, and what it saw."
    scenarios = {'plain': [], 'SAM': [SAM(RHO)], 'SAM sync': [SAM(RHO, sync=True)], 'MSAM': [MSAM(2, RHO)],
                 'MSAM sync': [MSAM(2, RHO, sync=True)], 'no_sync around backward': False, 'no_sync around both': True}
    seen, shard = {}, [cut(x, y, world)[rank] for x, y in data()]
    for name, cbs in scenarios.items():
        model = DDP(mlp())
        counter = Counter(model)
        with counter:
            if isinstance(cbs, bool): by_hand(model, shard, counter, forward_too=cbs)
            else: learner(model, shard, [*cbs, Ticks(counter.step)], opt_func=sgd, lr=LR).fit(1)
        seen[name], seen[name + ', counts'] = snapshot(model.module), counter.steps
    return seen


@pytest.fixture(scope='module')
def seen(tmp_path_factory):
    "World size -> what each process noted."
    return {world: in_processes(run_all, world, tmp_path_factory.mktemp(f'world{world}'), world) for world in (2, 4)}
