"""From a network's name in this package to the network."""

from pkgutil import resolve_name
from typing import Any

from torch import nn


def build(builder: str, layers: Any, classes: int, **settings: Any) -> nn.Module:
    """Build a network with that many classes.

    builder: its class or function in this package, such as "nin.NIN". layers: a triple (conv, norm, act) of
    constructors: conv(in_channels, out_channels, kernel_size, stride=, padding=, bias=), norm(channels), act(). No
    network names a convolution, a normalisation or an activation of its own. settings: the network's own, such as
    dropout for nin. Input (N, 3, H, W), output (N, classes).
    """
    network: nn.Module = resolve_name(f"{__package__}.{builder}")(layers, classes, **settings)
    return network
