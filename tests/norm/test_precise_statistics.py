"""set_precise_statistics: the moments of what training forwards give each layer, and everything else as it was."""

import copy

import pytest
import torch
from layer_kinds import inputs, kinds, make, network, one_or_two, remember, snapshot, unchanged
from torch import nn
from torch.testing import assert_close

from mbn import MemorizedBatchNorm2d, freeze, second_forward, set_precise_statistics
from mbn.norm.base import norm_layers

PRECISE = {"running_mean", "running_var", "running_std"}


@kinds
@one_or_two
def test_each_layer_gets_the_moments_of_what_the_layers_before_make_of_the_batches(kind, forwards):
    """The memories go along with the batches, and are back where they were at the end; dropout is off."""
    net = nn.Sequential(make(kind, forwards=forwards), nn.Dropout(0.5), make(kind, forwards=forwards))
    for t in range(2):
        remember(net[0], inputs(4, 3, 2, 2, at=t))
    reference = copy.deepcopy(net[0])
    batches = [inputs(n, 3, 2, 2, at=3) for n in (3, 4, 2)]
    given = [torch.cat(batches), torch.cat([remember(reference, x) for x in batches]).detach()]
    before, mode = snapshot(net), net.training
    set_precise_statistics(net, [(x, None) for x in batches])
    for layer, x in zip(norm_layers(net), given, strict=True):
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        assert_close(list(layer.test_statistics()), [mean, variance], atol=1e-12, rtol=1e-9)
    after = net.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before if k.rpartition(".")[2] not in PRECISE)
    assert net.training == mode


def test_held_memories_stay_where_training_ended():
    net, x = MemorizedBatchNorm2d(3, lam=1.0), torch.randn(4, 3, 2, 2)
    second_forward(net, x + 50)
    after = nn.Sequential(net, MemorizedBatchNorm2d(3))
    expected = {}
    for roll in (True, False):
        copied = copy.deepcopy(after)
        set_precise_statistics(copied, [x] * 40, roll=roll)
        expected[roll] = copied[1].running_mean.abs().max()
    assert expected[True] < 0.4 < 0.8 < expected[False]


@kinds
def test_an_empty_batch_does_not_count(kind):
    """As the head of a detector meets one where nothing was found."""
    first, second = make(kind), make(kind)
    xs = [inputs(n, 3, 2, 2, at=n) for n in (3, 4)]
    set_precise_statistics(first, [xs[0][:0], xs[0], xs[0][:0], xs[1]])
    set_precise_statistics(second, xs)
    assert_close(list(first.test_statistics()), list(second.test_statistics()), atol=0, rtol=0)


def test_frozen_layers_and_modes_stay_and_a_forward_can_be_given():
    net = network("mbn paper")
    freeze(net[1])
    net.eval()
    before, seen = snapshot(net[1]), []
    set_precise_statistics(net, [inputs(4, 3, 5, 5)], forward=lambda x: seen.append(net(x)))
    assert unchanged(before, net[1])
    assert not net.training
    assert not any(layer.training for layer in norm_layers(net))
    assert not seen[0].requires_grad


def test_an_error_leaves_everything_as_it_was():
    net = network("mbn paper")
    before = snapshot(net)
    with pytest.raises(ValueError, match="was given no batch"):
        set_precise_statistics(net, [])
    with pytest.raises(ValueError, match="4 channels, not 2"):
        set_precise_statistics(nn.Sequential(nn.Identity(), net[1], net[2]), [inputs(4, 4, 5, 5), inputs(4, 2, 5, 5)])
    assert unchanged(before, net)
    assert net.training
