"""What BatchNorm, BatchRenorm and MemorizedBatchNorm have in common, each against the float64 loops of `reference`."""

import copy
import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from layer_kinds import (
    KINDS,
    affine_of,
    close,
    follow,
    inputs,
    kinds,
    make,
    network,
    one_or_two,
    reference_of,
    remember,
    renew,
    set_changing,
    snapshot,
    trained,
    unchanged,
)
from torch import nn
from torch.testing import assert_close

from mbn import MemorizedBatchNorm2d, held, second_forward, set_lambda, set_renorm
from mbn.norm.base import norm_layers
from mbn.norm.convert import NORMS

# Against the reference.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@kinds
@one_or_two
def test_forty_iterations_follow_the_reference(path, kind, forwards, dtype):
    """While lambda, or r_max and d_max, change as in a schedule."""
    draw = random.Random(1)
    steps, r_seen, d_seen = iter(range(40)), set(), set()

    def steer(layer, ref, x):
        t = next(steps) // 8
        if kind.startswith("mbn"):
            ref.lam = (0.0, 0.1, 0.5, 0.9, 1.0)[t]
            set_lambda(layer, ref.lam)
        if kind == "brn":  # from batch norm to bounds that hardly clip
            ref.r_max, ref.d_max = ((1.0, 0.0), (1.2, 0.3), (1.5, 1.0), (3.0, 5.0), (1e3, 1e3))[t]
            set_renorm(layer, ref.r_max, ref.d_max)
            r, d = ref.correction(x)
            r_seen.update(torch.log(r).div(max(torch.tensor(ref.r_max).log(), 1e-9)).round(decimals=6).tolist())
            d_seen.update(d.div(max(ref.d_max, 1e-9)).tolist())

    # With few values a float32's rounding shows in the variance; one value a channel is refused without a memory.
    least = 3 if dtype == torch.float32 else 2
    sizes = [(draw.randint(least, 4), 3, *draw.choice([(1, 1), (1, 3), (2, 2)][least // 3 :])) for _ in range(40)]
    batches = [inputs(*size, at=4 * draw.random(), dtype=dtype) for size in sizes]
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-5}[dtype]
    follow(make(kind, dtype=dtype, forwards=forwards), batches, steer, tolerance, gradients=True)
    if kind == "brn":
        for seen in (r_seen, d_seen):
            assert {-1.0, 1.0} < seen, "nothing was clipped below or above, or all was"


@pytest.mark.parametrize("spatial", [(), (3,), (2, 3), (1, 3, 2)], ids=["2D", "3D", "4D", "5D"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@kinds
def test_every_input_shape_and_no_affine(path, kind, spatial, affine):
    layer = make(kind, dims=2 + len(spatial), affine=affine, forwards=1)
    follow(layer, [inputs(3, 3, *spatial, at=t) for t in range(3)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "case"),
    [
        (kind, case)
        for kind in KINDS
        for case in ("one value", "constant channel", "6e4", "one image last", "memory of 1")
        # Only a memory makes one value a channel meaningful, and only with the paper's gradient.
        if (case != "one value" or kind == "mbn paper") and (case != "memory of 1" or kind.startswith("mbn"))
    ],
)
@one_or_two
def test_numbers_at_the_edge_are_finite_and_those_of_the_reference(path, kind, case, dtype, forwards):
    """6e4: the sum of its squares overflows float16 by five orders of magnitude."""
    batches = [torch.randn(3, 3, 3, 2) + t for t in range(4)]
    if case == "one value":
        batches[1:] = [torch.randn(1, 3, 1, 1) + t for t in range(3)]
    if case == "constant channel":
        for x in batches:
            x[:, 1] = 3
    if case == "6e4":
        batches = [6e4 * torch.randn(x.shape).sign() for x in batches]
    if case == "one image last":
        batches[-1] = batches[-1][:1]
    memory = {"memory": 1} if case == "memory of 1" else {}
    follow(make(kind, dtype=dtype, forwards=forwards, **memory), [x.to(dtype) for x in batches])


# Output and gradients.


@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
@kinds
def test_a_frozen_tensor_gets_no_gradient_and_the_others_get_theirs(path, frozen, kind):
    layer, x = make(kind, forwards=1), inputs(3, 3, 2, 2)
    ref, dl_dy = reference_of(layer), torch.randn_like(x)
    layer(x + 1)
    ref.remember(x + 1)
    renew(layer)
    leaves = [x.clone().requires_grad_(), *affine_of(layer)]
    gradients = torch.autograd.grad(ref.normalize(*leaves), leaves, dl_dy)
    ours = {"input": x, "weight": layer.weight, "bias": layer.bias}
    for name, leaf in ours.items():
        leaf.requires_grad_(name != frozen)
    layer(x).backward(dl_dy)
    for (name, leaf), expected in zip(ours.items(), gradients, strict=True):
        if name == frozen:
            assert leaf.grad is None
        else:
            close(leaf.grad, expected, 1e-10)


@kinds
def test_the_layout_of_the_input_is_kept_and_that_of_the_gradient_does_not_matter(path, kind):
    layer, x = trained(kind), inputs(4, 3, 5, 2)
    dl_dy = torch.randn(1, 3, 5, 2, dtype=x.dtype).expand_as(x)  # as the backward of a mean over images gives it
    results = []
    for v in (x, x.contiguous(memory_format=torch.channels_last)):
        with held(layer):
            y = layer(v.requires_grad_())
        results.append([y, *torch.autograd.grad(y, [v, layer.weight, layer.bias], dl_dy)])
    assert results[1][0].is_contiguous(memory_format=torch.channels_last)
    assert_close(results[1], results[0], atol=1e-12, rtol=1e-12, check_stride=False)


@kinds
def test_a_tiny_gamma_has_its_gradient_in_half_precision(path, kind):
    """As gammas that start at 0 have; gradients are large, as those of a scaled loss."""
    layer = trained(kind, dtype=torch.float32, forwards=2)
    with torch.no_grad():
        layer.weight.fill_(1e-6)
    x, dl_dy = 30 * torch.randn(4, 3, 5, 2).half(), 1000 * torch.randn(4, 3, 5, 2).half()
    exact, v = copy.deepcopy(layer).double(), x.double().requires_grad_()
    (expected,) = torch.autograd.grad(exact(v), v, dl_dy.double())
    (found,) = torch.autograd.grad(layer(x.requires_grad_()), x, dl_dy)
    assert (found - expected).norm() < 0.01 * expected.norm()


def layouts(x):
    """x with its dimensions in memory in every order; of a single image also with the stride that x[None] has."""
    for order in itertools.permutations(range(x.dim())):
        back = [order.index(d) for d in range(x.dim())]
        yield x.permute(order).contiguous().permute(back)
        if len(x) == 1 and order[0] == 0:
            yield x.permute(order).contiguous().permute(back)[0][None]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dims", "shape"), [(4, (1, 3, 5, 2)), (4, (3, 1, 5, 2)), (5, (1, 3, 2, 1, 3))], ids=str)
@kinds
def test_gradients_of_single_images_are_the_same_in_every_layout(path, kind, dims, shape, training):
    """torch's own kernel for a CPU takes the strides of one image for those of another layout."""
    layer = make(kind, shape[1], dims, group_size=1).train(training)
    x, dl_dy = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)

    def results(v, dl_dy):
        with held(layer):
            y = layer(v.requires_grad_())
        return [y, *torch.autograd.grad(y, [v, layer.weight, layer.bias], dl_dy)]

    expected = results(x, dl_dy)
    for v, d in itertools.product(layouts(x), list(layouts(dl_dy))[:: 1 if dims == 4 else 9]):
        assert_close(results(v.detach(), d), expected, atol=1e-12, rtol=1e-12, check_stride=False)


# Statistics.


@kinds
def test_training_statistics_are_those_of_the_forward_and_change_nothing(path, kind):
    layer, x = trained(kind, affine=False), inputs(3, 3, 2, 2)
    before = snapshot(layer)
    mu, sigma = layer.training_statistics(x.requires_grad_())
    assert not mu.requires_grad
    assert unchanged(before, layer)
    with held(layer):
        assert_close(layer(x), (x - mu[:, None, None]) / sigma[:, None, None], atol=1e-10, rtol=1e-10)


@kinds
def test_test_statistics_that_are_set_are_those_of_evaluation(kind):
    """As PreciseBN does after training."""
    layer, x = trained(kind, affine=False), inputs(4, 3, 2, 2)
    mean, variance = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5
    layer.set_test_statistics(mean, variance)
    assert_close(list(layer.test_statistics()), [mean, variance])
    assert_close(layer.eval()(x), F.batch_norm(x, mean, variance, eps=layer.eps))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@kinds
def test_the_first_of_two_forwards_never_changes_the_statistics(kind, value):
    """A momentum of 0 would not be enough: 0 * NaN is NaN."""
    layer = trained(kind, forwards=2)
    before, x = snapshot(layer), inputs(4, 3, 2, 2)
    x[0, 0, 0, 0] = value
    layer(x)
    assert unchanged(before, layer)


# Precision, copies and state.


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=str)
@kinds
def test_narrow_casts_leave_the_statistics_in_float32_and_wide_casts_widen_them(kind, narrow):
    layer = trained(kind, dtype=torch.float32)
    before = {name: getattr(layer, name).clone() for name in layer.statistics}
    layer.to(narrow)
    assert layer.weight.dtype == layer.bias.dtype == narrow
    for name, value in before.items():
        assert getattr(layer, name).dtype == torch.float32
        assert torch.equal(getattr(layer, name), value)
    assert remember(copy.deepcopy(layer), inputs(4, 3, 3, 2, dtype=narrow)).dtype == narrow
    layer.double()
    for name in before.keys() - {layer.scheduled}:
        assert torch.equal(getattr(layer, name), before[name].double())
    if layer.scheduled:  # exact again, and not float32's rounding of 0.7
        assert getattr(layer, layer.scheduled).flatten().tolist() == [*layer.known]
    assert layer.float().running_mean.dtype == torch.float32


@kinds
def test_cpu_autocast_normalises_bfloat16_with_float32_statistics(kind):
    layer = make(kind, 4, dtype=torch.float32, forwards=1)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(inputs(4, 3, 6, 6, dtype=torch.float32))
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.running_mean.dtype == layer.weight.grad.dtype == torch.float32
    if kind != "brn":  # whose first batch is renormalised towards mean 0 and variance 1
        assert_close(y.float().mean((0, 2, 3)), torch.zeros(4), atol=1e-2, rtol=0)
        assert_close(y.float().var((0, 2, 3)), torch.ones(4), atol=3e-2, rtol=0)


@kinds
@one_or_two
def test_a_copy_and_a_layer_that_loads_the_state_dict_train_on_identically(kind, forwards):
    layer, loaded = trained(kind, forwards=forwards), make(kind, forwards=forwards)
    scheduled = {layer.scheduled} - {""}
    assert layer.state_dict().keys() == {"weight", "bias", *scheduled, *reference_of(layer).buffers()}
    loaded.load_state_dict(layer.state_dict())
    copies = [layer, copy.deepcopy(layer), loaded]
    for t in range(5):
        x = inputs(2 + t % 3, 3, 2, 2, at=t)
        ys = [remember(c, x) for c in copies]
        assert torch.equal(ys[0], ys[1])
        assert torch.equal(ys[0], ys[2])
    assert unchanged(snapshot(layer), copies[1])
    assert unchanged(snapshot(layer), loaded)


@kinds
@one_or_two
def test_reset_parameters_and_reset_running_stats_are_torchs(kind, forwards):
    """Loops that reset a network between folds call them: nothing is left but the settings, also changed ones."""
    layer = trained(kind, forwards=forwards)
    set_changing(layer, 0.25, 2.0, 0.5)
    fresh = make(kind, forwards=forwards)
    set_changing(fresh, 0.25, 2.0, 0.5)
    weight = layer.weight.detach().clone()
    layer.reset_running_stats()
    assert torch.equal(layer.weight, weight)
    layer.reset_parameters()
    assert unchanged(snapshot(fresh), layer)


# Settings and inputs.


@pytest.mark.parametrize(
    ("norm", "defaults"),
    [
        ("bn", {"momentum": 0.1, "forwards": 1, "group_size": None}),
        ("brn", {"momentum": 0.01, "r_max": 3.0, "d_max": 5.0, "warmup_steps": 0, "forwards": 1, "group_size": None}),
        (
            "mbn",
            {"memory": 20, "decay": 0.9, "lam": 0.1, "gradient": "paper", "forwards": 2, "pretrained_batches": 10}
            | {"group_size": None},
        ),
    ],
)
def test_the_defaults_are_the_papers(norm, defaults):
    layer = NORMS[norm][1](3)
    assert {name: getattr(layer, name) for name in layer.settings} == defaults
    assert (layer.eps, layer.affine) == (1e-5, True)


@pytest.mark.parametrize(
    ("norm", "setting", "values"),
    [
        *((norm, "forwards", (0, 3)) for norm in NORMS),
        *((norm, "group_size", (0, -1, 2.0, True, "2")) for norm in NORMS),
        *((norm, "eps", (0.0, -1e-5, float("nan"))) for norm in NORMS),
        ("bn", "momentum", (-0.1, 1.1)),
        ("brn", "momentum", (0.0, 1.1)),
        ("brn", "warmup_steps", (-1, float("nan"))),
        ("mbn", "pretrained_batches", (-1, float("nan"), float("inf"))),
        ("brn", "r_max", (0.9, float("nan"))),
        ("brn", "d_max", (-0.1, float("nan"))),
        ("mbn", "memory", (0, 2.0, True)),
        ("mbn", "decay", (0.0, 1.1)),
        ("mbn", "lam", (-0.1, 1.1, float("nan"))),
        ("mbn", "gradient", ("full",)),
    ],
)
def test_impossible_settings_are_refused_by_name(norm, setting, values):
    for layer in NORMS[norm]:
        for value in values:
            with pytest.raises(ValueError, match="lambda" if setting == "lam" else setting):
                layer(3, **{setting: value})


@pytest.mark.parametrize(
    ("kind", "put", "settings", "buffer", "wrong", "words"),
    [
        ("mbn paper", set_lambda, {"lam": 0.5}, "lam_tensor", [(2,), (float("nan"),)], r"lambda must be in \[0, 1\]"),
        (
            *("brn", set_renorm, {"r_max": 1.25, "d_max": 0.25}, "bounds"),
            [(0.9, 1.0), (2.0, -0.1), (float("nan"), 1.0), (2.0, float("nan"))],
            "r_max must be at least 1 and d_max at least 0",
        ),
    ],
)
def test_scheduled_values_reach_every_layer_and_its_state_dict(kind, put, settings, buffer, wrong, words):
    net = nn.Sequential(trained(kind), nn.Sequential(make(kind, dims=2)), nn.BatchNorm1d(2))
    put(net, *settings.values())
    before = snapshot(net)
    for values in wrong:
        with pytest.raises(ValueError, match=words):
            put(net, *values)
    assert unchanged(before, net)
    for layer in norm_layers(net):
        assert {name: getattr(layer, name) for name in settings} == settings
        assert getattr(layer, buffer).flatten().tolist() == [*settings.values()]
    twin = nn.Sequential(make(kind), nn.Sequential(make(kind, dims=2)), nn.BatchNorm1d(2))
    twin.load_state_dict(net.state_dict())
    assert all(getattr(twin[0], name) == value for name, value in settings.items())


def test_a_memory_of_numpys_integers_is_a_whole_number():
    assert type(MemorizedBatchNorm2d(3, memory=np.int64(4)).memory) is int


def test_settings_are_given_by_name():
    """torch's BatchNorm takes its momentum and more by position: here that would set something else."""
    for layers in NORMS.values():
        assert layers[1](3, 1e-3).eps == 1e-3
        with pytest.raises(TypeError, match="positional"):
            layers[1](3, 1e-3, 0.1)


@pytest.mark.parametrize(
    ("put", "values", "own", "other", "words"),
    [
        (set_lambda, (0.5,), "mbn paper", "brn", "set_lambda found no MemorizedBatchNorm: call convert"),
        (set_renorm, (2.0, 1.0), "brn", "mbn paper", "set_renorm found no BatchRenorm: call convert"),
    ],
)
def test_scheduled_values_without_a_layer_to_take_them_warn_once_a_call(put, values, own, other, words):
    for model in (nn.BatchNorm1d(3), network(other)):
        for _ in range(2):
            with pytest.warns(UserWarning, match=words) as caught:
                put(model, *values)
            assert [w.filename for w in caught] == [__file__]
    put(nn.Sequential(network(other), make(own)), *values)  # no warning


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((4, 3), "4D input, not 2D"),
        ((4, 3, 5), "4D input, not 3D"),
        ((4, 2, 5, 5), "3 channels, not 2"),
    ],
    ids=str,
)
@kinds
def test_wrong_inputs_are_refused_by_name_and_change_nothing(kind, shape, words):
    layer = make(kind, forwards=1)
    before = snapshot(layer)
    with pytest.raises(ValueError, match=rf"{type(layer).__name__} .*{words}"):
        layer(torch.randn(shape))
    assert unchanged(before, layer)


# torch.compile.


@kinds
@one_or_two
def test_a_compiled_net_trains_as_an_eager_one_and_is_compiled_once(kind, forwards):
    """One graph for each of the two forwards, whatever lambda, r_max and d_max become during training.

    With forwards=1 the graph overwrites what its own backward needs (torch recomputes from it, pytorch#197039).
    """
    torch._dynamo.reset()
    eager = network(kind, forwards=forwards)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    tolerance = {"atol": 1e-10, "rtol": 1e-10}
    for t, lam in enumerate([0.3, 0.3, 0.5, 0.9, 0.0]):
        x, dl_dy = inputs(4, 3, 5, 5, at=t), torch.randn(4, 3, dtype=torch.float64)
        with torch._dynamo.config.patch(error_on_recompile=t > 0):
            results = []
            for net, module in ((eager, eager), (compiled, twin)):
                set_changing(net, lam, 1 + lam, 2 * lam)
                y = net(x)
                module.zero_grad()
                y.backward(dl_dy)
                with torch.no_grad():
                    for p in module.parameters():
                        p -= 0.01 * p.grad
                second = second_forward(net, x) if forwards == 2 else None
                results.append([y, second, [p.grad for p in module.parameters()], module.state_dict()])
            assert_close(results[1], results[0], **tolerance)
    for layer in norm_layers(eager):
        assert (layer.memory_count.count_nonzero() == 3) if kind.startswith("mbn") else layer.num_batches_tracked == 5
    assert_close(compiled.eval()(x), eager.eval()(x), **tolerance)


@kinds
def test_compiled_forwards_may_come_before_both_backwards(kind):
    """As in a siamese network. The second call overwrites what the first one normalised with."""
    torch._dynamo.reset()
    eager = trained(kind, dims=2, forwards=1)
    twin = copy.deepcopy(eager)
    a, b = inputs(4, 3).requires_grad_(), inputs(4, 3, at=3).requires_grad_()
    dl_dy, results = torch.randn(8, 3, dtype=torch.float64), []
    for layer in (eager, torch.compile(twin, fullgraph=True, backend="aot_eager")):
        y = torch.cat([layer(a), layer(b)])
        results.append(torch.autograd.grad(y, [a, b], dl_dy))
    assert_close(results[1], results[0], atol=1e-10, rtol=1e-10)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler's own, where it leaves a layer out
@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("brn", {"activation_memory_budget": 0.0}),
        ("mbn paper", {"activation_memory_budget": 0.0}),
        ("mbn batch", {"aggressive_recomputation": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_where_the_compiler_saves_memory_gradients_are_those_of_eager_layers(kind, setting):
    """It would compute what the layer normalises by again in the backward, from what it has remembered since."""
    torch._dynamo.reset()
    eager = network(kind, forwards=1)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, backend="aot_eager")
    with torch._functorch.config.patch(**setting):
        for t in range(3):
            x, dl_dy = inputs(4, 3, 5, 5, at=t), torch.randn(4, 3, dtype=torch.float64)
            grads = [torch.autograd.grad(net(x), net.parameters(), dl_dy) for net in (eager, compiled)]
            assert_close(grads[1], grads[0], atol=1e-10, rtol=1e-10)
        assert_close(twin.state_dict(), eager.state_dict(), atol=1e-10, rtol=1e-10)
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"leave activation_memory_budget at 1.*forwards=2"):
            torch.compile(twin, backend="aot_eager", fullgraph=True)(x)


# Subclasses of Tensor.


class Plain(torch.Tensor):
    """As MONAI's and fastai's, without what they add."""


@kinds
@one_or_two
@pytest.mark.parametrize("group_size", [None, 2])
def test_a_subclass_of_tensor_goes_through_and_may_be_changed_in_place(kind, forwards, group_size):
    layer = trained(kind, forwards=forwards, group_size=group_size)
    twin = copy.deepcopy(layer)
    x, dl_dy = inputs(4, 3, 3, 2), torch.randn(4, 3, 3, 2, dtype=torch.float64)
    results = []
    for one, given in ((layer, x.clone().requires_grad_()), (twin, x.clone().requires_grad_())):
        y = one(given if one is layer else given.as_subclass(Plain))
        assert type(y) is (torch.Tensor if one is layer else Plain)
        (dx,) = torch.autograd.grad(y.relu_(), given, dl_dy)
        if forwards == 2:
            second_forward(one, x if one is layer else x.as_subclass(Plain))
        results.append([y.as_subclass(torch.Tensor), dx, one.state_dict(), one.eval()(x)])
    assert_close(results[1], results[0], atol=0, rtol=0)
    assert {type(buffer) for buffer in twin.buffers()} == {torch.Tensor}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bn"])
def test_torchs_name_of_the_input_and_float64_through_a_layer_in_float32(kind):
    """BatchNorm refuses it, as torch's does."""
    layer, x = trained(kind, dtype=torch.float32), inputs(4, 3, 3, 2)
    wide = copy.deepcopy(layer).double()
    for mode in (True, False):
        y = layer.train(mode)(input=x)
        assert y.dtype == torch.float64
        assert_close(y, wide.train(mode)(x), atol=1e-6, rtol=1e-6)
