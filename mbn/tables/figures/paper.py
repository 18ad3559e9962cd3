"""The paper's three figures."""

from matplotlib.figure import Figure

from mbn.methods import METHODS
from mbn.tables.cells import Table
from mbn.tables.figures.style import COLUMN, PAGE, Lines, curve, limit, look, make_panels, plot, styled, with_legend

NETWORK_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
NETWORK_MARKERS = ("o", "s", "^", "D")


def figure1(table: Table) -> Figure | None:
    """Test error over epochs of BN, BRN and MBN with one and with two forwards, ResNet-56."""
    lines = [(look(cell), curve(table, cell, "test_error")) for cell in table.grid.cells]
    return _errors(lines, "test error (%)", columns=3)


def figure2(table: Table) -> Figure | None:
    """Training error (thin) and test error (bold) over epochs of BN and MBN, a panel for each network."""
    figure, panels = make_panels(len(table.grid.rows), PAGE, 2.6)
    for panel, row in zip(panels, table.grid.rows, strict=True):
        lines = []
        for cell in table.grid.row(row):
            method = METHODS[cell.config(0).norm.name]
            line = "-" if method is METHODS["mbn"] else "--"
            for key, width, marker in (("train_error", 0.7, ""), ("test_error", 1.8, method.marker)):
                kind = "training" if key == "train_error" else "test"
                style = styled(f"{method.label}, {kind}", method.colour, marker, line, width=width)
                lines.append((style, curve(table, cell, key)))
        plot(panel, lines)
        limit(panel, lines, zero=True)
        panel.set(title=row, xlabel="epoch")
    panels[0].set_ylabel("error (%)")
    return with_legend(figure, panels)


def figure3(table: Table) -> Figure | None:
    """ImageNet: test error over epochs; solid MBN, dashed BN; a colour for each network."""
    lines = []
    networks = [row for row, overrides in table.grid.rows.items() if overrides is not None]
    for row, colour, marker in zip(networks, NETWORK_COLOURS, NETWORK_MARKERS, strict=True):
        for column in ("MBN", "BN"):
            style = styled(f"{row}, {column}", colour, marker, "-" if column == "MBN" else "--", column == "MBN")
            lines.append((style, curve(table, table.grid.cell(row, column), "test_error")))
    return _errors(lines, "top-1 test error (%)", columns=2)


def _errors(lines: Lines, ylabel: str, columns: int) -> Figure | None:
    figure, (panel,) = make_panels(1, COLUMN, 3.0)
    plot(panel, lines)
    limit(panel, lines)
    panel.set(xlabel="epoch", ylabel=ylabel)
    return with_legend(figure, [panel], columns)
