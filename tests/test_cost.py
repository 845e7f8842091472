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
from torch import nn
from torch.nn import functional as F

from sam_explained import cost, prices
from sam_explained.command import parse_method
from sam_explained.cost import *
from sam_explained.prices import *
from sam_explained.mesa import MESA
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

def built(method, n=3, model=net, b=None):
    setting = cost._Setting(model, b or batch(), nn.CrossEntropyLoss(), cost.momentum_sgd, list, False, 0)
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
    for name, known in (('warm', False), ('timed', True)):
        for _ in range(step.warm if name == 'warm' else 5):
            step.ready()
            step()
            past = next(cb for cb in step.learn.cbs if isinstance(cb, cost.PastTerm))
            if known: assert len(past.kls) and past.kls[-1] > 0
    assert len(past.kls) == 5


def test_nothing_is_left_changed():
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    step_cost({'SAM': SAM, 'SSAM': parse_method('ssam:random')[1]}, lambda: nn.Sequential(net(), nn.Dropout()), batch(), rounds=1, threads=2)
    assert torch.equal(before, torch.get_rng_state()) and torch.get_num_threads() == threads


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


def test_medians_and_intervals():
    assert median_interval(range(1, 7)) == (3.5, 1, 6) and median_interval(range(1, 21)) == (10.5, 6, 15)
    assert all(map(math.isnan, median_interval([1, 2, 3, 4, 5])[1:]))
    assert [verdict((1, lo, hi), 2) for lo, hi in ((1, 2), (2.01, 3), (1, 2.01))] == ['holds', 'does not hold', 'not decided']


# A GPU, played by a stand-in: only the calls and their order are tested here ---------------------------------------------

def test_events_are_recorded_around_a_step_and_read_after_the_round(monkeypatch):
    machine, said = Machine(), []
    class Event:
        def __init__(self, enable_timing): assert enable_timing
        def record(self): self.at = machine.now
        def synchronize(self): said.append('wait')
        def elapsed_time(self, other): return 1e3 * (other.at - self.at)
    monkeypatch.setattr(torch.cuda, 'Event', Event)
    steps = [lambda k=k: (said.append(k), machine.work(1 + k)) for k in range(2)]
    assert list(interleave(steps, GpuClock(), 2)) == [[1, 2]] * 2
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
    (dict(methods='part:3'), r'the budget must be a number in \(1, 2\]'), (dict(methods='part:a'), 'part takes one number'),
    (dict(methods='sam,sam'), 'twice'), (dict(batch=0), 'batch=0'), (dict(rounds=0), 'rounds=0'), (dict(growth='age'), "growth='age' must be one of parameters, tensors, batch, shards, sparsity"),
    (dict(precision='fp8'), "precision='fp8'"), (dict(precision='bf16'), 'needs a GPU'), (dict(device='cuda:99'), 'PyTorch sees no such GPU'),
    (dict(device='moon'), "device='moon' must be"), (dict(clock='sun'), "clock='sun'"), (dict(json=Path('/proc/x.json'), rounds=1), 'cannot write'),
    (dict(methods='msam:9', batch=4), 'sam_cost: '),
])
def test_the_command_tells_what_is_wrong(change, told):
    with pytest.raises(SystemExit, match=told): sam_cost(**{**dict(model='mlp', batch=4, methods='sam', warmup=0, rounds=1), **change})
