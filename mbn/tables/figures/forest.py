"""The forest plot: every claim at every place, what the paper prints and what the runs say."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.transforms import blended_transform_factory

from mbn.tables.cells import heading
from mbn.tables.claims import OPEN
from mbn.tables.figures.style import GREY, PAGE, PALE
from mbn.tables.places import Place

# The axis ends here on both sides, in percentage points; beyond it an arrow and the number.
LIMIT = 5.0
OURS, HOLDS_HERE = "#0072B2", "#E3EFF7"
ON_WHITE = {"facecolor": "white", "linewidth": 0, "pad": 0.8}
# In inches: a line's height, the space above and below all lines, and where columns begin or (the last two) end.
LINE, ABOVE, BELOW = 0.165, 0.34, 0.72
LABELS, PLOT, PLOT_ENDS, PAPER, HERE = 0.1, 2.58, 4.56, 4.98, PAGE - 0.1

# A heading, a place, or several places of one claim that have nothing to show yet.
Line = str | Place | list[Place]


def forest(places: Sequence[Place], primary: Sequence[Place] = ()) -> Figure:
    """primary: the primary claims, which stand first, over all their places."""
    heads: list[Line] = ["Primary claims, each at all its places that have run", *primary] if primary else []
    lines = heads + _lines(places)
    height = ABOVE + LINE * len(lines) + BELOW
    figure = Figure(figsize=(PAGE, height))
    panel = figure.add_axes(
        (PLOT / PAGE, BELOW / height, (PLOT_ENDS - PLOT) / PAGE, LINE * len(lines) / height),
        xlim=(-LIMIT, LIMIT),
        ylim=(len(lines) - 0.5, -0.5),
        yticks=[],
        xlabel="difference of errors (percentage points)",
    )
    panel.spines["left"].set_visible(False)
    panel.axvline(0, color="black", linewidth=0.8, zorder=1.5)
    for y, line in enumerate(lines):
        if isinstance(line, str):
            _text(panel, LABELS, y, line, weight="bold", bbox=ON_WHITE)
        elif isinstance(line, Place):
            _place(panel, y, line)
        else:
            _empty(panel, y, line)
    _text(panel, PAPER, -1, "paper", ha="right", color=GREY)
    _text(panel, HERE, -1, "here [95 % interval], n", ha="right", color=OURS)
    panel.text(-0.15, -1, "◀ first is better", ha="right", va="center", fontsize=7)
    panel.text(0.15, -1, "second is better ▶", ha="left", va="center", fontsize=7)
    _legend(figure)
    return figure


def _lines(places: Sequence[Place]) -> list[Line]:
    """By table under its heading. Places of a claim with neither a run nor a number of the paper share a line."""
    claims: dict[tuple[str, str], list[Place]] = {}
    for place in places:
        claims.setdefault((place.table.grid.name, place.number), []).append(place)
    lines: list[Line] = []
    last = ""
    for (name, _), of_claim in claims.items():
        if name != last:
            lines.append(f"{heading(name)}: {of_claim[0].table.grid.title}")
        last = name
        empty: dict[str, list[Place]] = {}
        for place in of_claim:
            if not place.has_run and place.paper is None:
                empty.setdefault(_why(place), []).append(place)
        together = [of for of in empty.values() if len(of) > 1]
        lines += [place for place in of_claim if not any(place in of for of in together)]
        lines += together
    return lines


def _place(panel: Axes, y: int, place: Place) -> None:
    """One line: its label, the paper's mark, our mean with its interval, and both as numbers."""
    found = place.verdict.number
    colour = "black" if place.has_run else GREY
    _shade(panel, y, place)
    _text(panel, LABELS, y, signs(place.label), color=colour)
    if not place.has_run:
        panel.axhline(y, color="#DDDDDD", linewidth=0.7, zorder=1)
        _text(panel, HERE, y, _why(place), ha="right", color=PALE)
    if place.paper is not None:
        marker = "X" if place.verdict.excluded else "s"
        _mark(panel, y, place.paper, marker, GREY, filled=False, alone=not place.has_run)
        _text(panel, PAPER, y, signs(f"{place.paper:+.2f}"), ha="right", color=GREY)
    if found.mean is not None:
        bar = _interval(panel, y, found.interval())
        alone = place.paper is None and not bar
        marker = "D" if place.joint else "o"
        _mark(panel, y, found.mean, marker, OURS, filled=place.verdict.outcome != OPEN, alone=alone)
        _text(panel, HERE, y, signs(str(found)), ha="right", color=OURS)


def _why(place: Place) -> str:
    """Why a place has no number."""
    return "no interval yet" if place.begun else "diverges" if place.verdict.diverges else "not run"


def _empty(panel: Axes, y: int, places: list[Place]) -> None:
    """One pale line for the places of a claim of which there is nothing to show."""
    _shade(panel, y, places[0])
    panel.axhline(y, color="#DDDDDD", linewidth=0.7, zorder=1)
    _text(panel, LABELS, y, signs(places[0].number), color=PALE)
    _text(panel, HERE, y, f"{_together(places)}: {_why(places[0])}", ha="right", color=PALE, bbox=ON_WHITE)


def _together(places: list[Place]) -> str:
    """Examples: batch 16, 32, 64; ResNet-20, VGG; 3 places, where their names are too long."""
    where = [place.where for place in places]
    if all(text.startswith("batch ") for text in where):
        where[1:] = [text.removeprefix("batch ") for text in where[1:]]
    text = ", ".join(where)
    return text if len(text) <= 30 and len(text.split(", ")) == len(where) else f"{len(places)} places"


def _shade(panel: Axes, y: int, place: Place) -> None:
    """Where the claim holds."""
    low, high = (min(max(bound, -LIMIT), LIMIT) for bound in place.claim.bounds)
    panel.add_patch(Rectangle((low, y - 0.5), high - low, 1, color=HOLDS_HERE, linewidth=0, zorder=0.5))


def _mark(panel: Axes, y: int, x: float, marker: str, colour: str, filled: bool, alone: bool) -> None:
    """A mark at x; beyond the limit an arrow at the edge, and beside it the number, where the mark is alone."""
    look: Any = {"color": colour, "markerfacecolor": colour if filled else "white", "markersize": 4.5, "clip_on": False}
    if abs(x) <= LIMIT:
        panel.plot([x], [y], marker=marker, zorder=3, **look)
        return
    side, arrow, ha = (1, ">", "right") if x > 0 else (-1, "<", "left")
    panel.plot([side * LIMIT], [y], marker=arrow, zorder=3, **look)
    if alone:
        text = signs(f"{x:+.2f}")
        panel.text(side * (LIMIT - 0.3), y, text, ha=ha, va="center", fontsize=7, color=colour)


def _interval(panel: Axes, y: int, interval: tuple[float, float] | None) -> bool:
    """A bar over the interval, an end beyond the limit an arrow; whether a part of it lies within the limits."""
    if interval is None or interval[1] < -LIMIT or interval[0] > LIMIT:
        return False
    low, high = interval
    panel.plot([max(low, -LIMIT), min(high, LIMIT)], [y, y], color=OURS, linewidth=1.3, zorder=2.5)
    for beyond, at, marker in ((low < -LIMIT, -LIMIT, "<"), (high > LIMIT, LIMIT, ">")):
        if beyond:
            panel.plot([at], [y], marker=marker, color=OURS, markersize=4.5, clip_on=False)
    return True


def _text(panel: Axes, inches: float, y: float, text: str, ha: str = "left", **style: Any) -> None:
    """Text of a line, that begins (or ends) so many inches from the left."""
    at = blended_transform_factory(panel.figure.transFigure, panel.transData)
    panel.text(inches / PAGE, y, text, transform=at, ha=ha, va="center", fontsize=7, **style)


def signs(text: str) -> str:
    """A text with minus signs where it has hyphens for them."""
    words = text.split(" ")
    return " ".join("−" + w[1:] if w == "-" or w[:1] == "-" else w.replace("[-", "[−") for w in words)


def _legend(figure: Figure) -> None:
    def mark(marker: str, colour: str = OURS, filled: bool = True, line: float = 1.3) -> Line2D:
        face = colour if filled else "white"
        return Line2D([], [], color=colour, marker=marker, markersize=4.5, markerfacecolor=face, linewidth=line)

    shown: dict[str, Any] = {
        "here, decided": mark("o"),
        "undecided": mark("o", filled=False),
        "places together": (mark("D", line=0), mark("D", filled=False, line=0)),
        "paper": mark("s", GREY, filled=False, line=0),
        "paper, excluded": mark("X", GREY, filled=False, line=0),
        "the claim holds": Patch(color=HOLDS_HERE, linewidth=0),
    }
    pairs = {tuple: HandlerTuple(ndivide=None)}
    figure.legend(
        list(shown.values()),
        list(shown),
        loc="lower center",
        ncols=6,
        columnspacing=1.2,
        borderaxespad=0.3,
        handler_map=pairs,
    )
