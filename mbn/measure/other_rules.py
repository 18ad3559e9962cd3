"""Other ways of testing a trained network than by what its layers have remembered, and the test error by each.

They separate what was learned from how it is tested: the same weights, other statistics. Each is given a network in
eval mode, which is afterwards what it was.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from mbn.measure.evaluation import evaluate
from mbn.norm.as_in_training import as_in_training, kept
from mbn.norm.base import norm_layers
from mbn.norm.batch import _BatchNorm
from mbn.norm.functional import pool
from mbn.norm.memorized import _MemorizedBatchNorm
from mbn.system.processes import ALONE, Processes

Batches = Iterable[tuple[Tensor, Tensor]]
# Images in a test batch whose own statistics normalise it, beside the run's own number.
SIZES = (8, 128)
# Of BN's moving averages, beside the run's own.
MOMENTA = (0.9, 1.0)
# How many of the last training batches these averages are made from.
LAST_BATCHES = 100


def newest_entry_as_the_batch(model: nn.Module, test: Batches, processes: Processes = ALONE) -> float:
    """Test error in percent of MBN by the paper's literal rule: the newest entry is taken as the current batch.

    The statistics are eq. 6 over the memory with alpha_0 = 1 and alpha_a = lambda eta**(a - 1) at age a >= 1. At
    lambda = eta this is the memory's pool. test: test images; each of several processes its own.
    """
    with kept(model):
        for layer in norm_layers(model):
            if isinstance(layer, _MemorizedBatchNorm):
                set_newest_as_batch(layer)
        return evaluate(model, test, processes).error


@torch.no_grad()
def set_newest_as_batch(layer: _MemorizedBatchNorm) -> None:
    """Let evaluation normalise by the paper's literal rule; nothing changes while the memory is empty."""
    count = layer.memory_count
    if float(count[0]) <= 0:
        return
    alpha = layer.lam_tensor * layer.powers()[:, 0] / layer.decay
    alpha[0] = 1
    mean, variance, _ = pool(layer.memory_mean, layer.memory_var, alpha * count)
    layer.set_test_statistics(mean, variance)


def statistics_of_the_test_batch(model: nn.Module, test: Batches, roll: bool, processes: Processes = ALONE) -> float:
    """Test error in percent in training mode, dropout off: each test batch is normalised as a training batch would be.

    roll: whether the test batches enter memories and averages. test: batches of which each of several processes has its
    share, as in training.
    """
    with kept(model), as_in_training(model, roll) as forward:
        return evaluate(forward, test, processes).error


def averages_with_momentum(
    model: nn.Module, momentum: float, train: Batches, test: Batches, processes: Processes = ALONE
) -> float:
    """Test error in percent of BN with moving averages of another momentum, made of the batches of train.

    momentum: the share of the newest batch, torch's meaning. train: the last training batches, shared as in training.
    """
    with kept(model), _momentum(model, momentum):
        with as_in_training(model, roll=True) as forward:
            for images, _ in train:
                forward(images)
        return evaluate(model, test, processes).error


@contextlib.contextmanager
def _momentum(model: nn.Module, momentum: float) -> Iterator[None]:
    layers = [layer for layer in norm_layers(model) if isinstance(layer, _BatchNorm)]
    before = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = momentum
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.momentum = value


# A rule by its name: a function that gives the test error in percent.
Rules = dict[str, Callable[[], float]]


def rules(
    model: nn.Module,
    batch_size: int,
    test: Callable[[], Batches],
    test_in_batches: Callable[[int], Batches],
    last_of_training: Callable[[], Batches],
    processes: Processes = ALONE,
) -> Rules:
    """All rules by which this network can be tested beside its own. A network without batch statistics has none.

    batch_size: of the run. test: gives the test images in batches of any size; test_in_batches: in batches of this
    size; last_of_training: the last LAST_BATCHES training batches; each from the start at every call.

    The names stand in records. "held" and "rolling": whether the test batches enter memories and averages. With BN
    alone both are the same number, which then has no such word.
    """

    def newest() -> float:
        return newest_entry_as_the_batch(model, test(), processes)

    def test_batch(size: int, roll: bool) -> float:
        return statistics_of_the_test_batch(model, test_in_batches(size), roll, processes)

    def averages(momentum: float) -> float:
        return averages_with_momentum(model, momentum, last_of_training(), test(), processes)

    layers = norm_layers(model)
    found: Rules = {}
    if any(isinstance(layer, _MemorizedBatchNorm) for layer in layers):
        found["newest entry as the batch"] = newest
    only_bn = all(isinstance(layer, _BatchNorm) for layer in layers)
    for size in sorted({*SIZES, batch_size}) if layers else ():
        if only_bn:
            found[f"test batch of {size}"] = partial(test_batch, size, False)
        else:
            found[f"test batch of {size}, held"] = partial(test_batch, size, False)
            found[f"test batch of {size}, rolling"] = partial(test_batch, size, True)
    if any(isinstance(layer, _BatchNorm) for layer in layers):
        for momentum in MOMENTA:
            found[f"averages with momentum {momentum}"] = partial(averages, momentum)
    return found
