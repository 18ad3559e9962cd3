"""Normalisation propagation against loops, its constants against their derivation, its claim against random numbers."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from mbn import StandardReLU, UnitConv2d, project_unit_rows
from mbn.norm.normprop import RELU_MEAN, RELU_STD


def conv(channels=3, rows=4, size=2, **settings):
    """A float64 layer whose rows, gains and shifts are all different."""
    layer = UnitConv2d(channels, rows, size, **settings).double()
    with torch.no_grad():
        layer.weight.mul_(torch.linspace(0.1, 10, rows, dtype=torch.float64).view(-1, 1, 1, 1))
        layer.gain.copy_(torch.rand(rows) + 0.5)
        layer.shift.copy_(torch.randn(rows))
    return layer


def norms(layer):
    return layer.weight.detach().flatten(1).norm(dim=1)


@pytest.mark.parametrize("training", [True, False])
def test_output_and_gradients_follow_the_reference(training):
    layer = conv().train(training)
    x = torch.randn(2, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x, layer.weight, layer.gain, layer.shift]
    u, expected = layer(x), reference.unit_convolution(*leaves)
    assert_close(u, expected, atol=1e-12, rtol=1e-12)
    o, standard = StandardReLU()(u), reference.standard_relu(expected)
    assert_close(o, standard, atol=1e-12, rtol=1e-12)
    dl_do = torch.randn_like(o)
    got, expected = (torch.autograd.grad(out, leaves, dl_do) for out in (o, standard))
    assert_close(list(got), list(expected), atol=1e-12, rtol=1e-12)


def test_stride_padding_and_groups_are_those_of_torchs_convolution():
    layer = conv(channels=4, stride=2, padding=1, groups=2)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    scale = (layer.gain / norms(layer)).view(-1, 1, 1, 1)
    expected = F.conv2d(x, layer.weight * scale, layer.shift, stride=2, padding=1, groups=2)
    assert_close(layer(x), expected, atol=1e-12, rtol=1e-12)


def test_projection_gives_every_unit_layer_unit_rows_and_leaves_the_output_and_other_layers():
    layer, plain = conv(), nn.Conv2d(4, 4, 1).double()
    model, x = nn.Sequential(nn.Sequential(layer), plain, conv(4, size=1)), torch.randn(2, 3, 3, 3, dtype=torch.float64)
    before, weight, other = model(x), layer.weight, plain.weight.clone()
    assert norms(layer).max() > 1.5
    project_unit_rows(model)
    assert layer.weight is weight
    assert torch.equal(plain.weight, other)
    for projected in (layer, model[2]):
        assert_close(norms(projected), torch.ones(4, dtype=torch.float64), atol=1e-12, rtol=0)
    assert_close(model(x), before, atol=1e-12, rtol=1e-12)


def test_a_filter_of_zeros_gives_its_shift_and_stays_zero():
    layer = UnitConv2d(3, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight[0].zero_()
        layer.shift.fill_(0.5)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    for _ in range(2):
        y = layer(x)
        assert (y[:, 0] == 0.5).all()
        y.sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())
        layer.project_()
    assert_close(layer.weight.flatten(1).norm(dim=1), torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_the_constants_follow_from_pi_and_are_the_printed_ones():
    """The mean and deviation of max(u, 0) for u ~ N(0, 1), integrated here by the trapezoidal rule."""
    u = torch.linspace(0, 12, 200_001, dtype=torch.float64)
    density = (-u.square() / 2).exp() / math.sqrt(2 * math.pi)
    mean = torch.trapezoid(u * density, u).item()
    std = math.sqrt(torch.trapezoid(u.square() * density, u).item() - mean**2)
    assert abs(RELU_MEAN - mean) < 1e-9
    assert abs(RELU_STD - std) < 1e-9
    assert abs(RELU_MEAN - 0.398942) < 5e-7
    assert abs(RELU_STD - 0.583819) < 5e-7


def test_gain_starts_at_1_over_1_21_and_shift_at_0():
    layer = UnitConv2d(3, 4, 2)
    assert torch.equal(layer.gain, torch.full((4,), 1 / 1.21))
    assert torch.equal(layer.shift, torch.zeros(4))
    assert set(layer.state_dict()) == {"weight", "gain", "shift"}


@pytest.mark.parametrize("settings", [{"dtype": torch.float64}, {"device": "meta"}], ids=str)
def test_device_and_dtype_are_those_of_all_parameters(settings):
    layer = UnitConv2d(3, 4, 2, **settings)
    assert {(p.dtype, p.device) for p in layer.parameters()} == {(layer.weight.dtype, layer.weight.device)}
    assert layer.weight.is_meta or layer(torch.randn(1, 3, 2, 2, **settings)).dtype == torch.float64


def test_reset_parameters_puts_gain_and_shift_back_too():
    layer = conv()
    torch.manual_seed(0)
    layer.reset_parameters()
    torch.manual_seed(0)
    assert_close(layer.state_dict(), UnitConv2d(3, 4, 2, dtype=torch.float64).state_dict())
    emptied = torch.nn.utils.skip_init(UnitConv2d, 3, 4, 2)  # asks the signature for a device
    emptied.reset_parameters()
    assert torch.equal(emptied.gain, torch.full((4,), 1 / 1.21))


def test_a_bias_is_refused():
    with pytest.raises(ValueError, match="bias must be False"):
        UnitConv2d(3, 4, 2, bias=True)
    assert UnitConv2d(3, 4, 2, bias=False).bias is None


def test_standard_normal_input_stays_standard():
    """One real layer: 256 filters over 5 channels, of lengths that span two decades, 64 images of 12x12 outputs.

    Over twenty seeds the means strayed from 0 by at most 0.006, the variances from 1 by 0.012, one filter's by 0.09.
    """
    layer = UnitConv2d(5, 256, 3)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-1, 1, 256).view(-1, 1, 1, 1))
        layer.gain.fill_(1)
        u = layer(torch.randn(64, 5, 14, 14))
        o = StandardReLU()(u)
    for output in (u, o):
        assert abs(output.mean()) < 0.01
        assert abs(output.var() - 1) < 0.02
        assert (output.var((0, 2, 3)) - 1).abs().max() < 0.15
