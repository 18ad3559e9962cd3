"""Every cell that has runs, also those that no table plans, and what pages call it: a pure function of the records."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from mbn.config import Config, identity, iterations, run_name
from mbn.grid import Cell
from mbn.methods import METHODS
from mbn.records.record import config_of
from mbn.system.setting_fields import by_full_names, typed
from mbn.tables.cells import AllRuns, RecordsBySeed, Table, heading, network
from mbn.tables.measures import Record

# Settings that a method's name has, and the batch size, which a place names anyway.
NOT_OF_PLACES = ("norm=", "norm.", "forwards=", "batch_size=", "schedule.iterations=")
# Of a table's cells, whose heading says how long they train, network and data are not named again either.
NOT_OF_TABLES = (*NOT_OF_PLACES, "dataset=", "model=", "schedule.")


@dataclass(frozen=True)
class RunCell:
    """A cell with its runs of the planned seeds.

    place: network, data and schedule, such as 'ResNet-56 on CIFAR-10, batch 8'. method: such as 'MBN-2 batch'.
    bn: BN's cell at this place. planned: whether a table has it.
    """

    cell: Cell
    place: str
    method: str
    runs: RecordsBySeed
    bn: Cell
    planned: bool

    @property
    def label(self) -> str:
        return f"{self.place}, {self.method}"


@dataclass(frozen=True)
class Unplanned:
    """A record that no table has: its cell, and the settings in which this differs from the nearest planned one."""

    record: Record
    cell: Cell
    other: tuple[str, ...]


def run_cells(tables: dict[str, Table]) -> list[RunCell]:
    """Each cell once, place by place: the places of the tables, then those that only unplanned cells have."""
    if not tables:
        return []
    all_runs = next(iter(tables.values())).all_runs
    planned = [cell for table in tables.values() for cell in table.grid.cells if cell.overrides is not None]
    names: dict[str, str] = {}  # of places, by BN's run there: the same network, data and schedule
    found: dict[str, RunCell] = {}
    for cell in planned:
        if cell.name(0) not in found and (runs := all_runs.of(cell)):
            assert cell.overrides is not None
            settings = [one for one in cell.overrides if not one.startswith(NOT_OF_TABLES)]
            place = _named(names, cell, [_network_and_batch(cell), *settings, heading(cell.grid)])
            found[cell.name(0)] = RunCell(cell, place, _method(cell), runs, cell.baseline(), True)
    for one in unplanned(all_runs):
        cell = one.cell
        if cell.name(0) not in found and (runs := all_runs.of(cell)):
            parts = [_network_and_batch(cell), *_of_place(one, planned)]
            place = _named(names, cell, [", ".join(parts), heading(cell.grid), cell.baseline().name(0)])
            found[cell.name(0)] = RunCell(cell, place, _method(cell), runs, cell.baseline(), False)
    order = list(names.values())
    return sorted(found.values(), key=lambda cell: order.index(cell.place))


def _network_and_batch(cell: Cell) -> str:
    return f"{network(cell)}, batch {cell.config(0).batch_size}"


def _named(names: dict[str, str], cell: Cell, parts: list[str]) -> str:
    """The name of a cell's place: the first part, with as many others in brackets as no other place has it."""
    bn = cell.baseline().name(0)
    if bn not in names:
        first, *more = parts
        several = [first, *(f"{first} ({', '.join(more[:n])})" for n in range(1, len(parts)))]
        names[bn] = next((name for name in several if name not in names.values()), several[-1])
    return names[bn]


def _of_place(one: Unplanned, planned: list[Cell]) -> list[str]:
    """The settings that a place's name needs; the length, unless it is that of the tables at this batch size."""
    length = iterations(one.cell.config(0))
    usual = next((c for c in planned if _network_and_batch(c) == _network_and_batch(one.cell)), None)
    named = [] if usual and iterations(usual.config(0)) == length else [f"{length:,} iterations"]
    return [*(setting for setting in one.other if not setting.startswith(NOT_OF_PLACES)), *named]


def _method(cell: Cell) -> str:
    """Examples: BN-1; MBN-2 batch; MBN-2 memory=10."""
    assert cell.overrides is not None
    config = cell.config(0)
    method = METHODS[config.norm.name]
    name = f"{method.label}-{config.forwards}" if method.statistics else method.label
    settings = [o.removeprefix("norm.") for o in cell.overrides if o.startswith("norm.")]
    usual = ("gradient=paper", "memory=20")
    return " ".join([name, *(setting.removeprefix("gradient=") for setting in settings if setting not in usual)])


def unplanned(all_runs: AllRuns) -> Iterator[Unplanned]:
    """The records that no cell has at its planned seeds, except those of networks and data that no table has."""
    shown = {one["name"] for cell in all_runs.cells.values() for one in all_runs.of(cell).values()}
    for name, one in sorted(all_runs.records.items()):
        if name not in shown and (found := _unplanned(one, list(all_runs.cells.values()))):
            yield found


def _unplanned(record: Record, planned: list[Cell]) -> Unplanned | None:
    """The nearest of the planned cells of its network and data: of its method, if one is, with the fewest other
    settings."""
    config = config_of(record)
    alike = [cell for cell in planned if _kind(cell) == (config.dataset.name, config.model.name)]
    of_method = [cell for cell in alike if cell.config(0).norm.name == config.norm.name]
    candidates = of_method or [_with(cell, {"norm": config.norm.name}) for cell in alike]
    if not candidates:
        return None
    nearest = min(candidates, key=lambda cell: len(_other(config, cell)))
    other = _other(config, nearest)
    # A length that is equal only because the batch sizes differ, too, has to be set.
    cells = (_with(nearest, other), _with(nearest, other | {"schedule.iterations": str(iterations(config))}))
    cell = next((cell for cell in cells if cell.name(config.seed) == run_name(config)), None)
    if cell is None:
        return None
    said = tuple(f"{key}={value}" for key, value in other.items())
    return Unplanned(record, cell, said or (f"seed={config.seed}",))


def _kind(cell: Cell) -> tuple[str, str]:
    config = cell.config(0)
    return config.dataset.name, config.model.name


def _other(config: Config, cell: Cell) -> dict[str, str]:
    """The settings of a run that are not a cell's, as overrides; its seed aside."""
    own, planned = (by_full_names(identity(one)) for one in (replace(config, seed=0), cell.config(0)))
    return {key: typed(value) for key, value in own.items() if key not in planned or value != planned[key]}


def _with(cell: Cell, other: dict[str, str]) -> Cell:
    """The cell with these settings instead of its own."""
    assert cell.overrides is not None
    replaced = {*other}
    if "schedule.iterations" in other:
        replaced |= {"schedule.epochs", "schedule.scale"}
    kept: Iterable[str] = (o for o in cell.overrides if o.partition("=")[0] not in replaced)
    if "norm" in other:
        kept = (o for o in kept if not o.startswith(("norm.", "forwards=")))
    return Cell(cell.grid, cell.row, cell.column, (*kept, *(f"{key}={value}" for key, value in other.items())), {})
