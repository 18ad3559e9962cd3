"""Test statistics taken again with the final weights, over as many images as one likes (PreciseBN)."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .as_in_training import as_in_training, kept
from .base import BatchStatisticsNorm, norm_layers


@torch.no_grad()
def set_precise_statistics(
    module: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[Any], object] | None = None,
    roll: bool = True,
) -> None:
    """Replace the test statistics of our layers inside module by those of their inputs over batches.

    A layer that no batch reaches keeps what it has. Every value counts the same, in whichever batch it is; a batch that
    is not finite where it reaches a layer (an overflow) does not count there, as in training. For
    evaluation after training, above all with batches too small for the memory to hold many images;
    `torch.optim.swa_utils.update_bn` does the same for nn.BatchNorm. To train on afterwards use a copy for this:
    MemorizedBatchNorm would take the new statistics for its memory's pool.

    Arguments:
        module: a network. Its mode, its gradients and what its layers remember stay as they are.
        batches: training inputs, augmented and in batches of the size that training used, because each layer normalises
            them as in training for the layers behind it. Of a tuple or list the first element is the input.
        forward: called with each input in place of module, to move it to a device for example.
        roll: let the memories and averages go along with the batches, the weights being fixed, and put them back at the
            end. False holds them, which is wrong where the batches are not those at the end of training.

    Our layers that are in eval mode beside others in training mode, and frozen ones (`freeze`), are left alone; where
    all are in eval mode, as in a trained network, all that are not frozen take part. Every other module is in eval mode
    meanwhile: no dropout draws, and an nn.BatchNorm normalises by its averages and does not move them. With sync=True
    the statistics are those of all processes.

    Warns where module has none of our layers. Errors: ValueError where batches is empty, or no layer saw a value of it;
    TypeError where it is one tensor.

    Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3.
    """
    if isinstance(batches, Tensor):  # it would be taken image by image
        raise TypeError("set_precise_statistics needs batches: a loader, or [images] for a single one")
    if not norm_layers(module):
        warnings.warn("set_precise_statistics found none of our layers: call convert(model) before it", stacklevel=3)
    empty = True
    with contextlib.ExitStack() as stack:
        stack.enter_context(kept(module))
        take = stack.enter_context(as_in_training(module, roll, forward))
        layers = [layer for layer in norm_layers(module) if layer.training]
        tallies = stack.enter_context(_tallied(layers))
        for batch in batches:
            empty = False
            take(batch[0] if isinstance(batch, tuple | list) else batch)
    if empty:
        raise ValueError("set_precise_statistics was given no batch: give it batches of training inputs")
    seen = [(layer, mean, variance) for layer, (mean, variance, n) in zip(layers, tallies, strict=True) if n > 0]
    if layers and not seen:
        raise ValueError(
            "set_precise_statistics: no layer saw a value: give it batches, or a forward, that reach module's layers"
        )
    for layer, mean, variance in seen:
        layer.set_test_statistics(mean, variance)


@contextlib.contextmanager
def _tallied(layers: list[BatchStatisticsNorm]) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """A context in which layers take the values that they normalise into these means, variances and numbers."""
    tallies = []
    for layer in layers:
        wide = torch.float32 if layer.running_mean.device.type == "mps" else torch.float64  # which mps lacks
        mean = torch.zeros_like(layer.running_mean, dtype=wide)
        layer.tally = (mean, mean.clone(), mean.new_zeros(1))
        tallies.append(layer.tally)
    try:
        yield tallies
    finally:
        for layer in layers:
            layer.tally = None
