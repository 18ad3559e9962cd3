"""convert and to_batch_norm: what they promise to keep, for every norm and number of dimensions."""

import copy
import inspect

import pytest
import torch
from kinds import snapshot, unchanged
from torch import nn
from torch.testing import assert_close

import mbn
from mbn import MemorizedBatchNorm2d, convert, second_forward, to_batch_norm
from mbn.norm.base import BatchStatisticsNorm, norm_layers
from mbn.norm.convert import NORMS

TORCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
PREFIX = {"mbn": "MemorizedBatchNorm", "brn": "BatchRenorm", "bn": "BatchNorm"}
SHAPES = {"1d-2D": (4, 3), "1d-3D": (4, 3, 5), "2d": (4, 3, 5, 2), "3d": (4, 3, 2, 3, 2)}

norms = pytest.mark.parametrize("norm", NORMS)
shapes = pytest.mark.parametrize(("dims", "shape"), [(int(k[0]), v) for k, v in SHAPES.items()], ids=SHAPES)


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
def test_evaluation_is_that_of_the_batch_norm(norm, dims, shape):
    old = trained(dims, shape).eval()
    new = convert(copy.deepcopy(old), norm)
    assert type(new) is getattr(mbn, f"{PREFIX[norm]}{dims}d")
    x = 3 * torch.randn(shape)
    assert_close(new(x), old(x))


@norms
def test_parameters_are_the_same_objects(norm):
    model = network()
    before = dict(model.named_parameters())
    assert convert(model, norm) is model
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert batch_norms(model) == []
    assert len(norm_layers(model)) == 3


@norms
def test_an_optimiser_made_before_moves_the_converted_model(norm):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layer = norm_layers(convert(model, norm, forwards=1))[0]
    before = layer.weight.clone()
    model(torch.randn(4, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)


@norms
def test_each_layers_eps_is_kept_there_and_back(norm):
    eps = [1e-3, 1e-5, 1e-4]
    model = convert(network(), norm)
    assert [layer.eps for layer in norm_layers(model)] == eps
    assert [layer.eps for layer in batch_norms(to_batch_norm(model))] == eps


@norms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_kept_and_statistics_have_at_least_float32(norm, dtype):
    old = trained().to(dtype)
    new = convert(copy.deepcopy(old), norm)
    assert new.weight.dtype == new.bias.dtype == dtype
    for name in new.statistics:
        assert getattr(new, name).dtype == torch.promote_types(dtype, torch.float32)
    back = to_batch_norm(new)
    assert back.weight.dtype == back.running_mean.dtype == back.running_var.dtype == dtype
    x = torch.randn(SHAPES["2d"]).to(dtype)
    for layer in (new, back):
        assert_close(layer.eval()(x), old.eval()(x), atol=1e-2 if dtype.itemsize == 2 else 1e-6, rtol=2e-2)


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
    """They are in tensors that no state dict fills, and in float64 they are not a float32's 0.1."""
    layer = convert(nn.BatchNorm2d(3, device="meta"), norm, **settings).to_empty(device="cpu")
    assert torch.equal(getattr(layer, buffer), torch.tensor(values))
    assert torch.equal(getattr(layer.half().double(), buffer), torch.tensor(values, dtype=torch.float64))


@norms
def test_requires_grad_is_kept(norm):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[0].weight.requires_grad_(False)
    for converted in (convert(model, norm), to_batch_norm(model)):
        assert [p.requires_grad for p in converted.parameters()] == [False, True, True, True]


@norms
def test_train_mode_is_kept_layer_by_layer(norm):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[0].eval()
    for converted in (convert(model, norm), to_batch_norm(model)):
        assert [m.training for m in converted] == [False, True]
        assert converted.training


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
        assert model.a.memory_count.count_nonzero() == 3
    back = to_batch_norm(model)
    assert type(back.a) is nn.BatchNorm2d
    assert back.a is back.b is back.inner[1]


@norms
def test_a_batch_norm_without_affine_stays_without(norm):
    old = trained(affine=False).eval()
    new = convert(copy.deepcopy(old), norm)
    assert new.weight is None
    assert new.bias is None
    assert not new.affine
    back = to_batch_norm(new)
    assert back.weight is None
    assert not back.affine
    x = torch.randn(SHAPES["2d"])
    assert_close(new(x), old(x))
    assert_close(back(x), old(x))
    assert new.train()(x.requires_grad_()).requires_grad


@norms
@pytest.mark.skipif(
    "bias" not in inspect.signature(nn.BatchNorm2d).parameters, reason="this torch's BatchNorm has no bias=False"
)
def test_a_batch_norm_without_bias_stays_without(norm):
    old = trained(bias=False).eval()
    new = convert(copy.deepcopy(old), norm, forwards=1)
    assert new.bias is None
    x = torch.randn(SHAPES["2d"])
    assert_close(new(x), old(x))
    assert_close(to_batch_norm(new)(x), old(x))
    assert to_batch_norm(new).bias is None
    new.train()(x).square().sum().backward()
    assert new.weight.grad is not None
    new.load_state_dict(old.state_dict())


@norms
def test_a_batch_norm_without_running_statistics_gets_initial_ones(norm):
    old = nn.BatchNorm2d(3, eps=1e-12, track_running_stats=False)
    new = convert(old, norm, forwards=1)
    assert torch.equal(new.running_mean, torch.zeros(3))
    x = torch.randn(SHAPES["2d"])
    assert_close(new.eval()(x), x)
    new.train()(x)
    assert not torch.equal(new.running_mean, torch.zeros(3))
    bare = convert(nn.BatchNorm2d(3, affine=False, track_running_stats=False), norm, forwards=1)
    assert bare(x).isfinite().all()


@norms
def test_a_batch_norm_as_the_root_is_replaced(norm):
    old = nn.BatchNorm2d(3)
    new = convert(old, norm)
    assert type(new) is NORMS[norm][1]
    assert new.weight is old.weight
    assert type(to_batch_norm(new)) is nn.BatchNorm2d


@norms
def test_a_second_convert_changes_nothing(norm):
    model = train(convert(network(), norm))
    layers, before = norm_layers(model), snapshot(model)
    for again in NORMS:
        convert(model, again)
        assert all(a is b for a, b in zip(layers, norm_layers(model), strict=True))
    assert unchanged(before, model)


@norms
def test_other_layers_are_left_alone(norm):
    others = [nn.GroupNorm(1, 3), nn.InstanceNorm2d(3, affine=True), nn.LayerNorm(3), nn.Conv2d(3, 3, 1)]
    model = convert(nn.Sequential(*others), norm)
    assert all(a is b for a, b in zip(model, others, strict=True))


@norms
def test_a_layer_that_does_more_than_batch_norm_does_not_lose_it(norm):
    """A subclass with its own forward (timm's BatchNormAct2d) is refused or left alone, not cut down in silence."""

    class BatchNormReLU(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    model = nn.Sequential(BatchNormReLU(3)).eval()
    try:
        convert(model, norm)
    except TypeError:
        assert isinstance(model[0], BatchNormReLU)
    assert (model(torch.randn(SHAPES["2d"])) >= 0).all()


# What is refused.


@norms
def test_sync_batch_norm_is_refused_in_one_sentence_and_nothing_is_changed(norm):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.SyncBatchNorm(3)), nn.BatchNorm2d(3))
    layers = list(model.modules())
    with pytest.raises(TypeError, match="SyncBatchNorm cannot be converted") as error:
        convert(model, norm)
    assert "\n" not in str(error.value)
    assert ". " not in str(error.value)
    assert all(a is b for a, b in zip(layers, model.modules(), strict=True))


@norms
def test_a_lazy_batch_norm_is_refused_and_nothing_is_changed(norm):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d())
    layers = list(model.modules())
    with pytest.raises(TypeError, match="run the network once before convert"):
        convert(model, norm)
    assert all(a is b for a, b in zip(layers, model.modules(), strict=True))
    model(torch.randn(SHAPES["2d"]))
    assert len(norm_layers(convert(model, norm))) == 2


@pytest.mark.parametrize(
    ("norm", "settings"),
    [
        ("mbn", "memory, decay, lam, forwards, gradient"),
        ("brn", "momentum, r_max, d_max, forwards"),
        ("bn", "momentum, forwards"),
    ],
)
@pytest.mark.parametrize("wrong", ["lambda_", "eps", "affine", "num_features"])
def test_an_unknown_setting_is_answered_with_the_right_ones(norm, settings, wrong):
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(TypeError, match=f"{norm} layers have no setting '{wrong}'; theirs are {settings}$"):
        convert(model, norm, **{wrong: 1})
    assert type(model[0]) is nn.BatchNorm2d


@pytest.mark.parametrize(
    ("norm", "setting"),
    [("mbn", {"memory": 0}), ("brn", {"r_max": 0.5}), ("bn", {"momentum": 2}), ("bn", {"forwards": 3})],
)
def test_an_impossible_setting_is_refused_and_nothing_is_changed(norm, setting):
    model = network()
    layers = list(model.modules())
    with pytest.raises(ValueError, match=next(iter(setting))):
        convert(model, norm, **setting)
    assert all(a is b for a, b in zip(layers, model.modules(), strict=True))


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="norm must be one of mbn, brn, bn, not 'gn'"):
        convert(nn.BatchNorm2d(3), "gn")


@pytest.mark.parametrize(
    ("norm", "settings"),
    [
        ("mbn", {"memory": 7, "decay": 0.5, "lam": 0.3, "forwards": 1, "gradient": "batch"}),
        ("brn", {"momentum": 0.2, "r_max": 2.0, "d_max": 4.0, "forwards": 2}),
        ("bn", {"momentum": 0.2, "forwards": 2}),
    ],
)
def test_settings_reach_every_layer_by_name(norm, settings):
    for layer in norm_layers(convert(network(), norm, **settings)):
        assert {name: getattr(layer, name) for name in settings} == settings
        assert {name: getattr(layer, name) for name in layer.settings} == settings
        for name, value in settings.items():
            assert f"{name}={value!r}" in repr(layer)


# State.


@norms
def test_a_batch_norms_state_dict_loads_strictly(norm):
    """A pretrained network's weights: evaluation is the BatchNorm model's, and the memory is empty."""
    old = train(network())
    new = train(convert(network(), norm))
    new.load_state_dict(old.state_dict(), strict=True)
    if norm == "mbn":
        assert all(layer.memory_count.sum() == 0 == layer.memory_weight for layer in norm_layers(new))
    x = torch.randn(4, 3, 5, 5)
    assert_close(new.eval()(x), old.eval()(x))


@norms
def test_loading_leaves_the_state_dict_as_it_was(norm):
    state = network().state_dict()
    names = list(state)
    convert(network(), norm).load_state_dict(state)
    assert list(state) == names


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


@norms
def test_a_converted_model_continues_from_the_statistics_it_brought(norm):
    """Only the memory replaces them at once: the moving averages of the others move on."""
    old = trained()
    new = convert(copy.deepcopy(old), norm, forwards=1)
    x = torch.randn(SHAPES["2d"]) + 10
    new(x)
    mu = x.mean((0, 2, 3))
    share = {"mbn": 1.0, "brn": 0.01, "bn": 0.1}[norm]
    assert_close(new.running_mean, old.running_mean + share * (mu - old.running_mean))


# And back.


@norms
@shapes
def test_to_batch_norm_equals_in_eval_mode(norm, dims, shape):
    model = nn.Sequential(convert(trained(dims, shape), norm))
    train(model, iterations=4, size=shape)
    back = to_batch_norm(model)
    assert type(back[0]) is TORCH[dims]
    x = 3 * torch.randn(shape)
    assert_close(back.eval()(x), model.eval()(x))


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


@norms
def test_there_and_back_and_there_again(norm):
    model = train(convert(network(), norm))
    back = to_batch_norm(model)
    again = convert(network(), norm)
    again.load_state_dict(back.state_dict(), strict=True)
    x = torch.randn(4, 3, 5, 5)
    assert_close(again.eval()(x), model.eval()(x))


def test_bn_keeps_the_old_layers_momentum_unless_told_otherwise():
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
