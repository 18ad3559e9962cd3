"""From a command line to a checked Config, through Hydra. Does not import torch."""

import dataclasses
import difflib
import functools
import itertools
import json
import math
import os.path
import typing
from collections.abc import Callable, Iterable
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mbn.config.registry import DATASETS, NETWORKS
from mbn.config.run_identity import iterations
from mbn.config.schema import CONFIGS, REPOSITORY, Config, check
from mbn.config.typed_paths import PATHS, quoted
from mbn.methods import METHODS
from mbn.system.errors import ConfigError
from mbn.system.setting_fields import fitted, in_words, leaves, shortened, shown

# The groups whose options have entries in a registry: the registry, and its file.
REGISTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "dataset": (DATASETS, "mbn/config/registry.py"),
    "model": (NETWORKS, "mbn/config/registry.py"),
    "norm": (METHODS, "mbn/methods.py"),
}

MOST_RUNS = 10_000  # of a sweep


def load(overrides: list[str]) -> Config:
    """Compose configs/ with Hydra overrides as typed on a command line, and check the result.

    Errors: ConfigError.
    """
    return checked(compose(overrides))


def is_given(name: str, overrides: Iterable[str]) -> bool:
    """Whether one of these overrides, as they are typed, sets name, such as machine.again."""
    return any(override.lstrip("+").startswith(f"{name}=") for override in overrides)


def sweep_lines(overrides: list[str]) -> list[list[str]]:
    """The command lines of a sweep: norm=bn,mbn seed=range(0,3) makes six. Errors: ConfigError."""
    choices = [_choices(text, override) for text, override in zip(overrides, parse(overrides), strict=True)]
    runs = math.prod(map(len, choices))
    if runs > MOST_RUNS:
        raise ConfigError(f"this sweep has {runs} runs: {MOST_RUNS} are allowed, so make several of it.")
    return [list(line) for line in itertools.product(*choices)]


def _choices(text: str, override: Any) -> list[str]:
    """A setting of a sweep, once for each of its values. Errors: ConfigError."""
    from hydra.core.override_parser.types import Glob
    from hydra.errors import HydraException

    key, value = override.get_key_element(), override.value()
    if not override.is_sweep_override():
        return [text]
    try:
        if isinstance(value, Glob):
            values = value.filter(options(override.key_or_group) if override.key_or_group in groups() else [])
        else:
            values = list(itertools.islice(override.sweep_string_iterator(), MOST_RUNS + 1))
    except (HydraException, ValueError) as error:
        why = _one_sentence(error).replace("type is ValueType.INTERVAL_SWEEP", "not an interval")
        raise ConfigError(f"cannot sweep {shown(text)}: {why}") from None
    if not values:
        raise ConfigError(f"{shortened(text)} stands for no value: nothing would be trained.")
    return [f"{key}={v}" for v in values]


def parse(overrides: list[str]) -> list[Any]:
    """Hydra's reading of each setting. Errors: ConfigError."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(quoted(text)))
        except (HydraException, ValueError, RecursionError):  # ValueError: a number of thousands of digits
            raise ConfigError(
                f"cannot read {shown(text)}: write a setting as key=value, a list as key=[1,2], with quotes for the "
                "shell."
            ) from None
    return parsed


def compose(overrides: list[str]) -> DictConfig:
    """Compose configs/ with Hydra overrides; refuse keys and options that do not exist. The values are not checked."""
    import hydra
    from hydra.errors import HydraException

    from mbn.config.yaml_source import read_strictly

    OmegaConf.register_new_resolver("repository", lambda path: str(REPOSITORY / path), replace=True)
    OmegaConf.register_new_resolver("schedule_of", _schedule_of, replace=True)
    parsed = [o for o in parse(overrides) if (o.key_or_group, o.value()) != ("experiment", None)]
    for override in parsed:
        _check_override(override)
    # A setting that ++ would add exists already.
    lines = [o.input_line if o.key_or_group in groups() else o.input_line.lstrip("+") for o in parsed]
    read_strictly()
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return hydra.compose("config", overrides=lines)
    except (HydraException, OmegaConfBaseException) as error:
        for key in (o.key_or_group for o in parsed):
            if f"'{key}'" in str(error) and (home := _home(key)):
                raise ConfigError(f"{key} is not a setting here: it belongs to {home}.") from None
        if str(error).startswith("Error merging override"):
            which = _one_sentence(error).removeprefix("Error merging override ").rstrip(".")
            raise ConfigError(f"cannot set {which}: its value is of another kind, or a ${{ lacks its }}.") from None
        raise ConfigError(_one_sentence(error)) from None


def _schedule_of(dataset: str) -> str:
    """The data set's schedule: the paper's where it has none of its own."""
    return dataset if dataset in options("schedule") else "paper"


def options(group: str) -> list[str]:
    """The choices of a group of the configuration, such as the data sets."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def groups() -> list[str]:
    return sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())


def _check_override(override: Any) -> None:
    """Refuse an override that fits no configuration. Errors: ConfigError."""
    key, value, line = override.key_or_group, override.value(), override.input_line
    if override.is_sweep_override():
        raise ConfigError(
            f"{shortened(line)} has several values, but one is needed here: write `python train.py -m "
            f"{shortened(line)}` for a sweep, or brackets for a list."
        )
    if key in groups():
        if value not in options(key):
            close = _suggestion(str(value), set(options(key)))
            raise ConfigError(
                f"{key}={shortened(str(value))} does not exist{close}; choose one of {', '.join(options(key))}."
            )
        return
    if key not in _known_keys():
        close = _suggestion(key, {*_known_keys(), *groups()})
        raise ConfigError(f"there is no setting {shown(key)}{close}; `python train.py --help` lists them all.")
    group, _, rest = key.partition(".")
    if rest == "name" and group in groups():
        raise ConfigError(f"{key} is set with what belongs to it: write {group}={shortened(str(value))}.")
    if override.is_delete():
        raise ConfigError(f"{key} cannot be deleted: leave it out of the command for its default.")
    if override.is_add() and not override.is_force_add():
        raise ConfigError(f"{key} exists already: set it without the plus sign.")


@functools.cache
def _known_keys() -> set[str]:
    """The keys of every setting and group, whatever the network and the method."""
    schemas = [Config(norm=method.settings()) for method in METHODS.values()]
    schemas += [Config(model=network.settings()) for network in NETWORKS.values()]
    return {key for schema in schemas for key, *_ in leaves(schema)}


def _home(key: str) -> str:
    """The options of a group that have the nested key, such as 'norm=mbn or norm=brn'."""
    group, _, name = key.partition(".")
    table, _ = REGISTRIES[group] if group in ("model", "norm") else ({}, "")
    homes = (option for option, entry in table.items() if name in {f.name for f in dataclasses.fields(entry.settings)})
    return " or ".join(f"{group}={option}" for option in homes)


def _suggestion(wrong: str, right: set[str]) -> str:
    # A key's last part counts too, so that epochs and optimizer.epochs find schedule.epochs.
    last = {key.rpartition(".")[2]: key for key in sorted(right)}
    end = wrong.rpartition(".")[2]
    similar = difflib.get_close_matches(wrong, sorted(right), n=1, cutoff=0.6)
    tail = difflib.get_close_matches(end, last, n=1, cutoff=0.8)
    close = [last[end]] if end in last else similar or [last[t] for t in tail]
    return f" (did you mean {close[0]!r}?)" if close else ""


def _one_sentence(error: Exception) -> str:
    """What an error of Hydra's says that no check above caught: its first line, and what that one announces."""
    said = f"{error}" or f"{error.__cause__ or type(error).__name__}"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    text = " ".join(lines[: 1 + lines[0].endswith(":")])
    return f"{shortened(text).rstrip('.')}."


def resolved(composed: DictConfig) -> dict[str, Any]:
    """A composed configuration as nested dictionaries. Errors: ConfigError."""
    try:
        plain = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"cannot read the value of {error.full_key}: {_one_sentence(error)}") from None
    return typing.cast(dict[str, Any], plain)


def checked(composed: DictConfig) -> Config:
    """Merge a composed configuration into the schema and check every value. Errors: ConfigError."""
    config = _filled(resolved(composed), _from_text)
    for name in (key.partition(".")[2] for key in PATHS):  # one of an experiment's file; a typed one has none
        setattr(config.machine, name, os.path.expanduser(getattr(config.machine, name)))  # noqa: PTH111  (as typed_paths)
    return config


def from_dict(plain: dict[str, Any]) -> Config:
    """The checked Config of nested dictionaries, such as a record holds.

    Every value must be of its setting's type, and a text stands for itself: nothing in it is looked up elsewhere.
    Errors: ConfigError.
    """
    return _filled(plain, lambda value: value)


def _filled(plain: dict[str, Any], convert: Callable[[Any], Any]) -> Config:
    schema = _schema_of(plain)
    _fill(schema, plain, schema, "", convert)
    check_run(schema)
    return schema


def check_run(config: Config) -> None:
    """Raise ConfigError for the first impossible value, and for a run that would never end."""
    check(config)
    if iterations(config) >= 2**31:
        raise ConfigError(f"this run would have {shown(iterations(config))} iterations: set a smaller schedule.scale.")


def _fill(part: Any, plain: dict[str, Any], schema: Config, prefix: str, convert: Callable[[Any], Any]) -> None:
    """Put the values of nested dictionaries into a part of the schema. Errors: ConfigError."""
    kinds = typing.get_type_hints(type(part))
    for key in plain:
        if key not in kinds:
            close = _suggestion(f"{prefix}{key}", {known for known, *_ in leaves(schema)})
            raise ConfigError(f"there is no setting {shown(f'{prefix}{key}')}{close}.")
    for name, kind in kinds.items():
        value = plain.get(name, getattr(part, name))
        if dataclasses.is_dataclass(kind):
            _fill(getattr(part, name), plain.get(name, {}), schema, f"{prefix}{name}.", convert)
            continue
        if value == MISSING:
            raise ConfigError(f"{prefix}{name} is not set: give it a value.")
        try:
            setattr(part, name, fitted(value if kind is str else convert(value), kind))
        except (TypeError, OverflowError):
            raise ConfigError(f"{prefix}{name} must be {in_words(kind)}, not {shown(value)}.") from None


def _from_text(value: Any) -> Any:
    """A number, true or false that was typed as a text, or that came from the environment as one."""
    if isinstance(value, list):
        return [_from_text(item) for item in value]
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _schema_of(plain: dict[str, Any]) -> Config:
    """The schema with the settings of the network and the method named in nested dictionaries. Errors: ConfigError."""
    if not isinstance(plain, dict):
        raise ConfigError(f"a configuration must be groups of settings, not {shown(plain)}.")
    for f in dataclasses.fields(Config):
        if dataclasses.is_dataclass(f.type) and not isinstance(plain.get(f.name, {}), dict):
            raise ConfigError(f"{f.name} must be a group of settings, not {shown(plain[f.name])}.")
    for group, (table, home) in REGISTRIES.items():
        name = plain.get(group, {}).get("name")
        if not isinstance(name, str | None):
            raise ConfigError(f"{group}.name must be a text, not {shown(name)}.")
        if name not in table and name in options(group):
            raise ConfigError(f"configs/{group}/{name}.yaml is there, but {home} lacks it: add an entry.")
        if name not in table and group != "dataset":
            wrong = f"{group}={shortened(str(name))}"
            raise ConfigError(f"{wrong} does not exist; choose one of {', '.join(sorted(table))}.")
    return Config(model=NETWORKS[plain["model"]["name"]].settings(), norm=METHODS[plain["norm"]["name"]].settings())
