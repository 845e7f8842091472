"""`sam_explained.reuse`: the same gradient with less work, and every reason not to try."""
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from conftest import same_bits
from processes import in_processes
from torch import nn
from torch.utils.checkpoint import checkpoint

from sam_explained.core import ascent, frozen_stats, perturbed, same_rng, two_pass
from sam_explained.cost import _Work as Products
from sam_explained.reuse import Prefix, suffix_for
from sam_explained.sam import norm_params


# Models --------------------------------------------------------------------------------------------------------

class Basic(nn.Module):
    "A residual block in torchvision's way: one in-place ReLU, called twice"
    def __init__(self, a, b, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b)) if a != b else None

    def forward(self, x):
        short = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += short
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(Basic(4, 4), Basic(4, 4))
        self.layer2 = nn.Sequential(Basic(4, 6, 2), Basic(6, 6))
        self.layer3 = nn.Sequential(Basic(6, 8, 2), Basic(8, 8))
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Attention(nn.Module):
    def __init__(self, d, drop):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(d), nn.MultiheadAttention(d, 2, drop, batch_first=True)
        self.norm2 = nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Dropout(drop), nn.Linear(2 * d, d))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    "Like timm's: a class token and positions that belong to the model itself, functional dropout in between"
    def __init__(self, d=8, depth=4, drop=.3):
        super().__init__()
        self.patch_embed, self.drop = nn.Conv2d(3, d, 4, 4), drop
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, d)), nn.Parameter(torch.randn(1, 5, d))
        self.blocks = nn.Sequential(*[Attention(d, drop) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 3)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        x = self.blocks(F.dropout(x, self.drop, self.training))
        return self.head(self.norm(x)[:, 0])


def mlp():
    nested = nn.Sequential(nn.Linear(8, 8), nn.Dropout(.4), nn.ReLU())
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nested, nn.Linear(8, 8), nn.Tanh(),
                         nn.Linear(8, 3))


def under(*names): return lambda m: [w for n in names for w in m.get_submodule(n).parameters()]
def everything(m): return list(m.parameters())


cases = {  # name: (model, what is perturbed, is the whole model run in both passes?)
    'mlp last': (mlp, under('6'), False),
    'mlp last two': (mlp, under('4', '6'), False),
    'mlp middle only': (mlp, under('4'), False),
    'mlp inside a nested block': (mlp, under('3'), False),
    'mlp one bias': (mlp, lambda m: [m[4].bias], False),
    'mlp everything': (mlp, everything, True),
    'resnet last stage': (ResNet, under('layer3', 'fc'), False),
    'resnet last two': (ResNet, under('layer2', 'layer3', 'fc'), False),
    'resnet fc': (ResNet, under('fc'), False),
    'resnet norm': (ResNet, norm_params, False),
    'resnet norm of a late block': (ResNet, under('layer3.1.bn2'), False),
    'resnet second convolution of a block': (ResNet, under('layer2.1.conv2'), False),
    'resnet everything': (ResNet, everything, True),
    'vit last blocks': (ViT, under('blocks.2', 'blocks.3', 'norm', 'head'), False),
    'vit head': (ViT, under('head'), False),
    'vit norm': (ViT, norm_params, False),
    'vit out_proj, a weight of a module never called': (ViT, under('blocks.2.attn.out_proj'), False),
    'vit positions, used by the model itself': (ViT, lambda m: [m.pos_embed], True),
    'vit everything': (ViT, everything, True),
}


# Two passes, in full and with reuse ----------------------------------------------------------------------------

def step(make, choose, reuse, steps=2, masked=False, prepare=None, fresh_draw=False):
    "All that two steps leave behind, the products they take, and the warnings"
    torch.manual_seed(4)
    model = make().double()
    if prepare: prepare(model)
    weights = choose(model)
    x, y = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.randint(0, 3, (6,))
    masks = [(torch.rand_like(w) < .5).to(w.dtype) for w in weights] if masked else None
    prefix, clean = Prefix(model, weights), []
    def loss(): return F.cross_entropy(model(x), y)
    with warnings.catch_warnings(record=True) as told, Products() as work:
        warnings.simplefilter('always')
        for _ in range(steps):
            closure = prefix.twice(loss) if reuse else loss
            if fresh_draw: new_draw(closure, weights, model)
            else: clean.append(two_pass(closure, weights, .5, model=model, masks=masks))
            with torch.no_grad(): [w.sub_(.1 * w.grad) for w in model.parameters() if w.grad is not None]
    told = [w for w in told if 'runs in both passes' in str(w.message)]
    assert not any('forward' in vars(m) for m in model.modules())
    grads = {n: w.grad for n, w in model.named_parameters() if w.grad is not None}
    return dict(model.state_dict(), rng=torch.get_rng_state(), **{f'clean {i}': c for i, c in enumerate(clean)},
                **{f'grad {n}': g for n, g in grads.items()}), work.flops, told


def new_draw(closure, weights, model):
    "Two passes, each with its own dropout"
    grads = torch.autograd.grad(closure(), weights)
    with perturbed(weights, ascent(grads, .5)), frozen_stats(model): closure().backward()


def compare(make, choose, full, warned=0, **kwargs):
    a, work, _ = step(make, choose, False, **kwargs)
    b, less, told = step(make, choose, True, **kwargs)
    bad = [k for k in a if not same_bits([a[k]], [b[k]])]
    assert a.keys() == b.keys() and not bad, f'differ in {bad}'
    assert (less == work) if full else (less < work), f'{less} products for {work}'
    assert len(told) == warned, [str(w.message) for w in told]
    return work, less


@pytest.mark.parametrize('name', cases)
@pytest.mark.parametrize('masked', [False, True])
def test_all_is_equal_to_two_full_passes_to_the_last_bit(name, masked):
    compare(*cases[name], masked=masked)


def test_against_two_passes_written_by_hand():
    torch.manual_seed(0)
    model, x, y = ResNet().double(), torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.randint(0, 3, (6,))
    weights = under('layer3', 'fc')(model)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    two_pass(Prefix(model, weights).twice(lambda: F.cross_entropy(model(x), y)), weights, .5, model=model)
    ours, stats = [w.grad.clone() for w in model.parameters()], model.bn1.running_mean.clone()
    model.load_state_dict(start)
    g = torch.autograd.grad(F.cross_entropy(model(x), y), weights)
    torch.testing.assert_close(stats, model.bn1.running_mean, rtol=0, atol=0)
    length = sum((t**2).sum() for t in g).sqrt()
    for w, t in zip(weights, g): w.data += .5 * t / length
    for a, b in zip(ours, torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_in_the_second_pass_only_the_suffix_makes_products():
    "For the last of six equal layers: 6 + 1 forward, 1 upward, 6 + 5 backward; one unit is 2 * 6 * 8 * 8"
    def make(): return nn.Sequential(nn.Flatten(), Thin(), *[nn.Linear(8, 8) for _ in range(6)])
    work, less = compare(make, under('7'), False, steps=1)
    assert less / (2 * 6 * 8 * 8) == 6 + 1 + 1 + 6 + 5
    assert work - less == 5 * (2 * 6 * 8 * 8)                       # five forward products not made


class Thin(nn.Module):
    def forward(self, x): return x[:, :8].contiguous()


def test_accumulation_of_two_batches():
    def run(reuse):
        torch.manual_seed(1)
        model = ViT().double()
        weights, prefix = under('blocks.3', 'head')(model), None
        prefix = Prefix(model, weights)
        for seed in (1, 2):
            x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            def loss(): return model(x).square().mean()
            two_pass(prefix.twice(loss) if reuse else loss, weights, .3, model=model)
        return [w.grad for w in model.parameters()]
    assert same_bits(run(False), run(True))


def test_shards():
    def run(reuse):
        torch.manual_seed(1)
        model, xs = mlp().double(), torch.randn(3, 4, 3, 8, 8, dtype=torch.float64)
        prefix, weights = Prefix(model, under('6')(model)), under('6')(model)
        shards = [lambda x=x: model(x).square().mean() for x in xs]
        two_pass([prefix.twice(s) for s in shards] if reuse else shards, weights, .3, model=model)
        return [w.grad for w in model.parameters()]
    assert same_bits(run(False), run(True))


# Reasons to run again ------------------------------------------------------------------------------------------

class Parts(nn.Module):
    "Three layers and a forward to be filled in"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(192, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.relu, self.drop, self.n, self.seen = nn.ReLU(inplace=True), nn.Dropout(.5), 1., []


class Twice(Parts):
    def forward(self, x): return self.c(self.b(self.b(self.a(x.flatten(1))).tanh()))

class Late(Parts):
    def forward(self, x): return self.c(self.b(h := self.b(self.a(x.flatten(1))).tanh())) + self.c(self.b(h))

class InPlace(Parts):
    def forward(self, x): return self.c(self.relu(self.b(self.a(x.flatten(1)))))

class InPlaceAfterTheCut(Parts):
    "The suffix changes what the prefix has returned; on the changed value the rest of the forward would differ"
    def forward(self, x):
        h = self.b(self.a(x.flatten(1)))
        k = self.c.weight.sum() * 1
        return self.c(h.mul_(3).add_(k))

class Counter(Parts):
    "The second run of the prefix differs from the first"
    def forward(self, x):
        self.n += .5
        return self.c(self.b(self.a(x.flatten(1)) * self.n))

class Memory(Parts):
    "The suffix leaves something behind that the prefix reads"
    def forward(self, x):
        h = self.a(x.flatten(1))
        h = self.b(h + sum(self.seen))
        out = self.c(h)
        self.seen = [h.detach()]
        return out

class Grown(Memory):
    "The same, in place, in a list"
    def forward(self, x):
        h = self.b(self.a(x.flatten(1)) + sum(self.seen))
        self.seen.append(h.detach())
        return self.c(h)

class Private(Parts):
    def forward(self, x):
        self._n = getattr(self, '_n', 0) + 1
        return self.c(self.b(self.a(x.flatten(1)) * self._n))

class Bag(nn.Module):
    def __init__(self): super().__init__(); self.lin = nn.Linear(6, 6)
    def forward(self, x): return dict(x=self.lin(x))

class OwnBag(nn.Linear):
    def forward(self, x): return dict(x=super().forward(x))

class Dicts(Parts):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(192, 6), Bag()
    def forward(self, x): return self.c(self.b(self.a(x.flatten(1)))['x'])

class OwnDicts(Dicts):
    def __init__(self):
        super().__init__()
        self.b = OwnBag(6, 6)

class Changed(Dicts):
    "The suffix replaces what is in the returned dict"
    def forward(self, x):
        bag = self.b(self.a(x.flatten(1)))
        bag['x'] = self.c(bag['x'])
        return bag['x']

class Reaches(Parts):
    "The model uses a weight of `c` before `c` is called"
    def forward(self, x): return self.c(self.b(self.a(x.flatten(1)) * self.c.weight.mean()))

class Within(Parts):
    "...and without autograd"
    def forward(self, x):
        h = self.a(x.flatten(1))
        with torch.no_grad(): k = self.c.weight.square().mean()
        return self.c(self.b(h * k))

class Random(Parts):
    def forward(self, x): return self.c(self.drop(self.b(self.drop(self.a(x.flatten(1))))))

class Branch(Parts):
    "What the parent draws at random between two modules of the prefix, and a way around the second"
    def forward(self, x):
        h = F.dropout(self.a(x.flatten(1)), .5)
        return self.c(F.dropout(self.b(h), .5) + h)

class Outside(Parts):
    "The parent reads something that is not in the model, between two modules of the prefix"
    scale = 1.
    def forward(self, x):
        Outside.scale *= 1.1
        return self.c(self.b(self.a(x.flatten(1)) * Outside.scale))

class Observed(Parts):
    "A tensor hook in the suffix on an output of the prefix"
    def forward(self, x):
        h = self.b(self.a(x.flatten(1)))
        h.register_hook(lambda g: 2 * g)
        return self.c(h)

class Checkpointed(Parts):
    def forward(self, x):
        h = checkpoint(lambda x: self.b(self.a(x).tanh()), x.flatten(1), use_reentrant=False)
        return self.c(h)

class CheckpointedModule(Parts):
    def __init__(self): super().__init__(); self.b = nn.Sequential(nn.Linear(6, 6), nn.Dropout(.5), nn.Tanh())
    def forward(self, x): return self.c(checkpoint(self.b, self.a(x.flatten(1)), use_reentrant=False))

class Spectral(Parts):
    def __init__(self):
        super().__init__()
        self.b = torch.nn.utils.parametrizations.spectral_norm(self.b)
    def forward(self, x): return self.c(self.b(self.a(x.flatten(1))))

class Chain(Parts):
    def forward(self, x): return self.c(self.b(self.a(x.flatten(1))))


late = under('c')


@pytest.mark.parametrize('make, full, warned', [
    (Twice, False, 1), (Late, False, 1),                              # `a` is still skipped, `b` is not
    (InPlace, False, 0), (InPlaceAfterTheCut, False, 0),
    (Counter, True, 1), (Memory, True, 1), (Grown, True, 1), (Private, True, 1), (Spectral, True, 1),
    (Dicts, False, 0), (Changed, False, 0), (OwnDicts, False, 1),
    (Reaches, False, 0), (Within, False, 0), (Random, False, 0), (Observed, False, 0), (Chain, False, 0)])
def test_unusual_models(make, full, warned): compare(make, late, full, warned)


def test_a_parent_that_changes_its_mind(monkeypatch):
    "`a` sees the same input again, `b` does not"
    def run(reuse):
        monkeypatch.setattr(Outside, 'scale', 1.)
        return step(Outside, late, reuse, steps=1)
    (a, work, _), (b, less, told) = run(False), run(True)
    assert all(same_bits([a[k]], [b[k]]) for k in a) and work - less == 2 * 6 * 192 * 6 and not told


@pytest.mark.parametrize('change', ['new', 'in place', 'equal', 'keyword'])
def test_another_batch_in_the_second_pass(change):
    def run(reuse):
        torch.manual_seed(0)
        model, x, passes = Chain().double(), torch.randn(6, 192, dtype=torch.float64), []
        def loss():
            passes.append(0)
            if change == 'in place' and len(passes) == 2: x.mul_(2)
            if change == 'keyword': return model(x=x * len(passes)).square().mean()
            return model(x * len(passes) if change == 'new' else x.clone() if change == 'equal' else x).square().mean()
        two_pass(Prefix(model, late(model)).twice(loss) if reuse else loss, late(model), .5, model=model)
        return [w.grad for w in model.parameters()]
    assert same_bits(run(False), run(True))


@pytest.mark.parametrize('make', [Checkpointed, CheckpointedModule])
def test_checkpointing(make): compare(make, late, False)


def test_checkpointing_with_the_backward_inside_the_second_pass():
    def run(reuse):
        torch.manual_seed(0)
        model, x = CheckpointedModule().double(), torch.randn(6, 192, dtype=torch.float64)
        prefix, weights, again = Prefix(model, late(model)), late(model), same_rng()
        with prefix.first() if reuse else nullcontext(): loss = model(x).square().mean()
        eps = ascent(torch.autograd.grad(loss, weights), .5)
        with perturbed(weights, eps), again, prefix.second() if reuse else nullcontext():
            model(x).square().mean().backward()
        return [w.grad for w in model.parameters()]
    assert same_bits(run(False), run(True))


def test_a_branch_computed_by_the_parent_is_right_if_not_always_to_the_last_bit():
    a, b = (step(Branch, late, reuse)[0] for reuse in (False, True))
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-12, atol=1e-14)


def test_in_place_reuse_skips_what_it_may():
    "Of three layers the first is skipped, the one whose output is changed in place is not"
    chain, place = (compare(make, late, False, steps=1) for make in (Chain, InPlace))
    one = 2 * 6 * 6 * 6
    assert chain[0] - chain[1] == 2 * 6 * 192 * 6 + one and place[0] - place[1] == 2 * 6 * 192 * 6


def test_fresh_draws():
    "Without a fixed draw: a random prefix runs again, a random suffix is no obstacle"
    compare(Random, late, True, 1, fresh_draw=True)
    class After(Parts):
        def forward(self, x): return self.drop(self.c(self.b(self.a(x.flatten(1)))))
    compare(After, late, False, 0, fresh_draw=True)


hooks = {
    'forward': lambda m: m.a.register_forward_hook(lambda *_: None),
    'pre': lambda m: m.a.register_forward_pre_hook(lambda *_: None),
    'backward': lambda m: m.b.register_full_backward_hook(lambda *_: None),
    'pre of the model': lambda m: m.register_forward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize('name', hooks)
def test_hooks_in_the_prefix_see_both_passes(name): compare(Chain, late, True, 1, prepare=hooks[name])


@pytest.mark.parametrize('hook', [lambda m: m.c.register_forward_hook(lambda *_: None),
                                  lambda m: m.register_forward_hook(lambda *_: None)])
def test_hooks_after_the_cut_are_no_obstacle(hook): compare(Chain, late, False, prepare=hook)


def test_a_hook_that_changes_its_module_sees_both_passes():
    def prepare(m):
        calls = []
        def louder(mod, args, out):
            calls.append(0)
            return out * len(calls)
        m.a.register_forward_hook(louder)
    compare(Chain, late, True, 1, prepare=prepare)


def test_hooks_on_all_modules():
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try: compare(Chain, late, True, 1)
    finally: hook.remove()


def test_a_compiled_module_is_not_taken_apart():
    compare(Chain, late, True, 1, prepare=lambda m: m.a.compile(backend='eager'))


def test_unused_params():
    class Unused(Chain):
        def __init__(self): super().__init__(); self.d = nn.Linear(2, 2)
    def choose(m): return under('d')(m)
    told = step(Unused, choose, True)[2]
    assert len(told) == 1 and 'none of params' in str(told[0].message)


def test_more_is_perturbed_than_was_said():
    "A weight of the prefix that changes between the passes is seen by its version"
    def run(reuse):
        torch.manual_seed(0)
        model, x = Chain().double(), torch.randn(6, 3, 8, 8, dtype=torch.float64)
        def loss(): return model(x).square().mean()
        prefix = Prefix(model, late(model))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            two_pass(prefix.twice(loss) if reuse else loss, everything(model), .5, model=model)
        return [w.grad for w in model.parameters()]
    assert same_bits(run(False), run(True))


# Order, errors, cleaning up ------------------------------------------------------------------------------------

@pytest.mark.parametrize('which', [0, 1])
def test_an_error_in_either_pass_leaves_no_trace(which):
    model = Chain()
    own = model.b.forward
    model.b.forward = lambda x: own(x)                                  # a forward of its own, as some libraries set
    mine, passes, prefix = model.b.forward, [], Prefix(model, late(model))
    def loss():
        passes.append(0)
        out = model(torch.randn(2, 192))
        if len(passes) == which + 1: raise KeyboardInterrupt
        return out.sum()
    with pytest.raises(KeyboardInterrupt): two_pass(prefix.twice(loss), late(model), .5, model=model)
    assert model.b.forward is mine and 'forward' not in vars(model.a) and prefix.watch is None
    with pytest.raises(RuntimeError, match='first'):
        with prefix.second(): pass
    two_pass(prefix.twice(loss), late(model), .5, model=model)          # and it works again


def test_second_before_first():
    prefix = Prefix(model := Chain(), late(model))
    with pytest.raises(RuntimeError, match='first'):
        with prefix.second(): pass


def test_nothing_is_held_after_the_second_pass():
    import gc
    import weakref
    model, found = Chain(), []
    model.c.register_forward_pre_hook(lambda m, args: found.append(weakref.ref(args[0])))
    prefix = Prefix(model, late(model))
    two_pass(prefix.twice(lambda: model(torch.randn(2, 192)).sum()), late(model), .5, model=model)
    gc.collect()
    assert len(found) == 2 and all(r() is None for r in found)


@pytest.mark.parametrize('params', [[], ()])
def test_no_params(params):
    with pytest.raises(ValueError, match='params'): Prefix(Chain(), params)


# Several processes ---------------------------------------------------------------------------------------------

def in_process(rank):
    "Two steps of SAM with a perturbation of its own per process, in full and with reuse, and what each leaves"
    found = {}
    for make, names in ((ResNet, ('layer3', 'fc')), (ViT, ('blocks.3', 'head'))):
        for reuse in (False, True):
            torch.manual_seed(0)
            net = make().double()
            model, weights = nn.parallel.DistributedDataParallel(net), under(*names)(net)
            x = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
            prefix = Prefix(model, weights)
            with warnings.catch_warnings(record=True) as told, Products() as work:
                warnings.simplefilter('always')
                for _ in range(2): ddp_step(model, x, weights, prefix if reuse else None)
            told = [str(w.message) for w in told if 'runs in both' in str(w.message)]
            state = [w.grad for w in net.parameters()] + [b.clone() for b in net.buffers()]
            found[make.__name__, reuse] = state, work.flops, told
    return found


def ddp_step(model, x, weights, prefix):
    again, first, second = same_rng(), nullcontext(), nullcontext()
    if prefix: first, second = prefix.first(), prefix.second()
    with model.no_sync():
        with first: loss = model(x).square().mean()
        eps = ascent(torch.autograd.grad(loss, weights), .5)
    with perturbed(weights, eps), frozen_stats(model), again:
        with second: loss = model(x).square().mean()
        loss.backward()


def test_two_processes(tmp_path):
    ranks = in_processes(in_process, 2, tmp_path)
    for found in ranks:
        for name in ('ResNet', 'ViT'):
            (full, work, _), (ours, less, told) = found[name, False], found[name, True]
            assert same_bits(full, ours) and less < work and not told
            n = len([w for w in (ResNet if name == 'ResNet' else ViT)().parameters()])
            assert same_bits(ours[:n], ranks[0][name, True][0][:n])          # the gradients have been averaged


# A budget ------------------------------------------------------------------------------------------------------

def test_suffix_for_a_resnet():
    model, x = ResNet(), torch.randn(2, 3, 8, 8)
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    costs = {}
    for budget in (1.05, 1.2, 1.5, 1.9, 2):
        names, cost = suffix_for(model, x, budget)
        assert cost <= budget and names[-1] == 'fc'
        costs[budget] = len(names)
    assert list(costs.values()) == sorted(costs.values()) and suffix_for(model, x, 2)[0][0] == 'conv1'
    assert same_bits(before, dict(model.state_dict())) and torch.equal(rng, torch.get_rng_state()) and model.training
    side, macs = 4, lambda a, b, k, s: a * b * k * k * s * s           # side of the maps after the pool
    stage = lambda a, b, s: macs(a, b, 3, s) + 3 * macs(b, b, 3, s) + (macs(a, b, 1, s) if a != b else 0)
    parts = [3 * 4 * 9 * 64, stage(4, 4, side), stage(4, 6, side // 2), stage(6, 8, side // 4), 8 * 3]
    names, cost = suffix_for(model, x, 1 + (parts[-1] + parts[-2]) / sum(parts) + 1e-6)
    assert names == ['layer3.0', 'layer3.1', 'fc'] and cost == pytest.approx(1 + (parts[-1] + parts[-2]) / sum(parts))


def test_suffix_for_a_vit_and_its_use():
    model, x = ViT(depth=8), torch.randn(2, 3, 8, 8)
    names, cost = suffix_for(model, (x,), 1.4)
    assert names[-2:] == ['norm', 'head'] and names[0].startswith('blocks.') and 1.25 < cost <= 1.4
    compare(lambda: ViT(depth=8), under(*names), False)


@pytest.mark.parametrize('budget', [1, 1., .9, 2.01, float('nan'), float('inf'), -1])
def test_a_budget_out_of_range(budget):
    with pytest.raises(ValueError, match='budget'): suffix_for(Chain(), torch.randn(2, 192), budget)


@pytest.mark.parametrize('budget', ['1.3', None, True])
def test_a_budget_of_the_wrong_type(budget):
    with pytest.raises(TypeError, match='budget'): suffix_for(Chain(), torch.randn(2, 192), budget)


def test_a_budget_below_the_last_block_and_a_model_without_products():
    for layer, message in ((nn.Linear(4, 4), 'too small'), (nn.LayerNorm(4), 'model')):
        with pytest.raises(ValueError, match=message): suffix_for(nn.Sequential(layer), torch.randn(2, 4), 1.5)
