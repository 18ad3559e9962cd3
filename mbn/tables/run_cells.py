"""Every cell that has runs, also those that no table plans, and what pages call it: a pure function of the records."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mbn.config import Config, run_name
from mbn.config.run_identity import identity
from mbn.grid import Cell
from mbn.methods import METHODS
from mbn.records.record import config_of
from mbn.tables.cells import AllRuns, RecordsBySeed, Table, heading, network


@dataclass(frozen=True)
class RunCell:
    """A cell with its runs.

    place: network, data and schedule, such as 'ResNet-56 on CIFAR-10, batch 8'. method: such as 'MBN-2 batch'.
    bn: BN's cell at this place. other: the settings that no planned cell has.
    """

    cell: Cell
    place: str
    method: str
    runs: RecordsBySeed
    bn: Cell
    other: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.place}, {self.method}"


def run_cells(tables: dict[str, Table]) -> list[RunCell]:
    """Each cell once, place by place: the places of the tables, then those that only unplanned cells have."""
    if not tables:
        return []
    all_runs = next(iter(tables.values())).all_runs
    planned = [(c, heading(name), ()) for name, table in tables.items() for c in table.grid.cells if c.overrides]
    places: dict[str, str] = {}  # names by BN's run there: the same network, data and schedule
    found: dict[str, RunCell] = {}
    for cell, where, other in (*planned, *_unplanned(all_runs)):
        if cell.name(0) not in found and (runs := all_runs.of(cell)):
            bn = cell.baseline()
            places.setdefault(bn.name(0), _place(cell, where, other, taken=list(places.values())))
            found[cell.name(0)] = RunCell(cell, places[bn.name(0)], _method(cell), runs, bn, other)
    order = list(places.values())
    return sorted(found.values(), key=lambda cell: order.index(cell.place))


def _place(cell: Cell, where: str, other: Iterable[str], taken: list[str]) -> str:
    """With the table, where another schedule has that name."""
    settings = [setting for setting in other if not setting.startswith("norm.")]
    name = ", ".join([network(cell), f"batch {cell.config(0).batch_size}", *settings])
    return f"{name} ({where})" if name in taken and where else name


def _method(cell: Cell) -> str:
    """Examples: BN-1; MBN-2 batch; MBN-2 memory=10."""
    assert cell.overrides is not None
    config = cell.config(0)
    method = METHODS[config.norm.name]
    name = f"{method.label}-{config.forwards}" if method.statistics else method.label
    settings = [o.removeprefix("norm.") for o in cell.overrides if o.startswith("norm.")]
    usual = ("gradient=paper", "memory=20")
    return " ".join([name, *(setting.removeprefix("gradient=") for setting in settings if setting not in usual)])


def _unplanned(all_runs: AllRuns) -> Iterator[tuple[Cell, str, tuple[str, ...]]]:
    """A cell for each record that no planned one has, and the settings in which it differs from the nearest of these:
    of the same data, network and method, with the fewest of them."""
    shown = {one["name"] for cell in all_runs.cells.values() for one in all_runs.of(cell).values()}
    known = set(all_runs.cells)
    for name, one in sorted(all_runs.records.items()):
        if name in shown:
            continue
        config = replace(config_of(one), seed=0)
        alike = [cell for cell in all_runs.cells.values() if _kind(cell.config(0)) == _kind(config)]
        if run_name(config) not in known and alike:
            known.add(run_name(config))
            nearest = min(alike, key=lambda cell: len(_other(config, cell)))
            yield _with(nearest, other := _other(config, nearest)), "", tuple(f"{k}={v}" for k, v in other.items())


def _kind(config: Config) -> tuple[str, str, str]:
    return config.dataset.name, config.model.name, config.norm.name


def _other(config: Config, cell: Cell) -> dict[str, str]:
    """The settings of a run that are not a cell's, as overrides."""
    own, planned = _flat(identity(config)), _flat(identity(cell.config(0)))
    return {key: value for key, value in own.items() if value != planned[key]}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return flat


def _with(cell: Cell, other: dict[str, str]) -> Cell:
    """The cell with these settings instead of its own."""
    assert cell.overrides is not None
    replaced = {*other} | ({"schedule.epochs", "schedule.scale"} if "schedule.iterations" in other else set())
    kept = [override for override in cell.overrides if override.partition("=")[0] not in replaced]
    return Cell(cell.grid, cell.row, cell.column, (*kept, *(f"{k}={v}" for k, v in other.items())), {})
