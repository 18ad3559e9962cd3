"""The runs that tables are made of, and whether each is finished. Does not import torch."""

import dataclasses
import json
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mbn import grid
from mbn.config import Config, run_name, to_dict
from mbn.records import record
from mbn.system.errors import UserError
from mbn.system.files import visible
from mbn.system.setting_fields import by_full_names, typed

# `all` is everything for CIFAR.
NOT_IN_ALL = ("table3",)


@dataclass(frozen=True)
class PlannedRun:
    """One training; overrides: its command line, without the settings of the machine."""

    name: str
    config: Config
    overrides: tuple[str, ...]

    def on(self, common: Config) -> "PlannedRun":
        """The same run with the machine and the evaluation of another configuration."""
        whole = dataclasses.replace(self.config, machine=common.machine, evaluate=common.evaluate)
        return dataclasses.replace(self, config=whole)

    def folder(self, results: Path) -> Path:
        return record.run_folder(results, self.name)

    def finished(self, results: Path) -> bool:
        return visible(record.path_of(results, self.name))


def runs(
    tables: Sequence[str],
    seeds: Iterable[int],
    filters: Sequence[str] = (),
    scale: float = 1.0,
    folder: Path = grid.GRIDS,
) -> list[PlannedRun]:
    """All runs of these tables, each once: every cell with the first seed, then every cell with the next.

    filters: `key=value,value`; only runs whose configuration has one of the values, for every filter.
    Errors: UserError, ConfigError.
    """
    chosen = [(cell, cell.config(seed=0, scale=scale)) for cell in _cells(tables, folder)]
    if filters:
        chosen = _filtered(chosen, filters)
    found: dict[str, PlannedRun] = {}
    for seed in seeds:
        for cell, config in chosen:
            seeded = dataclasses.replace(config, seed=seed)
            name = run_name(seeded)
            found.setdefault(name, PlannedRun(name, seeded, tuple(cell.command(seed, scale))))
    return list(found.values())


def table_names(tables: Sequence[str], folder: Path) -> list[str]:
    """These tables, each once, with those that `all` means in its place."""
    names: list[str] = []
    for table in tables:
        names += [n for n in grid.names(folder) if n not in NOT_IN_ALL] if table == "all" else [table]
    return list(dict.fromkeys(names))


def _cells(tables: Sequence[str], folder: Path) -> list[grid.Cell]:
    grids = [grid.read(name, folder) for name in table_names(tables, folder)]
    if folder == grid.GRIDS:  # another folder is for trials
        for one in grids:
            grid.check_data_sets(one)
    return [cell for one in grids for cell in one.cells if cell.overrides is not None]


Candidates = list[tuple[grid.Cell, Config]]


def _filtered(candidates: Candidates, filters: Sequence[str]) -> Candidates:
    """The candidates that match every filter. Errors: UserError, also where one value of a filter matches none."""
    left = candidates
    for text in filters:
        key, _, values = text.partition("=")
        if key == "seed":
            raise UserError(f"{text}: seeds are chosen by --seeds 5 or --seed 3.", code=2)
        found = {one for _, config in candidates if (one := setting(config, key)) is not None}
        if not found:
            raise UserError(f"none of these runs has a setting {key!r}: `python train.py --cfg job` shows all.", code=2)
        wanted = {_read(value): value for value in re.split(r",(?![^\[]*\])", values)}
        if unknown := wanted.keys() - set(map(_read, found)):
            named = min(wanted[value] for value in unknown)
            in_order = sorted(found, key=lambda text: (isinstance(_read(text), str), _read(text)))
            raise UserError(f"none of these runs has {key}={named}: they have {', '.join(in_order)}.", code=2)
        left = [(cell, config) for cell, config in left if _read(setting(config, key)) in wanted]
    if not left:
        raise UserError(f"none of these runs has {' and '.join(filters)} together.", code=2)
    return left


def _read(text: str | None) -> Hashable:
    """The value that a text stands for, so that 0 equals 0.0 and [0.1,0.5] equals [0.1, 0.5]."""
    try:
        value = json.loads(text or "")
    except ValueError:
        return text
    return value if isinstance(value, int | float) and not isinstance(value, bool) else json.dumps(value)


def setting(config: Config, key: str) -> str | None:
    """A setting's value as it is typed, or a group's name; None where the configuration has no such setting."""
    values = by_full_names(to_dict(config))
    name = key if key in values else f"{key}.name"
    return typed(values[name]) if name in values else None
