"""Which records are in which cell of a table, and the numbers that they give."""

import re
import statistics
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from mbn import grid
from mbn.grid import Cell, Grid
from mbn.launch.estimate import Estimate
from mbn.launch.table_status import TableStatus, table_status
from mbn.methods import METHODS
from mbn.records import record
from mbn.system.errors import UserError
from mbn.tables.measures import Measure, Record, Taken
from mbn.tables.over_seeds import SEEDS, Contrast, OneMore, Sample, Spread, Values, contrast, pooled

# The grids that the figure of test error against batch size is drawn from.
BATCH_SIZES = ("table4-resnet20", "table4-methods")

Records = dict[str, Record]
# The records of a cell, by seed.
RecordsBySeed = dict[int, Record]
NUMBERED = {"resnet": "ResNet", "cifar": "CIFAR"}
POOLED_APART = "GN, NormProp and cells without weight decay on gamma and beta over their own"  # pooled_with, in words


def read_records(results: Path) -> Records:
    """All records by name. Errors: UserError for one that was changed, or is not in its place."""
    folder = results / "records"
    found = {}
    for path in sorted(path for path in folder.rglob("*.json") if not path.name.startswith(".")):  # macOS's ._ files
        one = record.read(path)
        if path != record.path_of(results, one["name"]):
            raise UserError(
                f"{path} is the record of {one['name']}: move it to {record.path_of(results, one['name'])}."
            )
        found[one["name"]] = one
    return found


@dataclass(frozen=True)
class AllRuns:
    """All grids, and the records of their cells at the seeds and the scale that are asked for."""

    grids: tuple[Grid, ...]
    records: Records
    seeds: int = SEEDS
    scale: float = 1.0
    _spreads: dict[tuple[str, Taken], Spread] = field(default_factory=dict, repr=False)

    def of(self, cell: Cell) -> RecordsBySeed:
        """The records of a cell, by seed."""
        if cell.overrides is None:
            return {}
        named = {seed: cell.name(seed, self.scale) for seed in range(self.seeds)}
        return {seed: self.records[name] for seed, name in named.items() if name in self.records}

    def lost(self, cell: Cell) -> int:
        """How many of a cell's runs diverged."""
        return sum(map(record.diverged, self.of(cell).values()))

    def diverge(self, cell: Cell) -> bool:
        """Whether a cell has runs, and all of them diverged."""
        return 0 < self.lost(cell) == len(self.of(cell))

    def values(self, cell: Cell, measure: Taken) -> Values:
        """One number of each of a cell's runs, by seed, without those that have none."""
        numbers = {seed: measure(one) for seed, one in self.of(cell).items()}
        return {seed: number for seed, number in numbers.items() if number is not None}

    @cached_property
    def cells(self) -> dict[str, Cell]:
        """Every cell with runs, by the name of its first seed: the same training in two tables is one cell."""
        cells = (cell for one in self.grids for cell in one.cells if cell.overrides is not None)
        return dict(reversed([(cell.name(0, self.scale), cell) for cell in cells]))

    @cached_property
    def groups(self) -> dict[str, list[Cell]]:
        """The cells whose variance is pooled, by name."""
        groups: dict[str, list[Cell]] = {}
        for cell in self.cells.values():
            groups.setdefault(pooled_with(cell), []).append(cell)
        return groups

    def spread(self, group: str, measure: Taken) -> Spread:
        """How much the seeds of a group's cells differ in a number."""
        if (group, measure) not in self._spreads:
            found = pooled(self.values(cell, measure) for cell in self.groups.get(group, []))
            self._spreads[group, measure] = found
        return self._spreads[group, measure]

    def sample(self, cell: Cell, measure: Taken) -> Sample | None:
        """The mean of a number over a cell's runs, with the spread of its group; None without a run."""
        values = self.values(cell, measure)
        if not values:
            return None
        group, mean = pooled_with(cell), statistics.fmean(values.values())
        spread, lost = self.spread(group, measure), self.lost(cell)
        return Sample(cell.name(0, self.scale), mean, len(values), group, spread, lost)


def network(cell: Cell) -> str:
    """Example: ResNet-56 on CIFAR-10. A name that is not known is shown as it is."""
    config = cell.config(0)
    return " on ".join(_display(name) for name in (config.model.name, config.dataset.name))


def pooled_with(cell: Cell) -> str:
    """The name of the cells with which a cell pools its variance: those of its network and data set whose method has
    batch statistics, or those of its method, if that has none; without weight decay on gamma and beta, again those that
    have none. GN at a rate that does not suit it, or another way of training, in which seeds differ more, must not
    widen the intervals of claims in which it has no part.

    Example: ResNet-56 on CIFAR-10.
    """
    config = cell.config(0)
    method = METHODS[config.norm.name]
    name = network(cell) if method.statistics else f"{network(cell)}, {method.label}"
    return name if config.optimizer.decay_norm else f"{name} without weight decay on gamma and beta"


def _display(name: str) -> str:
    known = {"vgg16": "VGG", "nin": "NIN", "imagenet": "ImageNet"}
    return known.get(name) or re.sub(r"^(resnet|cifar)(\d+)$", lambda m: f"{NUMBERED[m[1]]}-{m[2]}", name)


@dataclass(frozen=True)
class Table:
    """A grid, and the runs that it is made from."""

    grid: Grid
    all_runs: AllRuns

    @property
    def records(self) -> Records:
        return self.all_runs.records

    @property
    def seeds(self) -> int:
        return self.all_runs.seeds

    @property
    def scale(self) -> float:
        return self.all_runs.scale

    @property
    def usual(self) -> bool:
        """Whether it shows runs of full length and of the planned seeds, of which the two READMEs tell."""
        return self.scale == 1 and self.seeds == SEEDS

    def runs(self, cell: Cell) -> RecordsBySeed:
        """The records of a cell, by seed."""
        return self.all_runs.of(cell)

    def values(self, cell: Cell, field: str) -> Values:
        """One field of a cell's records, by seed, without those that have none."""
        return self.all_runs.values(cell, Measure(field))

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
        measure = Measure(metric)
        sample, values = self.all_runs.sample(cell, measure), self.values(cell, metric)
        to_bn, papers = None, None
        if cell.overrides is not None and (bn := cell.baseline()).name(0) != cell.name(0):
            of_bn = self.all_runs.sample(bn, measure)
            to_bn = contrast([sample, of_bn], (1, -1)) if sample and of_bn else Contrast()
            printed = [c.paper.get(metric) for c in self.grid.cells if c.overrides and c.name(0) == bn.name(0)]
            ours = cell.paper.get(metric)
            papers = float(ours) - float(printed[0]) if ours and printed and printed[0] else None
        return Entry(cell, metric, self.seeds, values, self.all_runs.lost(cell), sample, to_bn, papers)


@dataclass(frozen=True)
class Entry:
    """One number of a table.

    diverged: how many of its runs have no number, because they diverged. to_bn: its difference to BN, without a mean
    where nothing can be compared, None where the cell is BN itself, or nothing is run; paper_to_bn: the paper's.
    """

    cell: Cell
    metric: str
    seeds: int
    values: Values
    diverged: int
    sample: Sample | None
    to_bn: Contrast | None
    paper_to_bn: float | None

    @property
    def paper(self) -> str | None:
        return self.cell.paper.get(self.metric)

    @property
    def has_run(self) -> bool:
        return bool(self.values or self.diverged)

    @property
    def mark(self) -> str:
        """better or worse than BN, where the whole interval of the difference is on one side of zero, else nothing.

        All metrics are errors.
        """
        interval = self.to_bn.interval() if self.to_bn else None
        return "" if interval is None else "better" if interval[1] < 0 else "worse" if interval[0] > 0 else ""

    @cached_property
    def one_more(self) -> OneMore | None:
        """The paper's number, taken for that of one more run; None where it or ours is not known."""
        return contrast([self.sample], [1]).one_more(float(self.paper)) if self.sample and self.paper else None

    @property
    def sd(self) -> float | None:
        """Of the cell's own seeds."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    def text(self, plus_minus: str = "±") -> str:
        """Examples: 6.41 ± 0.12 (5), 6.41 (1 of 5), 6.41 ± 0.12 (3), 2 diverged, diverges (2 of 5), -."""
        if not self.has_run:
            return "-"
        if self.sample is None:
            return f"diverges ({self._of_all(self.diverged)})"
        spread = f" {plus_minus} {self.sd:.2f}" if self.sd is not None else ""
        lost = f", {self.diverged} diverged" if self.diverged else ""
        n = self.sample.n
        return f"{self.sample.mean:.2f}{spread} ({n if n + self.diverged == self.seeds else self._of_all(n)}){lost}"

    def _of_all(self, n: int) -> str:
        return str(n) if n == self.seeds else f"{n} of {self.seeds}"


def read_tables(
    records: Records, names: list[str] | None = None, seeds: int = SEEDS, scale: float = 1.0
) -> dict[str, Table]:
    """Every table that is named, or all of them. How much seeds differ is judged by the runs of all tables.

    Errors: UserError for a name that no table has, and for a data set whose records are kept away from tables.
    """
    chosen = {name: grid.read(name) for name in names or grid.names()}
    all_runs = AllRuns(tuple(chosen.get(name) or grid.read(name) for name in grid.names()), records, seeds, scale)
    for one in chosen.values():
        grid.check_data_sets(one)
    return {name: Table(one, all_runs) for name, one in chosen.items()}


def file_name(name: str, scale: float, seeds: int) -> str:
    """Tables of shortened runs, and of other seeds than the planned ones, are files of their own."""
    exact = f"{scale:g}" if float(f"{scale:g}") == scale else repr(scale)
    return name + (f"-scale{exact}" if scale != 1 else "") + (f"-seeds{seeds}" if seeds != SEEDS else "")


def heading(name: str) -> str:
    """Example: Table 4 extra (methods): a table that is not the paper's."""
    head, _, rest = name.partition("-")
    return re.sub(r"(\d+)", r" \1", head).capitalize() + (f" extra ({rest})" if rest else "")


def label(cell: Cell) -> str:
    return f"{cell.row}, {cell.column}"


def cells_of_runs(tables: dict[str, Table]) -> dict[str, list[str]]:
    """The cells that each run is in, by its name. Example of one: Table 4: 8, BN."""
    found: dict[str, list[str]] = {}
    for name, table in tables.items():
        for cell in table.grid.cells:
            for one in table.runs(cell).values():
                found.setdefault(one["name"], []).append(f"{heading(name)}: {label(cell)}")
    return found


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


def lines(table: Table, plus_minus: str, better: str, worse: str) -> list[list[str]]:
    """For each row its label, and then one text for each of `heads`.

    better, worse: formats such as `**%s**` for a number that is better or worse than BN's.
    """
    forms = {"better": better, "worse": worse, "": "%s"}
    found = []
    for row in table.grid.rows:
        line = [row]
        for e in table.entries:
            if e.cell.row == row:
                line += [forms[e.mark] % e.text(plus_minus), *([e.paper or "-"] if table.grid.paper else [])]
        found.append(line)
    return found
