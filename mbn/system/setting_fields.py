"""A setting: a field of a dataclass with its default, a line of explanation and a rule for its values."""

import dataclasses
import json
import math
import reprlib
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """Which values are allowed: in words that follow "must be", and as a test."""

    wanted: str
    holds: Callable[[Any], bool]


def setting(default: Any, explanation: str, rule: Rule | None = None, staged: bool = False) -> Any:
    """A field of a dataclass. staged: a list with one value for each stage of the schedule, or one for all."""
    return dataclasses.field(default=default, metadata={"explanation": explanation, "rule": rule, "staged": staged})


def group(cls: type, explanation: str = "") -> Any:
    """A field that holds settings of its own."""
    return dataclasses.field(default_factory=cls, metadata={"explanation": explanation})


def leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Key, field and value of every setting. A group comes first, then its settings as `group.key`."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        yield prefix + field.name, field, value
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")


def by_full_names(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings of nested dictionaries by their full names, such as schedule.lr."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= by_full_names(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def typed(value: Any) -> str:
    """A value as it is typed on a command line. Example: [0.1,0.5]."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def fitted(value: Any, kind: Any) -> Any:
    """A plain value as one of that type: int, float, bool, str, X | None, list[X] or dict[str, X].

    A whole number is also a float, and -0.0 is 0.0. Errors: TypeError, OverflowError for a value of another type.
    """
    outer, inner = typing.get_origin(kind), typing.get_args(kind)
    if outer in (types.UnionType, typing.Union):
        return None if value is None else fitted(value, inner[0])
    if outer is list and type(value) is list:
        return [fitted(item, inner[0]) for item in value]
    if outer is dict and type(value) is dict:
        return {fitted(key, inner[0]): fitted(item, inner[1]) for key, item in value.items()}
    if kind is float and type(value) in (int, float):
        return float(value) + 0.0
    if type(value) is not kind:
        raise TypeError(f"{shown(value)} is not {in_words(kind)}")
    return value


def in_words(kind: Any) -> str:
    """The name of a type, for a message."""
    return _TYPE_NAMES.get(kind, str(kind))


_TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    int | None: "a whole number or null",
    list[float]: "a list of numbers such as [0.1]",
    list[str]: "a list of texts",
}


def shown(value: Any) -> str:
    """A value of a setting in a message: as in Python, and shortened in the middle if it is long."""
    return _short.repr(value)


def shortened(text: str) -> str:
    """A text in a message, shortened in the middle if it is long."""
    return text if len(text) <= 200 else f"{text[:150]}...{text[-40:]}"


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120


def at_least(least: float, most: int = 2**31 - 1) -> Rule:
    return Rule(f"at least {least} and at most {most}", lambda value: value is None or least <= value <= most)


def among(*choices: Any) -> Rule:
    words = " or ".join(map(str, choices)) if len(choices) == 2 else f"one of {', '.join(map(str, choices))}"
    return Rule(words, lambda value: value in choices)


ABOVE_0 = Rule("above 0", lambda value: 0 < value < math.inf)
BELOW_1 = Rule("at least 0 and below 1", lambda value: 0 <= value < 1)
SHARE = Rule("above 0 and at most 1", lambda value: 0 < value <= 1)
