"""The script of the tutorial, launched as a reader would: two processes of `torchrun` do what one does with MSAM(2)."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastai.basics import SGD, Learner, TrainEvalCallback, set_seed
from torch import nn

from sam_explained.data import digits
from sam_explained.msam import MSAM
from sam_explained.sam import SAM

script = Path(__file__).parent.parent / 'nbs/examples/two_processes.py'
EPOCHS, TIMEOUT = 2, 120


def launch(folder, *options):
    "The script in two processes on the CPU, on a free port of this machine; (exit code, standard output, all output)."
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(script)]
    env = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}
    env.update(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    with open(folder / 'stdout', 'w+') as out, open(folder / 'stderr', 'w+') as err:
        p = subprocess.Popen([*cmd, f'--epochs={EPOCHS}', *options], cwd=folder, env=env, stdout=out, stderr=err,
                             start_new_session=True)
        try: code = p.wait(TIMEOUT)
        except subprocess.TimeoutExpired: code = f'still running after {TIMEOUT} s'
        finally:
            if p.poll() is None:
                os.killpg(p.pid, signal.SIGKILL)                             # the launcher and what it started
                p.wait()
    out, err = (folder / 'stdout').read_text(), (folder / 'stderr').read_text()
    return code, out, out + err


def one_process(method):
    "The same data, model and seed in this process, nothing distributed."
    set_seed(42)
    dls = digits(bs=64, seed=42, device=torch.device('cpu'))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    learn = Learner(dls, model, opt_func=SGD, lr=.1, default_cbs=False, cbs=[TrainEvalCallback(), method])
    learn.create_mbar, learn.logger = False, lambda o: None
    learn.fit(EPOCHS)
    x, y = learn.dls.valid.one_batch()
    with torch.no_grad(): right = (model.eval()(x).argmax(1) == y).float().mean()
    return {k: v.detach().clone() for k, v in model.state_dict().items()}, float(right)


def furthest(a, b):
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


methods = {'': lambda: MSAM(2, rho=.1), '--sync': lambda: SAM(.1), '--shards=2': lambda: MSAM(4, rho=.1)}


@pytest.fixture(scope='module')
def single(): return {option: one_process(method()) for option, method in methods.items()}


@pytest.mark.parametrize('option', methods, ids=['plain', 'sync', 'shards'])
def test_two_processes_are_one(tmp_path, single, option):
    "The weights of one process, to 1e-5; and not those of the two other methods."
    code, printed, everything = launch(tmp_path, *option.split())
    assert code == 0, everything
    want, right = single[option]
    assert right > .8 and printed == f'2 processes, {EPOCHS} epochs: accuracy {right:.4f}\n', everything
    got = torch.load(tmp_path / 'two_processes.pt', weights_only=True)
    assert furthest(got, want) < 1e-5
    for other in methods.keys() - {option}: assert furthest(got, single[other][0]) > 1e-3, other
