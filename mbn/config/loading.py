"""From a command line to a checked Config, through Hydra. Does not import torch."""

import dataclasses
import difflib
import functools
import itertools
import typing
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from mbn.config.registry import DATASETS, NETWORKS
from mbn.config.schema import CONFIGS, REPOSITORY, Config, check
from mbn.config.typed_paths import quoted
from mbn.methods import METHODS
from mbn.system.errors import ConfigError
from mbn.system.setting_fields import leaves

# The groups whose options have entries in a registry: the registry, and its file.
REGISTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "dataset": (DATASETS, "mbn/config/registry.py"),
    "model": (NETWORKS, "mbn/config/registry.py"),
    "norm": (METHODS, "mbn/methods.py"),
}


# From the command line to a checked Config.


def load(overrides: list[str]) -> Config:
    """Compose configs/ with Hydra overrides as typed on a command line, and check the result.

    Errors: ConfigError.
    """
    return checked(compose(overrides))


def sweep_lines(overrides: list[str]) -> list[list[str]]:
    """The command lines of a sweep: norm=bn,mbn seed=range(0,3) makes six. Errors: ConfigError."""
    from hydra.errors import HydraException

    choices = []
    for text, override in zip(overrides, _parse(overrides), strict=True):
        key = override.get_key_element()
        try:
            values = list(override.sweep_string_iterator()) if override.is_sweep_override() else None
        except HydraException as error:
            raise ConfigError(f"cannot sweep {text!r}: {_one_sentence(error)}") from None
        choices.append([f"{key}={v}" for v in values] if values is not None else [text])
    return [list(line) for line in itertools.product(*choices)]


def _parse(overrides: list[str]) -> list[Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(quoted(text)))
        except HydraException:
            raise ConfigError(
                f"cannot read {text!r}: write a setting as key=value, a list as key=[1,2], with quotes for the shell."
            ) from None
    return parsed


def compose(overrides: list[str]) -> DictConfig:
    """Compose configs/ with Hydra overrides; refuse keys and options that do not exist. The values are not checked."""
    import hydra
    from hydra.errors import HydraException

    OmegaConf.register_new_resolver("repository", lambda path: str(REPOSITORY / path), replace=True)
    OmegaConf.register_new_resolver("schedule_of", _schedule_of, replace=True)
    parsed = [o for o in _parse(overrides) if (o.key_or_group, o.value()) != ("experiment", None)]
    for override in parsed:
        _check_override(override)
    # A setting that ++ would add exists already.
    lines = [o.input_line if o.key_or_group in groups() else o.input_line.lstrip("+") for o in parsed]
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return hydra.compose("config", overrides=lines)
    except (HydraException, OmegaConfBaseException) as error:
        for key in (o.key_or_group for o in parsed):
            if f"'{key}'" in str(error) and (home := _home(key)):
                raise ConfigError(f"{key} is not a setting here: it belongs to {home}.") from None
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
            f"{line} has several values, but one is needed here: write `python train.py -m {line}` for a sweep, or "
            "brackets for a list."
        )
    if key in groups():
        if value not in options(key):
            close = _suggestion(str(value), set(options(key)))
            raise ConfigError(f"{key}={value} does not exist{close}; choose one of {', '.join(options(key))}.")
        return
    if key not in _known_keys():
        close = _suggestion(key, {*_known_keys(), *groups()})
        raise ConfigError(f"there is no setting {key!r}{close}; `python train.py --help` lists them all.")
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
    # A key's last part counts too, so that epochs finds schedule.epochs.
    last = {key.rpartition(".")[2]: key for key in sorted(right)}
    tail = difflib.get_close_matches(wrong.rpartition(".")[2], last, n=1, cutoff=0.8)
    close = difflib.get_close_matches(wrong, sorted(right), n=1, cutoff=0.6) or [last[t] for t in tail]
    return f" (did you mean {close[0]!r}?)" if close else ""


def _one_sentence(error: Exception) -> str:
    """The first line of an error message from Hydra that no check above caught."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def resolved(composed: DictConfig) -> dict[str, Any]:
    """A composed configuration as nested dictionaries. Errors: ConfigError."""
    try:
        plain = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_one_sentence(error)) from None
    return typing.cast(dict[str, Any], plain)


def checked(composed: DictConfig) -> Config:
    """Merge a composed configuration into the schema and check every value. Errors: ConfigError."""
    return from_dict(resolved(composed))


def from_dict(plain: dict[str, Any]) -> Config:
    """The checked Config of nested dictionaries, such as a record holds. Errors: ConfigError."""
    schema = _schema_of(plain)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), plain)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{missing[0]} is not set: give it a value.")
        config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        key = error.full_key or str(error.key)
        close = _suggestion(key, {known for known, *_ in leaves(schema)})
        raise ConfigError(f"there is no setting {key!r}{close}.") from None
    except OmegaConfBaseException as error:
        raise ConfigError(_wrong_type(schema, error.full_key or str(error.key), plain)) from None
    assert isinstance(config, Config)
    check(config)
    return config


def _schema_of(plain: dict[str, Any]) -> Config:
    """The schema with the settings of the network and the method named in nested dictionaries. Errors: ConfigError."""
    for f in dataclasses.fields(Config):
        if dataclasses.is_dataclass(f.type) and not isinstance(plain.get(f.name, {}), dict):
            raise ConfigError(f"{f.name} must be a group of settings, not {plain[f.name]!r}.")
    for group, (table, home) in REGISTRIES.items():
        name = plain.get(group, {}).get("name")
        if name not in table and name in options(group):
            raise ConfigError(f"configs/{group}/{name}.yaml is there, but {home} lacks it: add an entry.")
        if name not in table and group != "dataset":
            raise ConfigError(f"{group}={name} does not exist; choose one of {', '.join(sorted(table))}.")
    return Config(model=NETWORKS[plain["model"]["name"]].settings(), norm=METHODS[plain["norm"]["name"]].settings())


_TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    int | None: "a whole number or null",
    list[float]: "a list of numbers such as [0.1,0.5]",
}


def _wrong_type(schema: Config, key: str, plain: dict[str, Any]) -> str:
    """'batch_size must be a whole number, not 'abc'.' for the key whose value the schema refused."""
    *parents, last = key.split("[")[0].split(".")
    node: Any = schema
    value: Any = plain
    for part in parents:
        node, value = getattr(node, part), value[part]
    wanted = _TYPE_NAMES[typing.get_type_hints(type(node))[last]]
    return f"{'.'.join([*parents, last])} must be {wanted}, not {value[last]!r}."
