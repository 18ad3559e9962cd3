"""What has run of each table and what the rest would cost, also as text. Does not import torch."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mbn.grid import Cell, Grid
from mbn.launch.estimate import Estimate
from mbn.system.durations import duration

CELLS = "Cells, row by row: how many seeds have a record, . for none, - where nothing is run."
TIME_LEFT = "Time left: one run at a time, at the records' speed; unknown: no finished run has such a network."


@dataclass(frozen=True)
class RunCounts:
    """Some runs by name. missing: those without a record, and the seconds that each would take; None: unknown."""

    wanted: frozenset[str]
    missing: dict[str, float | None]

    @property
    def done(self) -> int:
        return len(self.wanted) - len(self.missing)

    @property
    def seconds(self) -> float:
        """Of the missing runs together, as far as it is known."""
        return sum(seconds for seconds in self.missing.values() if seconds is not None)

    @property
    def unknown(self) -> int:
        """How many of the missing runs have no estimate."""
        return sum(seconds is None for seconds in self.missing.values())

    def left(self) -> str:
        """Examples: nothing; 154 h; 12 min, 3 unknown; unknown."""
        if not self.missing:
            return "nothing"
        if self.unknown == len(self.missing):
            return "unknown"
        return roughly(self.seconds) + (f", {self.unknown} unknown" if self.unknown else "")


@dataclass(frozen=True)
class TableStatus:
    """A table and the runs of each of its cells; none where nothing is run."""

    grid: Grid
    cells: dict[Cell, RunCounts]

    @property
    def whole(self) -> RunCounts:
        return union(self.cells.values())


def union(parts: Iterable[RunCounts]) -> RunCounts:
    """All these runs, each once."""
    parts = list(parts)
    missing = {name: seconds for part in parts for name, seconds in part.missing.items()}
    return RunCounts(frozenset().union(*(part.wanted for part in parts)), missing)


def table_status(
    grid: Grid, seeds: Sequence[int], scale: float, finished: Callable[[str], bool], estimate: Estimate
) -> TableStatus:
    """finished: whether the run of that name has a record."""

    def of(cell: Cell) -> RunCounts:
        wanted = {} if cell.overrides is None else {cell.name(seed, scale): seed for seed in seeds}
        missing = {name: seed for name, seed in wanted.items() if not finished(name)}
        seconds = {name: estimate.seconds(cell.config(seed, scale)) for name, seed in missing.items()}
        return RunCounts(frozenset(wanted), seconds)

    return TableStatus(grid, {cell: of(cell) for cell in grid.cells})


def status_text(tables: Sequence[TableStatus]) -> str:
    """A line for each table with a sign for each of its cells, and a line for all of them."""
    lines = [["table", "runs done", "time left", "cells"]]
    for table in tables:
        rows = ["".join(_sign(table.cells[cell]) for cell in table.grid.row(row)) for row in table.grid.rows]
        lines.append([table.grid.name, *_counts(table.whole), " ".join(rows)])
    lines.append(["all, each once", *_counts(union(table.whole for table in tables)), ""])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(f"{part:{width}}" for part, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*(line.rstrip() for line in shown), "", CELLS, TIME_LEFT])


def _counts(runs: RunCounts) -> list[str]:
    return [f"{runs.done:3} of {len(runs.wanted):3}", runs.left()]


def _sign(runs: RunCounts) -> str:
    """One character. A plus is ten or more."""
    if not runs.wanted:
        return "-"
    return "." if not runs.done else str(runs.done) if runs.done < 10 else "+"


def roughly(seconds: float) -> str:
    """1,068 h, 8.5 h, and less than two hours as `duration` has them."""
    hours = seconds / 3600
    return duration(seconds) if hours < 2 else f"{hours:.1f} h" if hours < 10 else f"{hours:,.0f} h"
