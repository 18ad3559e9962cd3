"""What a run measures over time: metrics.jsonl, the truth, and TensorBoard's event file, a view of it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import write_atomically

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
}
# For numbers that each layer has.
LAYER_TAGS = {
    "weight_norms": "weight_norm/{}",
    "gap_means": "layer_gap_mean/{}",
    "gap_stds": "layer_gap_log_std/{}",
}
# A curated first page: TensorBoard's custom scalars.
LAYOUT = {
    "Training": {
        "Error (%)": ["Multiline", ["train/error", "test/error"]],
        "Loss": ["Multiline", ["train/loss", "test/loss"]],
        "Learning rate": ["Multiline", ["schedule/learning_rate"]],
        "Lambda": ["Multiline", ["schedule/lambda"]],
    },
    "Normalisation": {
        "Statistics gap": ["Multiline", ["statistics_gap/mean", "statistics_gap/log_std"]],
        "Weight norm": ["Multiline", ["weights/norm"]],
    },
    "Speed": {"Images per second": ["Multiline", ["speed/images_per_second"]]},
}


class Journal:
    """Rows of numbers: `kind` is "train" within an epoch and "epoch" at the end of one, `images` the axis.

    lines: how many lines a resumed run keeps; those after its checkpoint are cut off, and TensorBoard's file is
    written anew from what is left, so that no point is doubled or missing.
    """

    def __init__(self, folder: Path, configuration: str, lines: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        kept = self.path.read_text().splitlines(keepends=True)[:lines] if self.path.exists() else []
        if len(kept) < lines:
            raise UserError(
                f"{self.path} has {len(kept)} rows, but its checkpoint counts on {lines}: move {folder} away and run "
                "the command again."
            )
        write_atomically(self.path, "".join(kept).encode())
        self.lines = len(kept)
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
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.lines += 1
        self._show(row)
        self.tensorboard.flush()

    def rows(self) -> Iterator[dict[str, Any]]:
        yield from (json.loads(line) for line in self.path.read_text().splitlines())

    def close(self) -> None:
        self.tensorboard.close()

    def _show(self, row: dict[str, Any]) -> None:
        for key, tag in TAGS.items():
            if row.get(key) is not None:
                self.tensorboard.add_scalar(tag, row[key], row["images"])
        for key, tag in LAYER_TAGS.items():
            for layer, value in row.get(key, {}).items():
                self.tensorboard.add_scalar(tag.format(layer), value, row["images"])
