"""What a record keeps of a run's journal: how errors, losses, gaps and weights went, in a few kilobytes."""

from collections.abc import Iterable, Sequence
from typing import Any

# A record keeps at most this many points of a curve.
POINTS = 250
# Measured at the end of an epoch. The weight norm is that of all matrices and filters together.
AT_EPOCHS = (
    *("images", "train_error", "train_loss", "test_error", "test_loss"),
    *("gap_mean", "gap_std", "weight_norm", "dead_channels", "dead_layers"),
)

Row = dict[str, Any]


def curves(rows: Iterable[Row]) -> dict[str, Any]:
    """The curves of a record, from the rows of a journal, of which the last must end an epoch.

    At most POINTS of the epochs' ends, the last one among them, under those names of AT_EPOCHS that all of them
    measured. Training losses and errors of such a point are means over its epoch, so that `training` has them in finer
    steps, from the rows within epochs: `images` seen, and the mean `loss` and `error` (percent) an image since the
    point before; at most POINTS.
    """
    rows = list(rows)
    epochs = [row for row in rows if row["kind"] == "epoch"]
    kept = _thinned(epochs)
    content: dict[str, Any] = {
        key: [_five_digits(row[key]) for row in kept] for key in AT_EPOCHS if all(key in row for row in kept)
    }
    return content | {"training": _training(rows)}


def last_epoch(rows: Iterable[Row], images: int) -> tuple[float, float]:
    """Mean training loss and error (percent) over the last images of a run, or all of it where it had fewer.

    From the last row that is so far back on. What a row that ends an epoch says of that epoch is not it: an epoch that
    the end of the run cut short may have had a few hundred images.
    """
    sums = [(0.0, 0.0, 0.0), *_sums(rows)]
    end = sums[-1]
    start = [s for s in sums if s[2] <= max(end[2] - images, 0)][-1]
    loss, error = ((end[i] - start[i]) / (end[2] - start[2]) for i in (0, 1))
    return round(loss, 9), round(error, 9)  # without what adding up and taking away left behind


def _training(rows: Sequence[Row]) -> dict[str, list[float]]:
    kept = _thinned(_sums(rows))
    pairs = list(zip([(0.0, 0.0, 0.0), *kept], kept, strict=False))
    return {
        "images": [int(end[2]) for _, end in pairs],
        "loss": [_five_digits((end[0] - start[0]) / (end[2] - start[2])) for start, end in pairs],
        "error": [_five_digits((end[1] - start[1]) / (end[2] - start[2])) for start, end in pairs],
    }


def _sums(rows: Iterable[Row]) -> list[tuple[float, float, float]]:
    """Losses, errors and images added up since the run began, at every row."""
    sums = []
    loss = error = images = 0.0
    before = (0.0, 0.0, 0.0)  # at the end of the last epoch
    for row in rows:
        if row["kind"] == "epoch":  # its means are the whole epoch's, the part before its last row included
            loss, error, images = before
        n = row["images"] - images
        loss, error, images = loss + row["train_loss"] * n, error + row["train_error"] * n, row["images"]
        if row["kind"] == "epoch":
            before = (loss, error, images)
        sums.append((loss, error, images))
    return sums


def _thinned(items: list[Any]) -> list[Any]:
    """At most POINTS of them at equal steps, the last one always."""
    step = -(-len(items) // POINTS)
    return items[::-step][::-1]


def _five_digits(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.5g}")
