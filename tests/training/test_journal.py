"""The journal of a run and TensorBoard's view of it."""

import json
import os
import re
import time

import pytest
from running import without
from test_files import small_disk

from mbn.system.errors import UserError
from mbn.training.journal import LAYER_TAGS, TAGS, Journal
from mbn.training.run import iterations_between_rows


def row(i):
    return {"kind": "train", "iteration": i, "images": 10 * i, "train_loss": 1 / i, "train_error": 50.0 / i, "lr": 0.1}


def write_rows(folder, rows, lines=0):
    journal = Journal(folder, "seed: 0\nnorm: bn", lines)
    for r in rows:
        journal.write(r)


def read_rows(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [without(r, {"time"}) for r in rows]


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = folder.glob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


@pytest.mark.parametrize(
    ("per_epoch", "between"), [(6, 1), (180, 18), (259, 25), (260, 50), (391, 50), (509, 50), (510, 100), (6250, 650)]
)
def test_ten_rows_an_epoch_or_fewer_where_losses_are_read_anyway(per_epoch, between):
    assert iterations_between_rows(per_epoch) == between


def test_the_journal_has_each_row_once_and_tensorboard_each_point(tmp_path):
    rows = [row(i) for i in range(1, 6)]
    write_rows(tmp_path, rows)
    assert read_rows(tmp_path) == rows
    for key, tag in (("train_loss", "loss/train"), ("train_error", "error/train"), ("lr", "schedule/learning_rate")):
        points = [(e.step, e.value) for e in events(tmp_path).Scalars(tag)]
        assert [step for step, _ in points] == [10, 20, 30, 40, 50]
        assert [value for _, value in points] == pytest.approx([r[key] for r in rows])


def test_a_resumed_journal_drops_what_came_after_its_checkpoint(tmp_path):
    write_rows(tmp_path, [row(i) for i in range(1, 6)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')  # killed while it wrote
    write_rows(tmp_path, [row(i) for i in range(4, 8)], lines=3)
    assert read_rows(tmp_path) == [row(i) for i in range(1, 8)]
    assert [e.step for e in events(tmp_path).Scalars("loss/train")] == [10 * i for i in range(1, 8)]


def test_a_crash_while_a_journal_is_cut_back_loses_none_of_its_rows(tmp_path):
    """The checkpoint needs them: a run that goes on without them has wrong curves and a wrong best error."""
    rows = [row(i) for i in range(1, 20001)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    half = (tmp_path / "metrics.jsonl").stat().st_size // 2
    with small_disk(half), pytest.raises((OSError, UserError)):
        Journal(tmp_path, "", 19999)
    assert read_rows(tmp_path)[:19999] == rows[:19999]


def test_a_journal_without_rows_that_its_checkpoint_needs_is_an_error(tmp_path):
    write_rows(tmp_path, [row(1), row(2)])
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        write_rows(tmp_path, [row(6)], lines=5)


def test_a_tensorboard_file_that_cannot_be_written_is_one_warning_and_loses_no_row(tmp_path, capsys):
    rows = [row(i) for i in range(1, 5)]
    journal = Journal(tmp_path, "")
    with small_disk(journal.view.stat().st_size + 10):
        for r in rows:
            journal.write(r)
    (path,) = tmp_path.glob("events.out.tfevents.*")
    err = capsys.readouterr().err
    assert err.count("\n") == err.count(f"warning: cannot write {path} (") == 1
    assert read_rows(tmp_path) == rows
    Journal(tmp_path, "", len(rows))
    assert [e.step for e in events(tmp_path).Scalars("loss/train")] == [10, 20, 30, 40]


def wall_times(folder):
    found = events(folder)
    assert found.FirstEventTimestamp() == found.Scalars("loss/train")[0].wall_time
    return [e.wall_time for e in found.Scalars("loss/train")]


def test_points_keep_the_time_of_their_rows_after_a_resume(tmp_path, monkeypatch):
    clock = iter(range(1000, 9000, 100))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    write_rows(tmp_path, [row(1), row(2)])
    first = [json.loads(line)["time"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert first[1] == first[0] + 100
    write_rows(tmp_path, [row(3)], lines=2)
    third = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["time"]
    assert third > first[1]
    assert wall_times(tmp_path) == [*first, third]


def test_points_of_an_older_journal_without_times_are_as_far_apart_as_its_speed_says(tmp_path):
    journal = tmp_path / "metrics.jsonl"
    older = [row(i) | {"images_per_second": speed} for i, speed in ((1, 3.0), (2, 1.0), (3, 0.5))]
    journal.write_text("".join(json.dumps(r) + "\n" for r in older))
    os.utime(journal, (5000, 5000))
    write_rows(tmp_path, [row(4)], lines=3)
    *times, fourth = wall_times(tmp_path)
    assert times == [4960, 4980, 5000]
    assert fourth > time.time() - 600
    write_rows(tmp_path, [], lines=4)
    assert wall_times(tmp_path) == pytest.approx([fourth - 40, fourth - 20, fourth, fourth], abs=1e-3)


def test_tensorboard_shows_error_and_loss_first_and_layers_and_stages_last():
    """Its pages are in the order of the alphabet."""
    layers = [tag.format("conv1") for tag in LAYER_TAGS.values()]
    order = sorted([*TAGS.values(), *layers])
    assert order[:4] == ["error/test", "error/train", "loss/test", "loss/train"]
    assert list(dict.fromkeys(tag.partition("/")[0] for tag in order))[2:] == [
        *("schedule", "statistics", "throughput", "top5", "within_layers", "within_stages")
    ]
    assert set(order[-len(layers) :]) == set(layers)


def test_the_configuration_is_shown_as_text_with_its_lines(tmp_path):
    write_rows(tmp_path, [])
    (tag,) = [t for t in events(tmp_path).Tags()["tensors"] if t.startswith("configuration")]
    (event,) = events(tmp_path).Tensors(tag)
    assert event.tensor_proto.string_val[0].decode() == "    seed: 0\n    norm: bn"


def test_the_curated_page_shows_only_what_is_written(tmp_path):
    from tensorboard.plugins.custom_scalar import layout_pb2

    write_rows(tmp_path, [])
    (event,) = events(tmp_path).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout()
    layout.ParseFromString(event.tensor_proto.string_val[0])
    written = [*TAGS.values(), *(tag.format("layer") for tag in LAYER_TAGS.values())]
    assert len(set(written)) == len(written)
    tags = set()
    # They are regular expressions: one could show two tags.
    for pattern in [tag for c in layout.category for chart in c.chart for tag in chart.multiline.tag]:
        (tag,) = [tag for tag in written if re.search(pattern, tag)]
        tags.add(tag)
    assert tags >= {"error/train", "error/test", "statistics/gap_mean", "statistics/weight_norm"}
