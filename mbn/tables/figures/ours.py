"""Our figures of errors and curves, beyond the paper's: batch sizes, and what happens during training."""

import statistics
from collections.abc import Sequence
from math import log2

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from mbn.methods import METHODS
from mbn.tables.cells import Table
from mbn.tables.figures.style import (
    GREY,
    PAGE,
    Lines,
    limit,
    look,
    make_panels,
    over_training,
    plot,
    styled,
    with_legend,
)

# Of an error that is so many times the median of its batch size only an arrow and the number are shown.
FAR = 1.5
# Methods stand beside each other at one batch size, in a band so many octaves wide.
BAND = 0.3
OVER_TRAINING = "share of training (%)"


def batch_size(tables: Sequence[Table], paper: Table) -> Figure | None:
    """Test error against batch size, a panel for each network: means over seeds, bars of one standard deviation.

    paper: the table whose printed numbers are drawn in grey, in the panel of the network that they belong to.
    """
    found = [(table, _by_size(table), _printed(paper, table)) for table in tables if table.has_runs]
    # Of a table may all runs have diverged, and the paper may print nothing there.
    drawn = [(table, ours, theirs) for table, ours, theirs in found if any(points for _, points in ours + theirs)]
    if not drawn:
        return None
    sizes = [sorted({x for _, points in ours + theirs for x, _ in points}) for _, ours, theirs in drawn]
    widths = [len(some) + 0.5 for some in sizes]
    figure, panels = make_panels(len(drawn), PAGE, 3.0, sharey=True, width_ratios=widths)
    lines = [_beside(ours) + theirs for _, ours, theirs in drawn]
    for panel, (table, *_), of_panel, some in zip(panels, drawn, lines, sizes, strict=True):
        plot(panel, of_panel, sparse=True)
        panel.set_xscale("log", base=2)
        panel.set_xticks(some, [f"{size:g}" for size in some])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlim(min(some) * 0.7, max(some) / 0.7)
        panel.set(title=table.grid.title.rpartition(", ")[2], xlabel="batch size")
    _without_far_points(panels, lines)
    panels[0].set_ylabel("test error (%)")
    return with_legend(figure, panels, columns=5)


def _by_size(table: Table) -> Lines:
    """The test errors of each column's method, over the batch size of the rows."""
    lines: Lines = []
    for column in table.grid.columns:
        cells = [table.grid.cell(row, column) for row in table.grid.rows]
        found = [(c.config(0).batch_size, table.values(c, "test_error")) for c in cells]
        lines.append((look(cells[0]), [(float(b), list(v.values())) for b, v in found if v]))
    return lines


def _printed(paper: Table, table: Table) -> Lines:
    """The paper's errors over the batch size, for those of its runs that are in the table too."""
    runs = {cell.name(0) for cell in table.grid.cells}
    lines: Lines = []
    for column in paper.grid.columns:
        cells = [paper.grid.cell(row, column) for row in paper.grid.rows]
        numbers = [(float(c.config(0).batch_size), c.paper.get("test_error")) for c in cells if c.name(0) in runs]
        config = cells[0].config(0)
        line, marker = "-" if config.forwards == 2 else "--", METHODS[config.norm.name].marker
        style = styled(f"{column}, paper", GREY, marker, line, filled=False, width=0.9)
        lines.append((style, [(size, [float(number)]) for size, number in numbers if number is not None]))
    return lines


def _beside(lines: Lines) -> Lines:
    """The lines that have points, moved a little: at one batch size they stand beside each other."""
    drawn = [(style, points) for style, points in lines if points]
    shift = [2 ** (BAND * ((i + 0.5) / len(drawn) - 0.5)) for i in range(len(drawn))]
    return [(style, [(x * s, ys) for x, ys in points]) for (style, points), s in zip(drawn, shift, strict=True)]


def _without_far_points(panels: Sequence[Axes], lines: Sequence[Lines]) -> None:
    """Limit the common y axis to the points that are not far above the others; an arrow shows where one of those is."""
    found = [
        (panel, style, x, statistics.fmean(ys))
        for panel, of_panel in zip(panels, lines, strict=True)
        for style, points in of_panel
        for x, ys in points
    ]
    at_size: dict[int, list[float]] = {}
    for _, _, x, mean in found:
        at_size.setdefault(round(log2(x)), []).append(mean)
    far = [one for one in found if one[3] > FAR * statistics.median(at_size[round(log2(one[2]))])]
    near = [one[3] for one in found if one not in far]
    room = 0.08 * max(max(near) - min(near), 1)
    top = max(near) + 2 * room
    panels[0].set_ylim(min(near) - 1.5 * room, top)
    for i, (panel, style, x, mean) in enumerate(far):
        beside = sum(panel is other and round(log2(x)) == round(log2(at)) for other, _, at, _ in far[:i])
        y = top - (0.5 + 0.7 * beside) * room
        text = f"{style['label']} {mean:.1f} ↑"
        panel.annotate(text, (x, y), ha="right", va="center", fontsize=7, color=style["color"], weight="bold")


def gap(table: Table) -> Figure | None:
    """The distance between training's and evaluation's statistics over training, at the smallest and largest batch.

    The means over layers and channels of |mu^ - mu_test| / sigma_test and of |log(sigma^ / sigma_test)|. The batch
    sizes are those at which several methods have run, if there are any, else those at which one has.
    """
    kinds = {"gap_mean": "gap of means (in σ)", "gap_std": "gap of log σ"}
    methods = {row: sum(bool(points) for _, points in over_training(table, row, "gap_mean")) for row in table.grid.rows}
    run = [row for row, n in methods.items() if n >= min(2, max(methods.values())) and n]
    if not run:
        return None
    rows = list(dict.fromkeys((run[0], run[-1])))
    shared = {"sharex": True, "sharey": "row"} if len(rows) > 1 else {}
    figure, panels = make_panels(2 * len(rows), PAGE, 2.4 * len(rows), rows=len(rows), **shared)
    places = [(key, row) for key in kinds for row in rows]
    for panel, (key, row) in zip(panels, places, strict=True):
        plot(panel, over_training(table, row, key))
        _changes(panel, table, row)
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.set_title(f"{kinds[key]}: {table.grid.title.rpartition(', ')[2]}, batch {row}")
    for panel in panels[-2:]:
        panel.set_xlabel(OVER_TRAINING)
    return with_legend(figure, panels)


def _changes(panel: Axes, table: Table, row: str) -> list[float]:
    """Draw where the learning rate and lambda change, and return these shares of training."""
    changes = [100 * share for share in table.grid.row(row)[0].config(0).schedule.milestones]
    for change in changes:
        panel.axvline(change, color=GREY, linestyle=":", linewidth=0.9, label="learning rate and λ change")
    return changes


def training(table: Table, row: str) -> Figure | None:
    """One row of the gradients' table: training loss, test error and weight norm over training.

    Below: the part after the last change of the learning rate, at its own scale.
    """
    keys = {"loss": "training loss", "test_error": "test error (%)", "weight_norm": "norm of all weights"}
    lines = {key: over_training(table, row, key) for key in keys}
    if not any(points for of_panel in lines.values() for _, points in of_panel):
        return None
    figure, panels = make_panels(2 * len(keys), PAGE, 4.8, rows=2)
    for whole, late, (key, name) in zip(panels[:3], panels[3:], keys.items(), strict=True):
        plot(whole, lines[key])
        limit(whole, lines[key], zero=key == "loss")
        changes = _changes(whole, table, row)
        end = [(style, [(x, ys) for x, ys in points if x >= changes[-1]]) for style, points in lines[key]]
        plot(late, end)
        late.set_xlim(changes[-1] - 1, 101)
        whole.set(title=name, xlabel=OVER_TRAINING)
        late.set(title=f"{name}, last {100 - changes[-1]:g} %", xlabel=OVER_TRAINING)
    return with_legend(figure, panels, columns=3)
