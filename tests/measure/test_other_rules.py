"""Other rules of testing, by hand in float64, and that they leave a network as it was."""

import pytest
import reference
import torch
from layer_kinds import inputs, reference_of, snapshot, unchanged
from running import Small, follow
from test_gap import LAYERS, every_norm, images, trained
from torch.testing import assert_close

from mbn import MemorizedBatchNorm2d, second_forward
from mbn.measure.evaluation import evaluate
from mbn.measure.other_rules import (
    averages_with_momentum,
    newest_entry_as_the_batch,
    rules,
    set_newest_as_batch,
    statistics_of_the_test_batch,
)
from mbn.network_layers import gn
from mbn.norm.base import norm_layers


def labelled(*sizes):
    return [(x, torch.arange(len(x)) % 10) for x in images(*sizes)]


@pytest.fixture
def logits():
    """A function that runs a rule on a model: the logits that it saw, and its result."""

    def of(model, rule, *arguments):
        seen = []
        hook = model.fc.register_forward_hook(lambda module, x, y: seen.append(y.detach()))
        with hook:
            error = rule(model.eval(), *arguments)
        return torch.cat(seen), error

    return of


def wrong(logits, batches):
    return 100 * (logits.argmax(1) != torch.cat([y for _, y in batches])).double().mean().item()


@pytest.mark.parametrize("remembered", [1, 3, 6])
@pytest.mark.parametrize("lam", [0.1, 0.9])
def test_the_newest_entry_as_the_batch_is_the_papers_literal_rule(lam, remembered):
    """alpha 1 for the newest, lambda eta^(a-1) for one of age a, times n: in loops over all remembered values."""
    layer = MemorizedBatchNorm2d(3, memory=4, lam=lam).double()
    by_hand = reference_of(layer)
    for t in range(remembered):
        x = inputs(2 + t % 3, 3, 2, 2, at=t)
        by_hand.remember(x)
        second_forward(layer, x)
    pool = [statistic.clone() for statistic in layer.test_statistics()]
    alpha = [1.0, *(lam * 0.9 ** (a - 1) for a in range(1, len(by_hand.memory)))]
    set_newest_as_batch(layer)
    assert_close(layer.test_statistics(), reference.weighted_moments(by_hand.memory, alpha), rtol=1e-10, atol=1e-12)
    same = all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(pool, layer.test_statistics(), strict=True))
    assert same == (lam == 0.9 or remembered == 1)  # at lambda = eta it is the pool


def test_the_newest_entry_normalises_every_layer_of_the_network(logits):
    model, references = trained("mbn")
    test = labelled(6)
    by_hand = Small(LAYERS["mbn"]).double()
    by_hand.load_state_dict(model.state_dict())
    for layer, own in zip(norm_layers(by_hand), references, strict=True):
        layer.set_test_statistics(*reference.weighted_moments(own.memory, [1.0, 0.5]))  # memory=2, lambda=0.5
    (x, _), *_ = test
    seen, error = logits(model, newest_entry_as_the_batch, test)
    assert_close(seen, by_hand.eval()(x).detach(), rtol=1e-9, atol=1e-9)
    assert error == pytest.approx(wrong(seen, test))


def test_an_empty_memory_has_no_newest_entry():
    layer = MemorizedBatchNorm2d(3)
    before = snapshot(layer)
    set_newest_as_batch(layer)
    assert unchanged(before, layer)


@pytest.mark.parametrize("roll", [False, True], ids=["held", "rolling"])
@every_norm
def test_a_test_batch_is_normalised_as_a_training_batch_would_be(norm, roll, logits):
    model, references = trained(norm)
    model.dropout.p = 0.5  # which must be off
    batches, expected = labelled(4, 4, 3), []
    for x, _ in batches:
        given = follow(model, references, x, remember=False)
        layer = norm_layers(model)[1]
        y = references[1].normalize(given[1], layer.weight, layer.bias).relu().mean((2, 3))
        expected.append(model.fc(y).detach())
        for by_hand, inside in zip(references, given, strict=True):
            if roll:
                by_hand.remember(inside)
    seen, error = logits(model, statistics_of_the_test_batch, batches, roll)
    assert_close(seen, torch.cat(expected), rtol=1e-9, atol=1e-9)
    assert error == pytest.approx(wrong(seen, batches))


@pytest.mark.parametrize("norm", ["bn", "mbn"])
def test_held_and_rolling_are_the_same_number_with_bn_alone(norm, logits):
    model, _ = trained(norm)
    batches = labelled(4, 4, 4)
    held, rolling = (logits(model, statistics_of_the_test_batch, batches, roll)[0] for roll in (False, True))
    assert torch.equal(held, rolling) == (norm == "bn")


@pytest.mark.parametrize("momentum", [0.9, 1.0])
@pytest.mark.parametrize("forwards", [1, 2])
def test_averages_of_another_momentum_are_those_of_the_last_training_batches(momentum, forwards, logits):
    model, _ = trained("bn", dropout=0.5)
    train, test = labelled(5, 3, 4), labelled(6)
    by_hand = Small(LAYERS["bn"]).double()
    by_hand.load_state_dict(model.state_dict())
    averages = [[m.clone() for m in layer.test_statistics()] for layer in norm_layers(model)]
    for layer in norm_layers(model):
        layer.forwards = forwards
    for x, _ in train:
        for own, h in zip(averages, follow(by_hand, [reference.BN(4, 1), reference.BN(5, 1)], x), strict=True):
            new = h.mean((0, 2, 3)), h.var((0, 2, 3))
            own[:] = [(1 - momentum) * old + momentum * value for old, value in zip(own, new, strict=True)]
    for layer, own in zip(norm_layers(by_hand), averages, strict=True):
        layer.set_test_statistics(*own)
    expected, _ = logits(by_hand, lambda model: evaluate(model, test).error)
    seen = []
    with model.fc.register_forward_hook(lambda module, i, y: seen.append(y)):
        error = averages_with_momentum(model.eval(), momentum, train, test)
    assert_close(seen[-1], expected, rtol=1e-9, atol=1e-9)
    assert error == pytest.approx(wrong(expected, test))


def every_rule(model, size=3):
    test, train = labelled(8, 8)
    in_batches = lambda n: zip(test[0].split(n), test[1].split(n), strict=True)  # noqa: E731
    return rules(model, size, lambda: [test], in_batches, lambda: [train])


@pytest.mark.parametrize("forwards", [1, 2])
@every_norm
def test_the_network_is_afterwards_what_it_was(norm, forwards):
    model, _ = trained(norm, dropout=0.5)
    for layer in norm_layers(model):
        layer.forwards = forwards
    model.eval()
    found, settings = every_rule(model), [layer.extra_repr() for layer in norm_layers(model)]
    before, drawn = snapshot(model), torch.get_rng_state()
    for rule in found.values():
        assert 0 <= rule() <= 100
        assert unchanged(before, model)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [layer.extra_repr() for layer in norm_layers(model)] == settings
    assert not any(module.training for module in model.modules())
    assert all(layer.phase == "first" and not layer.noted for layer in norm_layers(model))


TWICE = [f"test batch of {size}, {word}" for size in (3, 8, 128) for word in ("held", "rolling")]


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        (LAYERS["mbn"], ["newest entry as the batch", *TWICE]),
        (LAYERS["brn"], TWICE),
        (
            LAYERS["bn"],
            [
                *(f"test batch of {size}" for size in (3, 8, 128)),
                *(f"averages with momentum {momentum}" for momentum in ("0.9", "1.0")),
            ],
        ),
        (gn(1), []),
    ],
    ids=["mbn", "brn", "bn", "gn"],
)
def test_the_rules_of_each_method_by_name(layers, names):
    """The names stand in records."""
    assert list(every_rule(Small(layers))) == names
    assert list(every_rule(Small(layers), size=8)) == [name for name in names if "of 3" not in name]
