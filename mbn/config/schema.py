"""All settings with their types, defaults and rules, and which values go together. Does not import torch."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from mbn.config.registry import DATASETS, NETWORKS, Model, networks
from mbn.methods import METHODS, Norm, group_of
from mbn.system.errors import ConfigError
from mbn.system.setting_fields import ABOVE_0, BELOW_1, Rule, among, at_least, group, leaves, setting, shown

REPOSITORY = Path(__file__).resolve().parent.parent.parent
CONFIGS = REPOSITORY / "configs"
MODES = ("auto", "eager", "compile", "graph", "graph-eager")


DEVICE = Rule("auto, cpu, cuda, cuda:N or mps", lambda device: bool(re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device)))
FOLDER = Rule("the path of a folder", lambda path: path != "")


def _three(wanted: str, least: float) -> Rule:
    return Rule(
        f"a list of 3 numbers, one per channel{wanted}",
        lambda values: len(values) == 3 and all(least < value < math.inf for value in values),
    )


# The schema. Its defaults are not what a run uses when nothing is typed: configs/*.yaml says that. A default is for a
# setting that an older record does not have. Never change one: a run's name is made from what differs from them, so
# that every record keeps its name when a new setting is added whose default changes nothing.


@dataclass
class Dataset:
    name: str = setting(MISSING, "the data set", among(*DATASETS))
    classes: int = setting(MISSING, "number of classes", at_least(1))
    image_size: int = setting(32, "pixels a side", at_least(1))
    train_images: int = setting(MISSING, "number of training images", at_least(1))
    test_images: int = setting(MISSING, "number of test images", at_least(1))
    mean: list[float] = setting(MISSING, "subtracted from each channel", _three("", -math.inf))
    std: list[float] = setting(MISSING, "each channel is divided by it", _three(", each above 0", 0))
    padding: int = setting(
        0, "black pixels around a training image before a random crop; unused by imagenet, which resizes", at_least(0)
    )
    flip: bool = setting(False, "whether half of the training images are mirrored")


@dataclass
class Schedule:
    epochs: int | None = setting(None, "the length in epochs", at_least(1))
    iterations: int | None = setting(None, "the length in iterations", at_least(1))
    default_epochs: int = setting(200, "the length where neither epochs nor iterations is set", at_least(1))
    scale: float = setting(1.0, "multiplies the length, however that is set", ABOVE_0)
    lr: list[float] = setting(
        MISSING,
        "learning rate: a value for each stage, or one for all",
        Rule("a list of numbers above 0 and below 3e38", lambda lr: all(0 < value < 3e38 for value in lr)),
        staged=True,
    )
    milestones: list[float] = setting(
        MISSING,
        "where a stage ends and the next begins, as shares of training",
        Rule(
            "a list of numbers that rises, each above 0 and below 1",
            lambda stones: all(a < b for a, b in zip([0.0, *stones], [*stones, 1.0], strict=True)),
        ),
    )


@dataclass
class Optimizer:
    momentum: float = setting(0.9, "without Nesterov", BELOW_1)
    weight_decay: float = setting(
        0.0, "on all parameters, but see decay_norm", Rule("at least 0", lambda value: 0 <= value < math.inf)
    )
    decay_norm: bool = setting(True, "whether gamma and beta decay too")
    warmup: int = setting(0, "iterations at the start that have a tenth of the learning rate", at_least(0))


@dataclass
class Evaluate:
    precise: bool = setting(False, "also the test error with statistics recomputed over the training set (PreciseBN)")
    rules: bool = setting(
        False,
        "also the test error under other rules (statistics of the test batch, ...), and the error on augmented "
        "training images in evaluation mode",
    )
    batch_size: int | None = setting(
        None,
        "images tested at a time; null: 125 of CIFAR's on a CPU, 5000 on a GPU, and fewer of larger images",
        at_least(1),
    )


@dataclass
class Machine:
    data: str = setting(
        "data", "folder of the data sets (cifar-10-batches-py, ...); CIFAR is downloaded if missing", FOLDER
    )
    results: str = setting("results", "folder that gets records/ and runs/", FOLDER)
    device: str = setting(
        "auto",
        "auto (where the run began; a new one on CUDA, else CPU), cpu, cuda, cuda:1, mps",
        DEVICE,
    )
    threads: int | None = setting(
        None, "CPU threads; null: as the run began; a new one as torch chooses, at most one a core", at_least(1, 4096)
    )
    together: int = setting(1, "runs of a sweep (-m) trained at a time in this process, for a GPU", at_least(1, 4096))
    again: bool = setting(
        False, "true trains a run again from its start, and deletes its checkpoints; if stopped, it goes on"
    )
    mode: str = setting(
        "auto",
        f"{', '.join(MODES)}; auto: as the run began; a new one in graphs on CUDA, and compiled if it is long",
        among(*MODES),
    )
    deterministic: bool = setting(False, "only algorithms that give the same bits every time (on a GPU; slower there)")
    tf32: bool = setting(True, "on a GPU: products of float32 with 10-bit mantissas")
    workers: int | None = setting(
        None,
        "processes that decode ImageNet's images; null: one for each core it may use; 0: the run itself",
        at_least(0, 4096),
    )
    checkpoint_seconds: float = setting(
        300,
        "seconds between two checkpoints within an epoch",
        Rule("above 0, and finite", lambda seconds: 0 < seconds < math.inf),  # records hold it, and JSON has no inf
    )


@dataclass
class Config:
    """The whole configuration of a run."""

    dataset: Dataset = group(Dataset)
    model: Model = group(Model)
    forwards: int = setting(
        1, "2: a second forward after each step refreshes the statistics; each norm sets its own", among(1, 2)
    )
    norm: Norm = group(Norm)
    schedule: Schedule = group(Schedule, "learning rate and length")
    batch_size: int = setting(128, "images per iteration")
    seed: int = setting(
        0, "of weights, order of images and augmentation", Rule("from 0 to 4294967295", lambda n: 0 <= n < 2**32)
    )
    precision: str = setting(
        "fp32", "fp32, or bf16: mixed precision, with statistics in float32", among("fp32", "bf16")
    )
    optimizer: Optimizer = group(Optimizer, "SGD")
    evaluate: Evaluate = group(Evaluate, "what is measured beside training; not part of a run's identity")
    machine: Machine = group(Machine, "where and how it runs; not part of a run's identity")


# What is possible.


def check(config: Config) -> None:
    """Raise ConfigError for the first impossible value."""
    for key, spec, value in leaves(config):
        rule = spec.metadata.get("rule")
        if rule and not rule.holds(value):
            raise ConfigError(f"{key} must be {rule.wanted}, not {shown(value)}.")
    for key, ok, wanted, value in _rules_of_several(config):
        if not ok:
            raise ConfigError(f"{key} must be {wanted}, not {shown(value)}.")
    if config.schedule.epochs is not None and config.schedule.iterations is not None:
        raise ConfigError(
            "schedule.epochs and schedule.iterations are both set, but a run has one length: leave one of them null."
        )


def _rules_of_several(config: Config) -> Iterator[tuple[str, bool, str, Any]]:
    """The rules that look at more than one setting: key, whether it holds, what is wanted, value."""
    dataset, model, norm = config.dataset, config.model.name, config.norm.name
    possible = networks(dataset.image_size)
    wanted = f"one of {', '.join(possible)} for images of {dataset.image_size} pixels a side (dataset={dataset.name})"
    yield "model", model in possible, wanted, model
    plain = [name for name, network in NETWORKS.items() if not network.residual]
    why_not = METHODS[norm].not_residual
    wanted = f"one of {', '.join(sorted(plain))} with norm={norm}, which {why_not}"
    yield "model", not why_not or model in plain, wanted, model
    wanted = f"ones with norm={norm}, whose layers have no gamma that starts at 1"
    yield "model.gamma", METHODS[norm].gamma or config.model.gamma == "ones", wanted, config.model.gamma
    stages = len(config.schedule.milestones) + 1
    for key, spec, value in leaves(config):
        if spec.metadata.get("staged"):
            more = f" or {stages} numbers (one more than milestones)" if stages > 1 else " number, without milestones"
            wanted = f"a list of 1{more}"
            yield key, len(value) in (1, stages), wanted, value
    size = group_of(config.norm)
    wanted = f"null or a number that divides batch_size={config.batch_size}"
    yield "norm.group", size is None or config.batch_size % size == 0, wanted, size
    images = dataset.train_images
    wanted = f"from 1 to the {images} training images of {dataset.name}"
    yield "batch_size", 1 <= config.batch_size <= images, wanted, config.batch_size
