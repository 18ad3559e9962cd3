"""The status grid: of each cell of each table how many of its seeds have run, and what the rest would take."""

import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mbn.launch.table_status import TIME_LEFT, RunCounts, union
from mbn.tables.cells import Table, heading
from mbn.tables.figures.style import GREY, PAGE, PALE

DONE = "#0072B2"
# The side of a cell in inches. All other lengths are in cells: the picture's width, the place for a table, a letter of
# a name, and a line of text.
CELL = 0.165
WIDE = PAGE / CELL
ABREAST = 3
PLACE, LETTER, TEXT = (WIDE - 1) / ABREAST, 0.35, 0.85
# Letters in a line above a table.
LETTERS_A_LINE = 40


def status_grid(tables: Sequence[Table]) -> Figure:
    """Tables side by side and below each other, with the names of their rows and columns."""
    shelves = [tables[i : i + ABREAST] for i in range(0, len(tables), ABREAST)]
    heights = [max(_head(table) + len(table.grid.rows) + 1.3 for table in shelf) for shelf in shelves]
    tall = sum(heights) + 3.4
    figure = Figure(figsize=(PAGE, tall * CELL))
    panel = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDE), ylim=(tall, 0))
    panel.axis("off")
    whole = union(table.status.whole for table in tables)
    _write(panel, 0.5, 1, f"All tables, each run once: {_sentence(whole)}", weight="bold")
    _write(
        panel,
        0.5,
        1 + TEXT,
        "The number in a cell: how many of its seeds have a record; grey where all of these diverged.",
        color=GREY,
    )
    _write(panel, 0.5, 1 + 2 * TEXT, TIME_LEFT, color=GREY)
    top = 4.0
    for shelf, height in zip(shelves, heights, strict=True):
        for i, table in enumerate(shelf):
            _table(panel, 0.5 + i * PLACE, top, table)
        top += height
    return figure


def _head(table: Table) -> float:
    """The height of what stands above the cells."""
    return TEXT * (1 + len(_lines(table))) + LETTER * max(map(len, _columns(table))) + 0.3


def _columns(table: Table) -> list[str]:
    """The columns' names, except the name of one that stands alone: the title has it."""
    return list(table.grid.columns) if len(table.grid.columns) > 1 else [""]


def _lines(table: Table) -> list[tuple[str, str]]:
    """The lines below the heading, each with its colour."""
    parts = ((table.grid.title, "black"), (_sentence(table.status.whole), GREY))
    return [(line, colour) for text, colour in parts for line in textwrap.wrap(text, LETTERS_A_LINE)]


def _table(panel: Axes, left: float, top: float, table: Table) -> None:
    _write(panel, left, top, heading(table.grid.name), weight="bold")
    for i, (line, colour) in enumerate(_lines(table), 1):
        _write(panel, left, top + i * TEXT, line, color=colour)
    x0, y0 = left + LETTER * max(map(len, table.grid.rows)) + 0.3, top + _head(table)
    for j, column in enumerate(_columns(table)):
        _write(panel, x0 + j + 0.5, y0 - 0.3, column, ha="center", va="bottom", rotation=90)
    for i, row in enumerate(table.grid.rows):
        _write(panel, x0 - 0.3, y0 + i + 0.5, row, ha="right")
        for j, cell in enumerate(table.grid.row(row)):
            colour = GREY if table.all_runs.diverge(cell) else DONE
            _cell(panel, x0 + j, y0 + i, table.status.cells[cell], colour)


def _cell(panel: Axes, x: float, y: float, runs: RunCounts, darkest: str) -> None:
    """The darker, the more seeds have run."""
    if not runs.wanted:
        _write(panel, x + 0.5, y + 0.5, "–", ha="center", color=PALE)
        return
    share = runs.done / len(runs.wanted)
    colour = [1 - share * (1 - part) for part in to_rgb(darkest)]
    panel.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor=PALE, linewidth=0.6))
    if runs.done:
        _write(panel, x + 0.5, y + 0.52, str(runs.done), ha="center", color="white" if share > 0.5 else "black")


def _sentence(runs: RunCounts) -> str:
    """Example: 7 of 50 runs; left: 639 h."""
    return f"{runs.done} of {len(runs.wanted)} runs; left: {runs.left()}"


def _write(panel: Axes, x: float, y: float, text: str, **style: Any) -> None:
    style.setdefault("va", "center")
    panel.text(x, y, text, fontsize=7, **style)
