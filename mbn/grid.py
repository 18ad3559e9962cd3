"""The tables as data: rows x columns of overrides, the paper's numbers, and its claims (scripts/grids/*.yaml)."""

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache, cached_property
from math import inf
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mbn.config import DATASETS, REPOSITORY, Config, check_run, checked, compose, groups, parse, run_name
from mbn.system.errors import ConfigError, UserError
from mbn.system.setting_fields import fitted
from mbn.system.yaml_file import read_yaml

GRIDS = REPOSITORY / "scripts" / "grids"
# The fields of a record that a table may show, and what it calls them.
METRICS = {"test_error": "test error", "test_error_top5": "top-5 test error", "train_error": "training error"}
# A number as the paper prints it.
PRINTED = re.compile(r"\d+(\.\d+)?")
# The paper's claims that are tested together, each over all tables whose claims name it (`primary`); they were
# chosen when two networks had run at batch 8, and one at batch 16. All other claims are exploratory.
PRIMARY = ("MBN < BN", "two forwards < one (MBN)", "MBN < BRN")


@dataclass(frozen=True)
class Cell:
    """One cell of a table: the settings of its runs, except seed and scale.

    overrides: None where nothing is run (quoted numbers; methods that do not fit the network).
    paper: for each metric the number as printed, None for '-'.
    """

    grid: str
    row: str
    column: str
    overrides: tuple[str, ...] | None
    paper: dict[str, str | None] = field(hash=False)

    def command(self, seed: int, scale: float = 1.0) -> list[str]:
        """The overrides of one run of this cell."""
        assert self.overrides is not None
        scaled = [f"schedule.scale={scale!r}"] if scale != 1 else []
        return [*self.overrides, *scaled, f"seed={seed}"]

    def config(self, seed: int, scale: float = 1.0) -> Config:
        """What `load(self.command(seed, scale))` gives, composed once for all seeds and scales."""
        return replace(self._of_overrides(_scaled, scale), seed=seed)

    def name(self, seed: int, scale: float = 1.0) -> str:
        return self._of_overrides(_named, scale, seed)

    def _of_overrides(self, function: Callable[..., Any], *arguments: float) -> Any:
        """function(overrides, *arguments), with the cell's place in its errors."""
        assert self.overrides is not None
        # Sorted: the same overrides in another order are the same run (no key stands twice in a cell).
        try:
            return function(tuple(sorted(self.overrides)), *arguments)
        except ConfigError as error:
            raise ConfigError(f"{self.grid}, row {self.row}, column {self.column}: {error}") from None

    def baseline(self) -> "Cell":
        """The cell of batch norm with one forward on the same network, data and schedule."""
        assert self.overrides is not None
        kept = [o for o in self.overrides if not o.startswith(("norm=", "norm.", "forwards="))]
        return Cell(self.grid, self.row, self.column, (*kept, "norm=bn"), {})


@cache
def _named(overrides: tuple[str, ...], scale: float, seed: int) -> str:
    """The run's name: pages ask for the same ones thousands of times."""
    return run_name(replace(_scaled(overrides, scale), seed=seed))


@cache
def _scaled(overrides: tuple[str, ...], scale: float) -> Config:
    """What `load` gives with schedule.scale too."""
    config = _composed(overrides)
    if scale != config.schedule.scale:
        config = replace(config, schedule=replace(config.schedule, scale=scale))
        check_run(config)
    return config


@cache
def _composed(overrides: tuple[str, ...]) -> Config:
    """What `load` gives. Hydra takes 0.1 s or more, so it composes only the choices of groups, which cells share."""
    chosen = tuple(o for o in overrides if o.partition("=")[0] in groups())
    config = deepcopy(_chosen(chosen))
    for override in parse([o for o in overrides if o not in chosen]):
        try:
            OmegaConf.update(config, override.key_or_group, override.value())
        except OmegaConfBaseException:
            raise ConfigError(f"{override.input_line} is no setting.") from None
    return checked(config)


@cache
def _chosen(options: tuple[str, ...]) -> DictConfig:
    return compose(list(options))


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, or ours, about a table: a number made from some of its cells has a given sign or size.

    metric: the field of a record that is compared; for a drop or a rise, the curve of that name.
    cells: those that are compared, by place: a row where the claim names columns, a column where it names rows; a gain
    has one place, ''.
    number: how the number is made from them, in words, such as 'MBN - BN'.
    bounds: the claim holds for a number between these. at: where a drop or a rise is, as a share of training.
    primary: which of the PRIMARY claims it is a part of, if it is one.
    paper: the number, where the paper prints it and not the cells' own.
    """

    text: str
    metric: str
    cells: dict[str, tuple[Cell, ...]]
    number: str

    bounds: tuple[float, float]
    at: Fraction
    primary: str = ""
    paper: float | None = None


class Lower(Claim):
    """lower: X, than: Y. X - Y is below 0."""


class Equal(Claim):
    """equal: [X, Y], within: margin. X - Y is between -margin and margin."""


class Gain(Claim):
    """gain: [from, to], of: X, above: Y. (X at from - X at to) - (Y at from - Y at to) is above 0."""


class Drop(Claim):
    """drop: curve, at: share of training, with: X [, above: Y]. X's curve falls there [further than that of Y]."""


class Rise(Claim):
    """rise: curve, at: share of training, with: X. X's curve rises there, for a moment."""


@dataclass(frozen=True)
class Grid:
    """A table; the fields are the keys of its YAML, except three.

    name: the file's, without its ending. own: its `cells`, the settings that one cell has of its own. shown: its
    `metrics`, the fields of a record that it shows where the paper prints none.
    """

    name: str
    title: str
    about: str
    rows: dict[str, list[str] | None]
    columns: dict[str, list[str]]
    base: list[str]
    own: dict[str, list[str]]
    shown: list[str]
    claims: list[Claim]
    paper: dict[str, dict[str, list[str | None]]] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> list[str]:
        """Fields of a record that the table shows: those that the paper prints, where it prints any."""
        return list(self.paper) or self.shown

    @cached_property
    def cells(self) -> list[Cell]:
        """Row by row."""
        return [self._cell(row, i, column) for row in self.rows for i, column in enumerate(self.columns)]

    def cell(self, row: str, column: str) -> Cell:
        return next(c for c in self.cells if (c.row, c.column) == (row, column))

    def row(self, row: str) -> list[Cell]:
        return [c for c in self.cells if c.row == row]

    def across(self, labels: list[str]) -> dict[str, tuple[Cell, ...]]:
        """The cells of some rows in every column, or of some columns in every row. Errors: ValueError."""
        if all(label in self.rows for label in labels):
            return {column: tuple(self.cell(row, column) for row in labels) for column in self.columns}
        if all(label in self.columns for label in labels):
            return {row: tuple(self.cell(row, column) for column in labels) for row in self.rows}
        raise ValueError(f"{' and '.join(map(str, labels))} are neither all rows nor all columns")

    def _cell(self, row: str, position: int, column: str) -> Cell:
        printed = {metric: rows[row][position] for metric, rows in self.paper.items() if row in rows}
        own, of_row = self.own.get(f"{row}/{column}", []), self.rows[row]
        if of_row is None or f"{row}/{column}" in self.absent:
            return Cell(self.name, row, column, None, printed)
        return Cell(self.name, row, column, (*self.base, *of_row, *self.columns[column], *own), printed)


def names(folder: Path = GRIDS) -> list[str]:
    """All grids: the paper's tables first."""
    found = [path.stem for path in folder.glob("*.yaml")]
    return sorted(found, key=lambda n: (not n.startswith("table") or "-" in n, n))


def read(name: str, folder: Path = GRIDS) -> Grid:
    """Read a grid. Errors: UserError where there is none of that name, or where a key or a claim is wrong."""
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"there is no table {name!r}: choose among {', '.join(names(folder))}, or all.", 2)
    content = read_yaml(path)
    own, shown, claims = content.pop("cells", {}), content.pop("metrics", ["test_error"]), content.pop("claims", [])
    try:
        grid = Grid(name=name, own=own, shown=shown, claims=[], **content)
        _check(grid)
        if not isinstance(claims, list):
            raise TypeError("claims must be a list")
    except TypeError as error:
        raise ConfigError(f"{path} is not a table ({error}): correct its keys.") from None
    for claim in claims:
        try:
            grid.claims.append(read_claim(grid, claim))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}: the claim {claim} means nothing ({error}): correct it.") from None
    return grid


def _check(grid: Grid) -> None:
    """Check the form of what a file holds. Errors: TypeError."""
    for key, kind in get_type_hints(Grid).items():
        name = {"own": "cells", "shown": "metrics"}.get(key, key)
        try:
            fitted(getattr(grid, key), kind)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
    unknown = sorted({*grid.paper, *grid.shown} - {*METRICS})
    if unknown:
        raise TypeError(f"there is no {unknown[0]!r}")
    for row, numbers in (row for rows in grid.paper.values() for row in rows.items()):
        if row not in grid.rows:
            raise TypeError(f"paper: there is no row {row!r}")
        if len(numbers) != len(grid.columns) or not all(n is None or PRINTED.fullmatch(n) for n in numbers):
            raise TypeError(f"paper: {row} needs a number or null for each of the {len(grid.columns)} columns")
    unknown = sorted({*grid.own, *grid.absent} - {f"{cell.row}/{cell.column}" for cell in grid.cells})
    if unknown:
        raise TypeError(f"there is no cell {unknown[0]!r}: a cell is called ROW/COLUMN")
    for cell in grid.cells:
        keys = [override.partition("=")[0] for override in cell.overrides or ()]
        for key in keys:
            if keys.count(key) > 1:
                raise TypeError(f"{cell.row}/{cell.column} has {key} twice")
            if key in ("seed", "schedule.scale") or key.startswith(("machine.", "evaluate.")):
                raise TypeError(f"{key} is not for a table: its runs get it from the command")


def check_data_sets(grid: Grid) -> None:
    """Check that tables get the records of a grid's data sets. Errors: UserError."""
    for name in {cell.config(0).dataset.name for cell in grid.cells if cell.overrides is not None}:
        if not DATASETS[name].in_tables:
            raise UserError(
                f"{grid.name} has the data set {name}, whose records git ignores: set in_tables=True at its entry in "
                "mbn/config/registry.py."
            )


def read_claim(grid: Grid, content: dict[str, Any]) -> Claim:
    """A claim from its YAML. Errors: AttributeError, KeyError, TypeError or ValueError for a wrong one."""
    form = dict(content)
    text, metric, places = form.pop("claim"), form.pop("metric", grid.metrics[0]), form.pop("in", None)
    paper = form.pop("paper", None)
    if (primary := form.pop("primary", "")) not in ("", *PRIMARY):
        raise ValueError(f"there is no primary claim {primary!r}")
    kind: type[Claim]
    bounds, at = (0.0, inf), 0
    match form:
        case {"lower": x, "than": y, **rest}:
            kind, of, labels, bounds = Lower, "", [x, y], (-inf, 0.0)
        case {"equal": [x, y], "within": margin, **rest}:
            kind, of, labels, bounds = Equal, "", [x, y], (-float(margin), float(margin))
        case {"gain": [start, end], "of": x, "above": y, **rest}:
            kind, of, labels = Gain, "gain of ", [x, y]
        case {"drop": metric, "at": at, "with": x, **rest}:
            kind, of, labels = Drop, "drop of ", [x, rest.pop("above")] if "above" in rest else [x]
        case {"rise": metric, "at": at, "with": x, **rest}:
            kind, of, labels = Rise, "rise of ", [x]
        case _:
            raise ValueError("it has no known form")
    if rest or metric not in METRICS:
        raise ValueError(f"there is no {next(iter(rest), metric)!r}")
    if primary and (kind is not Lower or metric != "test_error"):
        raise ValueError("a primary claim is one of a lower test error")
    compared = grid.across(labels)
    if kind is Gain:
        compared = {"": (*compared[start], *compared[end])}
    elif places is not None:
        compared = {place: compared[place] for place in places}
    run = {place: cells for place, cells in compared.items() if all(cell.overrides is not None for cell in cells)}
    if not run:
        raise ValueError("nothing is run for it")
    if paper is not None and (kind is not Lower or len(run) != 1):
        raise ValueError("a printed number is that of one difference")
    number = " - ".join(f"{of}{label}" for label in labels)
    return kind(text, metric, run, number, bounds, Fraction(str(at)), primary, None if paper is None else float(paper))
