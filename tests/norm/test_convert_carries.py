"""What convert and to_batch_norm take over from a layer, and what they refuse: nothing is dropped in silence."""

import collections
import copy
import gc

import pytest
import torch
from layer_kinds import SHAPES
from test_convert import train
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.testing import assert_close

from mbn import convert, norm_layers, second_forward, to_batch_norm
from mbn.norm.convert import NORMS

norms = pytest.mark.parametrize("norm", NORMS)
X = torch.randn(SHAPES["2d"], generator=torch.Generator().manual_seed(0))

# Hooks.


def hooked(layer, seen):
    """Register each kind of hook, and return the handles."""
    always = {"always_call": True}
    return [
        layer.register_forward_hook(lambda m, x, y: seen.append(("forward", m))),
        layer.register_forward_hook(lambda m, x, k, y: seen.append(("kwargs", m)), with_kwargs=True),
        layer.register_forward_hook(lambda m, x, y: seen.append(("always", m)), **always),
        layer.register_forward_hook(lambda m, x, k, y: seen.append(("always, kwargs", m)), with_kwargs=True, **always),
        layer.register_forward_pre_hook(lambda m, x: seen.append(("pre", m))),
        layer.register_forward_pre_hook(lambda m, x, k: seen.append(("pre, kwargs", m)), with_kwargs=True),
        layer.register_full_backward_pre_hook(lambda m, dy: seen.append(("backward pre", m))),
        layer.register_full_backward_hook(lambda m, dx, dy: seen.append(("backward", m))),
    ]


@norms
def test_hooks_are_carried_over_and_their_handles_still_remove_them(norm):
    old, seen = nn.BatchNorm2d(3), []
    handles = hooked(old, seen)
    x = X.clone().requires_grad_()
    old(x).sum().backward()
    expected = [kind for kind, _ in seen]
    assert len(expected) == 8

    seen.clear()
    model = convert(nn.Sequential(old), norm)
    gc.collect()
    model(x).sum().backward()
    assert seen == [(kind, model[0]) for kind in expected]
    handles.pop(1).remove()

    seen.clear()
    back = to_batch_norm(model)
    back(x).sum().backward()
    assert seen == [(kind, back[0]) for kind in expected if kind != "kwargs"]
    for handle in handles:
        handle.remove()

    seen.clear()
    model(x).sum().backward()
    assert seen == []


def test_a_hook_that_is_always_called_is_called_after_an_error():
    old, seen = nn.BatchNorm2d(3), []
    hooked(old, seen)
    with pytest.raises(ValueError, match="expects a 4D input"):
        convert(nn.Sequential(old))(X[0])
    assert [kind for kind, _ in seen if "always" in kind] == ["always", "always, kwargs"]


def test_a_hook_that_changes_the_output_still_does():
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    model[0].register_forward_hook(lambda module, x, y: y + 1)
    before = model(X)
    assert_close(convert(model)(X), before)


# Attributes, and places outside of the modules.

Pair = collections.namedtuple("Pair", "first second")


class Holder(nn.Module):
    """Holds its layers in every way that torch does not know of."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.listed = [self.a, "name", [self.b, None]]
        self.pair = Pair(self.a, (1, self.b))
        self.named = {"a": self.a, self.b: {"b": [self.b]}}
        self.some = {self.a}
        self.listed.append(self.listed)
        self.__dict__["hidden"] = self.a

    def forward(self, x):
        x = self.listed[2][0](self.listed[0](x))
        return self.hidden(self.pair.second[1](x))


@norms
def test_a_layer_that_is_also_held_in_lists_tuples_dicts_and_sets_is_exchanged_there(norm):
    model = Holder()
    listed, named = model.listed, model.named
    other = model.pair
    convert(model, norm)
    for again in (model, copy.deepcopy(model)):
        a, b = norm_layers(again)
        assert again.listed[0] is again.pair.first is again.named["a"] is again.hidden is again.a is a
        assert again.listed[2][0] is again.pair.second[1] is again.named[b]["b"][0] is again.b is b
        assert again.some == {a}
        assert list(again.named) == ["a", b]
        assert again.listed[3] is again.listed
    assert model.listed is listed
    assert model.named is named
    assert type(model.pair) is Pair
    assert model.pair is not other
    back = to_batch_norm(model)
    assert back.listed[0] is back.hidden is back.a
    assert isinstance(back.a, nn.BatchNorm2d)
    assert model.hidden is a if (a := norm_layers(model)[0]) else False
    assert_close(back.eval()(X), model.eval()(X))


def test_containers_without_old_layers_are_left():
    model = nn.Sequential(nn.BatchNorm2d(3))
    model.kept = (1, [2, (3,)], {"a": (4,)})
    kept, inner = model.kept, model.kept[1][1]
    convert(model)
    assert model.kept is kept
    assert kept[1][1] is inner


@norms
def test_attributes_that_a_user_has_set_are_carried_over_there_and_back(norm):
    model = nn.Sequential(nn.BatchNorm2d(3))
    model[0].tag, model[0].mask = "stem", torch.ones(3)
    model[0].same = [model[0]]
    convert(model, norm)
    model[0].later = 1
    for layer in (model[0], to_batch_norm(model)[0]):
        assert (layer.tag, layer.later) == ("stem", 1)
        assert torch.equal(layer.mask, torch.ones(3))
        assert layer.same[0] is layer


# The way back.


@norms
@pytest.mark.parametrize("momentum", [None, 0.01])
def test_momentum_comes_back(norm, momentum):
    model = convert(nn.Sequential(nn.BatchNorm2d(3, momentum=momentum)), norm)
    if norm == "bn":
        assert model[0].momentum == momentum
    assert to_batch_norm(model)[0].momentum == momentum


def test_a_momentum_of_none_averages_all_batches_there_and_back():
    old = nn.BatchNorm2d(3, momentum=None)
    new = convert(copy.deepcopy(old), "bn")
    for t in range(3):
        old(X + t), new(X + t)
    back = to_batch_norm(new)
    for layer in (new, back):
        assert_close(layer.running_mean, old.running_mean)
    old(X + 9), back(X + 9)
    assert_close(back.running_mean, old.running_mean)


@pytest.mark.parametrize(("norm", "count"), [("mbn", 3 + 2), ("brn", 3 + 5), ("bn", 3 + 5)])
def test_the_counter_comes_back_so_that_the_statistics_count_as_trained(norm, count):
    """For MBN with what is in the memory beside what the old layer had counted."""
    old = nn.BatchNorm2d(3)
    for _ in range(3):
        old(X)
    settings = {"memory": 2} if norm == "mbn" else {}
    new = train(convert(nn.Sequential(old), norm, forwards=1, **settings), iterations=5)
    assert int(to_batch_norm(new)[0].num_batches_tracked) == count
    untouched = to_batch_norm(convert(nn.BatchNorm2d(3), norm))
    assert untouched.num_batches_tracked == torch.tensor(0)


def test_what_was_forgotten_is_not_counted_on_the_way_back():
    old = nn.BatchNorm2d(3)
    old(torch.randn(4, 3, 2, 2))
    for reset in ("reset_parameters", "reset_running_stats"):
        model = convert(nn.Sequential(copy.deepcopy(old)))
        getattr(model[0], reset)()
        assert to_batch_norm(model)[0].num_batches_tracked == 0
    assert to_batch_norm(convert(nn.Sequential(old)))[0].num_batches_tracked > 0


def test_a_layer_that_convert_did_not_make_becomes_a_plain_batch_norm():
    for dims, torchs in enumerate((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        assert type(to_batch_norm(NORMS["mbn"][dims](3))) is torchs
    assert to_batch_norm(NORMS["bn"][1](3, momentum=0.3)).momentum == 0.3


# SyncBatchNorm.


@norms
def test_sync_batch_norm_converts_where_sync_is_given_for_inputs_of_any_dimensions(norm):
    old = nn.Sequential(nn.SyncBatchNorm(3, momentum=0.3), nn.BatchNorm2d(3))
    for x in (X, X + 1):
        old(x)
    model = convert(copy.deepcopy(old), norm, sync=True)
    assert [layer.sync for layer in norm_layers(model)] == [True, True]
    back = to_batch_norm(model)
    assert [type(layer) for layer in back] == [nn.SyncBatchNorm, nn.BatchNorm2d]
    assert back[0].momentum == 0.3
    for layer in (model[0], back[0], copy.deepcopy(model)[0]):
        for shape in SHAPES.values():
            assert_close(layer.eval()(X.new_ones(shape)), old[0].eval()(X.new_ones(shape)))
    with pytest.raises(ValueError, match="expects a 4D input"):
        model[1](X[..., 0])


def test_a_process_group_reaches_every_layer_and_a_sync_batch_norm_keeps_its_own():
    """Any object will do: without processes nobody asks it."""

    class Group:
        def __deepcopy__(self, memo):
            raise TypeError("cannot be copied")

    own, given = Group(), Group()

    def groups(**settings):
        model = nn.Sequential(nn.SyncBatchNorm(3, process_group=own), nn.BatchNorm2d(3))
        model = convert(model, **settings)
        assert [layer.sync for layer in model] == [True, True]
        assert to_batch_norm(model)[0].process_group is model[0].process_group
        return [layer.process_group for layer in model]

    assert groups(sync=True) == [own, None]
    assert groups(sync=True, process_group=given) == [given, given]
    assert groups(process_group=given) == [given, given]


# What is refused.


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def changed(change):
    layer = nn.BatchNorm2d(3)
    change(layer)
    return layer


def set_attribute(name, value):
    return lambda layer: setattr(layer, name, value)


# For each: the words of what to do. The first ones stand against the way back too.
BOTH_WAYS = {
    "parametrized": (lambda m: parametrize.register_parametrization(m, "weight", Doubled()), "remove_parametrizations"),
    "pruned": (
        lambda m: prune.l1_unstructured(m, "weight", amount=1),
        r"prune\.remove",
    ),
    "pruned bias": (lambda m: prune.identity(m, "bias"), r"prune\.remove"),
    "forward": (lambda m: setattr(m, "forward", m.forward), "has a forward that .*remove_hook_from_module"),
    "train": (lambda m: setattr(m, "train", lambda mode: m), "has a train that was set on this one object"),
    "state dict": (lambda m: m.register_state_dict_post_hook(lambda *_: None), "on its state dict.* remove them"),
    "loading": (
        lambda m: m.register_load_state_dict_post_hook(lambda *_: None),
        "on its state dict.* remove them",
    ),
    "parameter": (lambda m: m.register_parameter("scale", nn.Parameter(torch.ones(3))), "has a tensor 'scale'"),
    "buffer": (lambda m: m.register_buffer("steps", torch.ones(3)), "has a tensor 'steps'"),
}
ONE_WAY = {
    "compiled": (lambda m: m.compile(), r"call its compile\(\) after"),
    "no parameter": (lambda m: (delattr(m, "weight"), setattr(m, "weight", torch.ones(3))), "has a tensor 'weight'"),
    "no statistics": (set_attribute("running_mean", None), r"track_running_stats=True, or convert\(model, replace="),
    "not tracked": (set_attribute("track_running_stats", False), "track_running_stats=True"),
    "our name": (set_attribute("phase", "train"), "has an attribute 'phase', which means something else in a"),
    "child of our name": (lambda m: m.add_module("forwards", nn.ReLU()), "has an attribute 'forwards'"),
    "shapes": (set_attribute("running_var", torch.ones(2)), "of different shapes"),
}


@norms
@pytest.mark.parametrize(("change", "words"), (BOTH_WAYS | ONE_WAY).values(), ids=BOTH_WAYS | ONE_WAY)
def test_what_cannot_be_carried_over_is_refused_by_name_and_nothing_is_changed(norm, change, words):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(changed(change)))
    model[0].register_forward_hook(lambda *_: None)
    layers = list(model.modules())
    with pytest.raises(TypeError, match=r"^layer 1\.0, a \w+, cannot be converted: it .*" + words) as caught:
        convert(model, norm)
    assert ". " not in str(caught.value)
    assert all(a is b for a, b in zip(layers, model.modules(), strict=True))
    assert model[0]._forward_hooks


@norms
def test_a_batch_norm_that_torch_compile_has_wrapped_is_refused(norm):
    """The wrapper would go on calling the old layer; around more than one layer it calls the new ones."""
    model = nn.Sequential(nn.BatchNorm2d(3), torch.compile(nn.BatchNorm2d(3), backend="eager"))
    with pytest.raises(TypeError, match=r"layer 1 is a BatchNorm inside torch\.compile: call torch\.compile after"):
        convert(model, norm)
    assert type(model[0]) is nn.BatchNorm2d
    block = convert(torch.compile(nn.Sequential(nn.BatchNorm2d(3)), backend="eager"), norm, forwards=1)
    before = copy.deepcopy(block.state_dict())
    block(torch.randn(4, 3, 2, 2))
    assert not all(map(torch.equal, before.values(), block.state_dict().values()))
    model = nn.Sequential(torch.compile(NORMS[norm][1](3), backend="eager"))
    with pytest.raises(
        TypeError, match=r"layer 0 is a BatchStatisticsNorm inside torch\.compile: call torch\.compile "
    ):
        to_batch_norm(model)


@norms
@pytest.mark.parametrize(("change", "words"), BOTH_WAYS.values(), ids=BOTH_WAYS)
def test_so_it_is_on_the_way_back(norm, change, words):
    model = convert(nn.Sequential(nn.BatchNorm2d(3)), norm)
    change(model[0])
    with pytest.raises(TypeError, match=r"^layer 0, a \w+, cannot become a BatchNorm: it .*" + words) as caught:
        to_batch_norm(model)
    assert ". " not in str(caught.value)


def test_a_subclass_of_ours_with_a_forward_of_its_own_is_refused_on_the_way_back():
    class Ours(NORMS["mbn"][1]):
        def forward(self, x):
            return super().forward(x).relu()

    with pytest.raises(TypeError, match="the module, a Ours, cannot become a BatchNorm: it has a forward of its own"):
        to_batch_norm(Ours(3))


@pytest.mark.parametrize(
    ("layer", "settings", "words"),
    [
        (nn.LazyBatchNorm2d(), {}, "has no channels yet: run the network once before"),
        (nn.SyncBatchNorm(3), {}, r"convert\(model, sync=True\) makes layers that do so too"),
        (nn.SyncBatchNorm(3), {"sync": False}, r"convert\(model, sync=True\)"),
        (nn.BatchNorm2d(3, track_running_stats=False), {}, "has no running statistics"),
        (nn.BatchNorm2d(3, eps=0.0), {}, r"layer 0, a BatchNorm2d, .* has eps=0\.0, which must be above 0"),
    ],
)
def test_layers_that_never_convert_are_refused(layer, settings, words):
    with pytest.raises(TypeError, match=words):
        convert(nn.Sequential(layer), **settings)


@pytest.mark.parametrize("name", ["FSDPModule", "FullyShardedDataParallel"])
def test_a_module_that_fsdp_has_sharded_is_refused_both_ways(name):
    """It is known by the name of a class of its own."""
    sharded = type("Sharded", (type(name, (), {}), nn.Sequential), {})
    model = nn.Sequential(sharded(nn.BatchNorm2d(3)))
    with pytest.raises(TypeError, match="call convert before FSDP"):
        convert(model)
    assert type(model[0][0]) is nn.BatchNorm2d
    with pytest.raises(RuntimeError, match=r"load its full state dict .* into the same network without FSDP"):
        to_batch_norm(sharded(convert(nn.BatchNorm2d(3))))


def test_a_momentum_of_0_holds_the_averages_as_in_torch():
    old = nn.BatchNorm2d(3, momentum=0.0)
    for forwards in (1, 2):
        layer, x = convert(copy.deepcopy(old), "bn", forwards=forwards), torch.randn(4, 3, 2, 2)
        old(x)
        if forwards == 2:
            second_forward(layer, x)
        else:
            layer(x)
        assert_close([layer.running_mean, layer.running_var], [old.running_mean, old.running_var], atol=0, rtol=0)
        assert to_batch_norm(layer).momentum == 0


def test_a_momentum_that_is_no_share_is_refused_by_the_layers_name():
    net = nn.Sequential(nn.BatchNorm2d(3, momentum=1.5))
    with pytest.raises(TypeError, match=r"layer 0, a BatchNorm2d, .* momentum=1.5, which must be in \[0, 1\] or None"):
        convert(net, "bn")
    assert convert(net, "bn", momentum=0.5)[0].momentum == 0.5
