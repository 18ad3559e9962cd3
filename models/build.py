"""From a network's name in this package to the network."""

from importlib import import_module
from typing import Any

from torch import nn


def build(builder: str, layers: Any, classes: int, **settings: Any) -> nn.Module:
    """Build a network with that many classes.

    builder: its function in this package, such as "nin.nin". layers: a triple (conv, norm, act) of constructors:
    conv(in_channels, out_channels, kernel_size, stride=, padding=, bias=), norm(channels), act(). No network names a
    convolution, a normalisation or an activation of its own. settings: the network's own, such as dropout for nin.
    Input (N, 3, H, W), output (N, classes).
    """
    module, _, function = builder.partition(".")
    network: nn.Module = getattr(import_module(f".{module}", __package__), function)(layers, classes, **settings)
    return network
