"""The state of a run: what training changes, what a checkpoint keeps of it, and how a checkpoint is restored."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mbn.config import Config, distinction, iterations, iterations_per_epoch, run_name, to_dict
from mbn.measure.statistics_gap import Statistics, uses_dropout
from mbn.records import provenance, record
from mbn.system.errors import UserError
from mbn.training import checkpoint_file


class Sums:
    """Losses, errors and images, added up in the order of iterations, so that a resume gives the same bits."""

    def __init__(self, losses: float = 0.0, errors: int = 0, images: int = 0) -> None:
        self.losses, self.errors, self.images = losses, errors, images

    def add(self, loss: float, errors: int, images: int) -> None:
        """One batch: its mean loss, its errors, its images."""
        self.losses += loss * images
        self.errors += errors
        self.images += images

    def as_list(self) -> list[float]:
        return [self.losses, self.errors, self.images]

    @property
    def loss(self) -> float:
        """Mean loss per image."""
        return self.losses / max(self.images, 1)

    @property
    def error(self) -> float:
        """Error in percent of the images."""
        return 100 * self.errors / max(self.images, 1)


class Clock:
    """Seconds of a run, and how many of them were training; testing and saving are not."""

    def __init__(self) -> None:
        self.seconds = self.training_seconds = 0.0
        self.counted_until = time.monotonic()

    def start(self) -> None:
        """Count from now on."""
        self.counted_until = time.monotonic()

    def count(self, training: bool) -> None:
        """Add the time since the last call."""
        now = time.monotonic()
        self.seconds += now - self.counted_until
        self.training_seconds += now - self.counted_until if training else 0.0
        self.counted_until = now


class State:
    """Network, optimiser and counters of a run, the devices it has used and the version of the code.

    scheduled: the values that `mbn.training.schedule.scheduled` gave last. epoch_sums, row_sums: sums since the epoch
    began, and since the last row of the journal. untested: between the end of an epoch's training and its test, the
    statistics of its last batch, which the epoch's row needs.
    """

    def __init__(self, config: Config, model: nn.Module, device: torch.device, threads: int) -> None:
        self.config, self.device, self.threads = config, device, threads
        self.name = run_name(config)
        self.length, self.per_epoch = iterations(config), iterations_per_epoch(config)
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.lr = torch.tensor(0.0, device=device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=self.lr,
            momentum=config.optimizer.momentum,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        self.scheduled: dict[str, Any] = {}
        self.iteration = 0
        self.epoch_sums, self.row_sums = Sums(), Sums()
        self.clock = Clock()
        self.journal_lines = 0
        self.untested: Statistics | None = None
        self.commit, self.dirty = provenance.commit_and_dirty()
        self.code = provenance.code()
        self.devices = devices_so_far(None, device)
        self.again = config.machine.again
        # Without dropout training draws no random numbers, so the first states are kept: other threads may change the
        # process's generators meanwhile.
        self.generators = None if uses_dropout(self.model) else generators(device)

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what a checkpoint holds."""
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.optimizer.param_groups[0]["lr"] = self.lr
        torch.set_rng_state(saved["generators"]["cpu"])
        if self.device.type == "cuda" and "cuda" in saved["generators"]:
            torch.cuda.set_rng_state(saved["generators"]["cuda"], self.device)
        if self.generators is not None:
            self.generators = generators(self.device)
        self.iteration = saved["iteration"]
        self.epoch_sums, self.row_sums = Sums(*saved["epoch_sums"]), Sums(*saved["row_sums"])
        self.clock.seconds, self.clock.training_seconds = saved["seconds"], saved["training_seconds"]
        self.journal_lines = saved["journal_lines"]
        self.devices = devices_so_far(saved, self.device)
        self.again = saved["anew"]
        untested = saved.get("untested")
        if untested is not None:
            self.untested = {name: (mu.to(self.device), s.to(self.device)) for name, (mu, s) in untested.items()}
        print(f"{self.name}: resuming at iteration {self.iteration} of {self.length}.")
        # A checkpoint from before the code's hash was kept has its commit only.
        changed = saved["code"] != self.code if "code" in saved else saved["commit"] != self.commit
        if "code" in saved and changed:
            print(
                f"warning: the code has changed since this run began ({provenance.with_code(saved)}; now "
                f"{provenance.with_code(vars(self))}); the record will say 'and changes'. To train all of it with one "
                "code, use machine.again=true.",
                file=sys.stderr,
            )
        if changed or saved["dirty"]:
            # Two versions of the code made one record: the commit alone would not give it.
            self.dirty = True

    def content(self, mode: str, journal_lines: int) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "name": self.name,
            "identity": distinction(self.config),
            "config": json.dumps(to_dict(self.config)),
            "iteration": self.iteration,
            "length": self.length,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generators": self.generators or generators(self.device),
            "epoch_sums": self.epoch_sums.as_list(),
            "row_sums": self.row_sums.as_list(),
            "journal_lines": journal_lines,
            "seconds": self.clock.seconds,
            "training_seconds": self.clock.training_seconds,
            "machine": {"device": str(self.device), "mode": mode, "threads": self.threads},
            "devices": self.devices,
            "commit": self.commit,
            "dirty": self.dirty,
            "code": self.code,
            "untested": self.untested,
            "anew": self.again,
        }

    def images_before(self, iteration: int) -> int:
        """Training images seen before a 0-based iteration."""
        epochs, batches = divmod(iteration, self.per_epoch)
        n = self.config.dataset.train_images
        return epochs * n + min(batches * self.config.batch_size, n)

    @property
    def images(self) -> int:
        """Training images seen so far."""
        return self.images_before(self.iteration)

    @property
    def images_per_second(self) -> float:
        """Training images a second since the run began, testing and saving left out."""
        return self.images / max(self.clock.training_seconds, 1e-9)

    def add(self, iteration: int, loss: float, errors: int) -> None:
        """Add the loss and the errors of an iteration to the sums."""
        images = self.images_before(iteration + 1) - self.images_before(iteration)
        self.epoch_sums.add(loss, errors, images)
        self.row_sums.add(loss, errors, images)


def saved_state(config: Config, folder: Path) -> dict[str, Any] | None:
    """The checkpoint in a run's folder to go on from, or None.

    With machine.again a run starts over if it is finished, or was not begun with machine.again. Errors: UserError.
    """
    path = folder / "checkpoint.pt"
    saved = checkpoint_file.newest(path)
    if saved is None:
        return None
    if saved["identity"] != distinction(config):
        raise UserError(f"{path} belongs to another configuration: move {folder} away and run the command again.")
    written = record.path_of(Path(config.machine.results), run_name(config)).exists()
    finished = written and saved["iteration"] == saved["length"] and saved.get("untested") is None
    if config.machine.again and (finished or not saved["anew"]):
        for file in folder.iterdir():
            if file.name not in ("lock", "log.txt"):  # these are in use
                file.unlink()
        return None
    return saved


def generators(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that training draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def devices_so_far(saved: dict[str, Any] | None, device: torch.device) -> list[str]:
    """The names of the devices that a run has used, in order; the last one is `device`."""
    name = provenance.device_name(device)
    earlier: list[str] = saved.get("devices", []) if saved else []
    if saved and not earlier and saved["machine"]["device"] != str(device):
        earlier = [saved["machine"]["device"]]  # a checkpoint from before names were kept
    return earlier if earlier[-1:] == [name] else [*earlier, name]
