"""Comparisons that are killed, shared, interrupted and resumed, in processes of their own."""
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from enum import Enum
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.basics import (Callback, CancelFitException, CrossEntropyLossFlat, DataLoader, DataLoaders, MSELossFlat, SGD, TfmdDL, Transform,
                           accuracy, mse, partial, top_k_accuracy)
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


pytestmark = pytest.mark.usefixtures('one_thread')


def heeds_ctrl_c(): signal.signal(signal.SIGINT, signal.SIG_DFL)       # a test run in the background passes on that it does not


def command(folder, *args, preexec_fn=heeds_ctrl_c, **kwargs):
    return subprocess.Popen([COMMAND, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            cwd=folder, start_new_session=True, preexec_fn=preexec_fn, **kwargs)


def said(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def runs(path):
    "Those in the file; a line that is being written just now, and has no end yet, is none"
    return [json.loads(l) for l in path.read_bytes().split(b'\n')[1:-1]] if path.exists() else []


def kill_at(process, path, n):
    "kill -9 of it and its workers as soon as there are `n` runs"
    deadline = time.monotonic() + 120
    while len(runs(path)) < n:
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
    assert s.loc['B', 'larger'] == np.mean(b > a)
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


class Way(Enum): UP, DOWN = 1, 2


class Goes(Callback):
    def __init__(self, way): self.way = way


def test_the_value_of_an_enum_is_a_setting(tmp_path):
    def go(way):
        return compare({'SGD': partial(Goes, way)}, small(), 1, seeds=1, out=tmp_path/'runs.jsonl', progress=False)
    go(Way.UP)
    go(Way.UP)
    with pytest.raises(ValueError, match='Way.UP.*Way.DOWN|Way.DOWN.*Way.UP'): go(Way.DOWN)


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


class Kept(Callback):
    "Keeps what it has from one fit to the next"
    def before_fit(self): self.fits = getattr(self, 'fits', 0) + 1


def test_a_shared_callback_is_refused(tmp_path):
    one = Kept()
    for f in (lambda: one, lambda: [SAM(.1), one]):
        with pytest.raises(ValueError, match="methods\\['kept'\\].*same callback"):
            compare({'SGD': list, 'kept': f}, small(), 1, seeds=1, out=tmp_path/'runs.jsonl', progress=False)
    assert not list(tmp_path.iterdir())


def test_names_of_methods():
    with pytest.raises(TypeError, match='names'): compare({3: list}, small(), 1, seeds=1, progress=False)
    df = compare({'try': list, 'SAM': SAM}, small(), 2, seeds=1, equal='grads', progress=False)
    assert df.groupby('method').epoch.max().to_dict() == {'try': 2, 'SAM': 1}


def test_a_function_that_makes_no_callbacks(tmp_path):
    def broken(): raise RuntimeError('no such mask')
    with pytest.raises(RuntimeError, match='no such mask'):
        compare({'SGD': list, 'broken': broken}, small(), 1, seeds=1, out=tmp_path/'runs.jsonl', progress=False)
    assert not list(tmp_path.iterdir())
    for wrong in (lambda: 'SAM', lambda: [3]):
        with pytest.raises(TypeError, match="methods\\['wrong'\\]"): compare({'wrong': wrong}, small(), 1, seeds=1, progress=False)


def test_seeds_of_numpy():
    want = compare({'SGD': list}, small(), 1, seeds=[0, 1], progress=False)
    for seeds in (np.int64(2), np.arange(2), (np.int32(0), np.uint8(1))):
        got = compare({'SGD': list}, small(), 1, seeds=seeds, progress=False)
        pd.testing.assert_frame_equal(numbers(got), numbers(want))


class EndsWith(Callback):
    "Raises `what` when `event` comes in an epoch from `epoch` on"
    def __init__(self, what, event='before_epoch', epoch=0): self.what, self.event_name, self.from_epoch = what, event, epoch
    def __call__(self, event):
        if event == self.event_name and self.epoch >= self.from_epoch: raise self.what
        return super().__call__(event)


def test_runs_that_end_early():
    "Before the first epoch: an error. Later: fewer rows, and the measures are those of the end"
    def two(objective): return 2.
    t = task('digits', n_train=96)
    p = Protocol(t.model, t.dls, measures=[two])
    methods = {'SGD': list, 'never': lambda: EndsWith(CancelFitException(), 'before_fit'), 'early': lambda: EndsWith(CancelFitException(), epoch=2),
               'exit': lambda: EndsWith(SystemExit(3)), 'raises': lambda: EndsWith(OSError('gone'), 'before_fit')}
    for n in (1, 2):
        df = compare(methods, p, 3, seeds=1, progress=False, n_workers=n)
        last = df.groupby('method').last()
        assert pd.isna(last.error['early']), last.error['early']
        assert last.epoch.to_dict() == pytest.approx({'SGD': 3, 'early': 2, 'never': math.nan, 'exit': math.nan, 'raises': math.nan}, nan_ok=True)
        assert last.two['SGD'] == last.two['early'] == 2 and df.two.notna().sum() == 2
        assert 'no epoch' in last.error['never'] and 'SystemExit' in last.error['exit'] and 'gone' in last.error['raises']
        assert summary(df).failed.to_dict() == {'SGD': 0, 'never': 1, 'early': 0, 'exit': 1, 'raises': 1}


def test_a_trial_that_fails_is_a_failed_run():
    df = compare({'SGD': list, 'fails': Fails, 'SAM': SAM}, small(), 2, seeds=2, equal='grads', progress=False)
    assert df[df.method == 'fails'].error.str.contains('no luck').all() and df[df.method == 'SAM'].epoch.tolist() == [1, 1]


def test_the_base_may_be_another_with_equal_epochs(tmp_path):
    file = tmp_path/'runs.jsonl'
    a = compare({'SGD': list, 'SAM': SAM}, small(), 1, seeds=1, out=file, progress=False)
    b = compare({'SAM': SAM, 'MESA': MESA}, small(), 1, seeds=2, out=file, progress=False)
    assert [r['key'] for r in runs(file)] == [['SGD', 0], ['SAM', 0], ['MESA', 0], ['SAM', 1], ['MESA', 1]]
    assert b.loss[0] == a.loss[1]
    file = tmp_path/'equal.jsonl'
    compare({'SGD': list, 'SAM': SAM}, small(), 2, seeds=1, out=file, equal='grads', progress=False)
    with pytest.raises(ValueError, match='base is'): compare({'SAM': SAM}, small(), 2, seeds=1, out=file, equal='grads', progress=False)


@pytest.mark.parametrize('other', [dict(noise=.3), dict(noise=.401), dict(part='choose')])
def test_another_task_is_another_comparison(tmp_path, other):
    "Wrong labels leave the inputs as they are"
    def go(**kwargs):
        t = task('digits', **{'noise': .4, 'n_train': 96, **kwargs})
        compare({'SGD': list}, Protocol(t.model, t.dls, wd=5e-4), 1, seeds=1, out=tmp_path/'runs.jsonl', progress=False)
    go()
    with pytest.raises(ValueError, match='data'): go(**other)


def test_one_other_label_is_another_comparison(tmp_path):
    "Also if the function has the same name and the label is not in the first batch"
    def go(flip):
        def dls(seed):
            made = small().dls(seed)
            first = {tuple(x.flatten().tolist()) for x in made.train.new().one_batch()[0]}
            late = next(i for i, x in enumerate(made.train_ds.x) if tuple(x.flatten().tolist()) not in first)
            if flip[0]: made.train_ds.y[late] = (made.train_ds.y[late] + 1) % 10
            return made
        compare({'SGD': list}, Protocol(small().model, dls), 1, seeds=1, out=tmp_path/'runs.jsonl', progress=False)
    go([False]), go([False])
    with pytest.raises(ValueError, match='data'): go([True])


def test_settings_in_lambdas_and_numpy_are_compared(tmp_path):
    def go(f): return compare({'SAM': f}, small(), 1, seeds=1, out=tmp_path/'runs.jsonl', progress=False)
    def by(k): return lambda: SAM(lambda pct: k * pct)
    go(by(.1)), go(by(.1))
    with pytest.raises(ValueError, match="another 'SAM'"): go(by(.2))
    with pytest.raises(ValueError, match="another 'SAM'"): go(lambda: SAM(lambda pct: .1 * pct**2))
    (tmp_path/'runs.jsonl').unlink()
    go(lambda: SAM(np.float32(.25))), go(lambda: SAM(np.float64(.25))), go(lambda: SAM(.25))
    with pytest.raises(ValueError, match="another 'SAM'"): go(lambda: SAM(np.float32(.5)))


def test_names_of_metrics_and_measures():
    t = task('digits', n_train=96)
    def loss(out, y): return 0.
    def seconds(objective): return 0.
    for told, kwargs in (('loss', dict(metric=loss)), ('seconds', dict(measures=[seconds])), ('lambda', dict(measures=[lambda o: 0., lambda o: 1.])),
                         ('accuracy', dict(measures=[accuracy])), ('metric', dict(metric=3)), ('measures', dict(measures=['ball']))):
        with pytest.raises((TypeError, ValueError), match=told): Protocol(t.model, t.dls, **kwargs)
    p = Protocol(t.model, t.dls, metric=partial(top_k_accuracy, k=2))
    df = compare({'SGD': list}, p, 1, seeds=1, progress=False)
    assert 'error' not in df and 0 < df.top_k_accuracy[0] <= 1


class Pair(torch.utils.data.Dataset):
    "A regression with two inputs and one weighted row more in each seed"
    def __init__(self, n, seed, nested=False):
        g = torch.Generator().manual_seed(seed)
        self.a, self.b, self.nested = torch.randn(n, 3, generator=g), torch.randn(n, 2, generator=g), nested
        self.y = self.a.sum(1, keepdim=True) - self.b[:, :1]
    def __len__(self): return len(self.a)
    def __getitem__(self, i): return ((self.a[i], self.b[i]), self.y[i]) if self.nested else (self.a[i], self.b[i], self.y[i])


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(5, 1)
    def forward(self, a, b=None): return self.l(torch.cat(a if b is None else (a, b), 1))


@pytest.mark.parametrize('nested', [False, True])
def test_two_inputs_a_regression_and_unequal_sizes(nested):
    def dls(seed):
        made = DataLoaders(DataLoader(Pair(64, seed, nested), bs=16, shuffle=True), DataLoader(Pair(33 + 7 * seed, 100 + seed, nested), bs=16))
        made.n_inp = 1 if nested else 2
        for dl in made.loaders: dl.n_inp = made.n_inp
        return made
    p = Protocol(TwoInputs, dls, loss_func=MSELossFlat(), metric=mse)
    df = compare({'SGD': list, 'SAM': SAM}, p, 5, .02, seeds=2, progress=False)
    assert 'error' not in df, df.error.iloc[0]
    assert np.allclose(df.mse, df.loss) and df[df.method == 'SAM'].grads.max() == 40
    assert df[df.epoch == 5].loss.max() < df[df.epoch == 1].loss.min()


def blank(x): return x * 0 if x.is_floating_point() else x


def test_transforms_of_items_are_applied():
    def dls(seed):
        made = task('digits', n_train=96).dls(seed)
        made.train.after_item.add(Transform(blank))
        return made
    df = compare({'SGD': list, 'SAM': SAM}, Protocol(small().model, dls), 1, seeds=1, progress=False)
    assert 'error' not in df and df.grads.tolist() == [4, 8]
    assert df.train_loss.max() < 3 and df.train_loss[0] != df.loss[0]
    with pytest.warns(UserWarning, match='without transforms'):
        again = compare({'SGD': list}, Protocol(small().model, dls), 1, seeds=1, stacked=True, progress=False)
    assert again.loss[0] == df.loss[0]


def test_nan_and_few_seeds():
    df = pd.DataFrame([{'method': m, 'seed': s, 'epoch': 1, 'accuracy': v, 'none': None} for m, s, v in
                       [('A', 0, .5), ('A', 1, .7), ('B', 0, .6), ('B', 1, None), ('C|D', 0, math.inf), ('C|D', 1, math.nan)]])
    s = summary(df)
    assert s.failed.tolist() == [0, 1, 2] and s.difference['B'] == pytest.approx(.1) and math.isnan(s['± ']['B'])
    lines = to_markdown(s).splitlines()
    assert 'nan' not in ''.join(lines) and lines[3] == '| B | 2 (1 failed) | 60.0 | +10.0 | 100 % |'
    assert lines[4] == '| C\\|D | 2 (2 failed) |  |  |  |'
    assert summary(df, 'none').failed.tolist() == [2, 2, 2]
    one = summary(df[df.seed == 0])
    assert one.loc['A', 'mean'] == .5 and math.isnan(one.loc['A', '±']) and 'nan' not in to_markdown(one)
    assert summary(df, base='C|D').difference.isna().all()
    for told, kwargs in (('base', dict(base='Z')), ('metric', dict(metric='beauty')), ('numbers', dict(metric='method'))):
        with pytest.raises(ValueError, match=told): summary(df, **kwargs)


def test_all_runs_failed():
    df = compare({'fails': Fails}, small(), 1, seeds=2, progress=False)
    with pytest.raises(ValueError, match='no luck'): summary(df)


def test_plotted_interval_is_that_of_the_summary():
    import matplotlib.pyplot as plt
    found = np.random.default_rng(0).normal(size=3)
    df = pd.DataFrame([{'method': 'SGD', 'seed': s, 'epoch': e, 'accuracy': v} for s, v in enumerate(found) for e in (1, 2)])
    ax = plot_compare(df)
    low, high = ax.collections[0].get_paths()[0].get_extents().intervaly
    s = summary(df).loc['SGD']
    assert (high, low) == pytest.approx((s['mean'] + s['±'], s['mean'] - s['±']))
    plt.close(ax.figure)
    with pytest.raises(ValueError, match='beauty'): plot_compare(df, 'beauty')


def test_journal_edited_by_hand(tmp_path):
    from sam_explained.journal import Journal
    file = tmp_path/'runs.jsonl'
    compare({'SGD': list}, small(), 1, seeds=2, out=file, progress=False)
    whole = file.read_text()
    for line in ('[1]', '{"no": "key"}', 'null', '{"key": ["SGD", 0]', '{"key": ["SGD", 2]}', '{"key": 3, "rows": []}'):
        file.write_text(whole + line + '\n')
        with pytest.raises(ValueError, match='line 4'): compare({'SGD': list}, small(), 1, seeds=3, out=file, progress=False)
        assert file.read_text() == whole + line + '\n'
    lines = whole.splitlines(keepends=True)
    file.write_text(lines[0] + lines[2])                   # a line taken out: that run is made again
    compare({'SGD': list}, small(), 1, seeds=2, out=file, progress=False)
    assert [r['key'] for r in runs(file)] == [['SGD', 1], ['SGD', 0]]
    for other in ('my only notes', 'a\x00b', '{"key": 1'):                  # no whole line, and not ours
        file.write_text(other)
        with pytest.raises(ValueError, match='not a file of runs'): Journal(file, {'a': 1})
        assert file.read_text() == other
    for mine in ('{', '{"about": {"a"'):                                    # ours, cut off
        file.write_text(mine)
        assert Journal(file, {'a': 1}).runs == []


def test_two_definitions_at_once(tmp_path):
    "Another process wrote a method of the same name after we had looked"
    file, p = tmp_path/'runs.jsonl', small()
    def meanwhile():
        if file.exists() and not runs(file): compare({'SAM': partial(SAM, .3)}, p, 1, seeds=1, out=file, progress=False)
        return []
    with pytest.raises(ValueError, match="another 'SAM'"):
        compare({'first': meanwhile, 'SAM': partial(SAM, .1)}, p, 1, seeds=1, out=file, progress=False)


def test_many_finished_runs_are_read_a_few_times(tmp_path, monkeypatch):
    from sam_explained.journal import Journal
    file, read, n = tmp_path/'runs.jsonl', Journal._read, []
    compare({'SGD': list}, small(), 1, seeds=12, out=file, progress=False)
    monkeypatch.setattr(Journal, '_read', lambda self: n.append(1) or read(self))
    compare({'SGD': list}, small(), 1, seeds=12, out=file, progress=False)
    assert len(n) < 8, len(n)


def test_a_lock_left_behind_is_cleared_away(tmp_path):
    "Of a process that was killed between writing a run and giving its lock back"
    from sam_explained.journal import _lock_path
    file = tmp_path/'runs.jsonl'
    compare({'SGD': list}, small(), 1, seeds=2, out=file, progress=False)
    (left := _lock_path(file, ['SGD', 1])).touch()
    before = file.read_bytes()
    compare({'SGD': list}, small(), 1, seeds=2, out=file, progress=False)
    assert not left.exists() and file.read_bytes() == before


def counted(monkeypatch):
    "What the bar was told: total, and how many came"
    told = []
    def bar(items, show, total=None):
        told.append([total, 0])
        for i in items:
            told[-1][1] += 1
            yield i
    monkeypatch.setattr(sys.modules['sam_explained.compare'], '_bar', bar)
    return told


@pytest.mark.parametrize('how', [dict(), dict(stacked=True), dict(n_workers=2)])
def test_the_bar_counts_runs(tmp_path, monkeypatch, how):
    told = counted(monkeypatch)
    methods, file = {'SGD': list, 'SAM': SAM, 'two': lambda: [SAM(), Kept()]}, tmp_path/'runs.jsonl'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        compare(methods, small(), 1, seeds=1, out=file, **how)
        compare(methods, small(), 1, seeds=3, out=file, **how)
    assert told == [[3, 3], [6, 6]] and len(runs(file)) == 9


class Noisy(nn.Sequential):
    def forward(self, x): return nn.functional.dropout(super().forward(x), .5, self.training)

class Decides(nn.Sequential):
    def forward(self, x): return super().forward(x) if x.sum() > 0 else -super().forward(x)

class Projected(nn.Sequential):
    "Its first layer is drawn and not trained"
    def __init__(self, *layers):
        super().__init__(*layers)
        self.register_buffer('P', torch.randn(64, 64) / 8)
    def forward(self, x): return super().forward(x.flatten(1) @ self.P)

class Halved(nn.Sequential):
    def forward(self, x): return super().forward(x) * (1 if self.training else .5)

def linear(kind=nn.Sequential): return kind(nn.Flatten(), nn.Linear(64, 10))

def frozen():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    for w in model[1].parameters(): w.requires_grad_(False)
    return model


@pytest.mark.parametrize('make', [partial(linear, Noisy), partial(linear, Decides), partial(linear, Projected), frozen, partial(task('digits', 'conv_bn').model)],
                         ids=['dropout', 'decides', 'buffer', 'frozen', 'batch norm'])
def test_what_cannot_be_stacked_is_trained_one_by_one(make):
    p = Protocol(make, small().dls)
    alone = compare({'SGD': list}, p, 2, seeds=2, progress=False)
    with pytest.warns(UserWarning, match='one after the other'):
        stacked = compare({'SGD': list}, p, 2, seeds=2, stacked=True, progress=False)
    pd.testing.assert_frame_equal(numbers(alone), numbers(stacked))


def other_loss(seed):
    dls = small().dls(seed)
    for ds in (dls.train_ds, dls.valid_ds): ds.loss_func = CrossEntropyLossFlat(weight=torch.linspace(.1, 2, 10))
    return dls

def other_loader(seed):
    dls = small().dls(seed)
    return DataLoaders(TfmdDL(dls.train_ds, bs=24, shuffle=True, drop_last=True, num_workers=0), dls.valid)

def other_valid(seed):
    dls = small().dls(seed)
    dls.valid.after_batch.add(Transform(blank))
    return dls

def unequal_train(seed): return task('digits', noise=.4, n_train=96 + 24 * seed).dls(seed)


@pytest.mark.parametrize('dls', [other_loss, other_loader, other_valid, unequal_train])
def test_data_that_cannot_be_stacked(dls):
    p = Protocol(small().model, dls)
    with pytest.warns(UserWarning, match='one after the other'):
        stacked = compare({'SGD': list}, p, 2, seeds=2, stacked=True, progress=False)
    pd.testing.assert_frame_equal(numbers(compare({'SGD': list}, p, 2, seeds=2, progress=False)), numbers(stacked))


@pytest.mark.parametrize('name, model', [('SGD', 'halved'), ('SAF16', 'mlp'), ('SGD', 'unequal')])
def test_stacked_is_the_same(name, model):
    "In evaluation mode, with SAF's table in half precision, with validation sets of several sizes"
    def unequal(seed):
        dls = small().dls(seed)
        ds = dls.valid_ds
        return DataLoaders(dls.train, dls.valid.new(ds.like(ds.x[:100 + 50 * seed], ds.y[:100 + 50 * seed])))
    methods = {'SGD': list, 'SAF16': lambda: SAF(30., tau=1., lag=1, start=1)}
    p = Protocol(partial(linear, Halved) if model == 'halved' else small().model, unequal if model == 'unequal' else small().dls)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        a, b = (compare({name: methods[name]}, p, 3, .05, seeds=2, stacked=s, progress=False) for s in (False, True))
    for c in ('loss', 'train_loss', 'accuracy', 'grads', 'gap'): np.testing.assert_allclose(numbers(a)[c], numbers(b)[c], rtol=2e-5, atol=2e-6, err_msg=c)


def test_stacked_a_method_that_raises_is_a_failed_run():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        df = compare({'SGD': list, 'mSAM': lambda: MSAM(500)}, small(), 1, seeds=2, stacked=True, progress=False)
    assert df[df.method == 'mSAM'].error.notna().all() and df[df.method == 'SGD'].loss.notna().all()


def test_lambdas_of_main_in_workers(tmp_path):
    "A script whose methods, metric and data are its own, with two processes"
    (tmp_path/'mine.py').write_text('''
import torch
from fastai.basics import *
torch.set_num_threads(1)
from sam_explained.compare import Protocol, compare
from sam_explained.sam import SAM
from sam_explained.tasks import task
class Mine(Callback): pass
def share(out, y): return (out.argmax(-1) == y).float().mean()
k = .25
if __name__ == '__main__':
    p = Protocol(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), lambda seed: task('digits', n_train=96).dls(seed), metric=share)
    args = {'SGD': lambda: [], 'mine': lambda: [Mine(), SAM(lambda pct: k)]}, p
    a, b = (compare(*args, 2, seeds=2, n_workers=n, progress=False).drop(columns='seconds') for n in (1, 2))
    assert 'error' not in a, a
    assert a.equals(b), (a, b)
    print(len(a))
''')
    done = subprocess.run([sys.executable, 'mine.py'], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.stdout == '8\n', done.stderr


@pytest.mark.parametrize('workers', [1, 2])
def test_ctrl_c_keeps_what_is_done(tmp_path, workers):
    file = tmp_path/'runs.jsonl'
    process = command(tmp_path, '--methods', 'sgd,sam', *SHORT[:-1], '200', '--out', file, '--workers', workers)
    deadline = time.monotonic() + 120
    while len(runs(file)) < 2 and time.monotonic() < deadline: time.sleep(.01)
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = said(process)
    assert code == 130 and 'goes on' in err and 2 <= len(runs(file)) < 400
    assert 'Traceback' not in err.splitlines()[-1]


def test_command_says_why_runs_failed(tmp_path, monkeypatch, capsys):
    from sam_explained import command as module
    monkeypatch.setitem(module._methods, 'sam', ((), lambda: EndsWith(RuntimeError('no luck'))))
    sam_compare = module.sam_compare
    sam_compare(methods='sgd,sam', train=96, epochs=1, seeds=2, out=str(tmp_path/'runs.jsonl'))
    assert 'SAM, seed 0: ' in (out := capsys.readouterr().out) and 'no luck' in out
    with pytest.raises(SystemExit, match='no luck'): sam_compare(methods='sam', train=96, epochs=1, seeds=1)
