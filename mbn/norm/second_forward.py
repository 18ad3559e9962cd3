"""Which forward pass remembers: the second forward propagation, and forwards that change nothing."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .base import BatchStatisticsNorm, norm_layers


@contextlib.contextmanager
def phase(layers: Iterable[BatchStatisticsNorm], name: str) -> Iterator[None]:
    """Set the layers' phase ("first", "second" or "held") for the duration of a with block."""
    layers = list(layers)
    before = [layer.phase for layer in layers]
    for layer in layers:
        layer.phase = name
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.phase = old


def held(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """A context in which training forwards of module change no memory and no moving average."""
    return phase(norm_layers(module), "held")


def second_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The second forward propagation of Algorithm 1: module's layers remember the batch under its updated weights.

    Call it after `optimizer.step()`, with the arguments of the first forward. It runs `module(*args, **kwargs)` in
    training mode and without gradients, under the autocast that is active, and returns its output. Every layer with
    forwards=2 takes the batch into its memory or moving averages, one entry per call. Layers in eval mode (frozen
    ones) remember nothing.

    Errors: RuntimeError where module is in eval mode, or has no layer with forwards=2.

    Source: Guo et al., AAAI 2018, Algorithm 1, lines 10 to 12.
    """
    if not module.training:
        raise RuntimeError("second_forward needs the module in training mode: call module.train() first")
    layers = norm_layers(module)
    if not any(layer.forwards == 2 for layer in layers):
        raise RuntimeError("second_forward found no layer with forwards=2: convert(module, forwards=2) makes them")
    torch.clear_autocast_cache()  # it may hold the weights from before the step
    with torch.no_grad(), phase(layers, "second"):
        return module(*args, **kwargs)
