"""The figures, drawn from the curves and results that records carry: three of the paper's, and ours."""

import io
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from mbn import grid
from mbn.grid import Cell
from mbn.methods import MBN, METHODS
from mbn.system.files import write_atomically
from mbn.tables.cells import BATCH_SIZES, Records, Table, file_name

# Width of one column of a two-column paper, in inches; and of both.
COLUMN, PAGE = 3.3, 6.9
NETWORK_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
NETWORK_MARKERS = ("o", "s", "^", "D")
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


def draw(records: Records, scale: float = 1.0, seeds: int = 5) -> dict[str, Figure | None]:
    """Every figure by its name; None where no record has data for it."""

    def read(name: str) -> Table:
        return Table(grid.read(name), records, seeds, scale)

    with matplotlib.rc_context(STYLE):
        return {
            "figure1": figure1(read("figure1")),
            "figure2": figure2(read("figure2")),
            "figure3": figure3(read("table3")),
            "batch-size": batch_size([read(name) for name in BATCH_SIZES]),
            "training-resnet20": training(read("gradient"), "ResNet-20, batch 8"),
            "training-resnet56": training(read("gradient"), "ResNet-56, batch 8"),
            "gap-resnet20": gap(read("table4-resnet20")),
            "gap-resnet56": gap(read("table4-methods")),
        }


def write(figures: dict[str, Figure | None], folder: Path, scale: float = 1.0) -> list[Path]:
    """Write PNG and SVG of each figure that there is. The same figure gives the same bytes."""
    written = []
    with matplotlib.rc_context(STYLE):
        for name, figure in figures.items():
            if figure is None:
                continue
            if scale != 1:
                figure.suptitle(f"{scale:g} of the paper's length", fontsize=7, x=0.01, ha="left", style="italic")
            for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                file = io.BytesIO()
                figure.savefig(file, format=kind, metadata=metadata)
                path = folder / f"{file_name(name, scale)}.{kind}"
                write_atomically(path, file.getvalue())
                written.append(path)
    return written


# The paper's.


def figure1(table: Table) -> Figure | None:
    """Test error over epochs of BN, BRN and MBN with one and with two forwards, ResNet-56."""
    lines = [(look(cell), _curve(table, cell, "test_error")) for cell in table.grid.cells]
    return _errors(lines, "test error (%)", columns=3)


def figure2(table: Table) -> Figure | None:
    """Training error (thin) and test error (bold) over epochs of BN and MBN, a panel for each network."""
    figure, panels = _panels(len(table.grid.rows), PAGE, 2.6)
    for panel, row in zip(panels, table.grid.rows, strict=True):
        lines = []
        for cell in table.grid.row(row):
            method = METHODS[cell.config(0).norm.name]
            line = "-" if method is METHODS["mbn"] else "--"
            for key, width, marker in (("train_error", 0.7, ""), ("test_error", 1.8, method.marker)):
                kind = "training" if key == "train_error" else "test"
                style = styled(f"{method.label}, {kind}", method.colour, marker, line, width=width)
                lines.append((style, _curve(table, cell, key)))
        _plot(panel, lines)
        _limit(panel, lines, zero=True)
        panel.set(title=row, xlabel="epoch")
    panels[0].set_ylabel("error (%)")
    return _with_legend(figure, panels)


def figure3(table: Table) -> Figure | None:
    """ImageNet: test error over epochs; solid MBN, dashed BN; a colour for each network."""
    lines = []
    networks = [row for row, overrides in table.grid.rows.items() if overrides is not None]
    for row, colour, marker in zip(networks, NETWORK_COLOURS, NETWORK_MARKERS, strict=True):
        for column in ("MBN", "BN"):
            style = styled(f"{row}, {column}", colour, marker, "-" if column == "MBN" else "--", column == "MBN")
            lines.append((style, _curve(table, table.grid.cell(row, column), "test_error")))
    return _errors(lines, "top-1 test error (%)", columns=2)


def _errors(lines: Lines, ylabel: str, columns: int) -> Figure | None:
    figure, (panel,) = _panels(1, COLUMN, 3.0)
    _plot(panel, lines)
    _limit(panel, lines)
    panel.set(xlabel="epoch", ylabel=ylabel)
    return _with_legend(figure, [panel], columns)


# Ours.


def batch_size(tables: Sequence[Table]) -> Figure | None:
    """Test error against batch size for each method: mean over seeds, and a bar of one standard deviation."""
    drawn = [table for table in tables if table.has_runs]
    if not drawn:
        return None
    figure, panels = _panels(len(drawn), COLUMN if len(drawn) == 1 else PAGE, 3.0)
    for panel, table in zip(panels, drawn, strict=True):
        lines = []
        for column in table.grid.columns:
            cells = [table.grid.cell(row, column) for row in table.grid.rows]
            found = [(c.config(0).batch_size, table.values(c, "test_error")) for c in cells]
            lines.append((look(cells[0]), [(float(b), list(v.values())) for b, v in found if v]))
        _plot(panel, lines, sparse=True)
        sizes = [table.grid.cell(row, column).config(0).batch_size for row in table.grid.rows]
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.set_xlim(min(sizes) * 0.85, max(sizes) * 1.18)
        panel.set(title=table.grid.title.rpartition(", ")[2], xlabel="batch size")
    panels[0].set_ylabel("test error (%)")
    return _with_legend(figure, panels)


def gap(table: Table) -> Figure | None:
    """The distance between training's and evaluation's statistics, over training, at the smallest and largest batch.

    The means over layers and channels of |mu^ - mu_test| / sigma_test and of |log(sigma^ / sigma_test)|.
    """
    first, *_, last = table.grid.rows
    kinds = {"gap_mean": "gap of the mean (σ)", "gap_std": "gap of log σ"}
    figure, panels = _panels(4, PAGE, 4.4, rows=2, sharex=True, sharey="row")
    for panel, (key, row) in zip(panels, product(kinds, (first, last)), strict=True):
        _plot(panel, _over_training(table, row, key))
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        panel.yaxis.set_minor_locator(NullLocator())
    for left, name in zip(panels[::2], kinds.values(), strict=True):
        left.set_ylabel(name)
    for top, bottom, row in zip(panels[:2], panels[2:], (first, last), strict=True):
        top.set_title(f"{table.grid.title.rpartition(', ')[2]}, batch {row}")
        bottom.set_xlabel("share of training (%)")
    return _with_legend(figure, panels)


def training(table: Table, row: str) -> Figure | None:
    """One row of the gradients' table: training loss, test error and weight norm over training.

    Dotted: where learning rate and lambda change.
    """
    keys = {"loss": "training loss", "test_error": "test error (%)", "weight_norm": "norm of all weights"}
    figure, panels = _panels(len(keys), PAGE, 2.7)
    for panel, (key, name) in zip(panels, keys.items(), strict=True):
        lines = _over_training(table, row, key)
        _plot(panel, lines)
        _limit(panel, lines, zero=key == "loss")
        for milestone in table.grid.row(row)[0].config(0).schedule.milestones:
            panel.axvline(100 * milestone, color="#888888", linestyle=":", linewidth=0.8)
        panel.set(title=name, xlabel="share of training (%)")
    return _with_legend(figure, panels, columns=3)


# Parts.


def _panels(n: int, width: float, height: float, rows: int = 1, **shared: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, n // rows, squeeze=False, **shared).flat)


def _over_training(table: Table, row: str, key: str) -> Lines:
    """A curve of each cell of a row, over the share of training."""
    return [(look(cell), _curve(table, cell, key, of_training=True)) for cell in table.grid.row(row)]


def _curve(table: Table, cell: Cell, key: str, of_training: bool = False) -> Points:
    """A curve of a cell: (x, one value for each seed) at the points that the records of all seeds have.

    key: a curve with one point per epoch, or "loss" or "error" for the finer ones of training. x: images seen, in
    epochs, or in percent of training. Empty where nothing has run.
    """
    found: list[dict[float, float]] = []
    for one in table.runs(cell).values():
        unit = one["images"] / 100 if of_training else one["config"]["dataset"]["train_images"]
        curves = one["curves"].get("training", {}) if key in ("loss", "error") else one["curves"]
        images, numbers = curves.get("images", []), curves.get(key, [])
        found.append({i / unit: y for i, y in zip(images, numbers, strict=False)})
    common = sorted(set.intersection(*map(set, found))) if found else []
    return [(x, [f[x] for f in found]) for x in common]


def _plot(panel: Axes, lines: Lines, sparse: bool = False) -> None:
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


def _limit(panel: Axes, lines: Lines, zero: bool = False) -> None:
    """Limit the y axis to what differs, not the first fifth of training: there every error falls from near chance."""
    late = [statistics.fmean(ys) for _, points in lines for _, ys in points[len(points) // 5 :]]
    if not late:
        return
    top, bottom = max(late) * 1.05, 0.0 if zero else min(late) * 0.9
    panel.set_ylim(bottom, max(top, bottom + 1))


def _with_legend(figure: Figure, panels: list[Axes], columns: int = 7) -> Figure | None:
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
