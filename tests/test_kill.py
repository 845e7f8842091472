"""One of two processes dies (or hangs) while its weights are perturbed: the other ends by itself with an error that
says why, and no checkpoint ever holds perturbed weights."""
import datetime
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import assert_same, batches, learner, mlp, snapshot
from fastai.basics import SGD, Callback
from fastai.callback.tracker import SaveModelCallback
from processes import meet
from reference import sam_gradient
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from sam_explained.msam import MSAM
from sam_explained.sam import SAM

STEPS, EPOCHS, DIES_AT = 5, 3, 7                  # the third batch of the second epoch
PATIENCE, TIMEOUT = 10, 120                       # seconds: of the group for one reduction; of the test for everything
methods = {'SAM': partial(SAM, .3), 'MSAM': partial(MSAM, 2, .3)}
signals = {'killed': signal.SIGKILL, 'hangs': signal.SIGSTOP}


class Mortal(nn.Module):
    "An mlp that sends its process a signal in the forward of the second pass of one step, with the weights moved."
    def __init__(self):
        super().__init__()
        self.net, self.left = mlp(torch.float32), None
    def forward(self, x):
        if self.left and any((v != w).any() for v, w in zip(self.left, self.net.parameters())):
            self.note(time.time())
            os.kill(os.getpid(), self.signal)
        return self.net(x)


class AtStep(Callback):
    "Keeps the weights after each step, saves them, and tells the model when its time has come."
    run_valid = False
    def __init__(self, keep, save, doom=None): self.keep, self.save, self.doom, self.done = keep, save, doom, 0
    def before_batch(self):
        if self.done == DIES_AT and self.doom: self.doom()
    def after_batch(self):
        self.done += 1
        self.keep.append(snapshot(self.learn.model.module))
        if self.save: self.learn.save('last')                                # fastai: by rank 0 only


def own(rank): return batches(n=STEPS, bs=4, seed=100 + rank, dtype=torch.float32)


def make(rank, folder, method, *cbs):
    model = DDP(Mortal(), process_group=dist.new_group([0, 1], timeout=datetime.timedelta(seconds=PATIENCE)))
    return learner(model, own(rank), [methods[method](), *cbs], opt_func=partial(SGD, mom=.9), recorder=True,
                   path=folder)


def train(rank, folder, method, fault):
    "One process: first undisturbed, for comparison, then with the fault in process 1."
    folder = Path(folder)
    os.environ.update(RANK=str(rank), WORLD_SIZE='2')                        # what fastai asks for, as under torchrun
    meet(rank, 2, folder)
    whole = []
    make(rank, folder, method, AtStep(whole, save=False)).fit(EPOCHS)
    if rank == 0: torch.save(whole, folder / 'undisturbed.pt')

    def doom():
        body = learn.model.module
        body.signal, body.left = signals[fault], [w.detach().clone() for w in body.net.parameters()]
        body.note = lambda t: (folder / 'died').write_text(str(t))
    steps = AtStep([], save=True, doom=doom if rank else None)
    learn = make(rank, folder, method, steps, SaveModelCallback(every_epoch=True, fname='epoch'))
    dist.barrier()
    try: learn.fit(EPOCHS)
    except Exception:
        learn.save('in_except')
        raise


def reference(n, steps):
    "The weights after so many steps in one process, each rank's batch cut into n shards."
    net, loss = mlp(torch.float32), nn.CrossEntropyLoss()
    opt = torch.optim.SGD(net.parameters(), lr=.1, momentum=.9)
    for i in range(steps):
        parts = [part for r in (0, 1) for part in zip(*(t.chunk(n) for t in own(r)[i % STEPS]))]
        grads = [sam_gradient(net, lambda call, x=x, y=y: loss(call(x), y), .3)[0] for x, y in parts]
        for w, gs in zip(net.parameters(), zip(*grads)): w.grad = sum(gs) / len(gs)
        opt.step()
    return {f'net.{k}': v for k, v in snapshot(net).items()}


def ended(process, seconds):
    try: return process.wait(seconds) is not None
    except subprocess.TimeoutExpired: return False


def remains(folder):
    "Processes that still have the folder's name in their command line."
    found = []
    for p in Path('/proc').glob('[0-9]*/cmdline'):
        try: found += [p.parent.name] * (str(folder).encode() in p.read_bytes())
        except OSError: pass                                                 # gone while we looked
    return found


def pair(folder, method, fault):
    "Both processes; exit codes and standard error, and how long process 0 lived on."
    code = 'import sys, test_kill; test_kill.train(int(sys.argv[1]), *sys.argv[2:])'
    env = dict(os.environ, OMP_NUM_THREADS='1',
               PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get('PYTHONPATH')])]))
    logs = [open(folder / f'stderr{r}', 'w+') for r in (0, 1)]
    both = [subprocess.Popen([sys.executable, '-c', code, str(r), str(folder), method, fault], env=env, stderr=logs[r],
                             stdout=subprocess.DEVNULL, cwd=folder) for r in (0, 1)]
    try:
        alone = ended(both[0], TIMEOUT)
        lived_on = time.time() - float((folder / 'died').read_text()) if (folder / 'died').exists() else None
        if fault == 'killed': ended(both[1], 10)
        codes = [p.poll() for p in both]
    finally:
        for p in both:
            p.kill()                                                         # a stopped process obeys only this
            p.wait()
        for log in logs: log.close()
    return alone, codes, (folder / 'stderr0').read_text(), lived_on


@pytest.mark.parametrize('method, fault', [('SAM', 'killed'), ('MSAM', 'killed'), ('SAM', 'hangs')])
def test_the_other_process_ends_and_nothing_perturbed_is_saved(tmp_path, method, fault):
    alone, codes, error, lived_on = pair(tmp_path, method, fault)
    assert alone, f'process 0 did not end by itself within {TIMEOUT} s'
    assert codes == [1, -signal.SIGKILL if fault == 'killed' else None], error
    reason = 'Connection (reset|closed) by peer' if fault == 'killed' else 'Timed out waiting'
    assert re.search(f"`{method}` when calling event `before_backward`:\\s+.*{reason}", error), error
    assert lived_on < PATIENCE + 10
    assert remains(tmp_path) == []

    undisturbed = torch.load(tmp_path / 'undisturbed.pt', weights_only=False)
    assert len(undisturbed) == EPOCHS * STEPS
    last = undisturbed[DIES_AT - 1]                                          # the last finished step
    torch.testing.assert_close(last, reference(2 if method == 'MSAM' else 1, DIES_AT), rtol=1e-4, atol=1e-5)
    for name, want in (('last', last), ('in_except', last), ('epoch_0', undisturbed[STEPS - 1])):
        assert_same(saved(tmp_path, name), want, name)
    assert not (tmp_path / 'models/epoch_1.pth').exists()
    assert any((a != b).any() for a, b in zip(last.values(), undisturbed[DIES_AT].values()))


def saved(folder, name):
    state = torch.load(folder / f'models/{name}.pth', weights_only=False)
    return state.get('model', state)                                         # with or without the optimizer's state
