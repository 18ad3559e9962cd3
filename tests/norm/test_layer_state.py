"""State: however torch and loaders take a layer apart and put it together again, it trains as before."""

import copy
import io
import itertools
import pickle
import random

import pytest
import torch
from layer_kinds import KINDS, inputs, kinds, make, one_or_two, remember, set_changing, snapshot, trained, unchanged
from torch import nn
from torch.testing import assert_close

from mbn import held, second_forward
from mbn.norm.base import norm_layers
from mbn.norm.convert import NORMS
from mbn.norm.memories import AllMemories

# The values with which all layers here are built; those of KINDS are the state's.
OTHERS = {"brn": {"r_max": 2.75, "d_max": 4.1}, "mbn": {"lam": 0.3}}


def like(layer, device=None):
    """A new layer of the same class with other values of what a schedule changes."""
    norm = next(norm for norm, layers in NORMS.items() if type(layer) in layers)
    settings = {name: getattr(layer, name) for name in layer.settings} | OTHERS.get(norm, {})
    return type(layer)(3, device=device, dtype=layer.weight.dtype, **settings)


def scheduled(layer):
    return {name: getattr(layer, name) for name in ("lam", "r_max", "d_max") if hasattr(layer, name)}


def the_same(layer, other):
    """The same state and settings now, and after two more batches, one value each of lambda, r_max and d_max."""
    layer, other = copy.deepcopy(layer), copy.deepcopy(other)
    assert scheduled(layer) == scheduled(other)
    assert repr(layer) == repr(other)
    for t in range(3):
        assert unchanged(snapshot(layer), other)
        x = inputs(4, 3, 2, 2, at=t, dtype=layer.weight.dtype)
        ys = [remember(each.train(), x) for each in (layer, other)]
        assert torch.equal(*ys)
        for each in (layer, other):
            set_changing(each, 0.2 * t, 1 + t, 0.3 * t)
    assert torch.equal(layer.eval()(x), other.eval()(x))


def batch_norm(trained=True, tracked=True):
    """A BatchNorm's state dict."""
    layer = nn.BatchNorm2d(3).double()
    if trained:
        layer(inputs(4, 3, 2, 2))
    return {name: value for name, value in layer.state_dict().items() if tracked or name != "num_batches_tracked"}


# What is in the state dict.


@kinds
def test_what_a_schedule_changes_is_in_the_state_dict_and_comes_back_with_its_digits(kind):
    for value in (0.1, 0.7, 1 / 3, 0.123456789, 0.0, 1.0):
        layer = make(kind, dtype=torch.float32)
        set_changing(layer, value, 1 + value, 5 * value)
        saved, other = io.BytesIO(), make(kind, dtype=torch.float32)
        torch.save(layer.state_dict(), saved)
        saved.seek(0)
        other.load_state_dict(torch.load(saved, weights_only=True))
        digits = 6 if value in (1 / 3, 0.123456789) else 15  # float32 holds no more of these
        assert scheduled(other) == pytest.approx(scheduled(layer), rel=10**-digits)
        assert (scheduled(other) == scheduled(layer)) == (digits == 15 or kind == "bn")


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bn"])
def test_a_state_dict_of_an_older_version_leaves_them_as_they_are(kind, assign):
    layer = trained(kind)
    other, twin = like(layer), like(layer)
    old = {name: value for name, value in snapshot(layer).items() if name != layer.scheduled}
    other.load_state_dict(old, assign=assign)
    twin.load_state_dict(old | {layer.scheduled: snapshot(twin)[layer.scheduled]})
    assert scheduled(other) == OTHERS[kind.split()[0]]
    the_same(other, twin)


@kinds
def test_a_state_dict_in_half_precision_is_kept_in_float32(kind):
    """As a whole checkpoint cast to bfloat16."""
    layer = trained(kind, dtype=torch.float32)
    narrow = {name: v.bfloat16() if v.is_floating_point() else v for name, v in snapshot(layer).items()}
    for assign, device in ((False, None), (True, "meta")):
        other = like(layer, device)
        other.load_state_dict(narrow, assign=assign)
        assert {getattr(other, name).dtype for name in other.statistics} == {torch.float32}
        assert all(torch.equal(getattr(other, name), narrow[name].float()) for name in other.statistics)
        assert narrow["running_mean"].dtype == torch.bfloat16
        assert remember(other, inputs(4, 3, 2, 2).to(other.weight.dtype)).isfinite().all()


@pytest.mark.parametrize("device", [None, "meta"])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("trained", [True, False])
@kinds
def test_a_batch_norms_state_loads_with_and_without_a_counter(kind, trained, tracked, device):
    """Strictly, and also into a layer on the meta device."""
    state = batch_norm(trained, tracked)
    layer = like(make(kind), device)
    layer.load_state_dict(state, assign=device == "meta")
    twin = nn.BatchNorm2d(3).double()
    twin.load_state_dict({"num_batches_tracked": torch.tensor(0)} | state)
    x = inputs(4, 3, 2, 2)
    assert_close(layer.eval()(x), twin.eval()(x), atol=1e-12, rtol=1e-12)
    own = like(make(kind))
    own.load_state_dict(state)
    the_same(layer, own)
    if kind != "bn":  # whose own counter stays
        waits = layer.num_batches_tracked if kind == "brn" else layer.memory_count[0] / -layer.pretrained_batches
        assert waits == trained


# From the meta device, and back to the start.


@kinds
@one_or_two
def test_a_layer_from_the_meta_device_trains_with_the_state_that_is_assigned(kind, forwards):
    layer = trained(kind, forwards=forwards)
    other = like(layer, "meta")
    missing = other.load_state_dict(snapshot(layer), assign=True)
    assert (missing.missing_keys, missing.unexpected_keys) == ([], [])
    assert {t.device.type for t in (*other.parameters(), *other.buffers())} == {"cpu"}
    the_same(layer, other)


@kinds
def test_from_nothing_reset_parameters_gives_a_new_layer(kind):
    """to_empty brings memory that nobody has written; what the constructor was given stays."""
    new = like(trained(kind))
    ways = {
        "meta": like(new, "meta").to_empty(device="cpu"),
        "skip_init": nn.utils.skip_init(
            type(new), 3, dtype=torch.float64, **{n: getattr(new, n) for n in new.settings}
        ),
        "there and back": trained_as(new).to_empty(device="meta").to_empty(device="cpu"),
        "trained": trained_as(new),
    }
    for way, layer in ways.items():
        if way != "trained":
            for tensor in (*layer.parameters(), *layer.buffers()):
                if tensor is not getattr(layer, layer.scheduled, None):  # which to_empty has filled again
                    tensor.data.fill_(77)
        layer.reset_parameters()
        the_same(layer, new)


def trained_as(layer):
    layer = copy.deepcopy(layer)
    for t in range(2):
        remember(layer, inputs(4, 3, 2, 2, at=t))
    with torch.no_grad():
        for p in layer.parameters():
            p += 1
    return layer


@kinds
def test_a_loop_that_resets_every_module_forgets_what_an_earlier_fold_has_left(kind):
    net, new = (nn.Sequential(nn.Flatten(), make(kind, 3, 2), nn.Identity()) for _ in range(2))
    remember(net[1], inputs(4, 3))
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert unchanged(snapshot(new), net)
    assert hasattr(net[1], "reset_running_stats")


# Loaders that set tensors on their own.


@pytest.mark.parametrize("device", [None, "meta"])
@kinds
def test_a_state_that_is_loaded_one_tensor_at_a_time_is_whole_in_any_order(kind, device):
    layer = trained(kind)
    state, shuffle = snapshot(layer), random.Random(1).shuffle
    for _ in range(8):
        keys, other = [*state], like(layer, device)
        shuffle(keys)
        for key in keys:
            other.load_state_dict({key: state[key].clone()}, strict=False, assign=True)
        the_same(layer, other)


@kinds
def test_a_batch_norms_state_that_is_loaded_one_tensor_at_a_time_is_what_evaluation_uses(kind):
    state, x = batch_norm(), inputs(4, 3, 2, 2)
    whole = make(kind).eval()
    whole.load_state_dict(state)
    for keys in itertools.permutations(state):
        layer = make(kind)
        for key in keys:
            layer.load_state_dict({key: state[key].clone()}, strict=False, assign=True)
        assert torch.equal(layer.eval()(x), whole(x))
        assert remember(layer.train(), x).isfinite().all()


def set_one_by_one(layer, state):
    """As transformers 5 does."""
    for name, value in state.items():
        setattr(layer, name, nn.Parameter(value) if name in layer._parameters else value)


def broadcast(layer, state):
    """As DistributedDataParallel does at its construction, where only the first process has loaded something."""
    with torch.no_grad():
        for name, value in state.items():
            layer.get_parameter(name).copy_(value) if name in layer._parameters else layer.get_buffer(name).copy_(value)


@pytest.mark.parametrize("of", ["our state", "a batch norm's"])
@pytest.mark.parametrize("way", [set_one_by_one, broadcast])
@kinds
def test_tensors_that_are_set_or_written_without_the_layers_knowledge_are_its_state(kind, way, of):
    """Lambda, r_max and d_max, and statistics that wait for the first batch, included."""
    layer = trained(kind)
    if of == "a batch norm's":
        layer.load_state_dict(batch_norm())
    other = like(layer)
    way(other, snapshot(layer))
    the_same(layer, other)
    if of == "a batch norm's" and kind.startswith("mbn"):
        mu, _ = other.training_statistics(torch.zeros(4, 3, 2, 2).double())
        assert_close(mu, other.running_mean * 10 * other.lam / (1 + 10 * other.lam))
        remember(other, inputs(4, 3, 2, 2))
        assert other.memory_count[:3].tolist() == [16, 160, 0]


def test_memories_that_are_shared_by_layers_know_when_a_layer_was_given_others():
    """Silence would leave what is entered in tensors that no layer has."""
    layers = [make("mbn paper", 3, 2) for _ in range(2)]
    memories = AllMemories(layers)
    layers[1].load_state_dict(snapshot(layers[1]), assign=True)
    for layer in layers:
        layer(inputs(4, 3))
    with pytest.raises(RuntimeError, match="make a new one"):
        memories.enter()


# Copies.


def copies_of(layer):
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    return [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False)]


class CopiesInside(nn.Module):
    """Copies its layer before and after it is used."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.copies = layer, []

    def forward(self, x):
        self.copies += copies_of(self.layer)
        y = self.layer(x)
        self.copies += copies_of(self.layer)
        return y


@pytest.mark.parametrize("inside", ["nothing", "held", "second forward", "shared memories"])
@kinds
@one_or_two
def test_a_copy_is_a_normal_layer_wherever_it_was_made(kind, forwards, inside):
    layer, x = trained(kind, forwards=forwards), inputs(4, 3, 2, 2)
    before, net = copies_of(layer)[0], CopiesInside(layer)
    if inside == "held":
        with held(net):
            net(x)
    elif inside == "second forward" and forwards == 2:
        second_forward(net, x)
    elif inside == "shared memories":
        AllMemories([layer])
        net(x)
    else:
        net.copies += copies_of(layer)
    for each in net.copies:
        assert (each.phase, each.noted, each.deferred) == ("first", (), False)
        if inside != "nothing" and not (kind == "bn" and each in net.copies[3:]):  # whose averages move at once
            the_same(each, before)


@one_or_two
@kinds
def test_the_first_replica_of_data_parallel_remembers_for_the_layer(kind, forwards):
    """Its replicas live for one forward; the first has the layer's own buffers, and the others copies."""

    class Parallel(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            ys = []
            for i, part in enumerate(x.chunk(2)):
                replica = self.layer._replicate_for_data_parallel()
                for name, p in self.layer.named_parameters():
                    setattr(replica, name, p.view_as(p))
                if i > 0:
                    replica._buffers = {name: b.clone() for name, b in self.layer.named_buffers()}
                ys.append(replica(part))
            return torch.cat(ys)

    layer = trained(kind, forwards=forwards)
    twin, x = copy.deepcopy(layer), inputs(8, 3, 2, 2)
    net = Parallel(layer)
    second_forward(net, x) if forwards == 2 else net(x)
    remember(twin, x[:4])
    assert unchanged(snapshot(twin), layer)
    the_same(layer, twin)


@kinds
def test_copies_of_a_whole_network_find_their_own_layers(kind):
    net, x = nn.Sequential(nn.Conv2d(3, 3, 1), make(kind, 3, dtype=torch.float32, forwards=2)), torch.randn(4, 3, 2, 2)
    second_forward(net, x)
    for other in copies_of(net):
        before = snapshot(net)
        second_forward(other, 2 * x)
        assert unchanged(before, net)
        assert not unchanged(before, other)
        assert norm_layers(other) == [other[1]]
