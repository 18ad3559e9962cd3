"""Our BatchNorm is torch's, bit for bit, except for the forward pass that updates its moving averages."""

import copy

import pytest
import reference
import torch
from torch import nn
from torch.testing import assert_close

import mbn
from mbn import BatchNorm1d, BatchNorm2d, second_forward

SHAPES = {"1d-2D": (4, 3), "1d-3D": (4, 3, 5), "2d": (4, 3, 5, 2), "3d": (4, 3, 2, 3, 2)}
shapes = pytest.mark.parametrize(("dims", "shape"), [(int(k[0]), v) for k, v in SHAPES.items()], ids=SHAPES)


def pair(dims=2, dtype=torch.float32, **settings):
    """Ours and torch's with the same random gamma and beta."""
    forwards = settings.pop("forwards", 1)
    ours = getattr(mbn, f"BatchNorm{dims}d")(3, forwards=forwards, **settings).to(dtype)
    torchs = getattr(nn, f"BatchNorm{dims}d")(3, **settings).to(dtype)
    with torch.no_grad():
        for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
            p.copy_(torch.randn(3))
            q.copy_(p)
    return ours, torchs


def same_state(ours, torchs):
    a, b = ours.state_dict(), torchs.state_dict()
    assert list(a) == list(b)
    return all(torch.equal(a[name], b[name]) for name in a)


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "settings", [{}, {"affine": False}, {"momentum": 0.3, "eps": 1e-3}, {"momentum": 1.0}], ids=str
)
def test_one_forward_is_torchs_batch_norm_bit_for_bit(dims, shape, dtype, settings):
    ours, torchs = pair(dims, dtype, **settings)
    for t in range(5):
        x = (2 * torch.randn(2 + t, *shape[1:], dtype=dtype) + t).requires_grad_()
        dl_dy = torch.randn_like(x)
        results = []
        for layer in (ours, torchs):
            y = layer(x)
            results.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], dl_dy)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert same_state(ours, torchs)
        assert torch.equal(ours.eval()(x), torchs.eval()(x))
        assert same_state(ours.train(), torchs.train())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_beside_float32_parameters_too(dtype):
    """As under autocast."""
    ours, torchs = pair()
    for _ in range(3):
        x = torch.randn(SHAPES["2d"], dtype=dtype).requires_grad_()
        results = []
        for layer in (ours, torchs):
            y = layer(x)
            results.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(x))])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert same_state(ours, torchs)
        assert torch.equal(ours.eval()(x), torchs.eval()(x))
        ours.train(), torchs.train()


@pytest.mark.parametrize("forwards", [1, 2])
def test_iterations_follow_the_reference(forwards):
    ours, _ = pair(dtype=torch.float64, forwards=forwards)
    ref = reference.BN(3, forwards=forwards)
    gamma, beta = ours.weight.detach(), ours.bias.detach()
    for t in range(5):
        x = (2 * torch.randn(2 + t, 3, 2, 2, dtype=torch.float64) + t).requires_grad_()
        dl_dy = torch.randn_like(x)
        y = ours(x)
        got = torch.autograd.grad(y, [x, ours.weight, ours.bias], dl_dy)
        assert_close(list(got), list(ref.backward(x.detach(), gamma, dl_dy)), atol=1e-10, rtol=1e-10)
        assert_close(y, ref.first(x.detach(), gamma, beta), atol=1e-10, rtol=1e-10)
        if forwards == 2:
            z = x.detach() * 1.5 + 1
            assert_close(second_forward(ours, z), ref.second(z, gamma, beta), atol=1e-10, rtol=1e-10)
        assert_close({name: getattr(ours, name) for name in ref.buffers()}, ref.buffers())
        assert_close(ours.eval()(x), ref.evaluate(x.detach(), gamma, beta), atol=1e-10, rtol=1e-10)
        ours.train()


@shapes
def test_with_two_forwards_only_the_second_updates(dims, shape):
    ours, torchs = pair(dims, forwards=2)
    for t in range(3):
        x, z = torch.randn(shape) + t, 2 * torch.randn(shape) - t
        assert torch.equal(ours(x), copy.deepcopy(torchs)(x))
        assert same_state(ours, torchs)
        assert torch.equal(second_forward(ours, z), torchs(z))
        assert same_state(ours, torchs)


def test_two_forwards_have_the_gradients_of_one():
    ours, torchs = pair(forwards=2)
    x = torch.randn(SHAPES["2d"], requires_grad=True)
    dl_dy = torch.randn_like(x)
    for a, b in zip(
        torch.autograd.grad(ours(x), [x, ours.weight, ours.bias], dl_dy),
        torch.autograd.grad(torchs(x), [x, torchs.weight, torchs.bias], dl_dy),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_first_forward_of_nan_leaves_the_averages_alone(value):
    """A momentum of 0 would not: 0 * NaN is NaN."""
    ours, torchs = pair(forwards=2)
    x = torch.randn(SHAPES["2d"])
    x[0, 0, 0, 0] = value
    ours(x)
    assert same_state(ours, torchs)
    assert ours.running_mean.isfinite().all()
    second_forward(ours, torch.randn(SHAPES["2d"]))
    assert ours.running_mean.isfinite().all()
    assert ours.running_var.isfinite().all()


@pytest.mark.parametrize("forwards", [1, 2])
def test_one_value_a_channel_is_refused_as_torch_does(forwards):
    layer = BatchNorm1d(3, forwards=forwards)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(torch.randn(1, 3))
    assert same_state(layer, BatchNorm1d(3))


def test_training_statistics_are_the_batchs():
    layer, _ = pair(dtype=torch.float64)
    x = torch.randn(SHAPES["2d"], dtype=torch.float64) + 1
    before = copy.deepcopy(layer)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    assert_close(list(layer.training_statistics(x)), [mean, (var + layer.eps).sqrt()])
    assert same_state(layer, before)


def test_narrow_casts_leave_the_averages_in_float32():
    layer = BatchNorm2d(3)
    layer(torch.randn(SHAPES["2d"]))
    mean = layer.running_mean.clone()
    layer.half()
    assert layer.weight.dtype == torch.float16
    assert torch.equal(layer.running_mean, mean)
    assert layer.running_var.dtype == torch.float32
    assert layer(torch.randn(SHAPES["2d"]).half()).dtype == torch.float16


@pytest.mark.parametrize("forwards", [1, 2])
def test_a_compiled_layer_trains_as_an_eager_one(forwards):
    torch._dynamo.reset()
    eager, _ = pair(dtype=torch.float64, forwards=forwards)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for t in range(3):
        x = (torch.randn(SHAPES["2d"], dtype=torch.float64) + t).requires_grad_()
        dl_dy, results = torch.randn_like(x), []
        for layer, module in ((eager, eager), (compiled, twin)):
            y = layer(x)
            grads = torch.autograd.grad(y, [x, module.weight, module.bias], dl_dy)
            second = second_forward(layer, x) if forwards == 2 else None
            results.append([y, grads, second, module.state_dict()])
        assert_close(results[1], results[0], atol=1e-12, rtol=1e-12)
    assert eager.num_batches_tracked == 3
