"""What can be set, with its types and defaults, and what is possible. Does not import torch."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

REPOSITORY = Path(__file__).resolve().parent.parent.parent
CONFIGS = REPOSITORY / "configs"


class ConfigError(Exception):
    """A configuration that cannot be run; the message is one sentence that says what would be right."""


# The schema. A default here is what a setting's absence means: identities are made of what differs from it, so that a
# new setting whose default changes nothing leaves every record its name.


@dataclass
class Dataset:
    name: str = MISSING
    classes: int = MISSING
    image_size: int = 32
    train_images: int = MISSING
    test_images: int = MISSING
    mean: list[float] = MISSING
    std: list[float] = MISSING
    padding: int = 0
    flip: bool = False


@dataclass
class Model:
    name: str = MISSING


@dataclass
class Dropout(Model):
    dropout: float = 0.0


@dataclass
class Norm:
    name: str = MISSING


@dataclass
class BN(Norm):
    eps: float = 1e-5
    momentum: float = 0.1


@dataclass
class MBN(Norm):
    eps: float = 1e-5
    memory: int = 20
    decay: float = 0.9
    lam: list[float] = MISSING
    gradient: str = "paper"


@dataclass
class BRN(Norm):
    eps: float = 1e-5
    momentum: float = 0.01


@dataclass
class GN(Norm):
    eps: float = 1e-5
    groups: int = 32
    channels: int = 4


@dataclass
class Schedule:
    lr: list[float] = MISSING
    milestones: list[float] = MISSING
    default_epochs: int = 200
    epochs: int | None = None
    iterations: int | None = None
    scale: float = 1.0


@dataclass
class Optimizer:
    momentum: float = 0.9
    weight_decay: float = 0.0


@dataclass
class Evaluate:
    batch_size: int | None = None
    precise: bool = False


@dataclass
class Machine:
    data: str = MISSING
    results: str = MISSING
    device: str = "auto"
    mode: str = "auto"
    deterministic: bool = False
    tf32: bool = True
    threads: int | None = None
    workers: int | None = None
    together: int = 1
    checkpoint_seconds: float = 300
    again: bool = False


@dataclass
class Config:
    """The whole configuration of a run."""

    dataset: Dataset = field(default_factory=Dataset)
    model: Model = field(default_factory=Model)
    forwards: int = 1
    norm: Norm = field(default_factory=Norm)
    schedule: Schedule = field(default_factory=Schedule)
    batch_size: int = 128
    seed: int = 0
    precision: str = "fp32"
    optimizer: Optimizer = field(default_factory=Optimizer)
    evaluate: Evaluate = field(default_factory=Evaluate)
    machine: Machine = field(default_factory=Machine)


NORMS: dict[str, type[Norm]] = {"bn": BN, "brn": BRN, "mbn": MBN, "normprop": Norm, "gn": GN}
DATASETS = ("cifar10", "cifar100", "digits", "imagenet")
# Which networks there are for images of up to 64 pixels, and for larger ones.
SMALL = ("resnet20", "resnet56", "vgg16", "nin")
LARGE = ("resnet18", "resnet34", "resnet50", "vgg16")
MODELS: dict[str, type[Model]] = dict.fromkeys((*SMALL, *LARGE), Model) | {"nin": Dropout}
MODES = ("auto", "eager", "compile", "graph", "graph-eager")


# What is possible.


def check(config: Config) -> None:
    """Raise ConfigError for the first impossible value."""
    for key, ok, wanted, value in _rules(config):
        if not ok:
            raise ConfigError(f"{key} must be {wanted}, not {value!r}.")
    schedule = config.schedule
    if schedule.epochs is not None and schedule.iterations is not None:
        raise ConfigError(
            "schedule.epochs and schedule.iterations are both set: leave one of them null, for a run has one length."
        )


Rule = tuple[str, bool, str, Any]


def _rules(config: Config) -> Iterator[Rule]:
    dataset, schedule, machine = config.dataset, config.schedule, config.machine

    def at_least(key: str, value: Any, least: float) -> Rule:
        return key, value is None or value >= least, f"at least {least}", value

    def among(key: str, value: str, choices: Any) -> Rule:
        return key, value in choices, f"one of {', '.join(choices)}", value

    yield among("dataset.name", dataset.name, DATASETS)
    for name in ("classes", "image_size", "train_images", "test_images"):
        yield at_least(f"dataset.{name}", getattr(dataset, name), 1)
    yield at_least("dataset.padding", dataset.padding, 0)
    for name in ("mean", "std"):
        values = getattr(dataset, name)
        positive = len(values) == 3 and all(math.isfinite(v) and (name == "mean" or v > 0) for v in values)
        yield f"dataset.{name}", positive, "a list of 3 numbers, one a channel, std above 0", values
    yield from _model_rules(config)
    yield "forwards", config.forwards in (1, 2), "1 or 2", config.forwards
    yield from _norm_rules(config)
    yield from _schedule_rules(schedule)
    limit = dataset.train_images
    yield (
        "batch_size",
        1 <= config.batch_size <= limit,
        f"from 1 to the {limit} training images of {dataset.name}",
        config.batch_size,
    )
    yield "seed", 0 <= config.seed < 2**32, "from 0 to 4294967295", config.seed
    momentum, decay = config.optimizer.momentum, config.optimizer.weight_decay
    yield "optimizer.momentum", 0 <= momentum < 1, "at least 0 and below 1", momentum
    yield "optimizer.weight_decay", 0 <= decay < math.inf, "at least 0", decay
    yield at_least("evaluate.batch_size", config.evaluate.batch_size, 1)
    device = re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", machine.device) is not None
    yield "machine.device", device, "auto, cpu, cuda, cuda:N or mps", machine.device
    yield among("machine.mode", machine.mode, MODES)
    yield at_least("machine.threads", machine.threads, 1)
    yield at_least("machine.workers", machine.workers, 0)
    yield at_least("machine.together", machine.together, 1)
    yield among("precision", config.precision, ("fp32", "bf16"))
    seconds = machine.checkpoint_seconds
    yield "machine.checkpoint_seconds", seconds > 0, "above 0", seconds


def _model_rules(config: Config) -> Iterator[Rule]:
    model = config.model
    choices = SMALL if config.dataset.image_size <= 64 else LARGE
    wanted = f"one of {', '.join(choices)} for the images of dataset={config.dataset.name}"
    yield "model", model.name in choices, wanted, model.name
    if config.norm.name == "normprop":
        wanted = (
            "one of nin, vgg16 with norm=normprop, which has no rule for the sum of a residual block and its shortcut "
            "(the paper says that it cannot be applied there)"
        )
        yield "model", not model.name.startswith("resnet"), wanted, model.name
    if isinstance(model, Dropout):
        yield "model.dropout", 0 <= model.dropout < 1, "at least 0 and below 1", model.dropout


def _norm_rules(config: Config) -> Iterator[Rule]:
    norm = config.norm
    eps = getattr(norm, "eps", 1.0)
    yield "norm.eps", 0 < eps < math.inf, "above 0", eps
    momentum = getattr(norm, "momentum", 1.0)
    yield "norm.momentum", 0 < momentum <= 1, "above 0 and at most 1", momentum
    if isinstance(norm, GN):
        yield "norm.groups", norm.groups >= 1, "at least 1", norm.groups
        yield "norm.channels", norm.channels >= 1, "at least 1", norm.channels
    if isinstance(norm, MBN):
        yield "norm.memory", norm.memory >= 1, "at least 1", norm.memory
        yield "norm.decay", 0 < norm.decay <= 1, "above 0 and at most 1", norm.decay
        inside = all(0 <= lam <= 1 for lam in norm.lam)
        yield "norm.lam", inside, "a list of numbers from 0 to 1", norm.lam
        changes = len(config.schedule.milestones)
        right = len(norm.lam) in (1, changes + 1)
        yield "norm.lam", right, f"a list of 1 or {changes + 1} numbers, one more than milestones", norm.lam
        yield "norm.gradient", norm.gradient in ("paper", "batch"), "paper or batch", norm.gradient


def _schedule_rules(schedule: Schedule) -> Iterator[Rule]:
    stones, lr = schedule.milestones, schedule.lr
    rising = all(a < b for a, b in zip([0.0, *stones], [*stones, 1.0], strict=True))
    yield "schedule.milestones", rising, "a list that rises, each above 0 and below 1", stones
    wanted = f"a list of 1 or {len(stones) + 1} numbers, one more than milestones"
    yield "schedule.lr", len(lr) in (1, len(stones) + 1), wanted, lr
    yield "schedule.lr", all(0 < v < math.inf for v in lr), "a list of numbers above 0", lr
    for name in ("default_epochs", "epochs", "iterations"):
        value = getattr(schedule, name)
        yield f"schedule.{name}", value is None or value >= 1, "at least 1", value
    yield "schedule.scale", 0 < schedule.scale < math.inf, "above 0", schedule.scale
