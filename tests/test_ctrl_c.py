"Ctrl-C between any two bytecodes: the weights are never left perturbed."
import contextlib
import signal
import sys
import threading

import pytest
import torch
from torch import nn

from sam_explained import core


class InterruptAt:
    "Send this process one SIGINT before the `n`-th bytecode executed in core.py or contextlib.py"

    def __init__(self, n): self.n, self.seen, self.sent = n, 0, False

    def __call__(self, frame, event, arg):
        if frame.f_code.co_filename not in (core.__file__, contextlib.__file__): return None
        frame.f_trace_opcodes = True
        if event == 'opcode':
            self.seen += 1
            if self.seen == self.n:
                self.sent = True
                signal.raise_signal(signal.SIGINT)
        return self


@pytest.fixture(autouse=True)
def ctrl_c():
    "Python's own handler; a shell that starts the tests in the background has Ctrl-C ignored"
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


def interrupted_step(n):
    "One `two_pass` step with a Ctrl-C before its n-th bytecode: (sent?, raised?, weights and buffers at home?)"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
    x = torch.randn(4, 2)
    home, where = [w.detach().clone() for w in net.parameters()], [w.data_ptr() for w in net.parameters()]
    tracer, raised = InterruptAt(n), False
    sys.settrace(tracer)
    try: core.two_pass(lambda: net(x).pow(2).mean(), net.parameters(), rho=0.5, model=net)
    except KeyboardInterrupt: raised = True
    finally:
        sys.settrace(None)
        torch.set_grad_enabled(True)   # an interrupt inside torch's own `no_grad.__exit__` leaves it off, with or without SAM
    same = all(torch.equal(w, h) for w, h in zip(net.parameters(), home)) and [w.data_ptr() for w in net.parameters()] == where
    return tracer.sent, raised, same, net[1].num_batches_tracked.item()


def test_weights_are_home_after_an_interrupt_at_any_bytecode():
    usual, n, raised = signal.getsignal(signal.SIGINT), 1, 0
    while True:
        sent, stopped, home, counted = interrupted_step(n)
        if not sent: break
        raised += stopped
        assert home, f'weights left perturbed by a Ctrl-C before bytecode {n}'
        assert counted in (0, 1), f'batch norm counted {counted} passes after a Ctrl-C before bytecode {n}'
        assert signal.getsignal(signal.SIGINT) is usual, f'handler lost at bytecode {n}'
        n += 1
    assert n > 300, 'the step has hundreds of bytecodes; if not, the tracer saw nothing'
    assert raised >= n - 5, 'an interrupt waits, but is never swallowed'


def test_a_second_interrupt_does_not_wait():
    w = torch.ones(2)
    with pytest.raises(KeyboardInterrupt):
        with core.perturbed([w], [torch.ones(2)]):
            signal.raise_signal(signal.SIGINT)
            assert w[0] == 2, 'the first one waits'
            signal.raise_signal(signal.SIGINT)
            pytest.fail('the second one must not')
    assert w[0] == 1


def test_other_threads_train_without_touching_signals():
    seen = []

    def work():
        w = torch.ones(2)
        with core.perturbed([w], [torch.ones(2)]): seen.append(w[0].item())
        seen.append(w[0].item())

    t = threading.Thread(target=work)
    t.start()
    t.join()
    assert seen == [2, 1]
