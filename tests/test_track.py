"""Sharpness measured while it trains: the run is the run without it, and the numbers are those measured afterwards."""
import math
import pickle
from functools import partial

import pytest
import torch
from conftest import CPUMixedPrecision, assert_same, batches, learner, mlp, snapshot
from fastai.basics import SGD, Callback
from fastai.callback.schedule import *
from fastai.callback.training import GradientAccumulation
from processes import in_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sam_explained.sam import SAM
from sam_explained.sharpness import Objective, ball_sharpness
from sam_explained.track import TrackSharpness, ball, lambda_1

f32 = torch.float32
sgd = partial(SGD, mom=.9)
net = partial(mlp, f32, norm=nn.BatchNorm1d, drop=.3)
data = partial(batches, dtype=f32)


@pytest.mark.parametrize('extra', [lambda: [], lambda: [SAM(.1)], lambda: [GradientAccumulation(12)], lambda: [CPUMixedPrecision(torch.bfloat16)]])
def test_the_run_is_the_run(extra):
    def end(*cbs):
        learn = learner(net(), data(), [*extra(), *cbs], opt_func=sgd, recorder=True)
        torch.manual_seed(2)
        learn.fit(3)
        return dict(snapshot(learn.model), rng=torch.get_rng_state())
    assert_same(end(), end(TrackSharpness()))


def test_the_numbers_are_those_measured_afterwards():
    class Copies(Callback):
        order = 44
        def before_fit(self): self.kept = []
        def after_train(self): self.kept.append({k: v.clone() for k, v in self.model.state_dict().items()})
    def height(of): return of.value()
    learn = learner(net(), data(), [Copies(), TrackSharpness(ball, lambda_1, height, every=2, dropout=True)], recorder=True)
    learn.fit(5)
    values = learn.track_sharpness.values
    assert [v['epoch'] for v in values] == [1, 3, 4]
    for v in values:
        model = net()
        model.load_state_dict(learn.copies.kept[v['epoch']])
        of = Objective((model, nn.CrossEntropyLoss(), data()), dropout=True)
        found = ball(of), lambda_1(of), of.value()
        assert (v['ball'], v['lambda_1'], v['loss']) == pytest.approx(found, rel=1e-5)
    names = list(learn.recorder.metric_names)
    column = [row[names.index('lambda_1') - 1] for row in learn.recorder.values]
    assert [math.isnan(c) for c in column] == [True, False, True, False, False]
    assert [c for c in column if not math.isnan(c)] == [v['lambda_1'] for v in values]


def test_other_batches_and_a_second_fit():
    learn = learner(net(), data(), TrackSharpness(batches=data(seed=7)), recorder=True)
    for epochs in (2, 1):
        learn.fit(epochs)
        assert len(learn.track_sharpness.values) == epochs and not len(learn.metrics)
        assert learn.track_sharpness.values[-1]['loss'] == Objective((learn.model, nn.CrossEntropyLoss(), data(seed=7))).value()
    pickle.dumps(learn.track_sharpness.measures)


def test_an_interrupted_fit_leaves_no_columns_behind():
    class Stop(Callback):
        def before_batch(self):
            if self.training and self.train_iter == 2: raise KeyboardInterrupt
    learn = learner(net(), data(), [TrackSharpness(), Stop()], recorder=True)
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    learn.remove_cb(learn.stop)
    learn.fit(1)
    assert list(learn.recorder.metric_names).count('ball') == 1


def test_two_of_them_and_results_with_errors():
    "On two data sets; `ball_sharpness` itself instead of a function that takes the number out of it"
    measure = partial(ball_sharpness, rho=.1, progress=False)
    class Other(TrackSharpness): pass
    learn = learner(net(), data(), [TrackSharpness(), Other(measure, batches=data(seed=7))], recorder=True)
    learn.fit(2)
    names = list(learn.recorder.metric_names)
    assert [names.count(n) for n in ('ball', 'lambda_1', 'ball_sharpness')] == [1, 1, 1]
    of = Objective((learn.model, nn.CrossEntropyLoss(), data(seed=7)))
    assert learn.other.values[-1]['ball_sharpness'] == pytest.approx(measure(of).rise, rel=1e-5)
    with pytest.raises(ValueError, match='different names'): TrackSharpness(lambda o: 1., lambda o: 2.)
    with pytest.raises(ValueError, match='nothing has been measured'): TrackSharpness().plot()


def test_not_while_looking_for_a_learning_rate(tmp_path):
    learn = learner(net(), data(), TrackSharpness(), recorder=True, path=tmp_path)
    learn.lr_find(num_it=12, show_plot=False, suggest_funcs=())
    assert not learn.track_sharpness.values and not len(learn.metrics)


def together(rank):
    "The loss of DDP's module, every process on the same rows"
    model = mlp()
    learn = learner(DistributedDataParallel(model), batches(seed=rank), TrackSharpness(batches=batches(seed=5)), opt_func=sgd)
    learn.fit(2)
    return learn.track_sharpness.values, snapshot(model)


def test_processes_measure_the_same(tmp_path):
    (a, wa), (b, wb) = in_processes(together, 2, tmp_path)
    assert a == b and len(a) == 2
    assert_same(wa, wb)


@pytest.mark.parametrize('every, error', [(0, ValueError), (1.5, TypeError)])
def test_bad_intervals(every, error):
    with pytest.raises(error, match='every='): TrackSharpness(every=every)
