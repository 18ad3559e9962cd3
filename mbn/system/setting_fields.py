"""A setting: a field of a dataclass with its default, a line of explanation and a rule for its values."""

import dataclasses
import math
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


def at_least(least: float) -> Rule:
    return Rule(f"at least {least}", lambda value: value is None or value >= least)


def among(*choices: Any) -> Rule:
    words = " or ".join(map(str, choices)) if len(choices) == 2 else f"one of {', '.join(map(str, choices))}"
    return Rule(words, lambda value: value in choices)


ABOVE_0 = Rule("above 0", lambda value: 0 < value < math.inf)
BELOW_1 = Rule("at least 0 and below 1", lambda value: 0 <= value < 1)
SHARE = Rule("above 0 and at most 1", lambda value: 0 < value <= 1)
