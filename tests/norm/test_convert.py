"""convert and to_batch_norm: what they promise to keep, for every norm and number of dimensions."""

import copy
import inspect
import itertools
import typing

import numpy as np
import pytest
import torch
from layer_kinds import SHAPES, shapes, snapshot, unchanged
from torch import nn
from torch.testing import assert_close

import mbn
from mbn import MemorizedBatchNorm2d, convert, freeze, second_forward, set_lambda, to_batch_norm, unfreeze
from mbn.norm.base import BatchStatisticsNorm, norm_layers
from mbn.norm.convert import NORMS

TORCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
PREFIX = {"mbn": "MemorizedBatchNorm", "brn": "BatchRenorm", "bn": "BatchNorm"}

norms = pytest.mark.parametrize("norm", NORMS)


def trained(dims=2, shape=SHAPES["2d"], **settings):
    """A BatchNorm whose parameters and running statistics are not the initial ones."""
    layer = TORCH[dims](3, **settings)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(3))
    for t in range(3):
        layer(2 * torch.randn(shape) + t)
    return layer


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4, eps=1e-3),
        nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)),
        nn.Flatten(),
        nn.Linear(4, 5),
        nn.BatchNorm1d(5, eps=1e-4),
    )


def train(model, *, iterations=3, size=(4, 3, 5, 5)):
    """Let all of the model's statistics move, whichever forward moves them."""
    two = any(layer.forwards == 2 for layer in norm_layers(model))
    with torch.no_grad():
        for t in range(iterations):
            x = 2 * torch.randn(size) + t
            second_forward(model, x) if two else model(x)
    return model


def batch_norms(model):
    return [layer for layer in model.modules() if isinstance(layer, tuple(TORCH.values()))]


# What is kept.


@norms
@shapes
def test_evaluation_is_that_of_the_batch_norm_there_and_back(norm, dims, shape):
    old, x = trained(dims, shape).eval(), 3 * torch.randn(shape)
    new = convert(copy.deepcopy(old), norm)
    assert type(new) is getattr(mbn, f"{PREFIX[norm]}{dims}d")
    assert_close(new(x), old(x))
    train(new.train(), iterations=4, size=shape)
    back = to_batch_norm(new)
    assert type(back) is TORCH[dims]
    assert_close(back.eval()(x), new.eval()(x))
    again = convert(TORCH[dims](3), norm)
    again.load_state_dict(back.state_dict(), strict=True)
    assert_close(again.eval()(x), new(x))


@norms
def test_parameters_are_the_same_objects(norm):
    """So that an optimiser that was made before still works."""
    model = network()
    before = dict(model.named_parameters())
    assert convert(model, norm) is model
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert batch_norms(model) == []
    root = nn.BatchNorm2d(3)
    assert convert(root, norm).weight is root.weight


@norms
def test_each_layer_keeps_its_eps_mode_and_requires_grad_there_and_back(norm):
    model = network()
    model[1].eval()
    model[5].weight.requires_grad_(False)
    expected = [(1e-3, False, True), (1e-5, True, True), (1e-4, True, False)]
    convert(model, norm)
    for layers in (norm_layers(model), batch_norms(to_batch_norm(model))):
        assert [(layer.eps, layer.training, layer.weight.requires_grad) for layer in layers] == expected


@norms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_kept_and_statistics_have_at_least_float32(norm, dtype):
    old = trained().to(dtype)
    new = convert(copy.deepcopy(old), norm)
    assert new.weight.dtype == new.bias.dtype == dtype
    for name in new.statistics:
        assert getattr(new, name).dtype == torch.promote_types(dtype, torch.float32)
    back = to_batch_norm(new)
    wide = torch.promote_types(dtype, torch.float32)
    assert {t.dtype for t in (back.weight, back.bias, back.running_mean, back.running_var)} == {wide}
    x = torch.randn(SHAPES["2d"]).to(dtype)
    for layer in (new, back):
        assert layer.eval()(x).dtype == dtype
        assert_close(layer(x), old.eval()(x), atol=1e-2 if dtype.itemsize == 2 else 1e-6, rtol=2e-2)


@norms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_way_back_keeps_variances_that_half_precision_has_not(norm, dtype):
    """In float16 they would be 0, and the output beta."""
    model = nn.Sequential(nn.BatchNorm2d(3, eps=1e-12), nn.BatchNorm2d(3))
    model[1].weight = model[0].weight
    model[0].running_var.fill_(1e-9)
    model = convert(model.eval(), norm).to(dtype)
    x = (3e-5 * torch.randn(SHAPES["2d"])).to(dtype)
    back = to_batch_norm(model)
    assert_close(back(x), model(x), rtol=0, atol=2e-2)
    assert model(x).std() > 0.5
    assert back[0].weight is back[1].weight


@norms
def test_device_is_kept(norm):
    """The meta device stands for an accelerator."""
    model = convert(nn.Sequential(nn.BatchNorm2d(3, device="meta")), norm)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    back = to_batch_norm(model)
    assert {t.device.type for t in (*back.parameters(), *back.buffers())} == {"meta"}


@pytest.mark.parametrize(
    ("norm", "settings", "buffer", "values"),
    [("mbn", {"lam": 0.1}, "lam_tensor", 0.1), ("brn", {"r_max": 2.1, "d_max": 0.1}, "bounds", [2.1, 0.1])],
)
def test_settings_survive_the_meta_device_and_casts(norm, settings, buffer, values):
    """They are numbers in tensors, which have no values on the meta device; in float64 they are exact."""
    layer = convert(nn.BatchNorm2d(3, device="meta"), norm, **settings).to_empty(device="cpu")
    assert torch.equal(getattr(layer, buffer), torch.tensor(values))
    assert torch.equal(getattr(layer.half().double(), buffer), torch.tensor(values, dtype=torch.float64))


class Shared(nn.Module):
    """One BatchNorm under two parents, and twice in one of them."""

    def __init__(self):
        super().__init__()
        self.a = nn.BatchNorm2d(3)
        self.b = self.a
        self.inner = nn.Sequential(nn.ReLU(), self.a)

    def forward(self, x):
        return self.inner(self.b(self.a(x)))


@norms
def test_a_shared_layer_stays_one_layer(norm):
    model = convert(Shared(), norm)
    assert isinstance(model.a, BatchStatisticsNorm)
    assert model.a is model.b is model.inner[1]
    if norm == "mbn":
        second_forward(model, torch.randn(SHAPES["2d"]))
        assert model.a.memory_count.tolist() == [3 * 4 * 10, *[0] * 19]
    back = to_batch_norm(model)
    assert type(back.a) is nn.BatchNorm2d
    assert back.a is back.b is back.inner[1]


no_bias = pytest.param(
    {"bias": False},
    marks=pytest.mark.skipif(
        "bias" not in inspect.signature(nn.BatchNorm2d).parameters, reason="this torch's BatchNorm has no bias=False"
    ),
)


@norms
@pytest.mark.parametrize("lacks", [{"affine": False}, no_bias])
def test_missing_parameters_stay_missing(norm, lacks):
    old, x = trained(**lacks).eval(), torch.randn(SHAPES["2d"])
    new = convert(copy.deepcopy(old), norm, forwards=1)
    new.load_state_dict(old.state_dict())
    for layer in (new, to_batch_norm(new)):
        assert (layer.weight is None, layer.bias is None) == (old.weight is None, old.bias is None)
        assert layer.affine == old.affine
        assert_close(layer(x), old(x))
    before = snapshot(new)
    new.train()(x.requires_grad_()).square().sum().backward()
    assert not unchanged(before, new)
    assert all(leaf.grad.isfinite().all() for leaf in (x, *new.parameters()))


# For each norm a setting that is not the default.
SET = {"mbn": {"memory": 7, "lam": 0.3}, "brn": {"momentum": 0.2, "forwards": 2}, "bn": {"momentum": 0.2}}


@norms
def test_layers_that_are_ours_already_and_other_layers_are_left_alone(norm):
    others = [nn.GroupNorm(1, 3), nn.InstanceNorm2d(3, affine=True), nn.LayerNorm(5), nn.Conv2d(3, 3, 1)]
    model = train(convert(nn.Sequential(*others, network()), norm, **SET[norm]))
    layers, before = list(model.modules()), snapshot(model)
    convert(model, norm)
    convert(model, norm, **SET[norm])
    assert all(a is b for a, b in zip(layers, model.modules(), strict=True))
    assert all(a is b for a, b in zip(model, others, strict=False))
    assert unchanged(before, model)


@norms
def test_the_rest_of_a_network_that_is_partly_ours_is_converted(norm):
    model = network()
    convert(model[2], norm, **SET[norm])
    ours = model[2][2]
    convert(model, norm)
    assert model[2][2] is ours
    assert [type(layer) for layer in norm_layers(model)] == [NORMS[norm][1], NORMS[norm][1], NORMS[norm][0]]


def test_a_network_may_have_layers_of_two_norms_part_by_part():
    model = network()
    convert(model[2], "brn")
    model[5] = convert(model[5], "bn")
    assert [type(layer).__name__ for layer in norm_layers(model)] == ["BatchRenorm2d", "BatchNorm1d"]


# What is refused.


@pytest.mark.parametrize(
    ("layer", "norm", "settings", "error", "words"),
    [
        (nn.ReLU(), "gn", {}, ValueError, "norm must be one of mbn, brn, bn, not 'gn'"),
        (nn.ReLU(), "mbn", {"lambda_": 1}, TypeError, "'lambda_' here; theirs are memory, .*, pretrained_batches$"),
        (nn.ReLU(), "brn", {"affine": False}, TypeError, "'affine' here; .*, group_size; eps, weight and bias stay"),
        (nn.ReLU(), "bn", {"eps": 1e-3}, TypeError, "'eps' here; theirs are momentum, .*; eps, .* stay"),
        (
            nn.ReLU(),
            "bn",
            {"num_features": 2},
            TypeError,
            "'num_features' here; theirs are momentum, forwards, group_size$",
        ),
        *(
            (
                convert(nn.BatchNorm2d(3), has),
                norm,
                {},
                ValueError,
                rf"layer 1\.0 is a {PREFIX[has]}2d .*='{has}' .*norm='{norm}'",
            )
            for has, norm in itertools.permutations(NORMS, 2)
        ),
        *(
            (
                convert(nn.BatchNorm2d(3), norm),
                norm,
                {name: value},
                ValueError,
                rf"layer 1\.0 is .* not {value!r}: {mend}",
            )
            for norm, name, value, mend in (
                ("mbn", "memory", 40, r"convert\(to_batch_norm\(model\), norm='mbn', memory=40\)"),
                ("mbn", "gradient", "batch", r"convert\(to_batch_norm"),
                ("mbn", "forwards", 1, r"convert\(to_batch_norm"),
                ("mbn", "sync", True, r"convert\(to_batch_norm"),
                ("mbn", "lam", 0.5, "set_lambda"),
                ("brn", "r_max", 2.0, "set_renorm"),
                ("brn", "forwards", 2, r"convert\(to_batch_norm"),
                ("bn", "momentum", 0.2, r"convert\(to_batch_norm"),
            )
        ),
        (nn.ReLU(), "mbn", {"memory": 0}, ValueError, "memory"),
        (nn.ReLU(), "brn", {"r_max": 0.5}, ValueError, "r_max"),
        (nn.ReLU(), "bn", {"momentum": 2}, ValueError, "momentum"),
        *(  # PyYAML reads 1e-3 as a string
            (nn.ReLU(), norm, {name: "1e-3"}, ValueError, f"{word} must be .*1e-3")
            for norm, name, word in (
                ("mbn", "decay", "decay"),
                ("mbn", "lam", "lambda"),
                ("mbn", "pretrained_batches", "pretrained_batches"),
                ("brn", "momentum", "momentum"),
                ("brn", "warmup_steps", "warmup_steps"),
                ("brn", "r_max", "r_max"),
                ("brn", "d_max", "r_max"),
                ("bn", "momentum", "momentum"),
            )
        ),
    ],
)
def test_what_cannot_be_converted_is_refused_in_one_sentence_and_nothing_is_changed(
    layer, norm, settings, error, words
):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(layer), nn.BatchNorm2d(3))
    layers = list(model.modules())
    with pytest.raises(error, match=words) as caught:
        convert(model, norm, **settings)
    assert "\n" not in str(caught.value)
    assert ". " not in str(caught.value)
    assert all(a is b for a, b in zip(layers, model.modules(), strict=True))


def test_a_module_that_is_a_layer_of_ours_is_refused_too():
    with pytest.raises(ValueError, match="the module is a MemorizedBatchNorm2d already, with memory=20 and not 40"):
        convert(MemorizedBatchNorm2d(3), memory=40)


@norms
def test_a_network_without_a_batch_norm_warns_at_every_call(norm):
    model = nn.Sequential(nn.Linear(3, 3), nn.GroupNorm(1, 3))
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"convert found no nn\.BatchNorm1d, 2d or 3d") as caught:
            assert convert(model, norm) is model
        assert [w.filename for w in caught] == [__file__]


def test_a_lazy_batch_norm_can_be_converted_once_it_has_run():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    model(torch.randn(SHAPES["2d"]))
    assert len(norm_layers(convert(model))) == 1


@pytest.mark.parametrize(
    ("norm", "settings"),
    [
        (
            "mbn",
            {"memory": 7, "decay": 0.5, "lam": 0.3, "gradient": "batch", "forwards": 1, "pretrained_batches": 3}
            | {"group_size": 2},
        ),
        ("brn", {"momentum": 0.2, "r_max": 2.0, "d_max": 4.0, "warmup_steps": 5, "forwards": 2, "group_size": 2}),
        ("bn", {"momentum": 0.2, "forwards": 2, "group_size": 2}),
    ],
)
def test_settings_reach_every_layer_by_name(norm, settings):
    for layer in norm_layers(convert(network(), norm, **settings)):
        assert {name: getattr(layer, name) for name in layer.settings} == settings
        for name, value in settings.items():
            assert f"{name}={value!r}" in repr(layer)


def test_the_types_of_the_settings_are_those_of_the_layers():
    """Names, defaults and annotations of the overloads."""
    of_networks = {"replace", "sync", "process_group"}
    not_settings = {"self", "num_features", "eps", "affine", "bias", "device", "dtype", "sync", "process_group"}
    found = {}
    for overload in typing.get_overloads(convert):
        parameters = dict(inspect.signature(overload).parameters)
        parameters.pop("module")
        norm = parameters.pop("norm").annotation
        assert of_networks < set(parameters)
        found[typing.get_args(norm)[0]] = [str(p) for name, p in parameters.items() if name not in of_networks]
    assert found.keys() == NORMS.keys()
    for norm, layers in NORMS.items():
        parameters = inspect.signature(layers[0].__init__).parameters
        assert found[norm] == [str(p) for name, p in parameters.items() if name not in not_settings]
        assert layers[0].settings == tuple(name for name in parameters if name not in not_settings)


# State.


@norms
def test_a_batch_norms_state_dict_loads_strictly_and_stays_what_it_was(norm):
    """A pretrained network's weights: evaluation is the BatchNorm model's, whose statistics wait in the memory."""
    old = train(network())
    new = train(convert(network(), norm))
    state = old.state_dict()
    new.load_state_dict(state, strict=True)
    assert list(state) == list(old.state_dict())
    if norm == "mbn":
        for layer in norm_layers(new):
            assert layer.memory_count.tolist() == [-10, *[0] * 19]
            assert torch.equal(layer.memory_mean[0], layer.running_mean)
    x = torch.randn(4, 3, 5, 5)
    assert_close(new.eval()(x), old.eval()(x))


@norms
def test_a_broken_state_dict_is_refused(norm):
    model = convert(network(), norm)
    state = network().state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(state | {"1.running_meen": torch.zeros(4)})
    del state["1.running_mean"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


def test_a_memorized_layers_own_incomplete_state_is_refused():
    state = MemorizedBatchNorm2d(3).state_dict()
    del state["memory_var"]
    with pytest.raises(RuntimeError, match="memory_var"):
        MemorizedBatchNorm2d(3).load_state_dict(state)


@pytest.mark.parametrize(
    ("norm", "settings", "share"),
    [
        ("mbn", {"pretrained_batches": 9, "decay": 1.0}, 0.1),
        ("mbn", {"pretrained_batches": 0}, 1.0),
        ("brn", {}, 0.01),
        ("bn", {}, 0.1),
    ],
)
def test_a_converted_model_continues_from_the_statistics_it_brought(norm, settings, share):
    """The newest batch has its share of them: the momentum, or one among pretrained_batches others."""
    old = trained()
    new = convert(copy.deepcopy(old), norm, forwards=1, **settings)
    x = torch.randn(SHAPES["2d"]) + 10
    new(x)
    mu = x.mean((0, 2, 3))
    assert_close(new.running_mean, old.running_mean + share * (mu - old.running_mean))


@norms
@pytest.mark.parametrize("own", [True, False])
def test_a_network_made_on_the_meta_device_trains_after_a_state_is_assigned(norm, own):
    """Its own state, or that of the BatchNorms."""
    old = train(network())
    trained = train(convert(copy.deepcopy(old), norm)) if own else old
    with torch.device("meta"):
        model = convert(network(), norm)
    model.load_state_dict(copy.deepcopy(trained.state_dict()), assign=True)
    x = torch.randn(4, 3, 5, 5)
    assert_close(model.eval()(x), trained.eval()(x))
    beside = trained if own else convert(old, norm)
    for again in (model, beside):
        torch.manual_seed(1)
        train(again.train())
    for name, value in beside.state_dict().items():
        assert_close(model.state_dict()[name], value)


@norms
def test_parameters_that_registering_would_move_are_left_where_they_are(norm, monkeypatch):
    """As in accelerate's init_empty_weights, which puts parameters on the meta device, and leaves buffers."""
    register = nn.Module.register_parameter

    def register_empty(module, name, param):
        register(module, name, param)
        if param is not None:
            module._parameters[name] = nn.Parameter(param.to("meta"))

    before = network()
    weights = dict(before.named_parameters())
    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "register_parameter", register_empty)
        after, empty = convert(before, norm), convert(network(), norm)
    assert all(weights[name] is p for name, p in after.named_parameters())
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert {b.device.type for b in empty.buffers()} == {"cpu"}
    empty.load_state_dict(after.state_dict(), assign=True)
    train(empty)


# And back.


@norms
def test_to_batch_norm_leaves_the_original_untouched(norm):
    model = train(convert(network(), norm))
    before, layers = snapshot(model), list(model.modules())
    back = to_batch_norm(model)
    assert norm_layers(back) == []
    ours = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert ours.isdisjoint(t.data_ptr() for t in (*back.parameters(), *back.buffers()))
    back(torch.randn(4, 3, 5, 5)).sum().backward()
    assert all(a is b for a, b in zip(layers, model.modules(), strict=True))
    assert unchanged(before, model)
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    train(model)


def test_bn_keeps_the_old_layers_momentum_unless_another_is_set():
    assert convert(nn.BatchNorm2d(3, momentum=0.3), norm="bn").momentum == 0.3
    assert convert(nn.BatchNorm2d(3, momentum=0.3), norm="bn", momentum=0.2).momentum == 0.2


def test_averages_from_a_batch_norm_that_counted_nothing_are_not_copied_over():
    """BatchNorm had no num_batches_tracked before torch 0.4.1."""
    old = nn.BatchNorm2d(3)
    old.running_mean.fill_(2.0)
    state = {key: value for key, value in old.state_dict().items() if key != "num_batches_tracked"}
    new = convert(nn.BatchNorm2d(3), norm="brn")
    new.load_state_dict(state)
    new(torch.randn(4, 3, 2, 2))
    assert (new.running_mean > 1.9).all()


@pytest.mark.parametrize("module", [nn.Linear, network, "resnet"])
def test_what_is_no_module_is_refused(module):
    with pytest.raises(TypeError, match=r"convert needs a module, such as Network\(\), and not "):
        convert(module)


def test_a_replace_that_is_no_mapping_is_refused():
    with pytest.raises(TypeError, match=r"replace must be \{class: function\}, and not \[1\]"):
        convert(network(), replace=[1])


@pytest.mark.parametrize(
    "function", [to_batch_norm, norm_layers, freeze, unfreeze, lambda module: set_lambda(module, 1)]
)
def test_what_is_no_module_is_refused_in_one_sentence(function):
    with pytest.raises(TypeError, match=r"a module.* and not 'net'"):
        function("net")


def test_settings_of_other_types_are_refused_or_taken_as_numbers():
    with pytest.raises(ValueError, match="sync must be True, False or None, not 'yes'"):
        MemorizedBatchNorm2d(3, sync="yes")
    assert MemorizedBatchNorm2d(3, sync=np.True_).sync is True
    for wrong in (True, 1.0, "2", 3):
        with pytest.raises(ValueError, match="forwards must be 1 or 2, not"):
            MemorizedBatchNorm2d(3, forwards=wrong)
    assert type(MemorizedBatchNorm2d(3, forwards=np.int64(2)).forwards) is int


@pytest.mark.parametrize("replace", [{"Odd": lambda old: old}, {nn.Linear: MemorizedBatchNorm2d}, {nn.ReLU: nn.ReLU()}])
def test_a_wrong_replace_is_refused_whether_it_would_be_used_or_not(replace):
    with pytest.raises(TypeError, match=r"replace must be \{class: function\}, where function\(layer\) returns"):
        convert(network(), replace=replace)
