"""Comparisons that are killed, shared, interrupted and resumed, in processes of their own."""
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.basics import Callback, SGD, partial
from scipy import stats
from torch import nn

from sam_explained.compare import Protocol, compare, plot_compare, summary, to_markdown
from sam_explained.mesa import MESA
from sam_explained.msam import MSAM
from sam_explained.saf import SAF
from sam_explained.sam import SAM
from sam_explained.ssam import SSAM, FisherMask, RandomMask
from sam_explained.tasks import split_loaders, task

SHORT = ['--noise', '0.4', '--train', '96', '--epochs', '3', '--seeds', '3']
COMMAND = Path(sys.executable).with_name('sam_compare')


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def command(folder, *args, **kwargs):
    return subprocess.Popen([COMMAND, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            cwd=folder, start_new_session=True, **kwargs)


def said(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def runs(path):
    return [json.loads(l) for l in path.read_text().splitlines()[1:]] if path.exists() else []


def kill_at(process, path, n):
    "kill -9 of it and its workers as soon as there are `n` runs"
    deadline = time.monotonic() + 120
    while len(path.read_bytes().splitlines()) - 1 < n if path.exists() else True:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_killed_shared_and_resumed(tmp_path):
    "Every run is there once, and the numbers are those of a comparison that nobody disturbed"
    args = ['--methods', 'sgd,sam:0.3,msam:2:0.2', *SHORT, '--out']
    file = tmp_path/'killed.jsonl'
    kill_at(command(tmp_path, *args, file), file, 1)
    first, second = command(tmp_path, *args, file), command(tmp_path, *args, file, '--workers', 2)
    kill_at(first, file, 4)
    code, out, err = said(second)
    assert code == 0, err
    code, calm, err = said(command(tmp_path, *args, tmp_path/'calm.jsonl'))
    assert code == 0 and out == calm, err
    keys = [tuple(r['key']) for r in runs(file)]
    assert len(keys) == len(set(keys)) == 9
    timed = {'seconds'}
    def numbers(path): return {tuple(r['key']): [{k: v for k, v in row.items() if k not in timed} for row in r['rows']] for r in runs(path)}
    assert numbers(file) == numbers(tmp_path/'calm.jsonl')
    assert not [p for p in tmp_path.iterdir() if p.name.startswith('killed') and p.suffix == '.lock' and p.name != 'killed.jsonl.lock']


def test_ctrl_c_keeps_what_is_done(tmp_path):
    file = tmp_path/'runs.jsonl'
    process = command(tmp_path, '--methods', 'sgd,sam', *SHORT[:-1], '200', '--out', file)
    deadline = time.monotonic() + 120
    while len(runs(file)) < 2 and time.monotonic() < deadline: time.sleep(.01)
    process.send_signal(signal.SIGINT)
    code, out, err = said(process)
    assert code != 0 and len(runs(file)) >= 2


def test_full_disk_in_the_middle(tmp_path):
    "The error is a sentence that names the run; what was there is there, and the next start goes on"
    file, args = tmp_path/'runs.jsonl', ['--methods', 'sgd,sam', *SHORT, '--out', tmp_path/'runs.jsonl']
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
    code, out, err = said(command(tmp_path, *args, preexec_fn=limit))
    assert code == 1 and 'could not be written' in err and 'Traceback' not in err
    before = file.read_bytes()
    assert 0 < len(before) <= 4000 and before.endswith(b'\n') and 1 <= len(runs(file)) < 6
    code, out, err = said(command(tmp_path, *args))
    assert code == 0 and file.read_bytes().startswith(before) and len(runs(file)) == 6


def test_parquet_and_sharpness(tmp_path):
    code, out, err = said(command(tmp_path, '--methods', 'sgd,sam:0.3', *SHORT, '--out', 'table.parquet', '--sharpness'))
    assert code == 0, err
    table = pd.read_parquet(tmp_path/'table.parquet')
    assert len(table) == 18 and table.lambda_1.notna().sum() == 6 and 'lambda_1' in out and '±' in out
    assert len(runs(tmp_path/'table.jsonl')) == 6


def test_help_needs_no_page(tmp_path):
    code, out, err = said(command(tmp_path, '--help'))
    flat = ' '.join(out.split())
    assert code == 0 and 'ssam[:MASK[:SPARSITY[:RHO]]]' in flat and 'goes on where it was interrupted' in flat


METHODS = {'SGD': list, 'SAM': partial(SAM, .2), 'mSAM': partial(MSAM, 2, .1), 'SSAM': lambda: SSAM(FisherMask(n_samples=32), .2),
           'random': lambda: SSAM(RandomMask(.5), .2), 'SAF': lambda: SAF(3., lag=1, start=1), 'MESA': lambda: MESA(3., start=1)}


def small(**kwargs):
    t = task('digits', noise=.4, n_train=96, **kwargs)
    return Protocol(t.model, t.dls, wd=5e-4)


def numbers(df): return df.drop(columns='seconds').sort_values(['method', 'seed', 'epoch'], ignore_index=True)


def test_workers_change_nothing(tmp_path):
    one = compare(METHODS, small(), 3, seeds=2, progress=False)
    two = compare(METHODS, small(), 3, seeds=2, n_workers=2, out=tmp_path/'two.jsonl', progress=False)
    pd.testing.assert_frame_equal(numbers(one), numbers(two))
    work = one.groupby('method').grads.max()
    assert work['SGD'] == work['SAF'] == work['MESA'] == 12 and work['SAM'] == work['mSAM'] == 24
    assert work['SSAM'] > 24 and work['random'] == 24        # the Fisher sample costs
    assert one[one.method == 'MESA'].forwards.max() == 8


def test_a_run_is_what_a_plain_loop_does():
    "Same seed, no fastai: the same losses"
    df = compare({'SGD': list}, small(), 4, lr=.05, seeds=[7], progress=False)
    from sam_explained.compare import _set_all
    t = task('digits', noise=.4, n_train=96)
    _set_all(7)
    dls = t.dls(7)
    _set_all(7)
    net = t.model()
    w = list(net.parameters())
    v, steps, k = [torch.zeros_like(p) for p in w], 16, 0
    for epoch in range(4):
        for x, y in dls.train:
            g = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), w)
            lr = .05 * (1 + np.cos(np.pi * k / steps)) / 2
            with torch.no_grad():
                for p, b, d in zip(w, v, g):
                    p.mul_(1 - lr * 5e-4)
                    b.mul_(.9).add_(d)
                    p.sub_(lr * b)
            k += 1
        with torch.no_grad():
            x, y = dls.valid_ds.x, dls.valid_ds.y
            row = df.iloc[epoch]
            assert abs(row.loss - nn.functional.cross_entropy(net(x), y).item()) < 1e-4
            assert row.accuracy == pytest.approx((net(x).argmax(1) == y).float().mean().item(), abs=1e-6)
            x, y = dls.train_ds.x, dls.train_ds.y
            assert abs(row.train_loss - nn.functional.cross_entropy(net(x), y).item()) < 1e-4
            assert row.gap == pytest.approx(row.loss - row.train_loss)


def test_the_callers_luck_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    compare({'SGD': list}, small(), 1, seeds=1, progress=False)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


class Slow(Callback):
    "Three times the time of a step of its own"
    def after_batch(self):
        if self.training: time.sleep(.05)


def test_equal_work(tmp_path):
    grads = compare(METHODS, small(), 6, seeds=1, equal='grads', progress=False).groupby('method').epoch.max()
    assert grads['SGD'] == grads['SAF'] == 6 and grads['SAM'] == grads['mSAM'] == 3
    file = tmp_path/'time.jsonl'
    slow = {'SGD': list, 'slow': Slow}
    timed = compare(slow, small(), 8, seeds=1, equal='time', out=file, progress=False)
    epochs = timed.groupby('method').epoch.max()
    assert epochs['SGD'] == 8 and 1 <= epochs['slow'] < 8
    again = compare(slow, small(), 8, seeds=2, equal='time', out=file, progress=False)      # the trial is remembered
    assert again.groupby(['method', 'seed']).epoch.max().unstack().eval('`0` == `1`').all()


class Fails(Callback):
    def before_step(self): raise RuntimeError('no luck')


def test_failed_and_collapsed_runs_are_counted():
    df = compare({'SGD': list, 'fails': Fails, 'explodes': partial(SAM, 1e30)}, small(), 2, seeds=2, progress=False)
    s = summary(df, 'loss')
    assert s.loc['fails', 'failed'] == 2 and 'no luck' in df[df.method == 'fails'].error.iloc[0]
    assert s.loc['SGD', 'failed'] == 0
    assert '(2 failed)' in to_markdown(s, percent=False)


def test_summary_against_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=12), rng.normal(.5, size=12)
    df = pd.DataFrame([{'method': m, 'seed': i, 'epoch': e, 'accuracy': v if e == 2 else -9.}
                       for m, x in (('A', a), ('B', b)) for i, v in enumerate(x) for e in (1, 2)])
    s = summary(df)
    low, high = stats.ttest_rel(b, a).confidence_interval(.95)
    assert s.loc['B', 'difference'] - s.loc['B', '± '] == pytest.approx(low)
    assert s.loc['B', 'difference'] + s.loc['B', '± '] == pytest.approx(high)
    assert s.loc['A', '±'] == pytest.approx(stats.t.ppf(.975, 11) * stats.sem(a))
    assert s.loc['B', 'effect'] == pytest.approx((b - a).mean() / (b - a).std(ddof=1))
    assert s.loc['B', 'won'] == np.mean(b > a)
    low2, high2 = stats.ttest_rel(a, b).confidence_interval(.95)
    assert summary(df, base='B').loc['A', 'difference'] == pytest.approx((low2 + high2) / 2)


@pytest.mark.parametrize('told, kwargs', [
    ('seeds', dict(seeds=0)), ('seeds', dict(seeds=[])), ('seeds', dict(seeds=[-1])), ('epochs', dict(epochs=0)),
    ('lr', dict(lr=-1.)), ('lr has no step size', dict(lr={'SAM': .1})), ('equal', dict(equal='luck')),
    ('n_workers', dict(n_workers=0)), ('methods', dict(methods=['sgd'])), ('methods', dict(methods={'SAM': SAM()}))])
def test_bad_arguments_before_anything_is_written(tmp_path, told, kwargs):
    with pytest.raises((TypeError, ValueError), match=told):
        compare(**{'methods': {'SGD': list}, 'protocol': small(), 'out': tmp_path/'runs.jsonl', 'progress': False, **kwargs})
    assert not list(tmp_path.iterdir())


def test_another_comparison_is_refused(tmp_path):
    file = tmp_path/'runs.jsonl'
    def go(methods=METHODS, t=None, epochs=1, **kwargs):
        return compare({'SGD': list, 'SAM': methods['SAM']}, t or small(**kwargs), epochs, seeds=1, out=file, progress=False)
    go()
    before = file.read_bytes()
    for told, act in (('epochs', lambda: go(epochs=2)), ('data', lambda: go(bs=12)), ('SAM', lambda: go({'SAM': partial(SAM, .3)})),
                      ('model', lambda: go(t=Protocol(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), small().dls, wd=5e-4))),
                      ('optimizer', lambda: go(t=Protocol(small().model, small().dls, opt_func=SGD, wd=5e-4)))):
        with pytest.raises(ValueError, match=told): act()
        assert file.read_bytes() == before, told


def test_plot(tmp_path):
    import matplotlib.pyplot as plt
    df = compare({'SGD': list, 'SAM': partial(SAM, .2)}, small(), 2, seeds=2, progress=False)
    ax = plot_compare(df, x='grads')
    assert [l.get_label() for l in ax.lines] == ['SGD', 'SAM'] and list(ax.lines[1].get_xdata()) == [8, 16]
    assert np.allclose(ax.lines[0].get_ydata(), df[df.method == 'SGD'].groupby('epoch').accuracy.mean())
    plt.close(ax.figure)


def test_rows_to_judge_by_are_never_seen():
    def rows(ds): return {tuple(x.flatten().tolist()) for x in ds.x}
    for data in ('digits', 'breast_cancer'):
        judged = rows(split_loaders(data, 0).valid_ds)
        for seed in range(4):
            dls = split_loaders(data, seed, n_train=120, part='choose')
            assert rows(split_loaders(data, seed).valid_ds) == judged
            assert not judged & (rows(dls.train_ds) | rows(dls.valid_ds)) and not rows(dls.train_ds) & rows(dls.valid_ds)
