"""Which records are in which cell of a table, and the numbers that they give."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mbn import grid
from mbn.grid import Cell, Grid
from mbn.launch.estimate import Estimate
from mbn.launch.table_status import TableStatus, table_status
from mbn.records import record
from mbn.system.errors import UserError
from mbn.tables.claims import Runs
from mbn.tables.over_seeds import Summary, Values, difference, summary, welch

# The grids that the figure of test error against batch size is drawn from.
BATCH_SIZES = ("table4-resnet20", "table4-methods")

Records = dict[str, dict[str, Any]]


def read_records(results: Path) -> Records:
    """All records by name. Errors: UserError for one that was changed, or is not in its place."""
    folder = results / "records"
    found = {}
    for path in sorted(folder.rglob("*.json")):
        one = record.read(path)
        if path != record.path_of(results, one["name"]):
            raise UserError(
                f"{path} is the record of {one['name']}: move it to {record.path_of(results, one['name'])}."
            )
        found[one["name"]] = one
    return found


@dataclass(frozen=True)
class Table:
    """A grid, and the records of its cells at the seeds and the scale that are asked for."""

    grid: Grid
    records: Records
    seeds: int = 5
    scale: float = 1.0

    def runs(self, cell: Cell) -> Runs:
        """The records of a cell, by seed."""
        if cell.overrides is None:
            return {}
        named = {seed: cell.name(seed, self.scale) for seed in range(self.seeds)}
        return {seed: self.records[name] for seed, name in named.items() if name in self.records}

    def values(self, cell: Cell, field: str) -> Values:
        """One field of a cell's records, by seed, without those that have none."""
        return {seed: one[field] for seed, one in self.runs(cell).items() if one[field] is not None}

    @cached_property
    def has_runs(self) -> bool:
        return any(self.runs(cell) for cell in self.grid.cells)

    @cached_property
    def status(self) -> TableStatus:
        """What has run and what the rest would take, judged by all records there are."""
        estimate = Estimate(self.records.values())
        return table_status(self.grid, range(self.seeds), self.scale, self.records.__contains__, estimate)

    @cached_property
    def entries(self) -> list["Entry"]:
        """Row by row, metric by metric, column by column: the order in which the table prints them."""
        return [
            self.entry(cell, metric)
            for row in self.grid.rows
            for metric in self.grid.metrics
            for cell in self.grid.row(row)
        ]

    def entry(self, cell: Cell, metric: str) -> "Entry":
        values = self.values(cell, metric)
        if cell.overrides is None or cell.baseline().name(0, self.scale) == cell.name(0, self.scale):
            return Entry(cell, metric, self.seeds, values, None, None)
        of_bn = self.values(cell.baseline(), metric)
        return Entry(cell, metric, self.seeds, values, difference(values, of_bn), welch(values, of_bn))


@dataclass(frozen=True)
class Entry:
    """One number of a table.

    to_bn: its difference to BN, welch: p of Welch's test of it; None where the cell is BN itself, or nothing is run.
    """

    cell: Cell
    metric: str
    seeds: int
    values: Values
    to_bn: Summary | None
    welch: float | None

    @property
    def paper(self) -> str | None:
        return self.cell.paper.get(self.metric)

    @property
    def better(self) -> bool:
        """Whether the whole interval of the difference to BN lies below zero: all metrics are errors."""
        return self.to_bn is not None and self.to_bn.high is not None and self.to_bn.high < 0

    @cached_property
    def over_seeds(self) -> Summary:
        return summary(self.values.values())

    def text(self, plus_minus: str = "±") -> str:
        """Examples: 6.41 ± 0.12 (5), 6.41 (1 of 5), -."""
        n, mean, sd = self.over_seeds.n, self.over_seeds.mean, self.over_seeds.sd
        if mean is None:
            return "-"
        spread = f" {plus_minus} {sd:.2f}" if sd is not None else ""
        return f"{mean:.2f}{spread} ({n if n == self.seeds else f'{n} of {self.seeds}'})"


def read_tables(
    records: Records, names: list[str] | None = None, seeds: int = 5, scale: float = 1.0
) -> dict[str, Table]:
    """Every table that is named, or all of them.

    Errors: UserError for a name that no table has, and for a data set whose records are kept away from tables.
    """
    tables = {name: Table(grid.read(name), records, seeds, scale) for name in names or grid.names()}
    for table in tables.values():
        grid.check_data_sets(table.grid)
    return tables


def file_name(name: str, scale: float) -> str:
    """Tables of shortened runs are files of their own."""
    return name if scale == 1 else f"{name}-scale{scale:g}"


def heading(name: str) -> str:
    """Example: Table 4, methods."""
    head, _, rest = name.partition("-")
    return re.sub(r"(\d+)", r" \1", head).capitalize() + (f", {rest}" if rest else "")


def label(cell: Cell) -> str:
    return f"{cell.row}, {cell.column}"


def heads(table: Table) -> list[str]:
    """The heads of all columns except the first, for markdown and LaTeX."""
    several = len(table.grid.metrics) > 1
    paper = ["paper" if table.scale == 1 else "paper, full length"] if table.grid.paper else []
    return [
        head
        for metric in table.grid.metrics
        for column in table.grid.columns
        for head in (f"{column}, {grid.METRICS[metric]}" if several else column, *paper)
    ]


def lines(table: Table, plus_minus: str, bold: str) -> list[list[str]]:
    """Of each row the label and the texts below `heads`. bold: the form (with %s) of one that is better than BN."""
    found = []
    for row in table.grid.rows:
        line = [row]
        for e in table.entries:
            if e.cell.row == row:
                text = e.text(plus_minus)
                line += [bold % text if e.better else text, *([e.paper or "-"] if table.grid.paper else [])]
        found.append(line)
    return found
