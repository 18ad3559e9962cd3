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
            mode, own = layer.training, _gamma_and_beta(layer)
            layer.frozen, layer.needed_gradients = True, tuple(p.requires_grad for p in own)
            layer.train(False)
            layer.unfrozen_mode = mode
            for p in own:
                p.requires_grad_(False)


def unfreeze(module: nn.Module) -> None:
    """Undo `freeze`: mode and need of gradients are what they would be without it.

    A parameter that has been made to need gradients meanwhile goes on to need them.
    """
    for layer in norm_layers(module):
        if layer.frozen:
            layer.frozen = False
            layer.train(layer.unfrozen_mode)
            require_gradients_again(layer)


def require_gradients_again(layer: BatchStatisticsNorm) -> None:
    """Let gamma and beta need gradients where they did before `freeze`."""
    for p, needed in zip(_gamma_and_beta(layer), layer.needed_gradients, strict=False):  # a pruning may be gone since
        if needed:
            p.requires_grad_()


def _gamma_and_beta(layer: BatchStatisticsNorm) -> list[nn.Parameter]:
    """The parameters that gamma and beta are, or are made from where they are pruned or parametrized."""
    made_from = getattr(layer, "parametrizations", {})
    found: list[nn.Parameter] = []
    for name in ("weight", "bias"):
        own = (layer._parameters.get(key) for key in (name, f"{name}_orig"))
        found += [p for p in own if p is not None]
        found += made_from[name].parameters() if name in made_from else []
    return found
