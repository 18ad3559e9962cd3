"""set_precise_statistics: the moments of what training forwards give each layer, and everything else as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from layer_kinds import inputs, kinds, make, network, one_or_two, remember, snapshot, unchanged
from torch import nn
from torch.testing import assert_close
from torchvision.ops import StochasticDepth

from mbn import MemorizedBatchNorm1d, MemorizedBatchNorm2d, freeze, second_forward, set_precise_statistics, unfreeze
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


@kinds
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_batch_that_is_not_finite_does_not_count(kind, value):
    """Of a layer that all values of that batch reach; where none counts, it keeps what it has."""
    first, second = (nn.Sequential(make(kind), make(kind)) for _ in range(2))
    xs = [inputs(4, 3, 2, 2, at=n) for n in range(3)]
    bad = xs[1].clone()
    bad[0, 0, 0, 0] = value
    set_precise_statistics(first, [xs[0], bad, xs[2]])
    set_precise_statistics(second, [xs[0], xs[2]])
    for one, other in zip(first, second, strict=True):
        assert_close(list(one.test_statistics()), list(other.test_statistics()), atol=0, rtol=0)
    with pytest.raises(ValueError, match="no layer saw a value"):
        set_precise_statistics(first, [bad])
    assert_close(list(first[0].test_statistics()), list(second[0].test_statistics()), atol=0, rtol=0)


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
    unfreeze(net[1])
    assert not net[1].training


class Called(nn.Module):
    """Calls its layer past the hooks, as networks do that call a layer's forward."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer.forward(x)


@kinds
@pytest.mark.parametrize("way", ["compiled", "compiled before", "forward called"])
def test_no_way_of_calling_a_layer_goes_past_it(kind, way):
    """Compiled code, also that of training, does not run hooks that were added after."""
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(3, 3), make(kind, dims=2)).double()
    for t in range(2):
        remember(net[1], inputs(4, 3, at=t))
    twin, batches = copy.deepcopy(net), [inputs(n, 3, at=t) for t, n in enumerate((4, 5, 6))]
    if way == "forward called":
        wrapped = nn.Sequential(net[0], Called(net[1]))
    else:
        wrapped = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    if way == "compiled before":
        for model in (wrapped, twin):
            model(batches[0]).sum().backward()
            if net[1].forwards == 2:
                second_forward(model, batches[0])
    for _ in range(2):
        for model in (wrapped, twin):
            set_precise_statistics(model, batches)
        assert_close(net.state_dict(), twin.state_dict(), atol=1e-12, rtol=1e-12)
        batches = batches[::-1]


def test_new_batches_do_not_let_a_compiled_network_be_compiled_again():
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(3, 3), MemorizedBatchNorm1d(3))
    model, batches = torch.compile(net, backend="aot_eager", fullgraph=True), [torch.randn(4, 3) for _ in range(3)]
    set_precise_statistics(model, batches[:1])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            set_precise_statistics(model, batches)


@kinds
def test_a_layer_that_the_batches_do_not_reach_keeps_what_it_has(kind):
    """A head that is used in training only, or a forward that covers a part."""
    net = nn.Sequential(make(kind), make(kind))
    for layer in net:
        remember(layer, inputs(4, 3, 2, 2))
    before = [snapshot(layer) for layer in net]
    set_precise_statistics(net, [inputs(4, 3, 2, 2)], forward=net[0])
    assert [unchanged(*pair) for pair in zip(before, net, strict=True)] == [False, True]
    with pytest.raises(ValueError, match="no layer saw a value"):
        set_precise_statistics(net, [inputs(0, 3, 2, 2)])
    assert unchanged(before[1], net[1])
    with pytest.raises(ValueError, match="no layer saw a value"):
        set_precise_statistics(net, [inputs(4, 3, 2, 2)], forward=lambda x: x)


def test_a_single_tensor_is_not_taken_for_batches():
    """It would be taken image by image, and in 1d without an error."""
    net = make("mbn paper", dims=3)
    before = snapshot(net)
    with pytest.raises(TypeError, match=r"needs batches: a loader, or \[images\]"):
        set_precise_statistics(net, inputs(4, 3, 3))
    assert unchanged(before, net)


def test_a_network_without_our_layers_is_said():
    net = nn.Sequential(nn.BatchNorm2d(3))
    before = copy.deepcopy(net.state_dict())
    with pytest.warns(UserWarning, match="found none of our layers") as caught:
        set_precise_statistics(net, [inputs(4, 3, 2, 2).float()])
    assert caught[0].filename == __file__
    assert_close(net.state_dict(), before, rtol=0, atol=0)


class Functional(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x[None], x[None], x[None])[0][0]


class Recurrent(nn.LSTM):
    def forward(self, x):
        return super().forward(x[None])[0][0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "other",
    [
        nn.Dropout(0.5),
        Functional(),
        Attention(4, 2, dropout=0.5, batch_first=True),
        Recurrent(4, 4, 2, dropout=0.5, batch_first=True),
        StochasticDepth(0.5, "row"),
        nn.BatchNorm1d(4),
    ],
    ids=lambda module: type(module).__name__,
)
def test_all_other_modules_are_in_eval_mode(other, training):
    """No dropout of whatever kind draws, and torch's batch norm moves nothing and uses what it has."""
    net = nn.Sequential(other, MemorizedBatchNorm1d(4)).train(training)
    x, before, generator = torch.randn(8, 4), snapshot(other), torch.get_rng_state()
    set_precise_statistics(net, [x, x])
    assert torch.equal(torch.get_rng_state(), generator)
    assert unchanged(before, other)
    assert_close(net[1].running_mean, other.eval()(x).mean(0).detach())
    assert net[1].training == training


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize(
    ("modes", "taken"), [((True, False), [True, False]), ((True, True), [True, True]), ((False, False), [True, True])]
)
def test_layers_in_eval_mode_are_left_alone_unless_all_are(modes, taken, root):
    """All are in a network that was trained, also where a wrapper (AveragedModel) has a mode of its own."""
    net = nn.Sequential(*(MemorizedBatchNorm2d(3).train(mode) for mode in modes))
    net.training = root
    before = [snapshot(layer) for layer in net]
    set_precise_statistics(net, [torch.randn(4, 3, 2, 2)])
    assert [not unchanged(*pair) for pair in zip(before, net, strict=True)] == taken
    assert (net.training, *(layer.training for layer in net)) == (root, *modes)


def test_nothing_of_a_second_forward_that_failed_enters_a_held_memory():
    net = nn.Sequential(make("mbn paper"), nn.Linear(9, 1).double())  # which does not fit
    with pytest.raises(RuntimeError):
        second_forward(net, inputs(4, 3, 2, 2))
    assert net[0].noted == ()
    other = make("mbn paper")
    for layer in (net[0], other):
        set_precise_statistics(layer, [inputs(4, 3, 2, 2, at=3)] * 3, roll=False)
        assert layer.memory_count.sum() == 0


def test_an_error_leaves_everything_as_it_was():
    net = network("mbn paper")
    before = snapshot(net)
    with pytest.raises(ValueError, match="was given no batch"):
        set_precise_statistics(net, [])
    with pytest.raises(ValueError, match="4 channels, not 2"):
        set_precise_statistics(nn.Sequential(nn.Identity(), net[1], net[2]), [inputs(4, 4, 5, 5), inputs(4, 2, 5, 5)])
    assert unchanged(before, net)
    assert net.training
    assert all(layer.tally is None for layer in norm_layers(net))
