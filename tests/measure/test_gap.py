"""The statistics gap, and evaluation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mbn.layers import bn, brn, gn, mbn
from mbn.measure.statistics_gap import epoch_statistics, training_statistics
from mbn.measure.test_error import evaluate
from mbn.norm import base
from mbn.norm.base import second_forward


class Small(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.conv1, self.norm1 = layers.conv(3, 4, 3, bias=False), layers.norm(4)
        self.dropout = nn.Dropout(0.5)
        self.conv2, self.norm2 = layers.conv(4, 2, 1, bias=False), layers.norm(2)

    def forward(self, x):
        return self.norm2(self.conv2(self.dropout(self.norm1(self.conv1(x)).relu())))


def trained(layers):
    """A network whose test statistics are not those of its next batch, and that batch."""
    model = Small(layers).double()
    for _ in range(3):
        x = torch.randn(6, 3, 5, 5, dtype=torch.float64) * 2 + 1
        second_forward(model, x)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return model, torch.randn(5, 3, 5, 5, dtype=torch.float64)


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


LAYERS = {"bn": bn(2), "mbn": mbn(2, 0.5, memory=2), "batch": mbn(2, 0.5, memory=2, gradient="batch"), "brn": brn(2)}


@pytest.mark.parametrize("name", LAYERS)
def test_the_probe_changes_neither_buffers_nor_generators_nor_modes(name):
    model, x = trained(LAYERS[name])
    before, drawn = state(model), torch.get_rng_state()
    training_statistics(model, x)
    after = state(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    base._warn_forgotten.cache_clear()
    model.eval()  # a probe is no forgotten second forward: no warning


@pytest.mark.parametrize("name", LAYERS)
def test_the_probe_sees_what_a_training_forward_normalises_by(name):
    """y = gamma (x - mu^) / sigma^ + beta at every layer of the training forward itself."""
    model, x = trained(LAYERS[name])
    torch.manual_seed(1)
    seen = training_statistics(model, x)
    passed = {}
    for key, layer in (("norm1", model.norm1), ("norm2", model.norm2)):
        layer.register_forward_hook(lambda _, i, o, key=key: passed.update({key: (i[0].detach(), o.detach())}))
    torch.manual_seed(1)
    model(x)
    for key, (x_in, y) in passed.items():
        layer = getattr(model, key)
        mu, sigma = (t.view(1, -1, 1, 1) for t in seen[key])
        weight, bias = layer.weight.view(1, -1, 1, 1), layer.bias.view(1, -1, 1, 1)
        torch.testing.assert_close(y, weight * (x_in - mu) / sigma + bias)


def test_the_gap_by_hand():
    """mean |mu^ - mu_test| / sigma_test and mean |log(sigma^ / sigma_test)|, from eq. 6 and 8."""
    model, x = trained(LAYERS["mbn"])
    row = epoch_statistics(model, training_statistics(model, x))
    assert list(row["gap_means"]) == list(row["gap_stds"]) == ["norm1", "norm2"]
    layer = model.norm1
    h = F.conv2d(x, model.conv1.weight)
    expected_mu, expected_sigma = [], []
    for c in range(4):
        values = h[:, c].flatten()
        entries = [(1.0, values.mean(), values.var(unbiased=False), len(values))]
        entries += [
            (lam * 0.9**age, layer.memory_mean[age, c], layer.memory_var[age, c], layer.memory_count[age].item())
            for age, lam in ((0, 0.5), (1, 0.5))
        ]

        def pooled(entries):
            total = sum(alpha * n for alpha, _, _, n in entries)
            mu = sum(alpha * n * m for alpha, m, _, n in entries) / total
            s2 = sum(alpha * n * ((m - mu) ** 2 + v) for alpha, m, v, n in entries) / total
            return mu, (s2 + 1e-5).sqrt()

        mu, sigma = pooled(entries)
        mu_test, sigma_test = pooled(entries[1:])
        expected_mu.append(abs(mu - mu_test) / sigma_test)
        expected_sigma.append(abs((sigma / sigma_test).log()))
    assert row["gap_means"]["norm1"] == pytest.approx((sum(expected_mu) / 4).item(), rel=1e-9)
    assert row["gap_stds"]["norm1"] == pytest.approx((sum(expected_sigma) / 4).item(), rel=1e-9)
    assert row["gap_means"]["norm1"] > 0.01
    assert row["gap_mean"] == pytest.approx(sum(row["gap_means"].values()) / 2, rel=1e-12)
    assert row["gap_std"] == pytest.approx(sum(row["gap_stds"].values()) / 2, rel=1e-12)


def test_weight_norms_by_hand():
    model, x = trained(LAYERS["mbn"])
    row = epoch_statistics(model, training_statistics(model, x))
    norms = {name: getattr(model, name).weight.detach().flatten().norm().item() for name in ("conv1", "conv2")}
    assert row["weight_norms"] == pytest.approx({f"{name}.weight": norm for name, norm in norms.items()})
    assert row["weight_norm"] == pytest.approx(sum(norm**2 for norm in norms.values()) ** 0.5)


def test_an_epochs_statistics_are_read_from_the_device_at_once(monkeypatch):
    model, x = trained(LAYERS["mbn"])
    training = training_statistics(model, x)
    reads = []
    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, *a, f=original, name=name: reads.append(name) or f(t, *a))
    epoch_statistics(model, training)
    assert reads == ["tolist"]


def test_the_gap_of_bn_is_the_batchs_moments_against_the_averages():
    model, x = trained(LAYERS["bn"])
    row = epoch_statistics(model, training_statistics(model, x))
    h = F.conv2d(x, model.conv1.weight)
    sigma_test = (model.norm1.running_var + 1e-5).sqrt()
    mu, sigma = h.mean((0, 2, 3)), (h.var((0, 2, 3), unbiased=False) + 1e-5).sqrt()
    assert row["gap_means"]["norm1"] == pytest.approx(
        ((mu - model.norm1.running_mean) / sigma_test).abs().mean().item()
    )
    assert row["gap_stds"]["norm1"] == pytest.approx((sigma / sigma_test).log().abs().mean().item())


def test_a_norm_without_statistics_has_no_gap():
    model = Small(gn(1, groups=2, channels=1))
    row = epoch_statistics(model, training_statistics(model, torch.randn(5, 3, 5, 5)))
    assert set(row) == {"weight_norm", "weight_norms"}


# Dead channels.


def dead(model, x):
    row = epoch_statistics(model, training_statistics(model, x))
    return row["dead_channels"], row["dead_layers"], row["layer_dead_channels"]


@pytest.mark.parametrize("name", LAYERS)
def test_channels_that_do_not_vary_are_dead(name):
    model, x = trained(LAYERS[name])
    assert dead(model, x) == (0, 0, {})
    with torch.no_grad():
        model.conv1.weight[[0, 2]] = 0
        model.conv1.weight[1] *= 0.01 / model.conv1.weight[1].norm()  # small, but it varies: alive
        for _ in range(2):  # the whole memory
            second_forward(model, x)
    assert dead(model, x) == (2, 0, {"norm1": 2})


@pytest.mark.parametrize("name", LAYERS)
def test_a_relu_that_lets_nothing_through_kills_all_of_the_next_layer(name):
    model, x = trained(LAYERS[name])
    with torch.no_grad():
        model.norm1.weight.zero_()
        model.norm1.bias.fill_(-1)
        for _ in range(2):
            second_forward(model, x)
    assert dead(model, x) == (2, 1, {"norm2": 2})


# Evaluation.


def test_loss_and_errors_by_hand_over_batches_of_unequal_sizes():
    logits = torch.randn(11, 7)
    labels = torch.randint(0, 7, (11,))
    batches = list(zip(logits.split(4), labels.split(4), strict=True))
    measured = evaluate(lambda x: x, batches)
    ranks = [
        sorted(range(7), key=lambda k: -row[k]).index(y)
        for row, y in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    assert measured.error == pytest.approx(100 * sum(r >= 1 for r in ranks) / 11)
    assert measured.error_top5 == pytest.approx(100 * sum(r >= 5 for r in ranks) / 11)
    assert measured.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)


def test_with_few_classes_the_top_five_are_all_of_them():
    assert evaluate(lambda x: x, [(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))]).error_top5 == 0


def test_evaluation_changes_nothing_and_keeps_no_graph():
    model, x = trained(LAYERS["mbn"])
    model.eval()
    before = copy.deepcopy(state(model))
    grads = []

    def classify(images):
        y = model(images).mean((2, 3))
        grads.append(y.requires_grad)
        return y

    evaluate(classify, [(x, torch.zeros(5, dtype=torch.int64))])
    assert grads == [False]
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())
