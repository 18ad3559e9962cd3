"""Files that survive a crash: atomic writes, generations of checkpoints, the journal."""

import contextlib
import json
import re
import resource
import signal

import pytest
import torch

from mbn.system import files
from mbn.system.errors import UserError
from mbn.system.files import write_atomically
from mbn.training import checkpoint
from mbn.training.journal import LAYER_TAGS, TAGS, Journal


@contextlib.contextmanager
def small_disk(size):
    """No file may grow beyond so many bytes.

    A context and no fixture: pytest writes its own progress, often into a file, before fixtures are torn down.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    for content in (b"one", b"two"):
        write_atomically(path, content)
        assert path.read_bytes() == content
        assert names(path.parent) == ["file"]


def test_a_write_never_touches_the_old_version(tmp_path):
    """Whoever has it open goes on reading it; a crash in the middle leaves it whole."""
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with path.open("rb") as reader:
        write_atomically(path, b"new")
        assert reader.read() == b"old"


def test_a_write_that_fails_leaves_the_old_file_and_says_how_much_it_needs(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with small_disk(1000), pytest.raises(UserError, match="2000 bytes: free some space"):
        write_atomically(path, b"x" * 2000)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_crash_at_any_step_of_a_write_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch, step):
    path, kept = tmp_path / "file", tmp_path / "kept"
    write_atomically(path, b"old")

    class CrashError(BaseException):
        pass

    for crash_at in range(1, 4):
        count = 0
        owner = files.os if step == "fsync" else type(path)
        original = getattr(owner, step)

        def crash(*args, original=original, crash_at=crash_at):
            nonlocal count
            count += 1
            if count == crash_at:
                raise CrashError
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(owner, step, crash)
            try:
                write_atomically(path, b"new", keep_as=kept)
            except CrashError:
                pass
            else:
                break
        whole = [p.read_bytes() for p in (path, kept) if p.exists()]
        assert whole
        assert set(whole) <= {b"old", b"new"}
        write_atomically(path, b"old")
    else:
        raise AssertionError(f"{step} was never done less than three times")
    assert crash_at > 1


def test_a_file_that_may_not_be_written_is_a_users_error(tmp_path):
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*folder/file"):
        write_atomically(tmp_path / "folder" / "file", b"")


# Checkpoints.


def test_a_checkpoint_is_read_as_it_was_saved_by_torch_too(tmp_path):
    path = tmp_path / "checkpoint.pt"
    state = {"weights": torch.randn(3, 4), "iteration": 7, "config": "{}", "sums": [0.1, 2, 3]}
    checkpoint.save(state, path)
    for read in (checkpoint.newest(path), torch.load(path, weights_only=True)):
        assert torch.equal(read.pop("weights"), state["weights"])
        assert read == {"iteration": 7, "config": "{}", "sums": [0.1, 2, 3]}


def test_the_generation_before_is_kept(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for iteration in range(3):
        checkpoint.save({"iteration": iteration}, path)
    assert checkpoint.newest(path) == {"iteration": 2}
    assert checkpoint.read(checkpoint.previous(path)) == {"iteration": 1}
    assert names(tmp_path) == ["checkpoint.previous.pt", "checkpoint.pt"]
    path.unlink()  # as between the two renames of a save
    assert checkpoint.newest(path) == {"iteration": 1}


def test_any_flipped_bit_of_a_checkpoint_is_noticed(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save({"weights": torch.randn(3)}, path)
    content = path.read_bytes()
    for place in range(0, len(content), 37):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(checkpoint.DamagedError, match=r"checkpoint\.pt"):
            checkpoint.read(path)


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_one_before(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save({"iteration": 1}, path)
    with small_disk(10_000), pytest.raises(UserError, match="free some space"):
        checkpoint.save({"weights": torch.zeros(100_000)}, path)
    assert checkpoint.newest(path) == {"iteration": 1}


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.newest(tmp_path / "checkpoint.pt") is None


# The journal.


def row(i):
    return {"kind": "train", "iteration": i, "images": 10 * i, "train_loss": 1 / i, "train_error": 50.0 / i, "lr": 0.1}


def write_rows(folder, rows, lines=0):
    journal = Journal(folder, "seed: 0\nnorm: bn", lines)
    for r in rows:
        journal.write(r)


def read_rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = folder.glob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def test_the_journal_has_each_row_once_and_tensorboard_each_point(tmp_path):
    rows = [row(i) for i in range(1, 6)]
    write_rows(tmp_path, rows)
    assert read_rows(tmp_path) == rows
    for key, tag in (("train_loss", "train/loss"), ("train_error", "train/error"), ("lr", "schedule/learning_rate")):
        points = [(e.step, e.value) for e in events(tmp_path).Scalars(tag)]
        assert [step for step, _ in points] == [10, 20, 30, 40, 50]
        assert [value for _, value in points] == pytest.approx([r[key] for r in rows])


def test_a_resumed_journal_drops_what_came_after_its_checkpoint(tmp_path):
    write_rows(tmp_path, [row(i) for i in range(1, 6)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')  # killed while it wrote
    write_rows(tmp_path, [row(i) for i in range(4, 8)], lines=3)
    assert read_rows(tmp_path) == [row(i) for i in range(1, 8)]
    assert [e.step for e in events(tmp_path).Scalars("train/loss")] == [10 * i for i in range(1, 8)]


def test_a_crash_while_a_journal_is_cut_back_loses_none_of_its_rows(tmp_path):
    """The checkpoint counts on them: a run that goes on without them has wrong curves and a wrong best error."""
    rows = [row(i) for i in range(1, 20001)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    half = (tmp_path / "metrics.jsonl").stat().st_size // 2
    with small_disk(half), pytest.raises((OSError, UserError)):
        Journal(tmp_path, "", 19999)
    assert read_rows(tmp_path)[:19999] == rows[:19999]


def test_a_journal_that_lacks_rows_its_checkpoint_counts_on_is_an_error(tmp_path):
    write_rows(tmp_path, [row(1), row(2)])
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        write_rows(tmp_path, [row(6)], lines=5)


def test_a_tensorboard_file_that_cannot_be_written_is_one_warning_and_loses_no_row(tmp_path, capsys):
    rows = [row(i) for i in range(1, 6)]
    journal = Journal(tmp_path, "")
    with small_disk(journal.view.stat().st_size + 10):
        for r in rows:
            journal.write(r)
    (path,) = tmp_path.glob("events.out.tfevents.*")
    err = capsys.readouterr().err
    assert err.count("\n") == err.count(f"warning: cannot write {path} (") == 1
    assert read_rows(tmp_path) == rows
    Journal(tmp_path, "", len(rows))
    assert [e.step for e in events(tmp_path).Scalars("train/loss")] == [10, 20, 30, 40, 50]


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
    tags = set()
    # They are regular expressions: test/error alone would show test/error_top5 too.
    for pattern in [tag for c in layout.category for chart in c.chart for tag in chart.multiline.tag]:
        (tag,) = [tag for tag in written if re.search(pattern, tag)]
        tags.add(tag)
    assert tags >= {"train/error", "test/error", "statistics_gap/mean", "weights/norm"}


def test_tags_are_distinct():
    tags = [*TAGS.values(), *LAYER_TAGS.values()]
    assert len(set(tags)) == len(tags)
