"""What `step_cost` counts, in which order it measures, and what it makes of known times. Measured times are never asserted."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CPUMixedPrecision
from torch import nn
from torch.nn import functional as F

from sam_explained import cost, prices
from sam_explained.command import parse_method
from sam_explained.cost import *
from sam_explained.prices import *
from sam_explained.mesa import MESA
from sam_explained.reuse import suffix_for
from sam_explained.saf import SAF
from sam_explained.sam import SAM

BASES = {'Learner': ['SGD', 'SGD again', 'two-pass floor'], 'plain': ['plain SGD', 'plain SGD again', 'plain two-pass floor']}


def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(),
                         nn.Linear(16, 3))


def batch(n=12, shape=(1, 6, 6)):
    gen = torch.Generator().manual_seed(0)
    return torch.randn(n, *shape, generator=gen), torch.randint(0, 3, (n,), generator=gen)


def work():
    "Products of a forward, and of forward and backward of `net`, by hand, for one row; the picture needs no gradient"
    conv, *linear = 16 * 9 * 4, 64 * 16, 16 * 3
    forward = conv + sum(linear)
    return forward, forward + 2 * sum(linear) + conv


# Counts -------------------------------------------------------------------------------------------------------------

F1, FB = work()
EXPECTED = {  # word: (forwards, backwards, work in units of SGD)
    'sam': (2, 2, 2), 'asam': (2, 2, 2), 'msam:1': (2, 2, 2), 'msam:4': (2, 2, 2), 'msam:5': (2, 2, 2), 'ssam:fisher': (2, 2, 2),
    'ssam:dst': (2, 2, 2), 'ssam:random:0.9': (2, 2, 2), 'saf': (1, 1, 1), 'mesa': (2, 1, (FB + F1) / FB), 'plain': (2, 2, 2),
    'peer': (2, 2, 2)}


@pytest.mark.parametrize('word', EXPECTED)
def test_passes_and_work_are_exact(word):
    if word == 'peer': pytest.importorskip('pytorch_optimizer')
    name, method = prices._cost_method(word, None)
    df = step_cost({name: method}, net, batch(), rounds=1, warmup=1)
    loop = 'plain' if word in ('plain', 'peer') else 'Learner'
    assert df.method.tolist() == [*BASES[loop], name] and set(df.loop) == {loop}
    found = df[['forwards', 'backwards', 'work']].values
    assert found[:3].tolist() == [[1, 1, 1], [1, 1, 1], [2, 2, 2]]
    assert found[3].tolist() == pytest.approx(EXPECTED[word], abs=1e-9)
    assert df.attrs['facts'][BASES[loop][0]]['flops'] == 2 * 12 * FB


def test_work_of_a_part_is_that_of_its_suffix():
    "Perturbed: the last two layers. Once: the convolution, all of the second pass but the input's gradient of the first"
    df = step_cost({'part': lambda: SAM(params=lambda m: m[4:].parameters())}, net, batch(), rounds=1, warmup=1)
    linear, last = 64 * 16 + 16 * 3, 16 * 3
    first = F1 + linear + last                   # forward; gradients of the two weights; of the upper one's input
    second = linear + 2 * linear + 16 * 9 * 4    # forward from layer 4 on; a whole backward
    assert df.work.iloc[3] == pytest.approx((first + second) / FB, abs=1e-9)
    assert df[['forwards', 'backwards']].iloc[3].tolist() == [2, 2]


def test_a_forward_that_nobody_goes_back_through_is_no_backward():
    def twice(model, loss, opt_func):
        step = plain_sgd(model, loss, opt_func)
        return lambda: (loss(), step())
    df = step_cost({'twice': PlainStep(twice)}, net, batch(), rounds=1, warmup=1)
    assert df[['forwards', 'backwards']].iloc[3].tolist() == [2, 1] and df.work.iloc[3] == pytest.approx(1 + F1 / FB)


@pytest.mark.parametrize('compiled', [False, 'eager'])
def test_compiled_models_have_the_same_counts(compiled):
    methods = {'SAM': SAM, 'MESA': MESA, 'plain SAM': PlainStep(plain_sam)}
    df = step_cost(methods, net, batch(), rounds=1, warmup=1, compiled=compiled).set_index('method')
    assert df.loc[['SAM', 'MESA', 'plain SAM'], ['forwards', 'backwards']].values.tolist() == [[2, 2], [2, 1], [2, 2]]
    assert df.peak_mb.isna().all() == bool(compiled) and df.attrs['about']['compiled'] == compiled


# What a row does ------------------------------------------------------------------------------------------------------

def built(method, n=3, model=net, b=None, extra=list):
    setting = cost._Setting(model, b or batch(), nn.CrossEntropyLoss(), cost.momentum_sgd, extra, False, 0)
    step = setting.step(method, False)
    for _ in range(n):
        step.ready()
        step()
    return step, [w.detach().clone() for w in (step.model if hasattr(step, 'model') else step.learn.model).parameters()]


def same(a, b): return all(map(torch.equal, a, b))


def test_the_floors_train_as_sgd_does_and_so_do_both_loops():
    sgd = built(PlainStep(plain_sgd))[1]
    assert not same(sgd, built(PlainStep(plain_sgd), 2)[1])                       # it moves
    for method in (PlainStep(plain_floor), list, cost.TwoPassFloor): assert same(sgd, built(method)[1]), method


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_the_floor_scales_its_loss_as_sgd_does(dtype):
    scaled = partial(CPUMixedPrecision, dtype)
    sgd, floor = (built(method, extra=scaled)[1] for method in (list, cost.TwoPassFloor))
    assert same(sgd, floor) and not same(sgd, built(list, 2, extra=scaled)[1])


def test_the_sam_rows_are_sam():
    model, b = lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), batch(shape=(5,))
    sgd, plain, callback = (built(m, 3, model, b)[1] for m in (PlainStep(plain_sgd), PlainStep(plain_sam), SAM))
    assert not same(sgd, plain) and all(torch.allclose(x, y, atol=1e-7) for x, y in zip(plain, callback))
    pytest.importorskip('pytorch_optimizer')
    peer = built(PlainStep(peer_sam), 3, model, b)[1]
    assert all(torch.allclose(x, y, atol=1e-7) for x, y in zip(plain, peer))
    assert max((x - y).abs().max() for x, y in zip(plain, sgd)) > 1e-5


@pytest.mark.parametrize('make', [SAF, partial(SAF, lag=1, start=1), partial(SAF, lag=2, start=9), MESA])
def test_the_term_of_the_past_counts_in_every_timed_step(make):
    setting = cost._Setting(net, batch(), nn.CrossEntropyLoss(), cost.momentum_sgd, list, False, 0)
    step = setting.step(make, False)
    cost._warm_up({'past': step}, 0)
    past = next(cb for cb in step.learn.cbs if isinstance(cb, cost.PastTerm))
    assert len(past.kls) == 0
    for _ in range(5):
        step.ready()
        step()
        assert len(past.kls) and past.kls[-1] > 0
    assert len(past.kls) == 5


def test_nothing_is_left_changed():
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    step_cost({'SAM': SAM, 'SSAM': parse_method('ssam:random')[1]}, lambda: nn.Sequential(net(), nn.Dropout()), batch(), rounds=1, threads=2)
    assert torch.equal(before, torch.get_rng_state()) and torch.get_num_threads() == threads


def test_warm_up_is_made_and_is_not_measured():
    "Calls of one method: the warm-up, the rounds, one to count passes, one for memory; seconds only of the rounds"
    machine, calls = Machine(), []
    def first_is_slow(model, loss, opt_func):
        step = plain_sgd(model, loss, opt_func)
        def one():
            step()
            machine.work(1 if len(calls) >= 2 else 1000)
            calls.append(0)
        return one
    df = step_cost({'cold': PlainStep(first_is_slow)}, net, batch(), rounds=4, warmup=2, clock=machine)
    assert len(calls) == 2 + 4 + 1 + 1 and df.attrs['seconds']['cold'] == [1] * 4


def test_a_loss_that_is_not_finite_is_found_before_anything_is_measured(tmp_path):
    def nan(model, loss, opt_func):
        step = plain_sgd(model, lambda: loss() * float('nan'), opt_func)
        return lambda: (step(), loss())
    with pytest.raises(ValueError, match='the loss of nan is nan'):
        step_cost({'nan': PlainStep(nan)}, net, batch(), rounds=3, warmup=1, out=tmp_path/'r.jsonl')
    assert len((tmp_path/'r.jsonl').read_text().splitlines()) == 1       # what it would have measured, and no round


@pytest.mark.parametrize('foreach', [True, False])
def test_the_peer_gets_what_it_is_told(monkeypatch, foreach):
    told = {}
    class Peer(torch.optim.SGD):
        def __init__(self, params, base, **kwargs):
            told.update(kwargs)
            super().__init__(params, lr=.1)
    monkeypatch.setattr(cost, 'PeerSAM', Peer)
    model = net()
    peer_sam(model, None, torch.optim.SGD, rho=.3, **({} if foreach else {'foreach': False}))
    assert told == {'rho': .3, 'foreach': foreach}


@pytest.mark.parametrize('move', [False, True])
def test_a_rung_is_all_of_sam_or_only_its_arithmetic(move):
    model, b, n = lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), batch(shape=(5,)), 3
    rung = built(sam_rung(move, rho=.3), n, model, b)[1]
    sgd, sam = built(PlainStep(plain_sgd), n, model, b)[1], built(PlainStep(partial(plain_sam, rho=.3)), n, model, b)[1]
    far = max((x - y).abs().max() for x, y in zip(sgd, sam))
    assert max((x - y).abs().max() for x, y in zip(rung, sam if move else sgd)) < far / 100
    df = step_cost({'rung': sam_rung(move)}, net, batch(), rounds=1, warmup=0)
    assert df[['forwards', 'backwards', 'work']].iloc[3].tolist() == [2, 2, 2]


# Order and time -------------------------------------------------------------------------------------------------------

class Machine:
    "A clock that moves when a step or a pass does something, slower from round to round"
    def __init__(self): self.now, self.slow, self.order = 0., 1., []
    def __call__(self): return self.now
    def work(self, seconds): self.now += seconds * self.slow
    def step(self, name, seconds):
        def one():
            self.order.append(name)
            self.work(seconds)
        return one


@pytest.mark.parametrize('n', [1, 2, 3, 5, 6, 13])
def test_everyone_has_every_place_and_follows_everyone(n):
    machine, rounds = Machine(), n if n % 2 == 0 else 2 * n
    list(interleave([machine.step(k, 1) for k in range(n)], HostClock(machine), rounds))
    orders = [tuple(machine.order[i:i + n]) for i in range(0, rounds * n, n)]
    assert all(sorted(o) == list(range(n)) for o in orders)
    place, after = Counter(p for o in orders for p in enumerate(o)), Counter(p for o in orders for p in zip(o, o[1:]))
    assert len(place) == n * n and len(set(place.values())) == 1
    assert len(after) == n * (n - 1) and len(set(after.values())) <= 1


def test_rounds_that_are_done_are_not_done_again_and_the_order_goes_on():
    machine = Machine()
    steps = [machine.step(k, 1 + k) for k in range(3)]
    assert list(interleave(steps, HostClock(machine), 5, first=3)) == [[1, 2, 3]] * 2
    assert machine.order == [k for o in list(islice(turns(3), 5))[3:] for k in o]


def test_a_file_of_rounds_is_gone_on_with_and_may_have_more_than_asked_for(tmp_path):
    def measured(rounds, speed):
        machine = Machine()
        machine.slow = speed
        methods = {'SAM': SAM, 'late': PlainStep(lambda *args: machine.step('late', 1))}
        df = step_cost(methods, net, batch(), rounds=rounds, warmup=1, clock=machine, out=tmp_path/'r.jsonl')
        return df.attrs['seconds']['late'], machine.order.count('late')
    assert measured(2, 1.) == ([1, 1], 1 + 2 + 2)              # warm-up, rounds, and one each for counts and memory
    assert measured(5, 7.) == ([1, 1, 7, 7, 7], 1 + 3 + 2)
    assert measured(3, 9.) == ([1, 1, 7], 1 + 0 + 2)


def test_getting_ready_is_not_timed():
    machine = Machine()
    step = machine.step('a', 2)
    step.ready = lambda: machine.work(100)
    assert list(interleave([step], HostClock(machine), 2)) == [[2], [2]] and machine.now == 204


class Slow(nn.Module):
    "A layer whose forward takes 1 second of `machine` and its backward 2"
    machine = None
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)
    def forward(self, x):
        out = self.layer(x)
        self.machine.work(1)
        if out.requires_grad: out.register_hook(lambda g: self.machine.work(2))
        return out


def test_known_times_give_exact_ratios(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(Slow, 'machine', machine)
    def rounds_get_slower(*args):
        for r in interleave(*args):
            machine.slow *= 1.25
            yield r
    monkeypatch.setattr(cost, 'interleave', rounds_get_slower)
    def late(model, loss, opt_func):
        step = plain_sgd(model, loss, opt_func)
        def one():
            step()
            machine.work(1.5)
        return one
    methods = {'SAM': SAM, 'mSAM': parse_method('msam:2')[1], 'MESA': MESA, 'SAF': SAF, 'late': PlainStep(late)}
    df = step_cost(methods, Slow, batch(shape=(5,)), rounds=8, clock=machine).set_index('method')
    want = {'SGD': 1, 'SGD again': 1, 'two-pass floor': 2, 'SAM': 2, 'mSAM': 4, 'MESA': 4 / 3, 'SAF': 1, 'plain SGD': 1,
            'plain SGD again': 1, 'plain two-pass floor': 2, 'late': 1.5}
    for column in ('ratio', 'q1', 'q3', 'low', 'high'): assert df[column].to_dict() == pytest.approx(want), column
    assert df.over_floor[['SAM', 'mSAM', 'late']].tolist() == pytest.approx([0, 1, -.25])
    assert df.ms['SGD'] == pytest.approx(1e3 * np.median(3 * 1.25**np.arange(8)))
    assert paired_cost(df.reset_index(), 'late', 'SAM') == pytest.approx((.75, .75, .75))
    assert df.attrs['about']['clock'] == 'own'


def test_a_median_of_ratios_is_not_the_ratio_of_medians():
    facts = {k: dict(loop='plain', forwards=1, backwards=1, flops=4, peak=8, weights=4) for k in 'abcd'}
    facts['d'] |= dict(flops=6, peak=10)
    seconds = dict(a=[1, 2, 4, 8, 16, 32, 64], b=[1] * 7, c=[2] * 7, d=[2] * 7)
    row = cost_frame(seconds, facts, {}).iloc[3]
    assert (row.ratio, row.low, row.high, row.q1, row.q3) == (2 / 8, 2 / 64, 2, (2 / 16 + 2 / 32) / 2, (2 / 2 + 2 / 4) / 2)
    assert (row.over_floor, row.ms, row.work, row.copies) == (0, 2000, 1.5, .5)
    three = cost_frame(dict(a=[1, 1, 1], b=[1, 1, 1], c=[3, 1, 2], d=[1, 2, 3]), facts, {})
    assert three.over_floor.iloc[3] == .5                        # 1/3, 2, 3/2; the medians are equal


    turned = cost_frame(dict(a=[1, 2, 4], b=[1, 2, 4], c=[1, 2, 4], d=[4, 1, 2]), facts, {})
    assert turned.ratio.iloc[3] == turned.over_floor.iloc[3] + 1 == .5          # of 4, 1/2 and 1/2; the medians are equal


def test_each_loop_is_compared_with_its_own():
    facts = {name: dict(loop=loop, forwards=1, backwards=1, flops=k, peak=k, weights=1) for k, (loop, name) in enumerate(
        [(loop, name) for loop in BASES for name in (*BASES[loop], 'SAM of a ' + loop)], 1)}
    df = cost_frame({name: [float(k)] * 6 for k, name in enumerate(facts, 1)}, facts, {}).set_index('method')
    assert df.ratio.tolist() == df.work.tolist() == [1, 2, 3, 4, 1, 6/5, 7/5, 8/5] and df.copies.tolist() == [0, 1, 2, 3] * 2
    assert df.over_floor.tolist() == pytest.approx([x / 3 - 1 for x in (1, 2, 3, 4)] + [x / 7 - 1 for x in (5, 6, 7, 8)])


def test_medians_and_intervals():
    assert median_interval(range(1, 7)) == (3.5, 1, 6) and median_interval(range(1, 21)) == (10.5, 6, 15)
    assert all(map(math.isnan, median_interval([1, 2, 3, 4, 5])[1:]))
    told = [verdict((1, low, high), 2) for low, high in ((1, 2), (2.01, 3), (1, 2.01), (2, 3))]
    assert told == ['holds', 'does not hold', 'not decided', 'not decided']


def test_a_clock_has_its_name():
    cpu, cuda = torch.device('cpu'), torch.device('cuda:1')
    assert cost._clock(None, cpu).now is cost._clock('cpu', cpu).now is time.process_time
    assert cost._clock('wall', cpu).now is time.perf_counter
    for name in (None, 'events'): assert isinstance(c := cost._clock(name, cuda), GpuClock) and c.device == cuda
    with pytest.raises(ValueError, match='does not see'): cost._clock('wall', cuda)


@pytest.mark.parametrize('journal', [False, True])
def test_the_load_of_the_machine_is_written_down(journal, tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'getloadavg', lambda: (7.25, 0, 0))
    df = step_cost({'SAM': SAM}, net, batch(), rounds=2, warmup=0, out=tmp_path/'r.jsonl' if journal else None)
    assert df.attrs['about']['load'] == 7.25


def test_what_is_printed_of_a_table():
    facts = {k: dict(loop='Learner', forwards=f, backwards=b, flops=4 * b, peak=p, weights=2**20)
             for k, f, b, p in (('SGD', 1, 1, 2**21), ('SGD again', 1, 1, 2**21), ('two-pass floor', 2, 2, 2**20),
                                ('SAM', 2, 2, 3 * 2**20), ('MESA', 2, 1, 2**20))}
    seconds = dict(zip(facts, ([1.] * 6, [1.] * 6, [2.] * 6, [2.5, 2.5, 2.5, 2.4, 2.6, 2.5], [1.25] * 6)))
    shown = show_costs(cost_frame(seconds, facts, {})).set_index('method')
    assert shown['over floor'].tolist() == ['', '', '', '+25.0%', '']
    assert shown.loc['SAM'].tolist() == ['2500.00', '2.500 (2.50 to 2.50)', '2.400 to 2.600', '+25.0%', '2', '2', '2.000', '3.00', '1.50']


# A GPU, played by a stand-in: only the calls and their order are tested here ---------------------------------------------

def test_events_are_recorded_around_a_step_and_read_after_the_round(monkeypatch):
    machine, said = Machine(), []
    class Event:
        def __init__(self, enable_timing): assert enable_timing
        def record(self, queue):
            assert queue == 'queue of 3'
            self.at = machine.now
        def synchronize(self): said.append('wait')
        def elapsed_time(self, other): return 1e3 * (other.at - self.at)
    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: f'queue of {device}')
    steps = [lambda k=k: (said.append(k), machine.work(1 + k)) for k in range(2)]
    assert list(interleave(steps, GpuClock(3), 2)) == [[1, 2]] * 2
    assert said == [0, 1, 'wait', 'wait', 1, 0, 'wait', 'wait']


def test_memory_of_a_gpu_is_its_own_peak_above_what_was_there(monkeypatch):
    said = []
    for name, value in dict(synchronize=None, reset_peak_memory_stats=None, memory_allocated=1000, max_memory_allocated=1700).items():
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name, value=value: (said.append(name), value)[1])
    assert peak_bytes(lambda: said.append('step'), 'cuda') == 700
    assert said == ['synchronize', 'reset_peak_memory_stats', 'memory_allocated', 'step', 'synchronize', 'max_memory_allocated']


# Memory ---------------------------------------------------------------------------------------------------------------

def test_memory_is_counted_and_given_back():
    old = torch.zeros(3000)
    with Allocated() as memory:
        old.add_(1), old.view(30, 100)
        a = torch.zeros(1000)
        b = a + 1
        b.add_(a), b.view(10, 100)
        del b
        c = torch.ones(500)
    assert (memory.most, memory.now) == (8000, 6000)
    del a, c
    assert memory.now == 0


def test_a_method_that_holds_a_known_amount_more_is_seen_to_do_so():
    def hoarder(model, loss, opt_func):
        opt = opt_func(model.parameters())
        def step():
            held = torch.zeros(3 * n_weights)
            loss().backward()
            opt.step()
            opt.zero_grad()
            return held
        return step
    n_weights = sum(w.numel() for w in net().parameters())
    df = step_cost({'hoarder': PlainStep(hoarder)}, net, batch(), rounds=1).set_index('method')
    assert df.copies.to_dict() == pytest.approx({'plain SGD': 0, 'plain SGD again': 0, 'plain two-pass floor': 0, 'hoarder': 3})
    assert df.peak_mb['hoarder'] - df.peak_mb['plain SGD'] == pytest.approx(12 * n_weights / 2**20)


# Precision and compiling ----------------------------------------------------------------------------------------------

class Told(nn.Linear):
    "Says in which type its products come out"
    seen = None
    def forward(self, x):
        out = super().forward(x)
        self.seen.append(out.dtype)
        return out


def test_bf16_on_a_cpu_reaches_every_pass_and_the_file(tmp_path, monkeypatch, capsys):
    seen = Told.seen = []
    monkeypatch.setitem(prices.cost_models, 'mlp', (lambda: nn.Sequential(Told(784, 10)), (784,)))
    def command(**kwargs):
        seen.clear()
        sam_cost(model='mlp', batch=4, methods='sam,msam:2,mesa,plain', rounds=1, warmup=1, json=tmp_path/'c.json', **kwargs)
        return len(seen), set(seen[1:]), capsys.readouterr().out      # the first is the check that the batch fits
    n, found, out = command(precision='bf16')
    about = json.loads((tmp_path/'c.json').read_text())['mlp 4 bf16 cpu']['about']
    assert n > 20 and found == {torch.bfloat16} and about['autocast'] == 'bf16' and about['dtype'] == 'float32'
    assert 'float32 with bf16 autocast, eager' in out and 'plain is left out: it runs in float32 only' in out
    assert not torch.is_autocast_enabled('cpu')
    n, found, out = command()
    assert found == {torch.float32} and 'autocast' not in out
    tables = load_costs(tmp_path/'c.json')
    assert list(tables) == ['mlp 4 bf16 cpu', 'mlp 4 fp32 cpu'] and tables['mlp 4 fp32 cpu'].attrs['about']['autocast'] is None
    for df in tables.values(): assert df.set_index('method').loc[['SAM', 'MESA'], ['forwards', 'backwards']].values.tolist() == [[2, 2], [2, 1]]


def test_rounds_of_another_precision_are_not_gone_on_with(tmp_path):
    "fp16 needs a GPU: its callback is only described here"
    about = []
    for mode in ('fp16', 'bf16'):
        setting = cost._Setting(net, batch(), nn.CrossEntropyLoss(), cost.momentum_sgd, partial(cost.MixedPrecision, mode), False, 0)
        about.append(cost._about({}, setting, 'cpu', 1, 1))
    assert about[0] != about[1] and [a['autocast'] for a in about] == ['fp16', 'bf16']


def test_without_a_compiler_the_command_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv('CXX', '/nowhere/g++')
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path/'cache'))
    process = run(*'--model mlp --batch 4 --methods sam --rounds 1 --warmup 1 --compiled --json c.json'.split(), cwd=tmp_path)
    out, err = process.communicate()
    assert process.returncode == 1 and 'Traceback' not in err and not (tmp_path/'c.json').exists()
    assert err.strip() == ("sam_cost: compiled: inductor, PyTorch's default backend, found no C++ compiler, which it needs for a CPU; "
                           'install g++ or clang++, or name one in the variable CXX')


def test_with_a_compiler_the_command_compiles(tmp_path, monkeypatch):
    monkeypatch.setitem(prices.cost_models, 'mlp', (lambda: nn.Sequential(nn.Linear(784, 4), nn.ReLU(), nn.Linear(4, 10)), (784,)))
    sam_cost(model='mlp', batch=4, methods='sam', rounds=1, warmup=1, compiled=True, json=tmp_path/'c.json')
    about = json.loads((tmp_path/'c.json').read_text())['mlp 4 fp32 compiled cpu']['about']
    df = load_costs(tmp_path/'c.json')['mlp 4 fp32 compiled cpu']
    assert about['compiled'] is True and df.backwards.tolist() == [1, 1, 2, 2] and df.peak_mb.isna().all()


# Files and the command --------------------------------------------------------------------------------------------------

def run(*words, cwd, **kwargs):
    script = Path(cwd)/'sam_cost.py'
    script.write_text('from sam_explained.prices import sam_cost\nsam_cost()\n')
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path), 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen([sys.executable, script, *map(str, words)], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **kwargs)


SMALL = '--model mlp --batch 8 --methods sam,mesa,plain --warmup 1 --json c.json'.split()
TABLE = 'mlp 8 fp32 cpu'


def test_the_command_writes_a_table_and_does_not_do_it_twice(tmp_path):
    words, files = [*SMALL, '--rounds', 6], lambda: {p.name for p in tmp_path.iterdir()} - {'sam_cost.py'}
    out, err = run(*words, cwd=tmp_path).communicate()
    assert not err and files() == {'c.json'}
    saved = json.loads((tmp_path/'c.json').read_text())[TABLE]
    rows = [*BASES['Learner'], 'SAM', 'MESA', *BASES['plain'], 'plain SAM']
    assert list(saved['seconds']) == list(saved['facts']) == saved['about']['methods'] == rows
    assert all(len(s) == 6 and min(s) > 0 for s in saved['seconds'].values())
    about = saved['about']
    assert (about['rounds'], about['weights'], about['tensors'], about['batch'], about['threads'], about['clock']) == (6, 335_114, 8, [[8, 784], [8]], 1, 'cpu')
    assert about['torch'] == torch.__version__ and '--model mlp' in about['command'] and about['load'] >= 0
    assert all(line in out for line in show_costs(load_costs(tmp_path/'c.json')[TABLE]).method) and 'processor time, 6 rounds' in out
    again, err = run(*words, cwd=tmp_path).communicate()
    assert 'already' in again and 'SGD' not in again.replace('c.json', '') and json.loads((tmp_path/'c.json').read_text())[TABLE] == saved
    run(*SMALL, '--rounds', 6, '--batch', 9, cwd=tmp_path).communicate()
    assert list(load_costs(tmp_path/'c.json')) == [TABLE, 'mlp 9 fp32 cpu']


def test_a_killed_command_goes_on_with_the_rounds_it_has(tmp_path):
    rounds = tmp_path/f'c.json.{TABLE.replace(" ", "_")}.jsonl'
    lines = lambda: rounds.read_text().splitlines()[1:] if rounds.exists() else []
    words = [*SMALL, '--rounds', 100000]
    first, end = run(*words, cwd=tmp_path), time.monotonic() + 180
    try:
        while len(lines()) < 5 and first.poll() is None and time.monotonic() < end: time.sleep(.02)
    finally: first.send_signal(signal.SIGKILL)
    first.communicate()
    found = [json.loads(l)['seconds'] for l in lines() if l.endswith('}')]
    n = len(found) + 2
    assert n >= 7 and not (tmp_path/'c.json').exists()
    assert not run(*SMALL, '--rounds', n, cwd=tmp_path).communicate()[1]
    seconds = json.loads((tmp_path/'c.json').read_text())[TABLE]['seconds']
    assert np.array(list(seconds.values())).T[:n - 2] == pytest.approx(np.array(found), rel=1e-4)
    assert not rounds.exists() and all(len(s) == n for s in seconds.values())


def test_what_the_command_is_told_is_what_is_measured(tmp_path, monkeypatch, capsys):
    "Nothing is done twice; with other settings all is done anew; nothing is left beside the file"
    monkeypatch.setitem(prices.cost_models, 'mlp', (lambda: nn.Linear(784, 10), (784,)))
    file = tmp_path/'c.json'
    def command(**kwargs):
        sam_cost(**{**dict(model='mlp', batch=4, methods='sam', rounds=3, warmup=2, threads=2, clock='wall', json=file), **kwargs})
        assert [p.name for p in tmp_path.iterdir()] == ['c.json']
        return capsys.readouterr().out, load_costs(file)['mlp 4 fp32 cpu'].attrs
    _, found = command()
    about = found['about']
    assert [about[k] for k in ('rounds', 'warmup', 'threads', 'clock', 'compiled')] == [3, 2, 2, 'wall', False]
    again, same = command()
    assert 'in ' in again and 'already' in again and same == found
    out, more = command(rounds=4)
    assert 'already' not in out and more['about']['rounds'] == 4 and len(more['seconds']['SAM']) == 4


def test_the_command_measures_every_point_of_a_curve(tmp_path, monkeypatch):
    def point(n): return {'SAM': SAM}, lambda: nn.Linear(5, 3), prices._random_batch((5,), n, classes=3)
    monkeypatch.setitem(prices.cost_axes, 'batch', (point, (2, 3, 4)))
    sam_cost(growth='batch', rounds=1, warmup=0, json=tmp_path/'g.json')
    tables = load_costs(tmp_path/'g.json')
    assert list(tables) == ['batch 2', 'batch 3', 'batch 4']
    assert [(df.attrs['about']['axis'], df.attrs['about']['value'], df.attrs['about']['batch'][0][0]) for df in tables.values()] == [
        ('batch', n, n) for n in (2, 3, 4)]


def test_every_batch_is_the_same_one():
    a, b = (prices._random_batch((3,), 5) for _ in range(2))
    assert all(map(torch.equal, a, b))


def test_a_file_is_changed_at_once_or_not_at_all(tmp_path, monkeypatch):
    df, file = step_cost({'SAM': SAM}, net, batch(), rounds=1, warmup=0), tmp_path/'t.json'
    save_costs(df, file, 'one')
    before = file.read_bytes()
    def full(*args): raise OSError('disk full')
    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(OSError, match='disk full'): save_costs(df, file, 'two')
    assert file.read_bytes() == before


@pytest.mark.parametrize('budget', [1.1, 1.3, 1.6])
def test_a_part_is_what_its_budget_allows(budget):
    "Its work is as predicted, at most the budget, and more blocks would cost more than that"
    x, y = prices._random_batch((3, 8, 8), 4)
    make = partial(cifar_resnet, (4, 8), 1)
    name, method = prices._cost_method(f'part:{budget}', x)
    df = step_cost({name: method}, make, (x, y), rounds=1, warmup=0)
    names, predicted = suffix_for(make(), x[:2], budget)
    model = make()
    chosen = prices._part(x, budget, model)
    assert [id(w) for w in chosen] == [id(w) for n in names for w in model.get_submodule(n).parameters()]
    assert 1 < predicted <= budget and len(chosen) < len(list(model.parameters()))
    assert name == f'SAM, part {budget:g}' and df.work.iloc[3] == pytest.approx(predicted, abs=.1)


def test_help_is_enough(tmp_path):
    out, _ = run('--help', cwd=tmp_path).communicate()
    for word in ('resnet18', 'vit_s', 'msam[:SHARDS[:RHO]]', 'part[:BUDGET]', 'peer', 'FILE.NAME.jsonl', 'processor', '--growth', '--rounds'): assert word in out, word


def test_a_missing_peer_is_left_out_with_a_sentence(monkeypatch, capsys):
    for module in (cost, prices): monkeypatch.setattr(module, 'PeerSAM', None)
    sam_cost(model='mlp', batch=4, rounds=1, warmup=0, methods='plain,peer')
    printed = capsys.readouterr().out
    assert 'peer is left out: pytorch_optimizer is not installed (pip install pytorch_optimizer)' in printed
    assert 'plain SAM' in printed and 'pytorch_optimizer SAM' not in printed
    with pytest.raises(ImportError, match='pip install'): step_cost({'peer': PlainStep(peer_sam)}, net, batch())


def test_a_file_of_something_else_is_refused(tmp_path):
    df = step_cost({'SAM': SAM}, net, batch(), rounds=1, warmup=0)
    for text in ('not json', '[1, 2]', '{"a": 1}'):
        (tmp_path/'x.json').write_text(text)
        with pytest.raises(ValueError, match='x.json'): save_costs(df, tmp_path/'x.json', 'a')
        assert (tmp_path/'x.json').read_text() == text
    with pytest.raises(ValueError, match='another'): step_cost({'SAM': SAM}, net, batch(8), rounds=1, out=_file(tmp_path, df))


def _file(folder, df):
    "A journal of rounds of a batch of 12"
    step_cost({'SAM': SAM}, net, batch(), rounds=2, warmup=0, out=folder/'rounds.jsonl')
    return folder/'rounds.jsonl'


def test_tables_come_back_as_they_were(tmp_path):
    df = step_cost({'SAM': SAM, 'plain SAM': PlainStep(plain_sam)}, net, batch(), rounds=7, warmup=0)
    save_costs(df, tmp_path/'t.json', 'one')
    back = load_costs(tmp_path/'t.json')['one']
    pd.testing.assert_frame_equal(back, df, rtol=1e-3, atol=1e-3)
    assert back.attrs['about'] == df.attrs['about'] and '7 rounds' in cost_about(back)


@pytest.mark.parametrize('axis, value, weights', [('parameters', 32, 4 * (32 * 32 + 32)), ('tensors', 16, 16 * (64 * 64 + 64)), ('batch', 16, 4 * (128 * 128 + 128))])
def test_a_point_of_growth_is_the_network_it_says(axis, value, weights):
    df = cost_growth(axis, value, rounds=1, warmup=0)
    about = df.attrs['about']
    assert (about['axis'], about['value'], about['weights']) == (axis, value, weights)
    assert about['tensors'] == (2 * value if axis == 'tensors' else 8) and about['batch'][0][0] == (value if axis == 'batch' else 64)
    assert df.forwards[3:].tolist() == [2] * (len(df) - 3)


@pytest.mark.parametrize('value', prices.cost_axes['tensors'][1])
def test_a_curve_of_tensors_has_always_about_as_many_weights(value):
    _, model, (x, y) = prices.cost_axes['tensors'][0](value)
    n = sum(w.numel() for w in model().parameters())
    assert abs(n / 66_000 - 1) < .06 and len(list(model().parameters())) == 2 * value and model()(x).shape == (64, x.shape[1])


def test_curves_of_shards_sparsity_and_pieces_are_what_they_say():
    for n in prices.cost_axes['shards'][1]:
        methods, model, (x, y) = prices.cost_axes['shards'][0](n)
        assert methods['mSAM']().n_shards == n and isinstance(methods['SAM'](), SAM) and len(x) == 64
    for s in prices.cost_axes['sparsity'][1]:
        methods, model, (x, y) = prices.cost_axes['sparsity'][0](s)
        net, last = model(), methods['SAM of the last']()
        share = sum(w.numel() for w in last.params(net)) / sum(w.numel() for w in net.parameters())
        assert methods['SSAM']().mask.sparsity == s and 1 - s - .15 < share <= 1 - s + 1e-9 and len(x) == 32
    for name, rows in (('mlp', 64), ('resnet20', 16)):
        methods, model, (x, y) = prices.cost_axes['pieces'][0](name)
        assert list(methods) == ['and the direction', 'and there and back', 'plain SAM'] and len(x) == rows
        assert x.shape[1:] == prices.cost_models[name][1]


@pytest.mark.parametrize('widths, depth, side', [((4, 8, 16), 2, 2), ((4, 8), 1, 4), ((6,), 3, 8)])
def test_a_resnet_halves_the_side_between_stages_and_has_shortcuts(widths, depth, side):
    model, seen = cifar_resnet(widths, depth), []
    model[-3].register_forward_hook(lambda m, args, out: seen.append((tuple(args[0].shape[1:]))))
    model(torch.randn(2, 3, 8, 8))
    assert seen == [(widths[-1], side, side)] and sum(isinstance(m, Residual) for m in model) == depth * len(widths)
    block = Residual(4, 4, 1).eval()
    for m in (block.conv1, block.conv2): nn.init.zeros_(m.weight)
    x = torch.rand(2, 4, 3, 3)
    assert torch.equal(block(x), x)                    # what comes in goes past


def test_the_last_part_of_the_weights_is_at_most_its_share():
    model = cifar_resnet()
    n = sum(w.numel() for w in model.parameters())
    for share in (0.1, 0.25, 0.75, 1.):
        part = prices._last(share, model)
        assert 0 < sum(w.numel() for w in part) <= share * n and part[-1] is list(model.parameters())[-1]
    assert len(prices._last(1., model)) == 65


# Errors -----------------------------------------------------------------------------------------------------------------

def bad_loss(out, y): return F.cross_entropy(out, y) * float('nan')


@pytest.mark.parametrize('change, kind, told', [
    (dict(rounds=0), ValueError, r'rounds=0 must be an int from 1 up'),
    (dict(warmup=-1), ValueError, 'warmup=-1'),
    (dict(threads=0), ValueError, 'threads=0'),
    (dict(methods={}), TypeError, 'dict of names and functions'),
    (dict(methods='sam'), TypeError, 'dict of names and functions'),
    (dict(methods={'SAM': SAM()}), TypeError, r"methods\['SAM'\] must be a PlainStep or a function"),
    (dict(methods={'SGD': list}), ValueError, "'SGD' is a row of every table"),
    (dict(batch=batch(shape=(2, 6, 6))), ValueError, r'batch of shapes \(12, 2, 6, 6\) and \(12,\) does not fit the model: RuntimeError'),
    (dict(batch=batch()[0]), TypeError, 'inputs, then targets'),
    (dict(batch=(batch()[0], batch(5)[1])), ValueError, r'\[12, 5\] rows'),
    (dict(loss_func=bad_loss), ValueError, 'the loss of the model is nan'),
    (dict(clock='sun'), ValueError, "clock='sun' must be"),
    (dict(clock='events'), ValueError, 'does not see the work of a cpu'),
    (dict(model=3), TypeError, 'function that makes the network'),
    (dict(methods={'p': PlainStep(plain_sam)}, extra=SAM), ValueError, 'a PlainStep has none'),
])
def test_bad_arguments_are_told(change, kind, told):
    with pytest.raises(kind, match=told): step_cost(**{**dict(methods={'SAM': SAM}, model=net, batch=batch(), rounds=1), **change})


def test_a_loss_that_becomes_infinite_is_told_with_the_method():
    def explode(model, loss, opt_func):
        step = plain_sgd(model, loss, opt_func)
        def one():
            step()
            with torch.no_grad(): model[4].weight.fill_(float('inf'))
        return one
    with pytest.raises(ValueError, match='the loss of boom is'): step_cost({'boom': PlainStep(explode)}, net, batch(), rounds=2, warmup=0)


@pytest.mark.parametrize('change, told', [
    (dict(model='resnet50'), "model='resnet50' must be one of resnet18, resnet20, vit_s, mlp"),
    (dict(methods='sam,adam'), "'adam' is no method"), (dict(methods='sam,adam'), r'part\[:BUDGET\]'),
    (dict(methods='part:3'), r'the budget must be a number in \(1, 2\]'), (dict(methods='part:1'), r'the budget must be a number in \(1, 2\]'), (dict(methods='part:a'), 'part takes one number'),
    (dict(methods='sam,sam'), 'twice'), (dict(batch=0), 'batch=0'), (dict(rounds=0), 'rounds=0'), (dict(growth='age'), "growth='age' must be one of parameters, tensors, batch, shards, sparsity"),
    (dict(precision='fp8'), "precision='fp8'"), (dict(precision='fp16'), "precision='fp16' needs a GPU"), (dict(device='cuda:99'), 'PyTorch sees no such GPU'),
    (dict(device='moon'), "device='moon' must be"), (dict(clock='sun'), "clock='sun'"), (dict(json=Path('/proc/x.json'), rounds=1), 'cannot write'),
    (dict(methods='msam:9', batch=4), 'sam_cost: '),
])
def test_the_command_tells_what_is_wrong(change, told):
    with pytest.raises(SystemExit, match=told): sam_cost(**{**dict(model='mlp', batch=4, methods='sam', warmup=0, rounds=1), **change})
