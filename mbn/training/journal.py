"""What a run measures over time: metrics.jsonl is the truth, TensorBoard's event file a view of it."""

import hashlib
import io
import itertools
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mbn.system.errors import UserError
from mbn.system.files import cannot_write, sync, write_atomically

# TensorBoard's name for each number of a row; the axis is images seen. Its pages show the names in the order of the
# alphabet, in groups by what stands before the slash: error and loss come first, and the many series of layers last.
TAGS = {
    "test_error": "error/test",
    "train_error": "error/train",
    "test_loss": "loss/test",
    "train_loss": "loss/train",
    "lambda": "schedule/lambda",
    "lr": "schedule/learning_rate",
    "gap_mean": "statistics/gap_mean",
    "gap_std": "statistics/gap_log_std",
    "weight_norm": "statistics/weight_norm",
    "dead_channels": "statistics/dead_channels",
    "dead_layers": "statistics/dead_layers",
    "dead_relus": "statistics/dead_relus",
    "images_per_second": "throughput/images_per_second",
    "test_error_top5": "top5/error_test",
}
# For numbers that each layer or each stage has.
LAYER_TAGS = {
    "layer_dead_channels": "within_layers/dead_channels/{}",
    "gap_means": "within_layers/gap_mean/{}",
    "gap_stds": "within_layers/gap_log_std/{}",
    "weight_norms": "within_layers/weight_norm/{}",
    "stage_dead_relus": "within_stages/dead_relus/{}",
}
# The Custom Scalars page, where curves that belong together share a chart. The names are regular expressions.
LAYOUT = {
    "Training": {
        "Error (%)": ["Multiline", ["error/test", "error/train"]],
        "Loss": ["Multiline", ["loss/test", "loss/train"]],
        "Learning rate": ["Multiline", ["schedule/learning_rate"]],
        "Lambda": ["Multiline", ["schedule/lambda"]],
    },
    "Normalisation": {
        "Statistics gap": ["Multiline", ["statistics/gap_mean", "statistics/gap_log_std"]],
        "Weight norm": ["Multiline", ["statistics/weight_norm"]],
        "Dead channels, layers": ["Multiline", ["statistics/dead_channels", "statistics/dead_layers"]],
        "Dead channels behind ReLUs": ["Multiline", ["statistics/dead_relus", "within_stages/dead_relus/.*"]],
    },
    "Speed": {"Images per second": ["Multiline", ["throughput/images_per_second"]]},
}


# The name of TensorBoard's file, as a pattern.
VIEW = r"events\.out\.tfevents\.\d+\..+\.\d+\.0"


class Journal:
    """Rows of numbers: `kind` is "train" within an epoch and "epoch" at the end of one, `images` the axis, `time` the
    seconds since 1970 at which it was written.

    lines: how many lines a resumed run keeps, and digest, their SHA-256, if its checkpoint knows it. Lines after its
    checkpoint are cut off, complete or not. TensorBoard's file is then written again from the lines kept, so that no
    point is doubled or missing. lines is None in a run that starts: a journal that is there is set aside.

    Errors: UserError, here and in every method, where rows are missing, damaged or changed, or the disk is full. If
    TensorBoard's file cannot be written, that is only a warning: the run goes on without it until it is resumed.
    """

    def __init__(self, folder: Path, configuration: str, lines: int | None = None, digest: str | None = None) -> None:
        self.path = folder / "metrics.jsonl"
        self.folder = folder
        if lines is None:
            set_aside(self.path)
            lines = 0
        there = self.path.exists()
        written, ended = (self.path.read_bytes(), self.path.stat().st_mtime) if there else (b"", time.time())
        # A complete row ends in a newline; a row that a crash cut short does not.
        kept = written.split(b"\n")[:-1][:lines]
        if len(kept) < lines:
            raise UserError(
                f"{self.path} has {len(kept)} rows, but its checkpoint needs {lines}: move {folder} away and run "
                "the command again."
            )
        content = b"".join(row + b"\n" for row in kept)
        self._hash = hashlib.sha256(content)
        if digest not in (None, self.hash):
            raise self._changed()
        write_atomically(self.path, content)
        self.lines = len(kept)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self.view: Path | None = folder / name
        for old in folder.iterdir():
            if re.fullmatch(VIEW, old.name) and old.is_file():
                old.unlink()
        rows = with_times(self.rows(), ended)
        began = rows[0]["time"] if rows else time.time()
        self._show([*first_events(configuration, began), *(event for row in rows for event in events(row))])

    @property
    def hash(self) -> str:
        """SHA-256 of all rows, in hex digits."""
        return self._hash.hexdigest()

    def _changed(self) -> UserError:
        return UserError(
            f"{self.path} is not the one that this run wrote (another SHA-256): restore it, or move {self.folder} away "
            "and run the command again to start over."
        )

    def write(self, row: dict[str, Any]) -> None:
        """Append one row to both files, with the time."""
        row = row | {"time": round(time.time(), 2)}
        line = json.dumps(row) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise cannot_write(self.path, error, len(line)) from None
        self._hash.update(line.encode())
        self.lines += 1
        self._show(events(row))

    def sync(self) -> None:
        """Return when all rows are on the disk. To be called before a checkpoint, which relies on them, is written."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                sync(file.fileno(), self.path)
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows, which must be those that this run wrote. Errors: UserError."""
        content = self.path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.hash:
            raise self._changed()
        for number, line in enumerate(content.split(b"\n")[:-1], 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not is_row(row):
                raise UserError(
                    f"{self.path} is damaged in row {number}: move {self.folder} away and run the command again."
                )
            yield row

    def _show(self, events: Iterable[bytes]) -> None:
        """Append to TensorBoard's file, unless that has failed before."""
        if self.view is None:
            return
        try:
            with self.view.open("ab") as file:
                file.write(b"".join(events))
        except OSError as error:
            print(
                f"warning: cannot write {self.view} ({error.strerror}): TensorBoard shows the rest of this run once "
                "it is resumed.",
                file=sys.stderr,
            )
            self.view = None


class NoJournal:
    """Stands in for the journal in the processes beside the main one, which alone writes."""

    lines, hash = 0, ""

    def write(self, row: dict[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass


# The numbers that rows have of each kind.
NUMBERS = {
    "train": ("images", "train_loss", "train_error"),
    "epoch": ("images", "train_loss", "train_error", "test_loss", "test_error", "test_error_top5"),
}


def is_row(row: Any) -> bool:
    """Whether a line of a journal is one of ours."""
    numbers = NUMBERS.get(str(row.get("kind"))) if isinstance(row, dict) else None
    return numbers is not None and all(isinstance(row.get(key), int | float) for key in numbers)


def set_aside(path: Path) -> None:
    """Rename a journal that has rows and no checkpoint to go on from, and say so."""
    if not path.exists() or not path.stat().st_size:
        return
    aside = next(a for n in itertools.count(1) if not (a := path.with_name(f"metrics.aside-{n}.jsonl")).exists())
    path.replace(aside)
    print(
        f"warning: {path} has rows but there is no checkpoint to go on from: training starts over, and the rows are "
        f"kept in {aside.name}.",
        file=sys.stderr,
    )


def with_times(rows: Iterable[dict[str, Any]], ended: float) -> list[dict[str, Any]]:
    """Rows with their times. Those of an older journal have none, and get times at its mean speed up to the first row
    that has one, or up to ended.
    """
    rows = list(rows)
    ended = next((row["time"] for row in rows if "time" in row), ended)
    last = [row for row in rows if "time" not in row][-1:]
    per_image = 1 / max(last[0]["images_per_second"], 0.1) if last else 0.0
    return [{"time": ended - per_image * (last[0]["images"] - row["images"]), **row} if last else row for row in rows]


# What TensorBoard's file holds. torch's SummaryWriter is not used: it writes in a thread whose errors nobody can catch.


def first_events(configuration: str, began: float) -> list[bytes]:
    """The file's version, the Custom Scalars page, and the configuration."""
    from torch.utils.tensorboard.summary import custom_scalars, text

    # As Markdown's code, so that TensorBoard keeps the lines.
    indented = "\n".join("    " + line for line in configuration.splitlines())
    return [
        _event(began, file_version="brain.Event:2"),
        _event(began, summary=custom_scalars(LAYOUT)),
        _event(began, summary=text("configuration", indented)),
    ]


def events(row: dict[str, Any]) -> list[bytes]:
    """The points of a row of the journal, at its time."""
    from torch.utils.tensorboard.summary import scalar

    points = {tag: row[key] for key, tag in TAGS.items() if row.get(key) is not None}
    for key, tag in LAYER_TAGS.items():
        points |= {tag.format(layer): value for layer, value in row.get(key, {}).items()}
    return [_event(row["time"], step=row["images"], summary=scalar(tag, value)) for tag, value in points.items()]


def _event(time: float, **content: Any) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    RecordWriter(buffer).write(Event(wall_time=time, **content).SerializeToString())
    return buffer.getvalue()
