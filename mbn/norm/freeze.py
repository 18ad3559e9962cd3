"""Layers that keep to what they have remembered, whatever mode the network is in."""

import warnings

from torch import nn

from .base import BatchStatisticsNorm, norm_layers


def freeze(module: nn.Module) -> None:
    """Let all of our layers inside module normalise by what they have remembered, until `unfreeze`.

    They stay in eval mode when module.train() is called, remember nothing, and their gamma and beta need no gradients:
    for fine-tuning with few images, as others freeze `nn.BatchNorm`. (Code that looks for
    `nn.modules.batchnorm._BatchNorm` does not find our layers.) Warns where module has none. Copies stay frozen; a
    state dict does not hold it.
    """
    layers = norm_layers(module)
    if not layers:
        warnings.warn("freeze found none of our layers: call convert(model) before it", stacklevel=2)
    for layer in layers:
        if not layer.frozen:
            own = (layer.weight, layer.bias)
            mode = layer.training
            layer.frozen, layer.needed_gradients = True, tuple(p is not None and p.requires_grad for p in own)
            layer.train(False)
            layer.unfrozen_mode = mode
            _require_gradients(layer, (False, False))


def unfreeze(module: nn.Module) -> None:
    """Undo `freeze`: mode and need of gradients are what they would be without it."""
    for layer in norm_layers(module):
        if layer.frozen:
            layer.frozen = False
            layer.train(layer.unfrozen_mode)
            _require_gradients(layer, layer.needed_gradients)


def _require_gradients(layer: BatchStatisticsNorm, wanted: tuple[bool, ...]) -> None:
    for p, needs in zip((layer.weight, layer.bias), wanted, strict=True):
        if p is not None:
            p.requires_grad_(needs)
