"""`sam_explained.data` where a notebook cell cannot go: other processes, workers, statistics, properties, bad input."""
import math, os, random, subprocess, sys, warnings
from types import SimpleNamespace
import numpy as np, pytest, torch
from fastai.basics import DataLoaders, Learner, accuracy, load_learner, nn
from hypothesis import example, given, settings, strategies as st
from scipy import stats
from sklearn.datasets import load_digits
from sam_explained.data import (PACKAGES, Labelled, corpus, digits, docstrings, loaders, naming, noisy, redraw, split,
                                words_of)

torch.set_num_threads(1)
SMALL = ('networkx', 'numpy')


def batches(dl): return [tuple(o.clone() for o in b) for b in dl]
def same(a, b):
    return len(a) == len(b) and all(torch.equal(u, v) for x, y in zip(a, b) for u, v in zip(x, y, strict=True))


def text(**kw): return docstrings(**{**dict(packages=SMALL, per_package=60, bs=16, seq_len=20), **kw})


@pytest.fixture(params=[digits, text], ids=['digits', 'docstrings'])
def make(request): return request.param


# --- the same for a seed -------------------------------------------------------------------------------------------

DIGEST = """
import hashlib, sys, torch
from sam_explained.data import digits, docstrings
h = hashlib.sha256()
text = docstrings(packages=('networkx', 'numpy'), per_package=60, bs=16, seed=3, noise=.3)
for dls in (digits(seed=3, noise=.3), text):
    h.update(repr(dls.vocab).encode())
    for dl in (dls.train, dls.train, dls.valid):
        for x, y in dl: h.update(x.numpy().tobytes() + y.numpy().tobytes())
print(h.hexdigest())
"""


def test_another_process_with_another_hash_seed_sees_the_same_bytes():
    def digest(hash_seed):
        env = {**os.environ, 'PYTHONHASHSEED': hash_seed, 'OMP_NUM_THREADS': '1'}
        done = subprocess.run([sys.executable, '-c', DIGEST], env=env, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout.strip()
    assert digest('1') == digest('2') != ''


def test_same_seed_same_batches_epoch_after_epoch(make):
    dls = []
    for seed in (5, 5, 6):
        random.seed(len(dls))                           # what else draws random numbers must not matter, here ...
        dls.append(make(seed=seed, noise=.4))
    a, b, c = dls
    first = batches(a.train)
    assert same(first, batches(b.train))
    random.seed(99)                                     # ... or there
    second = batches(a.train)
    random.seed(1)
    assert same(second, batches(b.train))
    assert not same(first, second) and not same(first, batches(c.train))
    assert same(batches(a.valid), batches(b.valid))


def test_workers_change_nothing(make):
    alone, two = make(noise=.2, num_workers=0), make(noise=.2, num_workers=2)
    assert two.train.fake_l.num_workers == 2
    for _ in range(2): assert same(batches(alone.train), batches(two.train))
    assert same(batches(alone.valid), batches(two.valid))


def test_a_fit_ends_in_the_same_weights_with_and_without_workers():
    def weights(num_workers):
        dls = digits(bs=24, valid_pct=1557, noise=.4, num_workers=num_workers)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(.5), nn.Linear(16, 10))
        learn = Learner(dls, model)
        with learn.no_logging(): learn.fit(2, 1e-2)
        return [p.detach().clone() for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(weights(0), weights(2), strict=True))


def test_global_random_states_are_left_alone(make):
    def states(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    before = states()
    dls = make(noise=.4)
    noisy(dls, .1, seed=1).train.new()
    assert states() == before


def test_looking_does_not_change_what_comes_next(make, monkeypatch):
    a, b = make(seed=5), make(seed=5)
    shown = []
    monkeypatch.setattr(type(a.train_ds), 'show', lambda self, *o: shown.append(o))
    a.show_batch(max_n=3)
    first = batches(b.train)
    assert torch.equal(shown[0][0], first[0][0][:3]) and torch.equal(shown[0][1], first[0][1][:3])
    assert same(batches(a.train), first)


# --- label noise ---------------------------------------------------------------------------------------------------

def test_noise_is_only_in_the_training_part(make):
    clean, told = make(), make(noise=.5)
    assert torch.equal(told.train_ds.x, clean.train_ds.x)
    assert torch.equal(told.train_ds.clean, clean.train_ds.y) and not torch.equal(told.train_ds.y, clean.train_ds.y)
    assert same(batches(told.valid), batches(clean.valid))
    assert torch.equal(told.valid_ds.clean, told.valid_ds.y)


def test_the_images_keep_their_true_labels():
    raw = load_digits()
    label = {im.tobytes(): t for im, t in zip(raw.images, raw.target)}
    dls = digits(noise=.5)
    for ds, y in ((dls.train_ds, dls.train_ds.clean), (dls.valid_ds, dls.valid_ds.y)):
        assert [label[ds.decode_x(x).double().numpy().tobytes()] for x in ds.x] == y.tolist()


def test_noise_while_loading_is_noise_afterwards(make):
    clean, at_once, after = make(seed=9), make(noise=.3, seed=9), noisy(make(seed=9), .3, seed=9)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches(clean.train), batches(at_once.train.new()), strict=True))
    for _ in range(2): assert same(batches(at_once.train), batches(after.train))
    again = noisy(after, .3, seed=10)
    assert torch.equal(again.train_ds.clean, after.train_ds.clean)
    assert not torch.equal(again.train_ds.y, after.train_ds.y)


def test_exactly_so_many_labels_are_redrawn_and_uniformly():
    # A "class" that no draw can give (c - 1 is the largest) marks the untouched labels, so every redrawn one is seen.
    y = torch.full((20_000,), 10)
    new = redraw(y, .37, 10, seed=0)
    drawn = new[new != 10]
    assert len(drawn) == 7400
    # Chi-square against uniform: for this fixed seed the outcome is fixed; over seeds it would fail one time in 1000.
    assert stats.chisquare(drawn.bincount(minlength=10).numpy()).pvalue > 1e-3
    # Which items: their places are uniform too (Kolmogorov-Smirnov, same error rate).
    assert stats.kstest((new != 10).nonzero()[:, 0].numpy() / 20_000, 'uniform').pvalue > 1e-3


def test_the_true_error_rate_is_the_stated_one():
    n, q, c = 50_000, .4, 10
    y = torch.arange(n) % c
    rate, expected = (redraw(y, q, c, seed=0) != y).float().mean().item(), q * (c - 1) / c
    sd = math.sqrt(q * (c - 1) / c / c / n)             # given round(q n) redrawn, each is wrong with probability 9/10
    assert abs(rate - expected) < 3.3 * sd              # two-sided, one seed in 1000 would fail


def test_split_and_noise_draw_from_different_streams():
    # With one stream, permutation(n) of the split and of the noise would start alike: compare over seeds.
    n = 1000
    overlap = []
    for seed in range(30):
        _, valid = split(n, .5, seed)
        chosen = redraw(torch.full((n,), 3), .5, 3, seed) != 3
        overlap.append(chosen[valid].float().mean().item())
    assert abs(np.mean(overlap) - .5) < 3.3 * .5 / math.sqrt(30 * 500)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(4, 60), c=st.integers(1, 12), q=st.floats(0, 1), seed=st.integers(0, 2**70))
def test_noisy_for_every_fraction(n, c, q, seed):
    y = torch.arange(n) % c
    dls = loaders(Labelled(torch.arange(n)[:, None], y, range(c)), bs=1, valid_pct=1, seed=seed)
    told = noisy(dls, q, seed)
    ds = told.train_ds
    assert (ds.y != ds.clean).sum() <= round(q * (n - 1))
    assert torch.equal(ds.clean, y[ds.x[:, 0]]) and torch.equal(told.valid_ds.y, y[told.valid_ds.x[:, 0]])
    assert ds.y.dtype == torch.int64 and 0 <= ds.y.min() and ds.y.max() < c
    # every label redrawn, seen through a mark outside the classes
    assert (redraw(torch.full((n,), c), q, c, seed) != c).sum() == round(q * n)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 400), valid=st.floats(0, 1) | st.integers(-2, 402), seed=st.integers(0, 2**40))
def test_split_for_every_size(n, valid, seed):
    wanted = valid if isinstance(valid, int) else round(valid * n)
    if not 0 < wanted < n:
        with pytest.raises(ValueError, match='valid_pct='): split(n, valid, seed)
        return
    a, b = split(n, valid, seed)
    assert len(b) == wanted and sorted([*a.tolist(), *b.tolist()]) == list(range(n))


def test_the_setting_of_240_images():
    for pct in (.8664, 1557):
        dls = digits(bs=24, valid_pct=pct)
        assert (len(dls.train_ds), len(dls.valid_ds), len(dls.train)) == (240, 1557, 10)


# --- bad input -----------------------------------------------------------------------------------------------------

wrong_values = st.one_of(
    st.tuples(st.just('noise'), st.floats().filter(lambda v: not 0 <= v <= 1)),
    st.tuples(st.sampled_from(['seed', 'num_workers']), st.integers(max_value=-1)),
    st.tuples(st.just('bs'), st.integers(max_value=0) | st.integers(1439)),
    st.tuples(st.just('valid_pct'), st.floats().filter(lambda v: not 0 <= v <= 1) | st.floats(0, 2e-4)
              | st.floats(.9998, 1) | st.integers(max_value=0) | st.integers(1797)))
wrong_types = st.tuples(st.sampled_from(['noise', 'seed', 'num_workers', 'bs', 'valid_pct']),
                        st.sampled_from(['1', None, True, [1], 1j, b'1']))


@settings(max_examples=80, deadline=None)
@given(wrong_values)
@example(('noise', math.nan))
@example(('valid_pct', math.nan))
def test_a_wrong_value_is_named_with_its_range(bad):
    name, value = bad
    with pytest.raises(ValueError) as e: digits(**{name: value})
    assert f'{name}={value!r}' in str(e.value) and 'allowed' in str(e.value)


@settings(max_examples=40, deadline=None)
@given(wrong_types | st.tuples(st.sampled_from(['seed', 'bs', 'num_workers']), st.floats()))
def test_a_wrong_type_is_named_too(bad):
    name, value = bad
    with pytest.raises(TypeError) as e: digits(**{name: value})
    assert f'{name}={value!r} must be' in str(e.value)


@pytest.mark.parametrize('kw, error, words', [
    (dict(vocab_size=0), ValueError, 'vocab_size=0 is outside the allowed range, from 1 up'),
    (dict(seq_len=-3), ValueError, 'seq_len=-3 is outside the allowed range, from 1 up'),
    (dict(per_package=0), ValueError, 'per_package=0'),
    (dict(seq_len=1.5), TypeError, 'seq_len=1.5 must be an int'),
    (dict(packages='torch'), TypeError, "packages='torch' must be a list or tuple"),
    (dict(packages=None), TypeError, 'packages=None must be a list or tuple'),
    (dict(packages=('torch', 3)), TypeError, "('torch', 3) must be a list or tuple of package names"),
    (dict(packages=('torch',)), ValueError, 'at least two names'),
    (dict(packages=('torch', 'torch')), ValueError, 'each once'),
    (dict(packages=('numpy', 'torhc')), ValueError, "'torhc' is not the name of an installed package; allowed are"),
    (dict(packages=('numpy', 'torch.nn')), ValueError, "'torch.nn' is not the name"),
    (dict(packages=('numpy', '__main__')), ValueError, "'__main__' is not the name"),
    (dict(packages=('numpy', 'math')), ValueError, "'math' is not the name"),
    (dict(noise=math.nan), ValueError, 'noise=nan'), (dict(noise='.4'), TypeError, "noise='.4'"),
    (dict(seed=-1), ValueError, 'seed=-1'), (dict(bs=10**6), ValueError, 'bs=1000000'),
    (dict(valid_pct=10**6), ValueError, 'valid_pct=1000000')])
def test_docstrings_refuses(kw, error, words):
    with pytest.raises(error) as e: text(**kw)
    assert words in str(e.value)


@pytest.mark.parametrize('what', ['dls', None, 3, DataLoaders.from_dsets([(1, 2)], [(1, 2)], bs=1, num_workers=0),
                                  SimpleNamespace(train_ds=[1])])
def test_noisy_refuses_what_has_no_labels_it_knows(what):
    with pytest.raises(TypeError, match='dls must hold a `Labelled` training set'): noisy(what, .1)


def test_loaders_refuses_other_data():
    with pytest.raises(TypeError, match='data must be a `Labelled`, not list'): loaders([(1, 2)])


# --- the corpus ----------------------------------------------------------------------------------------------------

def fake_package(folder):
    pkg = folder/'zfake'
    (pkg/'sub').mkdir(parents=True); (pkg/'tests').mkdir()
    doc = lambda word: f'"""{word} ' + 'reads the number of words here and keeps them all for later use"""'
    (pkg/'__init__.py').write_text('raise RuntimeError("imported")\n')
    (pkg/'sub/a.py').write_text(f'def f():\n    {doc("alpha zfake")}\nclass C:\n    {doc("beta")}\n'
                               f'    def m(self):\n        {doc("gamma")}\n')
    (pkg/'sub/b.py').write_text(f'async def g():\n    {doc("alpha ZFAKE")}\ndef h():\n    "too short"\n')
    (pkg/'tests/c.py').write_text(f'def t():\n    {doc("delta")}\n')
    (pkg/'escape.py').write_text('pattern = "\\d"\n')       # Python warns of this one when it parses the file
    (pkg/'broken.py').write_text('def f(:\n')
    (pkg/'latin.py').write_bytes(b'def f():\n    "\xe9\xe9"\n')


def test_corpus_reads_sources_without_running_them(tmp_path, monkeypatch):
    fake_package(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        rows = [t.split()[0] for t, c in corpus(('zfake', 'networkx'), 5) if c == 0]
    assert sorted(rows) == ['alpha', 'beta', 'gamma']   # not the repeat, the test, the short, the broken
    assert 'zfake' not in sys.modules and not caught
    assert not {m.split('.')[0] for m in set(sys.modules) - before} & {'zfake', 'networkx'}


def test_nothing_is_imported_by_docstrings():
    code = ("import sys\nfrom sam_explained.data import docstrings\nbefore = set(sys.modules)\n"
            "docstrings(packages=('networkx', 'sympy'), per_package=20, bs=4)\n"
            "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
            "assert 'networkx' not in before and 'sympy' not in before, 'choose other packages for this test'\n"
            "assert not new & {'networkx', 'sympy'}, new")
    subprocess.run([sys.executable, '-c', code], check=True)


def test_file_system_order_does_not_matter(monkeypatch):
    from pathlib import Path
    corpus.cache_clear()
    a = corpus(SMALL, 30)
    rglob = Path.rglob
    monkeypatch.setattr(Path, 'rglob', lambda self, pat: reversed(list(rglob(self, pat))))
    corpus.cache_clear()
    assert corpus(SMALL, 30) == a


def test_no_text_names_its_package_and_none_is_there_twice():
    rows = corpus()
    hidden = naming(PACKAGES)
    seen = [tuple(words_of(t, hidden)) for t, _ in rows]
    assert len(set(seen)) == len(seen) and min(map(len, seen)) >= 8
    for dls in (docstrings(vocab_size=10**6), docstrings(seed=1)):
        words = dls.vocab[0]
        assert not [w for w in words for p in PACKAGES if p in w]
        assert not {'np', 'pd', 'plt', 'nx', 'mpl'} & set(words)


def test_the_vocabulary_comes_from_the_training_part_only():
    rows = corpus(SMALL, 60)
    words = [set(words_of(t, naming(SMALL))) for t, _ in rows]
    train, valid = split(len(rows), .5, 4)
    here, there = (set().union(*(words[i] for i in part)) for part in (train, valid))
    dls = text(valid_pct=.5, seed=4, vocab_size=10**6)
    assert set(dls.vocab[0][2:]) == here and there - here
    count = {w: sum(w in words[i] for i in train) for w in here}
    top = text(valid_pct=.5, seed=4, vocab_size=50).vocab[0][2:]
    assert top == sorted(here, key=lambda w: (-count[w], w))[:50]


def test_a_row_is_the_beginning_of_its_text():
    rows, dls = corpus(SMALL, 60), text(seq_len=12, vocab_size=10**6)
    train, _ = split(len(rows), .2)
    for i, x, y in zip(train[:40], dls.train_ds.x, dls.train_ds.y):
        assert dls.train_ds.decode((x, y)) == (' '.join(words_of(rows[i][0], naming(SMALL))[:12]), SMALL[rows[i][1]])
    assert dls.train_ds.x.shape == (96, 12) and dls.train_ds.x.dtype == torch.int64
    assert dls.encode('zyzzyva').tolist() == [[1] + [0] * 11]


# --- with fastai ---------------------------------------------------------------------------------------------------

def model_for(dls):
    torch.manual_seed(0)
    if dls.c == 10: return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(nn.EmbeddingBag(len(dls.vocab[0]), 8, padding_idx=0), nn.Linear(8, dls.c))


def test_export_and_load(make, tmp_path):
    dls = make()
    learn = Learner(dls, model_for(dls), metrics=accuracy, path=tmp_path)
    with learn.no_logging(): learn.fit(1, 1e-2)
    raw = load_digits().images[:3] if dls.c == 10 else ['A path between two nodes.', 'The sum over an axis.', 'zyzzyva']
    expected = learn.get_preds(dl=learn.dls.test_dl(raw))[0]
    learn.export('small.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                 # fastai's reminder that pickles can hold anything
        again = load_learner(tmp_path/'small.pkl')
    assert len(again.dls.train_ds) == 0 and again.dls.vocab == dls.vocab
    assert torch.equal(again.get_preds(dl=again.dls.test_dl(raw))[0], expected)
    label, index, probs = again.predict(raw[0])
    torch.testing.assert_close(probs, expected[0])      # a batch of one, so not to the last bit
    assert label == dls.train_ds.classes[int(index)]


def test_predictions_come_in_the_order_of_the_data(make):
    dls = make(num_workers=0)
    learn = Learner(dls, model_for(dls))
    for ds_idx, ds in ((0, dls.train_ds), (1, dls.valid_ds)):
        preds, targets = learn.get_preds(ds_idx=ds_idx)
        assert torch.equal(targets, ds.y)
        torch.testing.assert_close(preds, learn.model(ds.x).softmax(1).detach())


def test_show_draws(make, monkeypatch):
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    plt.close('all')
    tables = []
    monkeypatch.setattr('sam_explained.data.display_df', tables.append)
    dls = make()
    learn = Learner(dls, model_for(dls))
    dls.show_batch(max_n=2)
    learn.show_results(max_n=2)
    if dls.c == 10: assert [len(plt.figure(i).axes) for i in plt.get_fignums()] == [2, 2]
    else: assert len(tables) == 2 and list(tables[1]) == ['label', 'prediction', 'input'] and tables[1].shape == (2, 3)
    plt.close('all')
