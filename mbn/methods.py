"""The methods: what each `norm=` is. Does not import torch: code that needs it is given as a path, loaded at first use.

A new method is its layers, an entry in METHODS, and configs/norm/NAME.yaml.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from omegaconf import MISSING

from mbn.system.registered import registered
from mbn.system.setting_fields import ABOVE_0, SHARE, Rule, among, at_least, setting

# Settings. A default here is the value of a setting that is absent, see `mbn.config.schema`.

GROUP = "images whose statistics are taken together; null: the whole batch"


@dataclass
class Norm:
    name: str = setting(MISSING, "the method")


@dataclass
class BN(Norm):
    eps: float = setting(1e-5, "added to the variance", ABOVE_0)
    momentum: float = setting(0.1, "share of the newest batch in the moving averages", SHARE)
    group: int | None = setting(None, GROUP, at_least(1))


@dataclass
class MBN(Norm):
    eps: float = setting(1e-5, "added to the variance", ABOVE_0)
    memory: int = setting(20, "k, batches remembered", at_least(1))
    decay: float = setting(0.9, "eta: each newer batch multiplies an older one's weight by it", SHARE)
    lam: list[float] = setting(
        MISSING,
        "lambda, the memory's weight: a value for each stage of the schedule, or one for all",
        Rule("a list of numbers from 0 to 1", lambda lam: all(0 <= value <= 1 for value in lam)),
        staged=True,
    )
    gradient: str = setting("paper", "paper, or batch: batch norm's whole gradient", among("paper", "batch"))
    group: int | None = setting(None, GROUP, at_least(1))


@dataclass
class BRN(Norm):
    eps: float = setting(1e-5, "added to the variance", ABOVE_0)
    momentum: float = setting(0.01, "share of the newest batch in the moving averages", SHARE)
    group: int | None = setting(None, GROUP, at_least(1))


@dataclass
class GN(Norm):
    eps: float = setting(1e-5, "added to the variance", ABOVE_0)
    groups: int = setting(32, "groups, at most", at_least(1))
    channels: int = setting(4, "channels in a group, at least", at_least(1))


def group_of(norm: Norm) -> int | None:
    """norm.group, the images whose statistics are taken together; None also for methods without such a setting."""
    return getattr(norm, "group", None)


@dataclass(frozen=True)
class Change:
    """Settings of a method that change during training: `value_path(config, iteration, iterations)` gives their values,
    `put_path(model, *values)` sets them in the layers. logged: the name of the first one in the journal, if any."""

    value_path: str
    put_path: str
    logged: str = ""

    @cached_property
    def values(self) -> Any:
        return registered(self.value_path, "mbn/methods.py")

    @cached_property
    def put(self) -> Any:
        return registered(self.put_path, "mbn/methods.py")


@dataclass(frozen=True)
class Method:
    """A method. label, colour, marker: in figures. layers: path of f(forwards, **settings), which gives its `Layers`.

    statistics: whether its layers have batch statistics; a second forward refreshes these, and precise statistics
    replace them. not_residual: why it cannot be applied to networks with shortcuts, if it cannot. gamma: whether its
    layers have a gamma that starts at 1.
    """

    label: str
    layers: str
    colour: str
    marker: str
    settings: type[Norm] = Norm
    statistics: bool = True
    change: Change | None = None
    not_residual: str = ""
    gamma: bool = True


# Colours that colour-blind readers can tell apart: Okabe and Ito 2008.
METHODS: dict[str, Method] = {
    "bn": Method(label="BN", layers="mbn.network_layers:bn", colour="#D55E00", marker="s", settings=BN),
    "brn": Method(
        label="BRN",
        layers="mbn.network_layers:brn",
        colour="#009E73",
        marker="^",
        settings=BRN,
        change=Change("mbn.training.schedule:renorm_values", "mbn.norm.renorm:set_renorm"),
    ),
    "mbn": Method(
        label="MBN",
        layers="mbn.network_layers:mbn",
        colour="#0072B2",
        marker="o",
        settings=MBN,
        change=Change("mbn.training.schedule:lambda_values", "mbn.norm.memorized:set_lambda", logged="lambda"),
    ),
    "gn": Method(
        label="GN", layers="mbn.network_layers:gn", colour="#CC79A7", marker="D", settings=GN, statistics=False
    ),
    "normprop": Method(
        label="NormProp",
        layers="mbn.network_layers:normprop",
        colour="#E69F00",
        marker="v",
        statistics=False,
        not_residual="has no rule for the sum of a residual block and its shortcut (the paper says that it cannot be "
        "applied there)",
        gamma=False,
    ),
}
