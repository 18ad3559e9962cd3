"""BatchRenorm: numbers by hand where public versions have faults, and its bounds."""

import pytest
import torch
from layer_kinds import follow, inputs, make, one_or_two, trained
from torch import nn
from torch.testing import assert_close

from mbn import BatchRenorm1d, held, set_renorm


def test_the_first_batches_by_hand():
    """The first update copies; sigma is averaged, not the variance; r and d come before gamma, beta and the update."""
    layer = BatchRenorm1d(1, eps=1e-12, momentum=0.25, r_max=2.0, d_max=0.5).double()
    with torch.no_grad():
        layer.weight.fill_(3)
        layer.bias.fill_(7)
    one = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)

    y = layer(4 * one + 9)  # about mean 0 and sigma 1: xhat = -1, 1; r = 2 and d = 0.5, both clipped
    assert y.flatten().tolist() == pytest.approx([3 * (-2 + 0.5) + 7, 3 * (2 + 0.5) + 7])
    assert (layer.running_mean.item(), layer.running_std.item()) == pytest.approx((9, 4))

    y = layer(5 * one + 10)  # about mean 9 and sigma 4: r = 1.25 and d = 0.25
    assert y.flatten().tolist() == pytest.approx([3 * (-1.25 + 0.25) + 7, 3 * (1.25 + 0.25) + 7])
    assert (layer.running_mean.item(), layer.running_std.item()) == pytest.approx((9.25, 4.25))


def test_bounds_are_not_those_that_another_layers_precision_has_rounded():
    layers = nn.ModuleList([make("brn", dtype=dtype) for dtype in (torch.float32, torch.float64, torch.float32)])
    set_renorm(layers, 1.3, 0.7)
    assert layers[1].bounds.tolist() == [1.3, 0.7]
    for layer in layers:
        assert layer.bounds.tolist() == pytest.approx([1.3, 0.7])
        assert layer.known == (1.3, 0.7)


def test_without_clipping_training_normalises_as_evaluation_does(path):
    """(x - mu_B) / sigma_B r + d = (x - mu) / sigma: what the method is for."""
    layer, x = trained("brn", r_max=1e6, d_max=1e6), inputs(4, 3, 2, 2, at=1)
    with held(layer):
        y = layer(x)
    assert_close(layer.eval()(x), y, atol=1e-10, rtol=1e-10)


@one_or_two
def test_until_the_end_of_the_warm_up_it_is_batch_norm(path, forwards):
    """Counted on the device: nothing outside the layer changes it, and a copy of its state goes on counting."""
    layer = make("brn", forwards=forwards, warmup_steps=3)
    seen = []

    def steer(layer, ref, x):
        r, d = layer._correction(*ref.batch_statistics(x), layer.running_mean, layer.running_std)
        seen.append(bool((r == 1).all() and (d == 0).all()))
        if len(seen) == 2:
            layer.load_state_dict(layer.state_dict())

    follow(layer, [inputs(4, 3, 2, 2, at=t) for t in range(5)], steer)
    assert seen == [True, True, True, False, False]
