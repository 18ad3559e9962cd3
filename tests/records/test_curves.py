"""The curves of a record, compared with the losses of the iterations behind a journal's rows."""

import numpy as np
import pytest

from mbn.records import curves as module
from mbn.records.curves import curves, last_epoch

PER_EPOCH, BATCH = 40, 8


def journal(iterations, row_every):
    """Rows as a run writes them, and each iteration's loss; the last epoch ends where the run does."""
    losses = np.random.RandomState(0).uniform(0.1, 3, iterations)
    rows, since_row, since_epoch = [], 0, 0
    for t in range(1, iterations + 1):
        ends = t % PER_EPOCH == 0 or t == iterations
        if not ends and (t % PER_EPOCH) % row_every:
            continue
        start = since_epoch if ends else since_row
        mean = float(losses[start:t].mean())
        row = {"kind": "epoch" if ends else "train", "images": BATCH * t, "train_loss": mean, "train_error": 10 * mean}
        if ends:
            row |= {"test_error": float(t), "test_loss": 1.0, "weight_norm": float(t * t)}
            since_epoch = t
        since_row = t
        rows.append(row)
    return rows, losses


def test_a_point_within_an_epoch_is_the_mean_since_the_point_before():
    rows, losses = journal(110, row_every=12)
    training = curves(rows)["training"]
    ends = [12, 24, 36, 40, 52, 64, 76, 80, 92, 104, 110]
    assert training["images"] == [BATCH * t for t in ends]
    means = [losses[a:b].mean() for a, b in zip([0, *ends], ends, strict=False)]
    assert training["loss"] == pytest.approx(means, rel=1e-4)
    assert training["error"] == pytest.approx([10 * m for m in means], rel=1e-4)


def test_points_are_merged_if_there_are_too_many(monkeypatch):
    assert module.POINTS == 250
    monkeypatch.setattr(module, "POINTS", 4)
    rows, losses = journal(240, row_every=12)
    found = curves(rows)
    assert found["images"] == [BATCH * t for t in (80, 160, 240)]
    assert found["weight_norm"] == [80**2, 160**2, 240**2]
    ends = [t // BATCH for t in found["training"]["images"]]
    assert len(ends) == 4
    assert ends[-1] == 240
    assert found["training"]["loss"] == pytest.approx(
        [losses[a:b].mean() for a, b in zip([0, *ends], ends, strict=False)], rel=1e-4
    )


def test_a_run_without_statistics_has_no_gap():
    rows, _ = journal(80, row_every=100)
    found = curves(rows)
    assert set(found) == {
        *("images", "train_error", "train_loss", "test_error", "test_loss", "weight_norm", "training")
    }
    assert found["training"]["images"] == found["images"]
    assert found["training"]["loss"] == found["train_loss"]


@pytest.mark.parametrize(
    ("iterations", "images", "from_iteration"),
    [
        (80, 320, 40),  # the last epoch, which is whole
        (110, 320, 64),  # an epoch and 6 iterations: rows end at 64 and 76, an epoch before the end is 70
        (82, 320, 40),  # two iterations are only a part of the last epoch
        (30, 320, 0),
        (110, 10**6, 0),
    ],
)
def test_the_last_epoch_is_the_last_images_of_a_run(iterations, images, from_iteration):
    rows, losses = journal(iterations, row_every=12)
    loss, error = last_epoch(rows, images)
    assert loss == pytest.approx(losses[from_iteration:].mean(), rel=1e-6)
    assert error == pytest.approx(10 * loss, rel=1e-6)


def test_what_the_first_rows_lack_is_left_out():
    """The first epochs were journalled by an earlier version, which measured less."""
    rows, _ = journal(80, row_every=100)
    rows[-1]["dead_layers"] = 3
    assert "dead_layers" not in curves(rows)
    rows[0]["dead_layers"] = 0
    assert curves(rows)["dead_layers"] == [0, 3]
