"""From a command line to a checked Config, by way of Hydra. Does not import torch."""

import dataclasses
import difflib
import itertools
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from mbn.config.schema import CONFIGS, MODELS, NORMS, REPOSITORY, Config, ConfigError, check

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
