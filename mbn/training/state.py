"""The state of a run: what training changes, what a checkpoint keeps of it, and how a checkpoint is restored."""

import contextlib
import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mbn.config import Config, distinction, images_before, iterations, iterations_per_epoch, run_name, to_dict
from mbn.measure.statistics_gap import Statistics, uses_dropout
from mbn.records import record, sense
from mbn.system.errors import UserError
from mbn.system.processes import ALONE, Processes
from mbn.system.signals import StopRequest
from mbn.training import checkpoint_file, conditions
from mbn.training.conditions import Conditions, before, parts_of, with_part
from mbn.training.journal import VIEW

# Version 1 had no parts and no hash of the journal.
VERSION = 2
# What a checkpoint of any version must have, and its types.
NEEDED: dict[str, Any] = {
    **dict.fromkeys(("identity", "config"), str),
    **dict.fromkeys(("iteration", "length", "journal_lines"), int),
    **dict.fromkeys(("seconds", "training_seconds"), (int, float)),
    **dict.fromkeys(("model", "optimizer", "generators", "machine"), dict),
    **dict.fromkeys(("epoch_sums", "row_sums"), list),
    "anew": bool,
}
# The files of a run that is trained again; what else is in its folder is not ours to delete. Without its checkpoints,
# which go first, a run starts over.
OWN_FILE = re.compile(rf"checkpoint(\.previous)?(\.damaged)?\.pt|metrics\.jsonl|config\.yaml|{VIEW}")


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
    """Seconds of a run, and how many of them were training; testing and saving are not.

    The time in which the process was suspended (Ctrl-Z) is in neither.
    """

    def __init__(self) -> None:
        self.seconds = self.training_seconds = 0.0
        self.start(StopRequest())

    def start(self, stop: StopRequest) -> None:
        """Count from now on. stop: knows whether the process was suspended."""
        self.stop = stop
        self.counted_until = self.ticked = time.monotonic()

    def tick(self) -> float:
        """To be called at each iteration, of which one in which the process was suspended is left out. Returns now."""
        now = time.monotonic()
        if self.stop.continued:
            self.stop.continued = False
            self.counted_until += now - max(self.ticked, self.counted_until)
        self.ticked = now
        return now

    def count(self, training: bool) -> None:
        """Add the time since the last call."""
        now = self.tick()
        self.seconds += now - self.counted_until
        self.training_seconds += now - self.counted_until if training else 0.0
        self.counted_until = now


class State:
    """Network, optimiser and counters of a run, and the conditions of its parts (`mbn.training.conditions`).

    scheduled: the values that `mbn.training.schedule.scheduled` gave last. epoch_sums, row_sums: sums since the epoch
    began, and since the last row of the journal. untested: between the end of an epoch's training and its test, the
    statistics of its last batch, which the epoch's row needs. controls_done: at the end, the results of those steps of
    `Trained.controls` that are done. replaces: SHA-256 of the record that this run is to replace, or None.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        device: torch.device,
        now: Conditions,
        processes: Processes = ALONE,
    ) -> None:
        self.config, self.device, self.threads = config, device, now["threads"]
        self.processes = processes
        self.name = run_name(config)
        self.length, self.per_epoch = iterations(config), iterations_per_epoch(config)
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.lr = torch.tensor(0.0, device=device)
        self.optimizer = torch.optim.SGD(
            _groups(self.model, config.optimizer.decay_norm),
            lr=self.lr,
            momentum=config.optimizer.momentum,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        self.scheduled: dict[str, Any] = {}
        self.iteration = 0
        self.epoch_sums, self.row_sums = Sums(), Sums()
        self.clock = Clock()
        self.untested: Statistics | None = None
        self.controls_done: dict[str, Any] = {}
        self.now, self.began = now, 0  # of this process: its conditions, and the iteration at which it began
        self.parts = with_part([], 0, now)
        self.again = config.machine.again
        # Only a run that is trained again finds a record: one that appears later is another's.
        self.replaces = record.content_hash(Path(config.machine.results), self.name) if self.again else None
        # Without dropout training draws no random numbers, so the first states are kept: other threads may change the
        # process's generators meanwhile.
        self.generators = None if uses_dropout(self.model) else generators(device)
        if self.generators is None and processes.rank:
            torch.manual_seed(_own_seed(config.seed, processes, 0))  # not the masks of another process

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what a checkpoint holds. Errors: whatever one of other code leads to."""
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self._restore_generators(saved)
        if self.generators is not None:
            self.generators = generators(self.device)
        self.iteration = saved["iteration"]
        self.epoch_sums, self.row_sums = Sums(*saved["epoch_sums"]), Sums(*saved["row_sums"])
        self.clock.seconds, self.clock.training_seconds = saved["seconds"], saved["training_seconds"]
        self.again = saved["anew"]
        self.replaces = saved.get("replaces", self.replaces)
        untested = saved.get("untested")
        if untested is not None:
            self.untested = {name: tuple(t.to(self.device) for t in of_one) for name, of_one in untested.items()}
        self.began, self.parts = self.iteration, parts_of(saved)
        measured = saved.get("controls", {})
        if measured.get("by") == self.now:  # not of other code, data or devices
            self.controls_done = measured["done"]

    def go_on(self) -> None:
        """Train on from a restored checkpoint: say so, and note the conditions of the part that begins."""
        print(f"{self.name}: resuming at iteration {self.iteration} of {self.length}.")
        self.parts = conditions.go_on(self.parts, self.began, self.now)

    def _restore_generators(self, saved: dict[str, Any]) -> None:
        """Go on with this process's draws; with new ones if the number of processes is another."""
        others = saved.get("other_generators", [])
        if self.generators is None and len(others) + 1 != self.processes.size:
            torch.manual_seed(_own_seed(self.config.seed, self.processes, saved["iteration"]))
            return
        own = [saved["generators"], *others][self.processes.rank if self.generators is None else 0]
        torch.set_rng_state(own["cpu"])
        if self.device.type == "cuda" and "cuda" in own:
            torch.cuda.set_rng_state(own["cuda"], self.device)

    def content(self, mode: str, lines: int, journal: str) -> dict[str, Any]:
        """What a checkpoint holds. lines, journal: how many lines the journal has by now, and their SHA-256.

        Called by all processes: where training draws, the main one gets the generators of all.
        """
        own = self.generators or generators(self.device)
        others = self.processes.everyones(own)[1:] if self.generators is None else []
        self.trained_in(mode)
        return {
            "version": VERSION,
            "name": self.name,
            "identity": distinction(self.config),
            "config": json.dumps(to_dict(self.config)),
            "iteration": self.iteration,
            "length": self.length,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generators": own,
            **({"other_generators": others} if others else {}),
            "epoch_sums": self.epoch_sums.as_list(),
            "row_sums": self.row_sums.as_list(),
            "journal_lines": lines,
            "journal": journal,
            "seconds": self.clock.seconds,
            "training_seconds": self.clock.training_seconds,
            "machine": {"device": str(self.device), "mode": mode, "threads": self.threads},
            "parts": self.parts,
            "replaces": self.replaces,
            "untested": self.untested,
            "controls": {"by": self.now, "done": self.controls_done},
            "anew": self.again,
        }

    def trained_in(self, mode: str) -> None:
        """Note the mode in this process's part: an iteration that could not be captured has changed it."""
        if mode != self.now["mode"]:
            self.now = self.now | {"mode": mode}
            self.parts = with_part(before(self.parts, self.began), self.began, self.now)

    def images_before(self, iteration: int) -> int:
        """Training images seen before a 0-based iteration."""
        return images_before(self.config, iteration)

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


def _groups(model: nn.Module, decay_norm: bool) -> list[dict[str, Any]]:
    """The optimiser's groups of parameters: all in one, or gamma and beta in a second one without weight decay.

    Gamma and beta: parameters of one dimension, except a bias beside a matrix or filters.
    """
    if decay_norm:
        return [{"params": list(model.parameters())}]
    others: list[nn.Parameter] = []
    norms: list[nn.Parameter] = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        of_map = isinstance(weight, nn.Parameter) and weight.dim() > 1
        for name, parameter in module.named_parameters(recurse=False):
            of_norm = parameter.dim() == 1 and not (of_map and name == "bias")
            (norms if of_norm else others).append(parameter)
    return [{"params": others}, {"params": norms, "weight_decay": 0.0}]


def saved_state(config: Config, folder: Path) -> dict[str, Any] | None:
    """The checkpoint in a run's folder to go on from, or None.

    With machine.again a run starts over if its record is of the training in this folder, or if that was not begun with
    machine.again; `remove_training` then deletes it. Errors: UserError.
    """
    path = folder / "checkpoint.pt"
    saved = checkpoint_file.newest(path)
    if saved is None:
        return None
    check_fields(saved, path)
    if saved["identity"] != distinction(config):
        raise UserError(f"{path} belongs to another configuration: move {folder} away and run the command again.")
    return None if config.machine.again and (not saved["anew"] or recorded(config, folder, saved)) else saved


def recorded(config: Config, folder: Path, saved: dict[str, Any]) -> bool:
    """Whether a run's record is of the training in this folder, whose checkpoint is `saved`: it ended, or diverged."""
    results, name = Path(config.machine.results), run_name(config)
    if record.content_hash(results, name) in (None, saved.get("replaces")):  # none, or of an earlier training
        return False
    with contextlib.suppress(UserError, OSError):
        found = record.read(record.path_of(results, name))
        return found["journal"] == hashlib.sha256((folder / "metrics.jsonl").read_bytes()).hexdigest()
    return False


def remove_training(folder: Path) -> None:
    """Delete what the program has written of a training into a run's folder, its checkpoints first."""
    for file in sorted(folder.iterdir()):
        if OWN_FILE.fullmatch(file.name) and file.is_file():
            file.unlink()


def check_fields(saved: dict[str, Any], path: Path) -> None:
    """Refuse a checkpoint of a version that kept other fields. Errors: UserError."""
    version = saved.get("version", 1)
    wrong = [key for key, kind in NEEDED.items() if not isinstance(saved.get(key), kind)]
    if version not in range(1, VERSION + 1):
        raise other_version(path, f"version {version}")
    if not wrong and not _has_parts(saved):
        wrong = ["parts"]
    if wrong:
        raise other_version(path, f"it lacks {', '.join(wrong)}, or holds something else there")


def _has_parts(saved: dict[str, Any]) -> bool:
    try:
        parts = parts_of(saved)
        return sense.FIELD_RULES["parts"].holds(parts) and not [*sense.wrong_in_parts(parts)]
    except (KeyError, TypeError):
        return False


def other_version(path: Path, why: str) -> UserError:
    """The error for a checkpoint that this code cannot continue."""
    return UserError(
        f"{path} is of another version of this code ({why}): go on with the code that wrote it, or move {path.parent} "
        "away and run the command again to start over."
    )


def _own_seed(seed: int, processes: Processes, iteration: int) -> int:
    """A seed for a process's draws from an iteration on, another one for each."""
    key = np.random.SeedSequence((seed, processes.size, processes.rank, iteration))
    return int(key.generate_state(1, np.uint64)[0])


def generators(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that training draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states
