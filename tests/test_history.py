"""The table gives back what was written `lag` epochs ago, and nothing else. It is checked against a dictionary."""
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders import LOADERS, Slow, seed
from processes import in_processes
from torch.utils.data import DataLoader as TorchLoader

from sam_explained import history
from sam_explained.history import History
from sam_explained.ids import with_ids
from sam_explained.saf import trajectory_loss

pytestmark = pytest.mark.filterwarnings('ignore:.*pin_memory.*')


# The table, against a dictionary -----------------------------------------------------------------------------------

row = st.lists(st.floats(-300, 300, width=32), min_size=3, max_size=3)
bad_row = st.sampled_from([[float('nan'), 0., 0.], [0., float('inf'), 1.], [0., 1., -float('inf')]])
step = st.lists(st.tuples(st.integers(0, 5), st.one_of(row, row, bad_row)), max_size=7)


@settings(max_examples=150, deadline=None)
@given(lag=st.integers(1, 4), dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
       epochs=st.lists(st.lists(step, max_size=3), max_size=9), save=st.integers(0, 20), jump=st.integers(0, 3))
def test_the_table_is_a_dictionary(lag, dtype, epochs, save, jump):
    "(epoch, id) -> row: what was last written; read before write; saved and loaded in the middle"
    table, known, steps = History(6, 3, lag, dtype, device='cpu'), {}, 0
    for e, batches in enumerate(epochs):
        e += jump * (e > 4)                                 # some epochs are skipped
        for batch in batches:
            ids = torch.tensor([i for i, _ in batch], dtype=torch.int64)
            z = torch.tensor([r for _, r in batch]).view(len(batch), 3)
            past, weight = table.read(ids, e)
            assert past.dtype == weight.dtype == torch.float32 and past.shape == (len(ids), 3)
            for i, p, w in zip(ids.tolist(), past, weight.tolist()):
                want = known.get((e - lag, i)) if (e, i) not in known else None
                assert w == (want is not None)
                if w: assert torch.equal(p, (want - want.max()).clamp(min=torch.finfo(dtype).min).to(dtype).float())
                assert p.isfinite().all()
            table.write(ids, z, e)
            for i, r in zip(ids.tolist(), z): known[e, i] = r if r.isfinite().all() else None
            steps += 1
            if steps == save:
                file = io.BytesIO()
                torch.save(table.state_dict(), file)
                file.seek(0)
                table = History(6, 3, lag, dtype, device='cpu')
                table.load_state_dict(torch.load(file))


@pytest.mark.parametrize('lag', [1, 2, 3, 5])
@pytest.mark.parametrize('name', ['fastai datasets', 'fastai workers', 'fastai weighted', 'torch plain', 'torch workers',
                                  'torch sampler', 'torch last'])
def test_the_past_is_lag_epochs_old_through_real_loaders(lag, name):
    "The output says (epoch, id); saved and loaded in the middle of an epoch"
    dl = LOADERS[name]()
    n = len(dl.dataset)
    table, last = History(n, 3, lag, torch.float32, device='cpu'), {}
    for e in range(2 * lag + 2):
        for b, (ids, _) in enumerate(with_ids(dl)):
            past, weight = table.read(ids, e)
            for i, (one, then, who), w in zip(ids.tolist(), past.tolist(), weight.tolist()):
                assert w == (last.get((e % lag, i)) == e - lag)
                if w: assert (then - one, who - one) == (e - lag, i)
            z = torch.tensor([[0., e, i] for i in ids.tolist()])
            table.write(ids, z, e)
            last.update({(e % lag, i): e for i in ids.tolist()})
            if b == 1 and e == lag:
                again = History(n, 3, lag, torch.float32, device='cpu')
                again.load_state_dict(pickle.loads(pickle.dumps(table.state_dict())))
                table = again


@pytest.mark.parametrize('lag', [1, 2, 3, 5])
def test_who_writes_first_finds_nothing(lag):
    "What is read and what is written share a slot: this epoch's own output is never handed out as the past"
    table = History(4, 2, lag, device='cpu')
    for e in range(3 * lag):
        table.write(range(4), torch.tensor([[0., e]] * 4), e)
        past, weight = table.read(range(4), e)
        assert not weight.any() and not past.any()


@pytest.mark.parametrize('lag', [1, 3])
def test_without_a_past_the_loss_is_the_plain_loss_exactly(lag):
    "Loss and gradient, bit for bit, while no row is set and where every row is stale. As zeros they would be targets"
    table, y = History(8, 5, lag, device='cpu'), torch.arange(8) % 5
    for epoch in (0, lag, 2 * lag + 1):
        if epoch == 2 * lag + 1: table.write(range(8), torch.randn(8, 5), 0 if lag == 1 else 1)
        z = torch.randn(8, 5, requires_grad=True)
        past, weight = table.read(range(8), epoch)
        plain = F.cross_entropy(z, y)
        losses = plain, plain + .3 * trajectory_loss(z, past, 5., weight), plain + .3 * trajectory_loss(z, past, 5.)
        grads = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in losses]
        assert torch.equal(losses[0], losses[1]) and torch.equal(grads[0], grads[1])
        assert losses[2] > losses[0] and not torch.allclose(grads[2], grads[0])


@pytest.mark.parametrize('classes', [10, 100, 1000])
def test_half_precision_is_enough_for_the_loss(classes):
    "At tau 5: a stored row from the row itself, and the mean over a batch for a network that has moved on"
    z, drift = 6 * torch.randn(512, classes), .5 * torch.randn(512, classes)
    kept = {}
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        table = History(512, classes, 1, dtype, device='cpu')
        table.write(range(512), z, 0)
        kept[dtype] = table.read(range(512), 1)[0].double()
    def kl(a, b): return F.kl_div((b / 5).log_softmax(1), (a / 5).log_softmax(1), reduction='none', log_target=True).sum(1)
    exact, half, rough = kept[torch.float32], kept[torch.float16], kept[torch.bfloat16]
    assert kl(exact, half).max() < 1e-6 < kl(exact, rough).max()
    now = z.double() + drift.double()
    for ids in torch.arange(512).split(128):
        assert (kl(half[ids], now[ids]).mean() - kl(exact[ids], now[ids]).mean()).abs() < 5e-6


def test_logits_far_apart_give_a_finite_loss():
    "1.5-10: softmax, then log, does not"
    table = History(2, 3, 1, device='cpu')
    table.write([0, 1], torch.tensor([[600., 0, 0], [0., -9e4, 9e4]]), 0)
    past, weight = table.read([0, 1], 1)
    z = torch.tensor([[0., 600, 0], [1e4, 0, -1e4]], requires_grad=True)
    loss = trajectory_loss(z, past, 5., weight)
    assert weight.all() and loss.isfinite() and torch.autograd.grad(loss, z)[0].isfinite().all()
    naive = F.kl_div((z / 5).softmax(1).log(), (past / 5).softmax(1), reduction='batchmean')
    assert not naive.isfinite()


@pytest.mark.parametrize('workers', [0, 2])
def test_a_data_set_that_grows_is_an_error_and_shrinking_is_none(workers):
    data = Slow(40)
    dl, table = TorchLoader(data, 8, num_workers=workers), History(40, 2, 1, device='cpu')
    def epoch(e):
        weights = []
        for ids, _ in with_ids(dl):
            weights.append(table.read(ids, e)[1])
            table.write(ids, torch.zeros(len(ids), 2), e)
        return torch.cat(weights)
    assert epoch(0).sum() == 0 and epoch(1).sum() == 40
    data.n = 33
    assert epoch(2).sum() == 33
    data.n = 41
    with pytest.raises(ValueError, match=r'ids has 40, which must be in \[0, 40\), the rows of the history'): epoch(3)
    assert table.read(range(40), 4)[1].sum() == 40, 'all whole batches before it were written, and nothing of the last'


def test_sizes_may_be_numbers_of_numpy(tmp_path):
    table = History(np.int64(9), np.int32(3), np.uint8(2), device='cpu')
    assert [type(o) for o in (table.n, table.classes, table.lag)] == [int] * 3
    table.write(np.arange(9), torch.randn(9, 3), np.int64(0))
    assert table.read(np.arange(9), np.int16(2))[1].sum() == 9
    torch.save(table.state_dict(), tmp_path/'state')
    History(9, 3, 2, device='cpu').load_state_dict(torch.load(tmp_path/'state', weights_only=True))


def test_no_gradient_and_no_reference_to_the_graph():
    table = History(4, 2, 1, device='cpu')
    z = torch.randn(4, 2, requires_grad=True)
    table.write(range(4), z * 2, 0)
    past, _ = table.read(range(4), 1)
    assert not past.requires_grad and not table.logits.requires_grad
    past.add_(1.)                                           # what was read is the caller's
    assert torch.equal(table.read(range(4), 1)[0] + 1, past)


def test_what_was_sent_has_arrived_before_anything_else():
    "From a GPU rows come later; whatever looks at the table waits for them"
    class Event:
        waited = False
        def synchronize(self): self.waited = True
    looks = [lambda t: t.read([1], 2), lambda t: t.state_dict(), lambda t: pickle.dumps(t),
             lambda t: t.write([0], torch.ones(1, 2), 0), lambda t: t.load_state_dict(History(4, 2, 2, device='cpu').state_dict())]
    for look in looks:
        table, event = History(4, 2, 2, device='cpu'), Event()
        table.waiting.append((0, event, [torch.tensor([1]), torch.tensor([[0., -3.]]).half(), torch.tensor([0], dtype=torch.int32)]))
        look(table)
        assert event.waited and not table.waiting
    past, weight = pickle.loads(pickle.dumps(table)).read([1], 2)
    assert weight == 0, 'cleared by load_state_dict, and not written again afterwards'


def test_clear_forgets():
    table = History(4, 2, 2, device='cpu')
    table.write(range(4), torch.ones(4, 2), 0)
    assert table.read(range(4), 2)[1].sum() == 4
    table.clear()
    assert table.read(range(4), 2)[1].sum() == 0


@pytest.mark.parametrize('dtype, low', [(torch.float16, -65504.), (torch.float32, -2e5)])
def test_what_is_below_the_range_of_the_type_is_clamped(dtype, low):
    table = History(2, 2, 1, dtype, device='cpu')
    table.write([0, 1], torch.tensor([[1e5, -1e5], [7e4, 7e4 + 1]]), 0)
    past, weight = table.read([0, 1], 1)
    assert past.tolist() == [[0, low], [-1, 0]] and weight.tolist() == [1, 1]
    assert torch.log_softmax(past / 5, 1).isfinite().all()


@pytest.mark.parametrize('n, classes, lag', [(1, 1, 1), (50_000, 100, 3), (7, 3, 5)])
@pytest.mark.parametrize('dtype, size', [(torch.float16, 2), (torch.float32, 4), (torch.bfloat16, 2)])
def test_memory_to_the_byte(n, classes, lag, dtype, size):
    table = History(n, classes, lag, dtype, device='cpu')
    want = n * classes * lag * size + 4 * n * lag
    assert History.memory(n, classes, lag, dtype) == table.nbytes == want
    assert table.logits.nbytes == table.logits.untyped_storage().nbytes() == n * classes * lag * size
    assert table.logits.is_contiguous() and table.stamps.dtype is torch.int32


@pytest.mark.parametrize('n, classes, mib', [(50_000, 100, 57.2), (1_281_167, 1000, 14_661.8)])
def test_memory_of_the_paper(n, classes, mib):
    "Table 2 and section 3.3: single precision, three slots"
    logits = History.memory(n, classes, 3, torch.float32) - 4 * n * 3
    assert logits == n * classes * 3 * 4 and abs(logits / 2**20 - mib) < .05


def test_the_last_of_a_repeated_id_wins_always():
    for trial in range(20):
        seed(trial)
        ids, z = torch.randint(0, 50, (4096,)), torch.randn(4096, 5)
        ordered, places = history._last_wins(ids)           # in parallel, on a GPU, it must not matter who writes last
        last_at = {i: k for k, i in enumerate(ids.tolist())}
        assert places.tolist() == [last_at[i] for i in ordered.tolist()] and torch.equal(ordered, ids.sort().values)
        table = History(50, 5, 1, torch.float32, device='cpu')
        table.write(ids, z, 0)
        for i in range(50):
            last = z[(ids == i).nonzero()[-1, 0]]
            assert torch.equal(table.logits[0, i], last - last.max())


# Where it lives ----------------------------------------------------------------------------------------------------

class Crowded(History): ram_share = 0


def test_it_goes_into_a_file_when_memory_is_short(tmp_path):
    nbytes = 2 * 100 * 10 * 2
    for free, in_file in ((2 * nbytes, False), (2 * nbytes - 1, True)):
        with patch.object(history, '_free_ram', lambda: free), patch.object(history, '_in_file', wraps=history._in_file) as made:
            if in_file:
                with pytest.warns(UserWarning, match=f'0 MiB, more than 50% of the .* goes into a file in .{tmp_path}'):
                    table = History(100, 10, 2, device='cpu', folder=tmp_path)
            else: table = History(100, 10, 2, device='cpu', folder=tmp_path)
        assert made.called == in_file
    table.write(range(100), torch.eye(100)[:, :10], 0)
    assert torch.equal(table.read(range(100), 2)[0], torch.eye(100)[:, :10] - torch.eye(100)[:, :10].amax(1, keepdim=True))
    assert not list(tmp_path.iterdir()), 'the file has no name, so nothing can be left over'
    other = History(100, 10, 2, device='cpu')
    other.load_state_dict(table.state_dict())
    assert torch.equal(other.logits, table.logits) and torch.equal(other.stamps, table.stamps)


@pytest.mark.filterwarnings('ignore:the history takes')
def test_a_disk_that_is_too_small_says_so(tmp_path):
    usage = type('Usage', (), dict(free=2**20))
    with patch('shutil.disk_usage', lambda folder: usage), pytest.raises(ValueError, match='1 MiB left, the history needs 57'):
        Crowded(1_000_000, 10, 3, device='cpu', folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_gpu_is_used_if_it_has_room():
    made = []
    def zeros(shape, **kwargs):
        made.append(kwargs)
        return torch.empty(shape, dtype=kwargs['dtype'], device='meta')
    cuda = torch.device('cuda:0')
    for free, want in ((400, dict(device=cuda)), (399, dict(pin_memory=True))):
        with patch.object(history, '_free_gpu', lambda d: free), patch.object(torch, 'zeros', zeros):
            history._table((1, 10, 5), torch.float16, cuda, None, .25, .5)
        assert made.pop() == dict(dtype=torch.float16, **want)


IMAGENET = '''
import os, sys, torch, warnings
from sam_explained.history import History
def resident(): return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
class Crowded(History): ram_share = 0
warnings.simplefilter('ignore')
torch.set_num_threads(1)
before = resident()
table = Crowded(1_281_167, 1000, 3, device='cpu', folder=sys.argv[1])
made = resident()
torch.manual_seed(0)
for e in range(5):
    g = torch.Generator().manual_seed(1)
    for _ in range(8):
        ids = torch.randint(0, 1_281_167, (256,), generator=g)
        z = torch.sin(ids[:, None] + torch.arange(1000.) + e)
        past, weight = table.read(ids, e)
        want = torch.sin(ids[:, None] + torch.arange(1000.) + e - 3)
        assert weight.mean() > .99 if e >= 3 else not weight.any()
        if e >= 3: assert ((past - want + want.amax(1, keepdim=True)).abs().amax(1) * weight).max() < 2e-3
        table.write(ids, z, e)
print(table.nbytes, made - before, resident() - made)
'''


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='the resident size is read from /proc')
def test_imagenet_in_a_sparse_file(tmp_path):
    out = subprocess.run([sys.executable, '-c', IMAGENET, tmp_path], capture_output=True, text=True,
                         env={**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1])})
    assert out.returncode == 0, out.stderr
    nbytes, made, grown = map(int, out.stdout.split())
    assert nbytes == 1_281_167 * 1000 * 3 * 2 + 4 * 1_281_167 * 3
    assert made < 64 * 2**20 and grown < 512 * 2**20, (made, grown)
    assert not list(tmp_path.iterdir())


# Saving ------------------------------------------------------------------------------------------------------------

def outputs(e, ids): return torch.sin(ids[:, None] * (e + 1.) + torch.arange(4))


def go_on(table, epochs):
    "What is read in these epochs"
    seen = []
    for e in epochs:
        for ids in torch.randperm(30, generator=torch.Generator().manual_seed(e))[:27].split(7):
            seen.append(torch.cat([*table.read(ids, e)[:1], table.read(ids, e)[1][:, None]], 1))
            table.write(ids, outputs(e, ids), e)
    return torch.cat(seen)


OTHER_PROCESS = '''
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_history import History, go_on
table = History(30, 4, 3, device='cpu')
table.load_state_dict(torch.load(sys.argv[2], weights_only=True))
torch.save(go_on(table, range(5, 10)), sys.argv[2] + '.out')
'''


def test_resume_in_a_new_process_is_exact(tmp_path):
    table = History(30, 4, 3, device='cpu')
    go_on(table, range(5))
    torch.save(table.state_dict(), tmp_path/'state')
    here = Path(__file__).parent
    out = subprocess.run([sys.executable, '-c', OTHER_PROCESS, here, tmp_path/'state'], capture_output=True, text=True,
                         env={**os.environ, 'PYTHONPATH': str(here.parent)})
    assert out.returncode == 0, out.stderr
    want = go_on(table, range(5, 10))
    assert torch.equal(torch.load(tmp_path/'state.out'), want) and want[:, -1].mean() > .7


def test_resume_without_the_history_masks_by_stamp():
    "1.5-13: zeros would be uniform targets. Here the weight is 0 for `lag` epochs, and nothing of zeros is ever a target"
    table = History(30, 4, 3, device='cpu')
    weights = [go_on(table, [e])[:, -1].mean().item() for e in range(5, 10)]
    assert weights[:3] == [0, 0, 0] and min(weights[3:]) > .7


@pytest.mark.parametrize('other, match', [
    (dict(n=31), 'n=30 in the state, 31 in this'), (dict(classes=5), 'classes=4 in the state, 5 in this'),
    (dict(lag=2), 'lag=3 in the state, 2 in this'), (dict(dtype=torch.float32), 'float16.*float32')])
def test_a_state_of_another_table_is_refused(other, match):
    state = History(30, 4, 3, device='cpu').state_dict()
    table = History(**{**dict(n=30, classes=4, lag=3, device='cpu'), **other})
    table.write([1], torch.ones(1, table.classes), 0)
    before = table.logits.clone(), table.stamps.clone()
    with pytest.raises(ValueError, match=match): table.load_state_dict(state)
    assert torch.equal(before[0], table.logits) and torch.equal(before[1], table.stamps)


# Bad input: an error that names it, and nothing has changed --------------------------------------------------------

@pytest.mark.parametrize('kwargs, error, match', [
    (dict(n=0), ValueError, 'n=0 must be an int from 1 up'), (dict(classes=0), ValueError, 'classes=0'),
    (dict(lag=0), ValueError, 'lag=0'), (dict(lag=-3), ValueError, 'lag=-3'), (dict(lag=1.5), TypeError, 'lag=1.5'),
    (dict(n=True), TypeError, 'n=True'), (dict(n='9'), TypeError, "n='9'"), (dict(classes=float('inf')), TypeError, 'classes=inf'),
    (dict(dtype=torch.int32), ValueError, 'dtype=torch.int32'), (dict(dtype='half'), TypeError, "dtype='half'")])
def test_bad_sizes(kwargs, error, match):
    with pytest.raises(error, match=match): History(**{**dict(n=9, classes=3, lag=2, device='cpu'), **kwargs})


@pytest.mark.parametrize('ids, shape, epoch, error, match', [
    ([9], (1, 3), 0, ValueError, r'ids has 9, which must be in \[0, 9\)'), ([0, -1], (2, 3), 0, ValueError, 'ids has -1'),
    ([0.], (1, 3), 0, TypeError, 'integers'), ([True], (1, 3), 0, TypeError, 'integers'), ([[0]], (1, 3), 0, ValueError, 'shape'),
    ([0], (1, 4), 0, ValueError, r'\(1, 4\) must be \(1, 3\)'), ([0, 1], (1, 3), 0, ValueError, r'\(1, 3\) must be \(2, 3\)'),
    ([0], (3,), 0, ValueError, 'logits of shape'), ([0], (1, 3), -1, ValueError, 'epoch=-1'),
    ([0], (1, 3), 1., TypeError, 'epoch=1.0'), ([0], (1, 3), True, TypeError, 'epoch=True')])
def test_bad_batches(ids, shape, epoch, error, match):
    table = History(9, 3, 2, device='cpu')
    table.write(range(9), torch.randn(9, 3), 0)
    before = table.logits.clone(), table.stamps.clone()
    with pytest.raises(error, match=match): table.write(ids, torch.zeros(shape), epoch)
    if 'logits' not in match and 'must be' not in match:
        with pytest.raises(error, match=match): table.read(ids, epoch)
    assert torch.equal(before[0], table.logits) and torch.equal(before[1], table.stamps)


# Several processes -------------------------------------------------------------------------------------------------

def deal(e, world, n=60):
    "Which examples each process sees, step by step, in epoch e: shares of unequal size, and at times none"
    g = torch.Generator().manual_seed(100 + e)
    order = torch.cat([torch.randperm(n, generator=g), torch.randint(0, 9, (n,), generator=g)])     # some in one step twice
    sizes = [(s + r * (s % 3)) % 5 for s in range(12) for r in range(world)]
    order = order.repeat(2)[:sum(sizes)]
    parts = order.split(sizes)
    return [parts[s * world:(s + 1) * world] for s in range(12)]


def says(e, ids, rank):
    "Who says something about an example that another process sees in the same step says something else"
    z = torch.sin(ids[:, None] * (e + 1.) + torch.arange(5) + rank)
    z[ids % 11 == 4] = float('nan')
    return z


def one_table(rank, world, shared, dtype):
    table, hits = History(60, 5, 3, dtype, device='cpu', shared=shared), []
    for e in range(7):
        for parts in deal(e, world):
            hits.append(table.read(parts[rank], e)[1])
            table.write(parts[rank], says(e, parts[rank], rank), e)
    return table.state_dict(), torch.cat(hits)


@pytest.mark.parametrize('world, dtype', [(2, torch.float16), (4, torch.float32), (2, torch.bfloat16)])
def test_processes_share_one_table(world, dtype, tmp_path):
    alone = History(60, 5, 3, dtype, device='cpu')
    for e in range(7):
        for parts in deal(e, world):
            alone.write(torch.cat(parts), torch.cat([says(e, ids, r) for r, ids in enumerate(parts)]), e)
    for state, _ in in_processes(one_table, world, tmp_path, world, True, dtype):
        assert torch.equal(state['logits'], alone.logits) and torch.equal(state['stamps'], alone.stamps)


def fresh_deal(rank, world, shared):
    "The weight in the first epoch that has a past"
    table = History(2000, 2, 3, device='cpu', shared=shared)
    for e in range(4):
        ids = torch.randperm(2000, generator=torch.Generator().manual_seed(e)).chunk(world)[rank]
        weight = table.read(ids, e)[1]
        table.write(ids, torch.zeros(len(ids), 2), e)
    return weight.mean().item()


@pytest.mark.parametrize('world', [2, 4])
def test_private_tables_hit_one_row_in_world(world, tmp_path):
    "1.5-12, the negative control"
    for shared, want, off in ((True, 1, 0), (False, 1 / world, .06)):
        (folder := tmp_path/str(shared)).mkdir()
        for hit in in_processes(fresh_deal, world, folder, world, shared): assert abs(hit - want) <= off
