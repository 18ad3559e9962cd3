"""What a record keeps of a run's journal: the curves of errors, losses, gaps and weights, in a few kilobytes."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

# A record keeps at most this many points of a curve.
POINTS = 250
# Measured at the end of an epoch. The weight norm is that of all matrices and filters together.
AT_EPOCHS = (
    *("images", "train_error", "train_loss", "test_error", "test_loss"),
    *("gap_mean", "gap_std", "weight_norm", "dead_channels", "dead_layers", "dead_relus"),
)

Row = dict[str, Any]
# Images, losses and errors added up from the run's start to a row.
Totals = tuple[float, float, float]
NOTHING_YET: Totals = (0, 0.0, 0.0)


def curves(rows: Iterable[Row]) -> dict[str, Any]:
    """The curves of a record, from the rows of a journal. The last row must end an epoch.

    A point is the end of an epoch: at most POINTS of them, the last one included, with those values of AT_EPOCHS that
    are finite at all of them. Their training loss and error are means over a whole epoch. `training` has finer steps,
    from the rows within epochs too: `images` seen, and the mean `loss` and `error` (percent) of the images since the
    point before, at most POINTS of each. `stage_dead_relus` has a curve for each stage.
    """
    rows = list(rows)
    kept = _thinned([row for row in rows if row["kind"] == "epoch"])
    content: dict[str, Any] = {
        key: [five_digits(row[key]) for row in kept]
        for key in AT_EPOCHS
        if all(math.isfinite(row.get(key, math.nan)) for row in kept)
    }
    steps = [_means(*pair) for pair in itertools.pairwise([NOTHING_YET, *_thinned(_sums(rows))])]
    training = {key: [five_digits(step[i]) for step in steps] for i, key in enumerate(("images", "loss", "error"))}
    if "dead_relus" in content:
        stages = [row["stage_dead_relus"] for row in kept]
        content["stage_dead_relus"] = {name: [row[name] for row in stages] for name in stages[0]}
    return content | {"training": training}


def last_epoch(rows: Iterable[Row], images: int) -> tuple[float, float]:
    """Mean training loss and error (percent) over the last images of a run, or all of it where it had fewer.

    They start at the last row that is at least so many images before the end. The run's last row would not do: its
    means are those of the last epoch, which may be cut short and have only a few hundred images.
    """
    sums = [NOTHING_YET, *_sums(rows)]
    start = [s for s in sums if s[0] <= max(sums[-1][0] - images, 0)][-1]
    _, loss, error = _means(start, sums[-1])
    return round(loss, 9), round(error, 9)  # without the rounding errors of sums and differences


def _sums(rows: Iterable[Row]) -> list[Totals]:
    sums = []
    images, loss, error = before = NOTHING_YET  # before: at the end of the last epoch
    for row in rows:
        if row["kind"] == "epoch":  # its means are those of the whole epoch, not only of the part since the last row
            images, loss, error = before
        n = row["images"] - images
        images, loss, error = row["images"], loss + row["train_loss"] * n, error + row["train_error"] * n
        if row["kind"] == "epoch":
            before = (images, loss, error)
        sums.append((images, loss, error))
    return sums


def _means(start: Totals, end: Totals) -> Totals:
    """The images seen at the end, and the mean loss and error of those since the start.

    A sum of losses so large that the rounding of it hides those after it may fall: their mean is then 0.
    """
    n = end[0] - start[0]
    return end[0], max((end[1] - start[1]) / n, 0.0), (end[2] - start[2]) / n


def _thinned(items: list[Any]) -> list[Any]:
    """At most POINTS of them at equal steps, the last one always."""
    step = -(-len(items) // POINTS)
    return items[::-step][::-1]


def five_digits(value: float) -> float:
    """A number as curves hold it: whole, or rounded to five digits."""
    return value if isinstance(value, int) else float(f"{value:.5g}")
