"""Test statistics taken again with the final weights, over as many images as one likes (PreciseBN)."""

import contextlib
from collections.abc import Callable, Iterable
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
    """Replace the test statistics of all our layers inside module by those of their inputs over batches.

    Every value counts the same, in whichever batch it is. For evaluation after training, above all with batches too
    small for the memory to hold many images; `torch.optim.swa_utils.update_bn` does the same for nn.BatchNorm. To train
    on afterwards use a copy for this: MemorizedBatchNorm would take the new statistics for its memory's pool.

    Arguments:
        module: a network. Its mode, its gradients and what its layers remember stay as they are.
        batches: training inputs, augmented and in batches of the size that training used, because each layer normalises
            them as in training for the layers behind it. Of a tuple or list the first element is the input.
        forward: called with each input in place of module, to move it to a device for example.
        roll: let the memories and averages go along with the batches, the weights being fixed, and put them back at the
            end. False holds them, which is wrong where the batches are not those at the end of training.

    Dropout is off. Frozen layers (`freeze`) are left alone. With sync=True the statistics are those of all processes.

    Errors: ValueError where batches is empty.

    Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3.
    """
    layers = [layer for layer in norm_layers(module) if not layer.frozen]
    moments = [_Moments(layer) for layer in layers]
    empty = True
    with contextlib.ExitStack() as stack:
        stack.enter_context(kept(module))
        take = stack.enter_context(as_in_training(module, roll, forward))
        for layer, own in zip(layers, moments, strict=True):
            stack.enter_context(layer.register_forward_hook(own.note))
        for batch in batches:
            empty = False
            take(batch[0] if isinstance(batch, tuple | list) else batch)
    if empty:
        raise ValueError("set_precise_statistics was given no batch: give it batches of training inputs")
    for layer, own in zip(layers, moments, strict=True):
        layer.set_test_statistics(own.mean, own.variance)


class _Moments:
    """Running mean and biased variance of all values seen, (C,) in float64 (Chan et al. 1979), changed in place."""

    def __init__(self, layer: BatchStatisticsNorm) -> None:
        wide = torch.float32 if layer.running_mean.device.type == "mps" else torch.float64  # which mps lacks
        self.mean = torch.zeros_like(layer.running_mean, dtype=wide)
        self.variance, self.n = self.mean.clone(), self.mean.new_zeros(1)

    def note(self, layer: BatchStatisticsNorm, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        """Take in the values that were normalised: a forward hook."""
        if inputs[0].numel() == 0 and layer.joint_group() is None:
            return
        mean, variance, n = layer.moments(inputs[0])
        self.n += n
        share = n / self.n
        distance = mean - self.mean
        self.mean += share * distance
        self.variance.mul_(1 - share).add_(share * variance).add_(share * (1 - share) * distance.square())
