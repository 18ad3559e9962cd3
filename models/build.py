"""From a network's name in this package to the network."""

from pkgutil import resolve_name
from typing import Any

from torch import nn

from .init import uniform_gamma


def build(builder: str, layers: Any, classes: int, gamma: str = "ones", **settings: Any) -> nn.Module:
    """Build a network with that many classes.

    builder: its class or function in this package, such as "nin.NIN". layers: a triple (conv, norm, act) of
    constructors: conv(in_channels, out_channels, kernel_size, stride=, padding=, bias=), norm(channels), act(). No
    network names a convolution, a normalisation or an activation of its own. gamma: "ones" leaves the norm layers'
    gamma as they are, "uniform" draws them last, so that all other weights are the same. settings: the network's own,
    such as dropout for nin. Input (N, 3, H, W), output (N, classes).
    """
    network: nn.Module = resolve_name(f"{__package__}.{builder}")(layers, classes, **settings)
    if gamma == "uniform":
        uniform_gamma(network)
    return network
