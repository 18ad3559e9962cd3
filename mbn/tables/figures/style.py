"""How lines and panels look, the same in all figures."""

import statistics
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mbn.grid import Cell
from mbn.methods import MBN, METHODS
from mbn.records.record import diverged
from mbn.tables.cells import Table

# Width of one column of a two-column paper, in inches; and of both.
COLUMN, PAGE = 3.3, 6.9
# Of what the paper prints, and of text and lines that should not be seen first.
GREY, PALE = "#777777", "#AAAAAA"
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same glyphs on every machine
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "lines.markersize": 4,
    "svg.hashsalt": "mbn",  # else the names of clip paths differ from one drawing to the next
    "savefig.dpi": 200,
    "savefig.facecolor": "white",  # also on a dark page
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
}

# How a line is drawn and what the legend calls it, as matplotlib's settings.
Look = dict[str, Any]
Points = list[tuple[float, list[float]]]
Lines = list[tuple[Look, Points]]


def styled(label: str, colour: str, marker: str, line: str, filled: bool = True, width: float = 1.3) -> Look:
    return {
        "label": label,
        "color": colour,
        "marker": marker,
        "linestyle": line,
        "linewidth": width,
        "markerfacecolor": colour if filled else "white",
        "markeredgecolor": colour,
        "markeredgewidth": 0.9,
    }


def look(cell: Cell) -> Look:
    """Colour and marker say the method; solid and filled mean two forwards, dashed and hollow one."""
    config = cell.config(0)
    method, two = METHODS[config.norm.name], config.forwards == 2
    if not method.statistics:  # one forward only: no number is shown
        return styled(method.label, method.colour, method.marker, ":")
    label, colour, marker = f"{method.label}-{config.forwards}", method.colour, method.marker
    if isinstance(config.norm, MBN) and config.norm.gradient == "batch":
        label, colour, marker = f"{label}, gradient batch", "#56B4E9", "P"
    return styled(label, colour, marker, "-" if two else "--", two)


def make_panels(n: int, width: float, height: float, rows: int = 1, **shared: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, n // rows, squeeze=False, **shared).flat)


def over_training(table: Table, row: str, key: str) -> Lines:
    """A curve of each cell of a row, over the share of training."""
    return [(look(cell), curve(table, cell, key, of_training=True)) for cell in table.grid.row(row)]


def curve(table: Table, cell: Cell, key: str, of_training: bool = False) -> Points:
    """A curve of a cell: (x, one value for each seed) at the points that all seeds have whose records have this curve;
    those that diverged are left out.

    key: a curve with one point per epoch, or "loss" or "error" for the finer ones of training. x: images seen, in
    epochs, or in percent of training. Empty where nothing has run.
    """
    found: list[dict[float, float]] = []
    for one in (one for one in table.runs(cell).values() if not diverged(one)):
        unit = one["images"] / 100 if of_training else one["config"]["dataset"]["train_images"]
        curves = one["curves"].get("training", {}) if key in ("loss", "error") else one["curves"]
        images, numbers = curves.get("images", []), curves.get(key, [])
        found.append({i / unit: y for i, y in zip(images, numbers, strict=False)})
    found = [one for one in found if one]
    common = sorted(set.intersection(*map(set, found))) if found else []
    return [(x, [f[x] for f in found]) for x in common]


def plot(panel: Axes, lines: Lines, sparse: bool = False) -> None:
    """Draw means, and bands of one standard deviation where there are several seeds.

    sparse: for a few points, which may have different numbers of seeds: a marker at every one, and a bar instead of a
    band. Otherwise each line has about eight markers, at different places than the other lines.
    """
    drawn = [(style, points) for style, points in lines if points]
    for i, (style, points) in enumerate(drawn):
        xs = [x for x, _ in points]
        means = [statistics.fmean(ys) for _, ys in points]
        step = 1 if sparse else max(1, len(xs) // 8)
        panel.plot(xs, means, markevery=(i * step // len(drawn), step), **style)
        spread = [(x, m, statistics.stdev(ys)) for (x, ys), m in zip(points, means, strict=True) if len(ys) > 1]
        if not spread:
            continue
        at, middle, sds = zip(*spread, strict=True)
        low, high = ([m + sign * sd for m, sd in zip(middle, sds, strict=True)] for sign in (-1, 1))
        if sparse:
            panel.vlines(at, low, high, color=style["color"], linewidth=0.9)
        else:
            panel.fill_between(at, low, high, color=style["color"], alpha=0.15, linewidth=0)


def limit(panel: Axes, lines: Lines, zero: bool = False) -> None:
    """Limit the y axis to what differs, not the first fifth of training: there every error falls from near chance."""
    late = [statistics.fmean(ys) for _, points in lines for _, ys in points[len(points) // 5 :]]
    if not late:
        return
    top, bottom = max(late) * 1.05, 0.0 if zero else min(late) * 0.9
    panel.set_ylim(bottom, max(top, bottom + 1))


def with_legend(figure: Figure, panels: list[Axes], columns: int = 7) -> Figure | None:
    """Add one legend for all panels, each label once; None where no line is drawn."""
    shown: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    if not shown:
        return None
    columns = min(columns, len(shown))
    figure.legend(list(shown.values()), shown, loc="outside lower center", ncols=columns, handlelength=2.8)
    return figure
