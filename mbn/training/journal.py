"""What a run measures over time: metrics.jsonl, the truth, and TensorBoard's event file, a view of it."""

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mbn.system.errors import UserError
from mbn.system.files import cannot_write, write_atomically

# TensorBoard's name for each number of a row; the axis is images seen.
TAGS = {
    "train_loss": "train/loss",
    "train_error": "train/error",
    "test_loss": "test/loss",
    "test_error": "test/error",
    "test_error_top5": "test/error_top5",
    "lr": "schedule/learning_rate",
    "lambda": "schedule/lambda",
    "images_per_second": "speed/images_per_second",
    "weight_norm": "weights/norm",
    "gap_mean": "statistics_gap/mean",
    "gap_std": "statistics_gap/log_std",
    "dead_channels": "dead/channels",
    "dead_layers": "dead/layers",
}
# For numbers that each layer has.
LAYER_TAGS = {
    "weight_norms": "weight_norm/{}",
    "gap_means": "layer_gap_mean/{}",
    "gap_stds": "layer_gap_log_std/{}",
    "layer_dead_channels": "layer_dead_channels/{}",
}
# A curated first page: TensorBoard's custom scalars, whose names are regular expressions.
LAYOUT = {
    "Training": {
        "Error (%)": ["Multiline", ["train/error", "test/error$"]],
        "Loss": ["Multiline", ["train/loss", "test/loss"]],
        "Learning rate": ["Multiline", ["schedule/learning_rate"]],
        "Lambda": ["Multiline", ["schedule/lambda"]],
    },
    "Normalisation": {
        "Statistics gap": ["Multiline", ["statistics_gap/mean", "statistics_gap/log_std"]],
        "Weight norm": ["Multiline", ["weights/norm"]],
        "Dead channels, layers": ["Multiline", ["dead/channels", "dead/layers"]],
    },
    "Speed": {"Images per second": ["Multiline", ["speed/images_per_second"]]},
}


# The process has one hook for its threads' exceptions, and runs in threads take turns at it.
_one_hook = threading.RLock()


class Journal:
    """Rows of numbers: `kind` is "train" within an epoch and "epoch" at the end of one, `images` the axis.

    lines: how many lines a resumed run keeps; those after its checkpoint are cut off, whatever a crash made of them,
    and TensorBoard's file is written anew from what is left, so that no point is doubled or missing.

    Errors: UserError, here and in every method, where rows are missing or damaged, or the disk is full.
    """

    def __init__(self, folder: Path, configuration: str, lines: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        written = self.path.read_bytes() if self.path.exists() else b""
        # A row ends in a newline: what a crash cut short has none.
        kept = written.split(b"\n")[:-1][:lines]
        if len(kept) < lines:
            raise UserError(
                f"{self.path} has {len(kept)} rows, but its checkpoint counts on {lines}: move {folder} away and run "
                "the command again."
            )
        write_atomically(self.path, b"".join(row + b"\n" for row in kept))
        self.lines = len(kept)
        with self._telling():
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
            self.tensorboard = SummaryWriter(str(folder))
            self.tensorboard.add_custom_scalars(LAYOUT)
            # As Markdown's code, so that TensorBoard keeps the lines.
            self.tensorboard.add_text("configuration", "\n".join("    " + line for line in configuration.splitlines()))
            for row in self.rows():
                self._show(row)
            self.tensorboard.flush()

    def write(self, row: dict[str, Any]) -> None:
        """Append one row to both."""
        line = json.dumps(row) + "\n"
        try:
            with self.path.open("a") as file:
                file.write(line)
        except OSError as error:
            raise cannot_write(self.path, error, len(line)) from None
        self.lines += 1
        with self._telling():
            self._show(row)
            self.tensorboard.flush()

    def sync(self) -> None:
        """Return when all rows are on the disk: before a checkpoint that counts on them is."""
        try:
            with self.path.open("a") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def rows(self) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(self.path.read_bytes().split(b"\n")[:-1], 1):
            try:
                yield json.loads(line)
            except ValueError:
                raise UserError(
                    f"{self.path} is damaged in row {number}: move {self.folder} away and run the command again."
                ) from None

    def close(self) -> None:
        with self._telling():
            self.tensorboard.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *raised: object) -> None:
        # What ends the run goes before what its view of the journal lacks.
        with contextlib.suppress(*((UserError,) if raised[0] else ())):
            self.close()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Turn a failed write of TensorBoard's into a UserError; its thread's own traceback is not shown."""
        with _one_hook:
            show = threading.excepthook

            def hook(args: threading.ExceptHookArgs) -> None:
                if not isinstance(args.exc_value, OSError):
                    show(args)

            threading.excepthook = hook
            try:
                yield
            except OSError as error:
                raise cannot_write(error.filename or self.folder / "events.out.tfevents", error) from None
            finally:
                threading.excepthook = show

    def _show(self, row: dict[str, Any]) -> None:
        for key, tag in TAGS.items():
            if row.get(key) is not None:
                self.tensorboard.add_scalar(tag, row[key], row["images"])
        for key, tag in LAYER_TAGS.items():
            for layer, value in row.get(key, {}).items():
                self.tensorboard.add_scalar(tag.format(layer), value, row["images"])
