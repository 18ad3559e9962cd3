"""freeze and unfreeze: layers that normalise by what they have remembered, and train not at all."""

import copy

import pytest
import torch
from layer_kinds import kinds, make, network, one_or_two, snapshot, unchanged
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.testing import assert_close

from mbn import convert, freeze, second_forward, to_batch_norm, unfreeze
from mbn.norm.base import norm_layers


@kinds
@one_or_two
def test_frozen_layers_normalise_as_in_evaluation_and_do_not_change_in_any_mode(kind, forwards):
    net = network(kind, forwards=forwards)
    net(torch.randn(4, 3, 5, 5).double())
    freeze(net)
    before = [snapshot(layer) for layer in norm_layers(net)]
    x = torch.randn(4, 3, 5, 5).double()
    expected = copy.deepcopy(net).eval()(x)
    for each in (net, copy.deepcopy(net)):
        each.eval().train()
        y = each(x)
        assert_close(y, expected)
        y.sum().backward()
        if forwards == 2:
            second_forward(each, x)
        assert all(unchanged(*pair) for pair in zip(before, norm_layers(each), strict=True))
        for layer in norm_layers(each):
            assert (layer.training, layer.weight.grad, layer.bias.grad) == (False, None, None)
        assert each[0].weight.grad is not None


@kinds
def test_unfrozen_layers_are_as_before(kind):
    net = network(kind, forwards=1)
    first, second, third = norm_layers(net)
    first.bias.requires_grad_(False)
    for _ in range(2):  # a second freeze changes nothing
        freeze(net)
    unfreeze(net)
    assert [p.requires_grad for x in (first, second) for p in (x.weight, x.bias)] == [True, False, True, True]
    before = snapshot(third)
    net(torch.randn(4, 3, 5, 5).double())
    assert not unchanged(before, third)
    freeze(net.eval())
    unfreeze(net)
    assert not any(layer.training for layer in norm_layers(net))


@kinds
def test_what_was_made_to_need_gradients_meanwhile_needs_them_after(kind):
    """First the head alone, then everything. Two layers may share their gamma."""
    net = nn.Sequential(make(kind), nn.ReLU(), make(kind))
    net[2].weight = net[0].weight
    freeze(net)
    unfreeze(net)
    assert all(p.requires_grad for p in net.parameters())
    net.requires_grad_(False)
    freeze(net)
    unfreeze(net)
    assert not any(p.requires_grad for p in net.parameters())
    freeze(net)
    net.requires_grad_(True)
    unfreeze(net)
    assert all(p.requires_grad for p in net.parameters())


def test_pruned_and_parametrized_layers_are_frozen_too():
    net = network("mbn paper")
    pruned, parametrized, _ = norm_layers(net)
    prune.l1_unstructured(pruned, "weight", 0.5)
    parametrize.register_parametrization(parametrized, "weight", nn.Softplus(), unsafe=True)
    x = torch.randn(4, 3, 5, 5).double()
    freeze(net)
    net(x).sum().backward()
    changing = {name for name, p in net.named_parameters() if p.grad is not None}
    assert changing == {"0.weight", "3.weight", "7.weight", "9.weight", "9.bias"}
    unfreeze(net)
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("norm", ["brn", "bn", "mbn"])
def test_a_frozen_network_becomes_one_that_is_not(norm):
    net = network("mbn paper")
    norm_layers(net)[0].bias.requires_grad_(False)
    freeze(net)
    new = convert(to_batch_norm(net), norm=norm)
    for copied in (to_batch_norm(net), new):
        needed = [p.requires_grad for i in (1, 4, 8) for p in copied[i].parameters()]
        assert needed == [True, False, *[True] * 4]
    assert not any(p.requires_grad for layer in norm_layers(net) for p in layer.parameters())  # itself is still
    assert {layer.train().training for layer in norm_layers(new)} == {True}


@pytest.mark.parametrize("part", [lambda net: net[1], lambda net: net], ids=["a layer", "its network"])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [None, True, False])
def test_unfrozen_layers_are_in_the_mode_that_they_would_be_in_without_freeze(part, before, after):
    net = network("mbn paper").train(before)
    freeze(part(net))
    if after is not None:
        net.train(after)
    for copied in (copy.deepcopy(net), net):
        unfreeze(part(copied))
        assert {module.training for module in copied.modules()} == {before if after is None else after}


def test_a_network_without_our_layers_warns_at_every_call():
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"freeze found none of our layers: call convert\(model\)") as caught:
            freeze(nn.BatchNorm2d(3))
        assert [w.filename for w in caught] == [__file__]
