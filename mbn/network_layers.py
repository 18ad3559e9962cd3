"""The layers that a network receives: constructors (conv, norm, act). One function for each entry of `mbn.methods`.

There are three because of normalisation propagation, which changes the convolution and the ReLU, and has no layer where
the other methods have `norm(channels)`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn

from mbn.config import Config
from mbn.methods import METHODS
from mbn.norm.batch import BatchNorm2d
from mbn.norm.memorized import MemorizedBatchNorm2d
from mbn.norm.normprop import StandardReLU, UnitConv2d
from mbn.norm.renorm import BatchRenorm2d
from mbn.system.registered import registered
from mbn.system.setting_fields import leaves


class Layers(NamedTuple):
    """conv(in_channels, out_channels, kernel_size, stride=, padding=, bias=), norm(channels) and act()."""

    conv: Callable[..., nn.Module]
    norm: Callable[[int], nn.Module]
    act: Callable[[], nn.Module]


def from_config(config: Config) -> Layers:
    """The layers of `norm=`, with its settings. A setting with a value for each stage starts at the first value."""
    settings = {
        key: value[0] if field.metadata.get("staged") else value
        for key, field, value in leaves(config.norm)
        if key != "name"
    }
    layers: Layers = registered(METHODS[config.norm.name].layers, "mbn/methods.py")(config.forwards, **settings)
    return layers


def bn(forwards: int, eps: float = 1e-5, momentum: float = 0.1, group: int | None = None) -> Layers:
    """Batch normalisation (Ioffe and Szegedy 2015)."""
    norm = partial(BatchNorm2d, eps=eps, momentum=momentum, forwards=forwards, group_size=group)
    return Layers(nn.Conv2d, norm, _relu)


def mbn(
    forwards: int,
    lam: float,
    memory: int = 20,
    decay: float = 0.9,
    eps: float = 1e-5,
    gradient: str = "paper",
    group: int | None = None,
) -> Layers:
    """Memorized batch normalisation (Guo et al. 2018), lambda starting at lam."""
    norm = partial(
        MemorizedBatchNorm2d,
        memory=memory,
        decay=decay,
        eps=eps,
        lam=lam,
        forwards=forwards,
        gradient=gradient,
        group_size=group,
    )
    return Layers(nn.Conv2d, norm, _relu)


def brn(forwards: int, eps: float = 1e-5, momentum: float = 0.01, group: int | None = None) -> Layers:
    """Batch renormalisation (Ioffe 2017), starting as batch normalisation: r_max = 1, d_max = 0."""
    norm = partial(BatchRenorm2d, eps=eps, momentum=momentum, r_max=1.0, d_max=0.0, forwards=forwards, group_size=group)
    return Layers(nn.Conv2d, norm, _relu)


def normprop(forwards: int) -> Layers:
    """Normalisation propagation (Arpit et al. 2016): no batch statistics, so that `forwards` changes nothing."""
    return Layers(_unit_conv, _no_norm, StandardReLU)


def gn(forwards: int, groups: int = 32, channels: int = 4, eps: float = 1e-5) -> Layers:
    """Group normalisation (Wu and He 2018) with min(groups, C // channels) groups: no batch statistics either.

    32 groups on a CIFAR network's 16 to 64 channels would be instance norm: hence at least `channels` channels a group.
    """

    def norm(num_features: int) -> nn.Module:
        most = min(groups, max(1, num_features // channels))
        # A layer of classes (NIN's last) may have a number of channels that is no multiple of the groups.
        divisor = next(g for g in range(most, 0, -1) if num_features % g == 0)
        return nn.GroupNorm(divisor, num_features, eps=eps)

    return Layers(nn.Conv2d, norm, _relu)


def _unit_conv(*args, bias: bool = False, **kwargs) -> nn.Module:
    """A unit-norm convolution, whatever bias the network asks for: its beta is a bias."""
    return UnitConv2d(*args, **kwargs)


def _relu() -> nn.Module:
    return nn.ReLU(inplace=True)


def _no_norm(num_features: int) -> nn.Module:
    return nn.Identity()
