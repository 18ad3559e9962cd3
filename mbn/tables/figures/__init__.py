"""The figures, drawn from what records carry: an overview of all tables, three of the paper's figures, and ours."""

import io
import re

import matplotlib
from matplotlib.figure import Figure

from mbn.tables.cells import BATCH_SIZES, Records, file_name, read_tables
from mbn.tables.figures import ours, paper
from mbn.tables.figures.forest import forest
from mbn.tables.figures.status_grid import status_grid
from mbn.tables.figures.style import STYLE
from mbn.tables.over_seeds import SEEDS
from mbn.tables.places import in_short, places, primary


def draw(records: Records, scale: float = 1.0, seeds: int = SEEDS) -> dict[str, Figure | None]:
    """Every figure by its name; None where no record has data for it."""
    tables = read_tables(records, seeds=seeds, scale=scale)
    claims, first, any_runs = places(tables), primary(tables), any(table.has_runs for table in tables.values())
    with matplotlib.rc_context(STYLE):
        return {
            "claims": forest(claims, first) if any_runs else None,
            "claims-short": forest(in_short(claims), first) if any_runs else None,
            "status": status_grid([*tables.values()]) if any_runs else None,
            "figure1": paper.figure1(tables["figure1"]),
            "figure2": paper.figure2(tables["figure2"]),
            "figure3": paper.figure3(tables["table3"]),
            "batch-size": ours.batch_size([tables[name] for name in BATCH_SIZES], tables["table4"]),
            "training-resnet20": ours.training(tables["gradient"], "ResNet-20, batch 8"),
            "training-resnet56": ours.training(tables["gradient"], "ResNet-56, batch 8"),
            "gap-resnet20": ours.gap(tables["table4-resnet20"]),
            "gap-resnet56": ours.gap(tables["table4-methods"]),
        }


def pictures(figures: dict[str, Figure | None], scale: float = 1.0, seeds: int = SEEDS) -> dict[str, bytes]:
    """PNG and SVG of each figure that there is, by the file's name. The same figure gives the same bytes."""
    content = {}
    with matplotlib.rc_context(STYLE):
        for name, figure in figures.items():
            if figure is None:
                continue
            if scale != 1:
                # In the overview, which is not laid out by matplotlib, it stands in the free corner.
                place = {} if figure.get_layout_engine() else {"y": 1 - 0.04 / figure.get_figheight(), "va": "top"}
                text = f"Every run has {scale:g} of its length"
                figure.suptitle(text, fontsize=7, x=0.985, ha="right", style="italic", **place)
            for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                file = io.BytesIO()
                figure.savefig(file, format=kind, metadata=metadata)
                drawn = file.getvalue()
                content[f"{file_name(name, scale, seeds)}.{kind}"] = (
                    with_numbered_clips(drawn) if kind == "svg" else drawn
                )
    return content


def with_numbered_clips(svg: bytes) -> bytes:
    """The drawing with its clip paths named p1, p2, ... in their order.

    matplotlib names them by a hash of their bounds, whose last bits differ between versions of numpy.
    """
    names = dict.fromkeys(re.findall(rb'<clipPath id="(p[0-9a-f]{10})"', svg))
    numbers = {name: b"p%d" % number for number, name in enumerate(names, 1)}
    return re.sub(rb"\bp[0-9a-f]{10}\b", lambda found: numbers.get(found[0], found[0]), svg)
