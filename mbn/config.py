"""The configuration: its typed schema, what is possible, a run's length, identity and name. Does not import torch."""

import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

REPOSITORY = Path(__file__).resolve().parent.parent
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


# From the command line to a checked Config.


def load(overrides: list[str]) -> Config:
    """Compose configs/ with Hydra overrides as typed on a command line, and check the result.

    Errors: ConfigError.
    """
    return checked(compose(overrides))


def sweep(overrides: list[str]) -> list[list[str]]:
    """The command lines of a sweep: norm=bn,mbn seed=range(0,3) makes six. Errors: ConfigError."""
    from hydra.errors import HydraException

    choices = []
    for override in _parse(overrides):
        key = override.get_key_element()
        try:
            values = list(override.sweep_string_iterator()) if override.is_sweep_override() else None
        except HydraException as error:
            raise ConfigError(f"cannot sweep {override.input_line!r}: {_one_sentence(error)}") from None
        choices.append([f"{key}={v}" for v in values] if values is not None else [str(override.input_line)])
    return [list(line) for line in itertools.product(*choices)]


def _parse(overrides: list[str]) -> list[Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])
        except HydraException:
            raise ConfigError(
                f"cannot read {text!r}: a setting is written key=value, a list key=[1,2], in quotes for the shell."
            ) from None
    return parsed


def compose(overrides: list[str]) -> DictConfig:
    """Compose configs/ with Hydra overrides; refuse keys and options that do not exist. The values are not checked."""
    import hydra
    from hydra.errors import HydraException

    register_resolvers()
    try:
        parsed = [o for o in _parse(overrides) if (o.key_or_group, o.value()) != ("experiment", None)]
        for override in parsed:
            if override.is_sweep_override():
                raise ConfigError(
                    f"{override.input_line}: one value is wanted here; several are a sweep, `python train.py -m "
                    f"{override.input_line}`, or a list in brackets."
                )
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            chosen = [o for o in parsed if _is_group(o.key_or_group)]
            for override in chosen:
                _check_option(override.key_or_group, override.value())
            bare = hydra.compose("config", overrides=[str(o.input_line) for o in chosen])
            known = set(_keys(bare))
            for override in parsed:
                if not _is_group(override.key_or_group):
                    _check_key(override, known)
            if len(chosen) == len(parsed):
                return bare
            return hydra.compose("config", overrides=[str(o.input_line) for o in parsed])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_sentence(error)) from None


def register_resolvers() -> None:
    """`${repository:data}` is the folder data beside train.py: defaults stand there wherever the command is typed."""
    OmegaConf.register_new_resolver("repository", lambda path: str(REPOSITORY / path), replace=True)


def options(group: str) -> list[str]:
    """The choices of a group of the configuration, such as the data sets."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def groups() -> list[str]:
    return sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())


def _is_group(key: str) -> bool:
    return key in groups()


def _check_option(group: str, value: Any) -> None:
    if value is None and group == "experiment":
        return
    if value not in options(group):
        close = _suggestion(str(value), options(group))
        raise ConfigError(f"{group}={value} does not exist{close}; choose one of {', '.join(options(group))}.")


def _check_key(override: Any, known: set[str]) -> None:
    key = override.key_or_group
    if key not in known:
        home = _home(key)
        if home:
            raise ConfigError(f"{key} is not a setting here: it belongs to {home}.")
        raise ConfigError(
            f"there is no setting {key!r}{_suggestion(key, known | set(groups()))}; `python train.py --cfg job` shows "
            "them all."
        )
    if override.is_delete():
        raise ConfigError(f"{key} cannot be deleted: leave it out of the command for its default.")
    if override.is_add() and not override.is_force_add():
        raise ConfigError(f"{key} exists already: write {override.input_line.lstrip('+')} without the plus sign.")


def _home(key: str) -> str:
    """The options of a group whose files have the nested key, as 'norm=mbn or norm=brn'."""
    group, _, rest = key.partition(".")
    if group not in ("model", "norm") or not rest:
        return ""
    table = NORMS if group == "norm" else MODELS
    return " or ".join(
        f"{group}={name}" for name, cls in table.items() if rest in {f.name for f in dataclasses.fields(cls)}
    )


def _suggestion(wrong: str, right: Any) -> str:
    # A key's last part counts too, so that epochs finds schedule.epochs.
    last = {key.rpartition(".")[2]: key for key in sorted(right)}
    tail = difflib.get_close_matches(wrong.rpartition(".")[2], last, n=1, cutoff=0.8)
    close = difflib.get_close_matches(wrong, sorted(right), n=1, cutoff=0.6) or [last[t] for t in tail]
    return f" (did you mean {close[0]!r}?)" if close else ""


def _keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in config:
        yield prefix + str(key)
        if OmegaConf.is_dict(config._get_node(key)):
            yield from _keys(config[key], f"{prefix}{key!s}.")


def _one_sentence(error: Exception) -> str:
    """The first line of a message of Hydra's that nothing above foresaw."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def checked(composed: DictConfig) -> Config:
    """Merge a composed configuration into the schema and check every value. Errors: ConfigError."""
    try:
        plain = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_one_sentence(error)) from None
    assert isinstance(plain, dict)
    return from_dict({str(key): value for key, value in plain.items()})


def from_dict(plain: dict[str, Any]) -> Config:
    """The checked Config of nested dictionaries, such as a record holds. Errors: ConfigError."""
    for f in dataclasses.fields(Config):
        if dataclasses.is_dataclass(f.type) and not isinstance(plain.get(f.name, {}), dict):
            raise ConfigError(f"{f.name} must be a group of settings, not {plain[f.name]!r}.")
    schema = Config(
        model=_schema_of(plain, "model", MODELS)(),
        norm=_schema_of(plain, "norm", NORMS)(),
    )
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), plain)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{missing[0]} is not set: give it a value.")
        config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        key = error.full_key or str(error.key)
        known = set(_keys(OmegaConf.structured(schema)))
        raise ConfigError(f"there is no setting {key!r}{_suggestion(key, known)}.") from None
    except (ValidationError, OmegaConfBaseException) as error:
        key = error.full_key or str(error.key)
        raise ConfigError(_wrong_type(schema, key, plain)) from None
    assert isinstance(config, Config)
    check(config)
    return config


def _schema_of(plain: dict[str, Any], group: str, table: dict[str, Any]) -> Any:
    section = plain.get(group)
    name = section.get("name") if isinstance(section, dict) else section
    if not isinstance(section, dict) or name not in table:
        raise ConfigError(f"{group}={name} does not exist; choose one of {', '.join(sorted(table))}.")
    return table[name]


_TYPE_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "int | None": "a whole number or null",
    "list[float]": "a list of numbers such as [0.1,0.5]",
}


def _wrong_type(schema: Config, key: str, plain: dict[str, Any]) -> str:
    """'batch_size must be a whole number, not 'abc'.' for the key at which the schema refused a value."""
    key = key.split("[")[0]
    node: Any = schema
    value: Any = plain
    hint = ""
    for part in key.split("."):
        fields = {f.name: f for f in dataclasses.fields(node)} if dataclasses.is_dataclass(node) else {}
        if part in fields:
            declared = fields[part].type
            hint = declared if isinstance(declared, str) else getattr(declared, "__name__", "")
            hint = str(declared) if hint in ("list", "") or "|" in str(declared) else hint
        node = getattr(node, part, None)
        value = value.get(part) if isinstance(value, dict) else None
    wanted = _TYPE_NAMES.get(hint, "a group of settings")
    return f"{key} must be {wanted}, not {value!r}."


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


# Length, identity, name.


def iterations_per_epoch(config: Config) -> int:
    """Batches an epoch; the last one is smaller where the batch size does not divide the images."""
    return -(-config.dataset.train_images // config.batch_size)


def iterations(config: Config) -> int:
    """The run's length in iterations, however it was asked for: at least 1."""
    schedule = config.schedule
    if schedule.iterations is not None:
        length = schedule.iterations
    else:
        epochs = schedule.default_epochs if schedule.epochs is None else schedule.epochs
        length = epochs * iterations_per_epoch(config)
    return max(1, round(length * Fraction(repr(schedule.scale))))


def cores() -> int:
    """The processors this process may use: what machine.workers=null and --jobs auto mean by one a core."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def network(config: Config) -> dict[str, Any]:
    """What `models.build` is told beside the layers."""
    settings = dataclasses.asdict(config.model)
    return settings | {"image_size": config.dataset.image_size, "classes": config.dataset.classes}


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def to_yaml(plain: Any) -> str:
    """Nested dictionaries as YAML, one line a setting."""

    class OneLine(yaml.SafeDumper):
        pass

    OneLine.add_representer(list, lambda dumper, v: dumper.represent_sequence("tag:yaml.org,2002:seq", v, True))
    return yaml.dump(plain, Dumper=OneLine, sort_keys=False, width=1000)


def identity(config: Config) -> dict[str, Any]:
    """What makes a run the run it is: all but `machine` and `evaluate`, the length resolved to iterations."""
    plain = to_dict(config)
    del plain["machine"], plain["evaluate"]
    for key in ("default_epochs", "epochs", "scale"):
        del plain["schedule"][key]
    plain["schedule"]["iterations"] = iterations(config)
    return plain


def run_name(config: Config) -> str:
    """A readable name and a hash of everything in the identity that differs from the schema's defaults.

    Example: cifar10/resnet56/mbn-f2-b8-s0-8623f493.
    """
    digest = hashlib.sha256(distinction(config).encode()).hexdigest()[:8]
    short = f"{config.norm.name}-f{config.forwards}-b{config.batch_size}-s{config.seed}"
    return f"{config.dataset.name}/{config.model.name}/{short}-{digest}"


def distinction(config: Config) -> str:
    """What of the identity differs from the schema's defaults, as JSON: equal for equal runs, old and new versions."""
    default = Config(model=type(config.model)(), norm=type(config.norm)())
    return json.dumps(_difference(identity(config), to_dict(default)), sort_keys=True)


def _difference(value: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    result = {}
    for key, v in value.items():
        if isinstance(v, dict):
            inner = _difference(v, default[key])
            if inner:  # a new group at its defaults leaves every name as it was
                result[key] = inner
        elif v != default.get(key):
            result[key] = v
    return result
