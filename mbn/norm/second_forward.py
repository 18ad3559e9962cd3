"""Which forward pass remembers: the second forward propagation, and forwards that change nothing."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .base import BatchStatisticsNorm, norm_layers, warn_once
from .convert import norm_of
from .memories import enter_noted

TOO_EARLY = (
    "second_forward comes before the optimizer's step: no parameter of its layers has changed since the training "
    "forward, so the batch is remembered under the old weights; call second_forward after optimizer.step()"
)


@contextlib.contextmanager
def phase(layers: Iterable[BatchStatisticsNorm], name: str) -> Iterator[None]:
    """Set the layers' phase ("first", "second" or "held") for the duration of a with block.

    What layers note in "second" is entered by `enter_noted` or an `AllMemories`, after the block.
    """
    layers = list(layers)
    before = [layer.phase for layer in layers]
    for layer in layers:
        layer.phase = name
        if name == "second":
            layer.noted = ()
    ended = False
    try:
        yield
        ended = True
        if name == "second":
            for layer in layers:
                layer.second_forward_was_run()
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.phase = old
            if name == "second" and not ended:  # what it has noted so far is to be entered nowhere
                layer.noted = ()


def held(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """A context in which training forwards of module change no memory and no moving average."""
    return phase(norm_layers(module), "held")


def second_forward(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """The second forward propagation of Algorithm 1: module's layers remember the batch under its updated weights.

    Call it after `optimizer.step()`, with the arguments of the first forward. It runs `module(*args, **kwargs)` as its
    parts are, in training mode or not, without gradients and under the autocast that is active, and returns its output.
    At its end every layer with forwards=2 takes the batch into its memory or moving averages: one entry a second
    forward, into which a layer that was called more than once pools its calls (a siamese or recurrent network; our
    BatchNorm moves its averages once a call, as torch's does). Where module raises, MemorizedBatchNorm and BatchRenorm
    have remembered nothing. Layers in eval mode (frozen ones) remember nothing.

    A model has one phase at a time: do not run second_forward or held on it in two threads at once.

    Warns, once in a process, where the call stands before `optimizer.step()`: no parameter of these layers has changed
    since the training forward, but some changed between the last second_forward and this training forward. So it warns
    from the second iteration on, and is silent where nothing changes at all (a learning rate of 0, a step that a
    GradScaler skips, parameters that the optimizer does not have). It knows of changes by autograd's version counters:
    it sees nothing of compiled forwards, nor the steps of optimizers that go past these counters, as those with
    fused=True and those that write p.data do. With these it warns falsely where something else writes parameters
    between the iterations, as averaged weights do that are swapped in and out for evaluation.

    Errors: TypeError where module is not an nn.Module; RuntimeError where it has no layer with forwards=2, and where
    these are all in eval mode, unless some are frozen in a module in training mode.

    Source: Guo et al., AAAI 2018, Algorithm 1, lines 10 to 12.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"second_forward needs the module first, then its arguments, and not a {type(module).__name__}")
    layers = norm_layers(module)
    of_two = [layer for layer in layers if layer.forwards == 2]
    if not of_two:
        raise RuntimeError(_no_layer_of_two_forwards(layers))
    if not any(layer.training or (layer.frozen and module.training) for layer in of_two):
        raise RuntimeError(
            "second_forward: all layers with forwards=2 are in eval mode: call train() on the module that holds them "
            "first, and freeze(part) for a part that is to stay as it is"
        )
    if not torch.compiler.is_compiling():
        _check_order(layers)
    torch.clear_autocast_cache()  # it may hold the weights from before the step
    try:
        with torch.no_grad(), phase(layers, "second"):
            output = module(*args, **kwargs)
    finally:
        # In older torch (2.6; not 2.11) it would keep casts without a gradient, and the next forward train nothing.
        torch.clear_autocast_cache()
    enter_noted(layers)
    return output


def _no_layer_of_two_forwards(layers: list[BatchStatisticsNorm]) -> str:
    if not layers:
        return "second_forward found none of our layers: put them in with convert(model) before training"
    return (
        f"second_forward found no layer with forwards=2; {type(layers[0]).__name__} with forwards=1 remembers in the "
        f'first forward: convert(model, norm="{norm_of(layers[0])}", forwards=2) before training makes layers for two'
    )


def _check_order(layers: list[BatchStatisticsNorm]) -> None:
    """Warn if the optimiser's step comes after `second_forward`; note the versions of now for the next call."""
    known = [layer for layer in layers if layer.forward_versions]
    now = [layer.versions() for layer in known]
    changed_before = any(layer.second_versions not in ((), layer.forward_versions) for layer in known)
    changed_since = now != [layer.forward_versions for layer in known]
    for layer, versions in zip(known, now, strict=True):
        layer.forward_versions, layer.second_versions = (), versions
    if changed_before and not changed_since:
        warn_once(TOO_EARLY)
