"""The tables as data: rows x columns of overrides, the paper's numbers, and its claims (scripts/grids/*.yaml)."""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from mbn.config import REPOSITORY, Config, checked, compose, groups, run_name
from mbn.system.errors import UserError

GRIDS = REPOSITORY / "scripts" / "grids"


@dataclass(frozen=True)
class Cell:
    """One cell of a table: what `train.py` is told for it, but for the seed and the scale.

    overrides: None where nothing is run (quoted numbers; methods that do not fit the network).
    paper: for each metric the number as printed, None for '-'.
    """

    grid: str
    row: str
    column: str
    overrides: tuple[str, ...] | None
    paper: dict[str, str | None] = field(hash=False)

    def command(self, seed: int, scale: float = 1.0, extra: tuple[str, ...] = ()) -> list[str]:
        """The overrides of one run of this cell; extra ones (machine and evaluate settings) come last."""
        if self.overrides is None:
            raise ValueError(f"{self.grid}: nothing is run for {self.row}, {self.column}")
        scaled = [f"schedule.scale={scale:g}"] if scale != 1 else []
        return [*self.overrides, *scaled, f"seed={seed}", *extra]

    def config(self, seed: int, scale: float = 1.0) -> Config:
        """What `load(self.command(seed, scale))` gives, composed once for all seeds and scales."""
        if self.overrides is None:
            raise ValueError(f"{self.grid}: nothing is run for {self.row}, {self.column}")
        # Sorted: the same overrides in another order are the same run (no key stands twice in a cell).
        config = _composed(tuple(sorted(self.overrides)))
        return replace(config, seed=seed, schedule=replace(config.schedule, scale=scale))

    def name(self, seed: int, scale: float = 1.0) -> str:
        return run_name(self.config(seed, scale))

    def baseline(self) -> "Cell":
        """The cell of batch norm with one forward on the same network, data and schedule."""
        if self.overrides is None:
            raise ValueError(f"{self.grid}: nothing is run for {self.row}, {self.column}")
        kept = [o for o in self.overrides if not o.startswith(("norm=", "norm.", "forwards=", "model.dropout="))]
        return Cell(self.grid, self.row, self.column, (*kept, "norm=bn"), {})


@cache
def _composed(overrides: tuple[str, ...]) -> Config:
    """What `load` gives. Hydra takes 0.1 s or more, so that only the choices of groups, which cells share, go to it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    chosen = tuple(o for o in overrides if o.partition("=")[0] in groups())
    config = deepcopy(_chosen(chosen))
    for override in OverridesParser.create().parse_overrides([o for o in overrides if o not in chosen]):
        OmegaConf.update(config, override.key_or_group, override.value())
    return checked(config)


@cache
def _chosen(options: tuple[str, ...]) -> DictConfig:
    return compose(list(options))


@dataclass(frozen=True)
class Grid:
    """A table; the fields are the keys of its YAML, `own` being `cells`, what one cell has of its own.

    shown: its `metrics`, the fields of a record that it shows where the paper prints none.
    """

    name: str
    title: str
    about: str
    rows: dict[str, list[str] | None]
    columns: dict[str, list[str]]
    base: list[str]
    own: dict[str, list[str]]
    absent: list[str]
    paper: dict[str, dict[str, list[str | None]]]
    claims: list[dict[str, Any]]
    notes: list[str]
    shown: list[str]

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
    """Read a grid. Errors: UserError where there is none of that name."""
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"there is no table {name!r}: choose among {', '.join(names(folder))}, or all.")
    content = yaml.safe_load(path.read_text())
    return Grid(
        name=name,
        title=content["title"],
        about=content["about"],
        rows=content["rows"],
        columns=content["columns"],
        base=content["base"],
        own=content.get("cells", {}),
        absent=content.get("absent", []),
        paper=content.get("paper", {}),
        claims=content.get("claims", []),
        notes=content.get("notes", []),
        shown=content.get("metrics", ["test_error"]),
    )
