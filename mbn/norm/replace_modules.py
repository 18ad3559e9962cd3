"""Put new modules where old ones are: as children of other modules, and in the lists and dicts that they hold."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn


def replace_modules(parents: Iterable[nn.Module], new: Mapping[nn.Module, nn.Module]) -> None:
    """Put the values of new in place of its keys, wherever one of the parents holds them.

    A parent may hold a module as a child, as an attribute that is not registered, and in lists, tuples, dicts and sets,
    however deep. Lists, dicts and sets stay the same objects; a tuple is made again.
    """
    seen: set[int] = set()
    for parent in parents:
        _within(parent.__dict__, new, seen)


def _within(held: Any, new: Mapping[nn.Module, nn.Module], seen: set[int]) -> Any:
    """The new module for an old one; a container with its old modules replaced; held itself for all else."""
    if isinstance(held, nn.Module):
        return new.get(held, held)
    if not isinstance(held, (list, tuple, dict, set)) or id(held) in seen:
        return held
    if not isinstance(held, tuple):
        seen.add(id(held))  # it may hold itself
    old = [*held, *held.values()] if isinstance(held, dict) else list(held)
    items = [_within(item, new, seen) for item in old]
    if all(a is b for a, b in zip(items, old, strict=True)):
        return held
    if isinstance(held, tuple):
        return held._make(items) if hasattr(held, "_make") else type(held)(items)
    if isinstance(held, list):
        held[:] = items
        return held
    held.clear()
    half = len(items) // 2
    held.update(zip(items[:half], items[half:], strict=True) if isinstance(held, dict) else items)
    return held
