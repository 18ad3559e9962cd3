"""Our BatchNorm is torch's, bit for bit, except for the forward pass that updates its moving averages."""

import copy
import itertools

import pytest
import torch
from layer_kinds import one_or_two, shapes, snapshot, unchanged
from torch import nn

import mbn
from mbn import BatchNorm1d, second_forward

SETTINGS = [{}, {"affine": False}, {"momentum": 0.3, "eps": 1e-3}, {"momentum": 1.0}]


def output_and_gradients(layer, x):
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], torch.linspace(-1, 2, x.numel()).view(x.shape).to(x))]


@shapes
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        *itertools.product([torch.float32, torch.float64], SETTINGS),
        *itertools.product([torch.float16, torch.bfloat16], SETTINGS[:1]),
    ],
    ids=str,
)
@one_or_two
def test_it_is_torchs_batch_norm_bit_for_bit(dims, shape, dtype, settings, forwards):
    """Half-precision inputs come beside float32 parameters, as under autocast."""
    wide = torch.promote_types(dtype, torch.float32)
    ours = getattr(mbn, f"BatchNorm{dims}d")(3, forwards=forwards, **settings).to(wide)
    torchs = getattr(nn, f"BatchNorm{dims}d")(3, **settings).to(wide)
    with torch.no_grad():
        for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
            q.copy_(p.copy_(torch.randn(3)))
    for t in range(5):
        x = (2 * torch.randn(2 + t, *shape[1:]) + t).to(dtype).requires_grad_()
        before = snapshot(torchs)
        expected = output_and_gradients(torchs, x)
        if forwards == 2:  # the first forward equals torch's too, but the averages wait for the second
            after, z = copy.deepcopy(torchs), x.detach() + 1
            torchs.load_state_dict(before)
        assert all(torch.equal(a, b) for a, b in zip(output_and_gradients(ours, x), expected, strict=True))
        assert unchanged(snapshot(torchs), ours)
        if forwards == 2:
            assert not unchanged(before, after)
            assert torch.equal(second_forward(ours, z), torchs(z))
            assert unchanged(snapshot(torchs), ours)
        assert torch.equal(ours.eval()(x), torchs.eval()(x))
        assert unchanged(snapshot(torchs.train()), ours.train())


@one_or_two
def test_one_value_a_channel_is_refused_as_torch_does(forwards):
    layer = BatchNorm1d(3, forwards=forwards)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(torch.randn(1, 3))
    assert unchanged(snapshot(BatchNorm1d(3)), layer)
