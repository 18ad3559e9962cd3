"""The statistics gap, weight norms and dead channels."""

import pytest
import reference
import torch
from layer_kinds import reference_of, snapshot, unchanged
from running import Small, follow
from torch import nn

import models
from mbn.measure.statistics_gap import epoch_statistics, training_statistics
from mbn.network_layers import bn, brn, gn, mbn, normprop
from mbn.norm import base
from mbn.norm.base import norm_layers
from mbn.norm.second_forward import second_forward

LAYERS = {"bn": bn(2), "brn": brn(2), "mbn": mbn(2, 0.5, memory=2), "batch": mbn(2, 0.5, memory=2, gradient="batch")}
every_norm = pytest.mark.parametrize("norm", LAYERS)


def images(*sizes):
    return [torch.randn(size, 3, 5, 5, dtype=torch.float64) * 2 + 1 for size in sizes]


def trained(norm, dropout=0.0, sizes=(6, 4, 6)):
    """A network whose test statistics are not those of its next batch, and a reference of each of its layers."""
    model = Small(LAYERS[norm], dropout=dropout).double()
    references = [reference_of(layer) for layer in norm_layers(model)]
    for x in images(*sizes):
        follow(model, references, x)
        second_forward(model, x)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return model, references


@every_norm
def test_the_probe_changes_neither_buffers_nor_generators_nor_modes(norm):
    model, _ = trained(norm, dropout=0.5)
    (x,) = images(5)
    before, drawn = snapshot(model), torch.get_rng_state()
    training_statistics(model, x)
    assert unchanged(before, model)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    base.warn_once.cache_clear()
    model.eval()  # no warning: a probe does not count as a forgotten second forward


@every_norm
def test_the_probe_sees_what_a_training_forward_normalises_by(norm):
    """y = gamma (x - mu^) / sigma^ + beta at every layer of the training forward itself, with the same dropout."""
    model, _ = trained(norm, dropout=0.5)
    (x,) = images(5)
    torch.manual_seed(1)
    seen = training_statistics(model, x)
    passed = {}
    for name in ("norm1", "norm2"):
        hook = lambda layer, i, o, name=name: passed.update({name: (layer, i[0].detach(), o.detach().clone())})  # noqa: E731
        getattr(model, name).register_forward_hook(hook)
    torch.manual_seed(1)
    model(x)
    assert passed.keys() | {"act1", "act2"} == seen.keys()
    for name, (layer, x_in, y) in passed.items():
        mu, sigma, weight, bias = (t.view(1, -1, 1, 1) for t in (*seen[name], layer.weight, layer.bias))
        torch.testing.assert_close(y, weight * (x_in - mu) / sigma + bias)


@pytest.mark.parametrize("norm", ["bn", "mbn"])
def test_the_gap_and_weight_norms_by_hand(norm):
    """mean |mu^ - mu_test| / sigma_test and mean |log(sigma^ / sigma_test)|."""
    model, references = trained(norm)
    (x,) = images(5)
    row = epoch_statistics(model, training_statistics(model, x))
    means, stds = {}, {}
    for name, expected, h in zip(("norm1", "norm2"), references, follow(model, references, x, False), strict=True):
        batch = reference.moments(reference.vectors(h)) if norm == "bn" else expected.training_statistics(h)
        mu, sigma = batch[0], (batch[1] + 1e-5) ** 0.5
        mu_test, sigma_test = expected.test_statistics()
        means[name] = ((mu - mu_test) / sigma_test).abs().mean().item()
        stds[name] = (sigma / sigma_test).log().abs().mean().item()
    assert row["gap_means"] == pytest.approx(means, rel=1e-9)
    assert row["gap_stds"] == pytest.approx(stds, rel=1e-9)
    assert min(*means.values(), *stds.values()) > 0.01
    assert row["gap_mean"] == pytest.approx(sum(means.values()) / 2, rel=1e-9)
    assert row["gap_std"] == pytest.approx(sum(stds.values()) / 2, rel=1e-9)
    norms = {f"{m}.weight": getattr(model, m).weight.square().sum().item() ** 0.5 for m in ("conv1", "conv2", "fc")}
    assert row["weight_norms"] == pytest.approx(norms)
    assert row["weight_norm"] == pytest.approx(sum(norm**2 for norm in norms.values()) ** 0.5)


def test_an_epochs_statistics_are_read_from_the_device_at_once(reads):
    model, _ = trained("mbn")
    training = training_statistics(model, *images(5))
    reads.clear()
    epoch_statistics(model, training)
    assert reads == ["tolist"]


def test_a_norm_without_statistics_has_no_gap():
    model = Small(gn(1, groups=2, channels=1)).double()
    row = epoch_statistics(model, training_statistics(model, *images(5)))
    assert set(row) == {"weight_norm", "weight_norms", "dead_relus", "stage_dead_relus"}


# Dead channels.


def dead(model, x):
    for _ in range(2):  # the whole memory
        second_forward(model, x)
    row = epoch_statistics(model, training_statistics(model, x))
    return row["dead_channels"], row["dead_layers"], row["layer_dead_channels"]


@every_norm
def test_channels_that_do_not_vary_are_dead(norm):
    model, _ = trained(norm)
    (x,) = images(5)
    assert dead(model, x) == (0, 0, {})
    with torch.no_grad():
        model.conv1.weight[[0, 2]] = 0
        model.conv1.weight[1] *= 0.01 / model.conv1.weight[1].norm()  # small, but it varies: alive
    assert dead(model, x) == (2, 0, {"norm1": 2})


@every_norm
def test_a_relu_that_lets_nothing_through_kills_all_of_the_next_layer(norm):
    model, _ = trained(norm)
    with torch.no_grad():
        model.norm1.weight.zero_()
        model.norm1.bias.fill_(-1)
    assert dead(model, *images(5)) == (5, 1, {"norm2": 5})


# Dead channels behind ReLUs.


def dead_relus(model, x):
    row = epoch_statistics(model, training_statistics(model, x))
    assert row["dead_relus"] == sum(row["stage_dead_relus"].values())
    return row["stage_dead_relus"]


@pytest.mark.parametrize("layers", [bn(1), gn(1, groups=2, channels=1), normprop(1)], ids=["bn", "gn", "normprop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_channel_that_lets_nothing_through_its_relu_is_dead(layers, dtype):
    """A single value of one image is enough for a channel to live."""
    x = -torch.rand(5, 4, 3, 3, dtype=dtype) - 0.1
    x[3, 2, 1, 0] = 0.05
    (dead,) = training_statistics(nn.Sequential(layers.act()), x)["0"]
    assert dead.tolist() == [True, True, False, True]


@pytest.mark.parametrize("layers", [bn(1), normprop(1)], ids=["bn", "normprop"])
def test_dead_relus_are_counted_by_stage(layers):
    model = models.build("resnet_cifar:resnet20", layers=layers, classes=10)
    x = torch.randn(4, 3, 32, 32)
    assert set(dead_relus(model, x)) == {"act1", "layer1", "layer2", "layer3"}
    with torch.no_grad():
        for block in (model.layer2[0], model.layer2[2]):
            (block.conv1.shift if hasattr(block.conv1, "shift") else block.bn1.bias)[:3] = -100.0
    assert dead_relus(model, x) == {"act1": 0, "layer1": 0, "layer2": 6, "layer3": 0}


def test_a_relu_that_is_called_twice_has_the_channels_of_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.fc = nn.ReLU(), nn.Linear(2, 2)

        def forward(self, x):
            return self.relu(self.relu(x) - 1)

    x = torch.tensor([[2.0, 0.5], [-1.0, 0.5]])
    assert training_statistics(Twice(), x)["relu"][0].tolist() == [False, False, False, True]
    assert dead_relus(Twice(), x) == {"relu": 1}


def test_a_network_without_relus_has_no_count():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Tanh())
    (x,) = images(5)
    assert not {"dead_relus", "stage_dead_relus"} & set(epoch_statistics(model, training_statistics(model, x.float())))
