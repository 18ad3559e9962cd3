"""Double forward propagation: which forward pass remembers, with which weights, and the warning if none did."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from layer_kinds import close, inputs, kinds, network, reference_of, remember, snapshot, unchanged
from torch import nn
from torch.testing import assert_close

import mbn.norm.base as base
from mbn import BatchNorm1d, BatchRenorm1d, MemorizedBatchNorm1d, held, second_forward
from mbn.norm.base import BatchStatisticsNorm, norm_layers

layers = pytest.mark.parametrize("layer", [BatchNorm1d, BatchRenorm1d, MemorizedBatchNorm1d])


@pytest.fixture
def no_warning_yet():
    """A process that has not warned yet, for the tests after this one too."""
    base._warn_forgotten.cache_clear()
    yield
    base._warn_forgotten.cache_clear()


@kinds
def test_each_layer_remembers_the_moments_under_the_new_weights(path, kind):
    """Algorithm 1 through a whole network, each layer normalising by what it remembers (without B) and B."""
    net = network(kind, forwards=2)
    refs = [reference_of(layer) for layer in norm_layers(net)]

    def by_hand(x, forward):
        left = iter(refs)
        for layer in net:
            ours = isinstance(layer, BatchStatisticsNorm)
            x = next(left).forward(x, layer.weight, layer.bias, forward) if ours else layer(x)
        return x

    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for t in range(5):
        x, labels = inputs(2 + t % 3, 3, 5, 5, at=t), torch.arange(2 + t % 3) % 3
        optimizer.zero_grad()
        y = net(x)
        close(y, by_hand(x, forward=1), 1e-9)
        F.cross_entropy(y, labels).backward()
        optimizer.step()
        close(second_forward(net, x), by_hand(x, forward=2), 1e-9)
        for layer, ref in zip(norm_layers(net), refs, strict=True):
            for name, expected in ref.buffers().items():
                close(getattr(layer, name), expected, 1e-9)


@layers
def test_one_entry_per_second_forward(layer):
    """Gradient accumulation: two training forwards, one step, and then each micro-batch's second forward."""
    model, twin = layer(3, forwards=2), layer(3, forwards=1)
    a, b = torch.randn(4, 3), torch.randn(5, 3) + 1
    before = snapshot(model)
    assert unchanged(before, twin)
    (model(a).square().sum() + model(b).square().sum()).backward()
    assert unchanged(before, model)
    second_forward(model, a)
    second_forward(model, b)
    with torch.no_grad():
        twin(a)
        twin(b)
    assert unchanged(snapshot(twin), model)


@layers
def test_only_layers_of_two_forwards_in_training_mode_take_the_second(layer):
    """A layer of one forward has remembered the batch already, and a frozen one remembers nothing."""
    one, two, frozen = layer(3, forwards=1), layer(3, forwards=2), layer(3, forwards=2)
    net, x = nn.Sequential(one, two, frozen), torch.randn(4, 3)
    frozen.eval()
    net(x)
    before = [snapshot(part) for part in net]
    second_forward(net, x)
    assert [unchanged(*pair) for pair in zip(before, net, strict=True)] == [True, False, True]


def test_second_forward_passes_arguments_on_and_returns_the_output_without_gradients():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = MemorizedBatchNorm1d(3)

        def forward(self, x, *, factor):
            assert not torch.is_grad_enabled()
            return {"y": self.norm(x) * factor}

    model, x = Doubled(), torch.randn(4, 3, requires_grad=True)
    y = second_forward(model, x, factor=2)["y"]
    assert not y.requires_grad
    assert_close(y, 2 * F.batch_norm(x.detach(), None, None, training=True))
    assert torch.is_grad_enabled()


def test_second_forward_sees_the_new_weights_inside_one_autocast():
    """autocast caches bfloat16 copies of the weights until it ends, and the optimiser's step is inside it."""
    net, x = nn.Sequential(nn.Linear(3, 4, bias=False), MemorizedBatchNorm1d(4)), torch.randn(8, 3)
    with torch.autocast("cpu", torch.bfloat16):
        net(x)
        with torch.no_grad():
            net[0].weight.mul_(3)
        assert second_forward(net, x).dtype == torch.bfloat16
    assert_close(net[1].memory_mean[0], net[0](x).mean(0), atol=3e-2, rtol=3e-2)
    assert second_forward(net, x).dtype == torch.float32


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (MemorizedBatchNorm1d(3).eval(), r"call module\.train\(\) first"),
        *((m, "forwards=2") for m in (nn.Linear(3, 3), nn.BatchNorm1d(3), MemorizedBatchNorm1d(3, forwards=1))),
    ],
)
def test_second_forward_refuses_eval_mode_and_a_model_without_a_layer_of_two_forwards(model, words):
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=words):
        second_forward(model, torch.randn(4, 3))
    assert unchanged(before, model)


@layers
def test_after_a_failed_second_forward_the_next_forward_is_a_first_one(layer):
    model = nn.Sequential(layer(3, forwards=2), nn.Linear(5, 5))
    with pytest.raises(RuntimeError):
        second_forward(model, torch.randn(4, 3))
    before = snapshot(model)
    model[0](torch.randn(4, 3))
    assert unchanged(before, model)


@layers
@pytest.mark.parametrize("forwards", [1, 2])
def test_held_layers_normalise_as_always_and_remember_nothing(layer, forwards):
    model, x = layer(3, forwards=forwards), torch.randn(4, 3)
    for _ in range(2):
        remember(model, x + 1)
    before, twin = snapshot(model), copy.deepcopy(model)
    with held(model):
        y = model(x)
    assert unchanged(before, model)
    assert torch.equal(y, twin(x))
    remember(model, x)
    assert not unchanged(before, model)
    model.eval()  # no warning


def warned(model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.eval()
    model.train()
    return [str(w.message) for w in caught]


@layers
def test_eval_after_forgotten_second_forwards_warns_once_in_a_process(layer, no_warning_yet):
    model, x = nn.Sequential(layer(3, forwards=2), layer(3, forwards=2)), torch.randn(4, 3)
    model(x)
    (message,) = warned(model)
    assert "second_forward(model, inputs)" in message
    model(x)
    assert warned(model) == []


@layers
@pytest.mark.parametrize("case", ["second forward", "one forward", "held", "evaluation", "nothing"])
def test_no_warning_without_a_forgotten_second_forward(layer, case, no_warning_yet):
    model, x = nn.Sequential(layer(3, forwards=1 if case == "one forward" else 2)), torch.randn(4, 3)
    if case in ("second forward", "one forward"):
        model(x)
    if case == "second forward":
        second_forward(model, x)
    if case == "held":
        with held(model):
            model(x)
    if case == "evaluation":
        model.eval()
        model(x)
    assert warned(model) == []
    model.train()
    assert warned(model) == []


def test_a_warning_made_an_error_is_raised_again_next_time(no_warning_yet):
    model = MemorizedBatchNorm1d(3)
    for _ in range(2):
        model.train()
        model(torch.randn(4, 3))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="second_forward"):
                model.eval()
