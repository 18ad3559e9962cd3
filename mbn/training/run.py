"""A run from its configuration to its record."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mbn.config import Config, distinction, iterations, iterations_per_epoch, run_name, to_dict, to_yaml
from mbn.data.datasets import load
from mbn.data.in_memory import Batch, Data
from mbn.layers import Layers, from_config
from mbn.measure.precise_bn import set_precise_statistics
from mbn.measure.statistics_gap import Statistics, draws, epoch_statistics, training_statistics
from mbn.measure.test_error import Measured, batch_size_for, evaluate
from mbn.methods import METHODS
from mbn.norm.base import norm_layers
from mbn.records import provenance, record
from mbn.records.curves import curves, last_epoch
from mbn.system.cuda_graph import one_at_a_time, own_stream
from mbn.system.errors import UserError
from mbn.system.files import lock, remove_partials, write_atomically
from mbn.system.signals import Stop, Told
from mbn.training import checkpoint
from mbn.training.execution import GRAPHS, choose_mode
from mbn.training.iteration import WINDOW, Update, autocast
from mbn.training.journal import Journal
from mbn.training.schedule import value_at

# What a run's folder holds that is written atomically.
WRITTEN = ("checkpoint.pt", "metrics.jsonl", "config.yaml")
# Rows of the journal within an epoch.
ROWS_PER_EPOCH = 10
# Seconds between two checkpoints at the ends of epochs, which on a GPU may take a second each.
SAVES_APART = 10.0


def train(
    config: Config,
    build: Callable[[Layers], nn.Module],
    stop: Told | None = None,
    load: Callable[[Config, torch.device], Data] | None = None,
) -> dict[str, Any]:
    """Train the run that config describes, from its last checkpoint if there is one, and return its record.

    build: makes the network from its layers. For threads side by side, which cannot answer signals and share their
    images, stop: what tells it to stop (None: this process's signals), and load: what opens its data set.

    Errors: UserError, with code 75 or 130 when a signal stopped the run; the same call goes on from where it was.
    """
    folder = Path(config.machine.results) / "runs" / run_name(config)
    with lock(folder / "lock"), _memory_is_enough(config):
        with one_at_a_time:  # seeds and generators are the process's
            run = Run(config, build, folder, load)
        for path in (*(folder / name for name in WRITTEN), record.path_of(run.results, run.name)):
            remove_partials(path)
        run.open_journal()
        with own_stream(run.device):
            try:
                with _signals(stop) as told:
                    with run.journal:
                        run.train(told)
                    return run.finish(told)
            finally:
                run.update.recorded.clear()  # and the memory that recordings hold


def _signals(stop: Told | None) -> contextlib.AbstractContextManager[Told]:
    return Stop() if stop is None else contextlib.nullcontext(stop)


@contextlib.contextmanager
def _memory_is_enough(config: Config) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        few = ", machine.together" if config.machine.together > 1 else ""
        raise UserError(
            f"the device's memory is not enough: try a smaller batch_size than {config.batch_size}{few}, or "
            "evaluate.batch_size; the same command goes on from the last checkpoint."
        ) from None


def add_precise_error(config: Config, build: Callable[[Layers], nn.Module], stop: Told | None = None) -> dict[str, Any]:
    """Measure `test_error_precise` from a finished run's final checkpoint, add it to its record, and return that.

    Nothing else in the record changes but its checksum. stop: as for `train`. Errors: UserError where the checkpoint is
    not there any more, or when a signal stopped it.
    """
    path = record.path_of(Path(config.machine.results), run_name(config))
    folder = Path(config.machine.results) / "runs" / run_name(config)
    with lock(folder / "lock"):
        run = Run(config, build, folder)
        if run.iteration != run.length:
            raise UserError(
                f"{run.checkpoint_path} does not hold the end of the run, from which evaluate.precise=true measures: "
                "machine.again=true trains it anew."
            )
        with own_stream(run.device), _signals(stop) as told:
            return record.rewrite(path, test_error_precise=run.precise_error(told))


class Run:
    """The state of a run: network, optimiser, data, counters; what a checkpoint holds."""

    def __init__(
        self,
        config: Config,
        build: Callable[[Layers], nn.Module],
        folder: Path,
        open_data: Callable[[Config, torch.device], Data] | None = None,
    ) -> None:
        self.config = config
        self.folder = folder
        self.name = run_name(config)
        self.results = Path(config.machine.results)
        self.checkpoint_path = folder / "checkpoint.pt"
        state = self._saved_state()
        machine = state["machine"] if state else {}
        # What is left to choose is chosen once: a resumed run goes on as it began.
        self.device = choose_device(config.machine.device, machine.get("device"))
        self.threads = choose_threads(config.machine.threads, machine.get("threads"))
        torch.set_num_threads(self.threads)
        set_arithmetic(self.device, config.machine.tf32, config.machine.deterministic)
        self.commit, self.dirty = provenance.commit_and_dirty()
        self.devices = devices_so_far(state, self.device)

        self.length = iterations(config)
        self.per_epoch = iterations_per_epoch(config)
        torch.manual_seed(config.seed)
        model = build(from_config(config))
        mode = choose_mode(config.machine.mode, machine.get("mode"), config, model, self.device, self.threads)
        self.model = model.to(self.device).to(memory_format=torch.channels_last)
        self.lr = torch.tensor(0.0, device=self.device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=self.lr,
            momentum=config.optimizer.momentum,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        self.update = Update(
            self.model, self.optimizer, config.forwards, mode, config.precision, self.device, config.batch_size
        )
        if config.forwards == 2 and not self.update.layers:
            print(
                f"warning: norm={config.norm.name} has no batch statistics: the second forward is skipped.",
                file=sys.stderr,
            )
        self.change = METHODS[config.norm.name].change
        self.changed_to: tuple[float, ...] = ()
        self.iteration = 0
        self.saved = 0
        self.seconds = 0.0
        self.training_seconds = 0.0
        self.epoch_sums = Sums()
        self.row_sums = Sums()
        self.anew = config.machine.again
        if state:
            self._restore(state)
        # Without dropout training draws nothing: threads side by side must not read what others do to the generators.
        self.generators = None if draws(self.model) else self._generators()
        self.data = (open_data or load)(config, self.device)
        self.journal_lines = state["journal_lines"] if state else 0

    def open_journal(self) -> None:
        """Go on writing where the checkpoint left off; what stands behind it is cut."""
        text = to_yaml(to_dict(self.config))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "config.yaml", text.encode())
        self.journal = Journal(self.folder, text, self.journal_lines)

    # Checkpoints.

    def _saved_state(self) -> dict[str, Any] | None:
        """The state to go on from. With machine.again a finished run, or one not begun so, starts over."""
        state = checkpoint.load(self.checkpoint_path)
        if state is None:
            return None
        if state["identity"] != distinction(self.config):
            raise UserError(
                f"{self.checkpoint_path} belongs to another configuration: move {self.folder} away and run the "
                "command again."
            )
        finished = record.path_of(self.results, self.name).exists() and state["iteration"] == state["length"]
        if self.config.machine.again and (finished or not state["anew"]):
            for path in self.folder.iterdir():
                if path.name not in ("lock", "log.txt"):  # which are in use
                    path.unlink()
            return None
        return state

    def _generators(self) -> dict[str, Tensor]:
        generators = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        return generators

    def _state(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "identity": distinction(self.config),
            "config": json.dumps(to_dict(self.config)),
            "iteration": self.iteration,
            "length": self.length,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generators": self.generators or self._generators(),
            "epoch_sums": self.epoch_sums.as_list(),
            "row_sums": self.row_sums.as_list(),
            "journal_lines": self.journal.lines,
            "seconds": self.seconds,
            "training_seconds": self.training_seconds,
            "machine": {"device": str(self.device), "mode": self.update.mode, "threads": self.threads},
            "devices": self.devices,
            "commit": self.commit,
            "dirty": self.dirty,
            "anew": self.anew,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.param_groups[0]["lr"] = self.lr
        torch.set_rng_state(state["generators"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["generators"]:
            torch.cuda.set_rng_state(state["generators"]["cuda"], self.device)
        self.iteration = state["iteration"]
        self.epoch_sums = Sums(*state["epoch_sums"])
        self.row_sums = Sums(*state["row_sums"])
        self.seconds = state["seconds"]
        self.training_seconds = state["training_seconds"]
        self.anew = state["anew"]
        if state["commit"] != self.commit or state["dirty"]:
            # One record, two versions of the code: not what its commit alone would give.
            self.dirty = True
        print(f"{self.name}: resuming at iteration {self.iteration} of {self.length}.")

    def save(self) -> None:
        """Write a checkpoint, unless the state is no longer finite. Errors: UserError."""
        name = first_nonfinite(self.model)
        if name is not None:
            last = self.iteration - 1
            raise self._diverged(f"{name} is no longer finite after iteration {last}", last)
        self.journal.sync()
        checkpoint.save(self._state(), self.checkpoint_path)
        self.saved = self.iteration
        self.saved_at = time.monotonic()
        self._untimed()

    # Training.

    def train(self, stop: Told) -> None:
        """Train to the end, or until a signal: then save and raise UserError."""
        self.saved_at = self.clock = time.monotonic()
        bar = tqdm(total=self.length, initial=self.iteration, unit="it", disable=None, dynamic_ncols=True)
        batches = self.data.train_batches(self.iteration, self.config.batch_size)
        self.model.train()
        row_every = max(1, self.per_epoch // ROWS_PER_EPOCH)
        if row_every > WINDOW // 2:  # then rows wait for the windows' ends, where losses are read anyway
            row_every = -(-row_every // WINDOW) * WINDOW
        with bar:
            while self.iteration < self.length:
                position = self.iteration % self.per_epoch
                self.set_schedule(self.iteration)
                images, labels = next(batches)
                ends = position == self.per_epoch - 1 or self.iteration == self.length - 1
                training = self._training_statistics(images) if ends else {}
                self.update(images, labels)
                self.iteration += 1
                bar.update()
                row_due = (position + 1) % row_every == 0 and not ends
                if ends or row_due or self.update.pending == WINDOW:
                    self.drain()
                    bar.set_postfix_str(self.epoch_sums.shown(self.images_per_second()))
                if row_due:
                    self._row("train", self.row_sums)
                if ends:
                    self._end_of_epoch(training, bar)
                    apart = min(SAVES_APART, self.config.machine.checkpoint_seconds)
                    if self.iteration == self.length or time.monotonic() - self.saved_at > apart:
                        self.save()
                elif time.monotonic() - self.saved_at > self.config.machine.checkpoint_seconds:
                    self.drain()
                    self.save()
                if stop.code is not None and self.iteration < self.length:
                    if self.saved != self.iteration:  # else both generations would be this one
                        self.drain()
                        self.save()
                    raise self._stopped(stop.code)

    def _stopped(self, code: int) -> UserError:
        return UserError(
            f"stopped at iteration {self.iteration} of {self.length}, saved in {self.checkpoint_path}: the same "
            "command goes on from there.",
            code=code,
        )

    def _training_statistics(self, images: Tensor) -> Statistics:
        with autocast(self.device, self.config.precision):
            return training_statistics(self.model, images)

    def set_schedule(self, iteration: int) -> None:
        """Put learning rate and what changes of the method to their values for this 0-based iteration."""
        schedule = self.config.schedule
        lr = value_at(schedule.lr, schedule.milestones, iteration, self.length)
        if lr != getattr(self, "_lr_set", None):
            self._lr_set = lr
            self.lr.fill_(lr)
        if self.change:
            values = self.change.values(self.config, iteration, self.length)
            if values != self.changed_to:
                self.changed_to = values
                self.change.put(self.model, *values)

    def drain(self) -> None:
        """Read the losses of the iterations since the last time, and stop if one of them is not finite."""
        pending = self.update.pending
        for offset, (loss, errors) in enumerate(self.update.drain()):
            iteration = self.iteration - pending + offset
            if loss != loss or loss in (float("inf"), float("-inf")):
                name = self.update.watch.first_bad(pending - offset)
                blame = f" with the norm of {name} not finite before it" if name else ""
                raise self._diverged(f"the loss was {loss} at iteration {iteration}{blame}", iteration)
            images = self._images_at(iteration + 1) - self._images_at(iteration)
            self.epoch_sums.add(loss, errors, images)
            self.row_sums.add(loss, errors, images)
        now = time.monotonic()
        self.training_seconds += now - self.clock
        self.seconds += now - self.clock
        self.clock = now

    def _diverged(self, what: str, iteration: int) -> UserError:
        last = f"{self.checkpoint_path} holds the last good state" if self.checkpoint_path.exists() else ""
        lr = value_at(self.config.schedule.lr, self.config.schedule.milestones, iteration, self.length)
        epoch = iteration // self.per_epoch + 1
        return UserError(
            f"training diverged: {what} (epoch {epoch}, learning rate {lr}); "
            + (last or "no checkpoint had been written yet")
            + "; try a smaller schedule.lr."
        )

    def _end_of_epoch(self, training: Statistics, bar: tqdm) -> None:
        statistics = epoch_statistics(self.model, training)
        self.model.eval()
        measured = self._evaluate()
        self.model.train()
        speed = self.images_per_second()
        tested = {
            "test_loss": measured.loss,
            "test_error": measured.error,
            "test_error_top5": measured.error_top5,
        }
        epoch = self.iteration / self.per_epoch
        sums = self.epoch_sums
        bar.write(
            f"epoch {epoch:g} of {self.length / self.per_epoch:g}: training loss {sums.loss:.4f}, error "
            f"{sums.error:.2f} %; test loss {measured.loss:.4f}, error {measured.error:.2f} %; {speed:.0f} images/s",
            file=sys.stdout,
        )
        sys.stdout.flush()
        self._row("epoch", sums, tested | statistics)
        self.row_sums = Sums()
        self.epoch_sums = Sums()
        self._untimed()

    def _untimed(self) -> None:
        """Count the time since the last drain as the run's, but not as training."""
        now = time.monotonic()
        self.seconds += now - self.clock
        self.clock = now

    def _evaluate(self) -> Measured:
        with autocast(self.device, self.config.precision):
            return evaluate(self.model, self.data.test_batches(batch_size_for(self.config, self.device)))

    def precise_error(self, stop: Told) -> float | None:
        """Test error in percent with statistics taken anew over an epoch of training, which are then put back.

        The images are augmented as in training: it is their statistics that the weights were trained with. Those of
        plain images differ by more than the control is to tell (ResNet-56, BN, batch 8: 18.1 % against 15.7 %).
        """
        if not norm_layers(self.model):
            print(f"warning: norm={self.config.norm.name} has no statistics to take anew.", file=sys.stderr)
            return None
        self.set_schedule(self.length - 1)  # lambda, r_max and d_max as training ended with
        batches = self._until(stop, self.data.train_batches(0, self.config.batch_size))
        kept = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        with autocast(self.device, self.config.precision):
            set_precise_statistics(self.model, islice(batches, self.per_epoch), self.update.mode in GRAPHS)
        error = self._evaluate().error
        self.model.load_state_dict(kept)
        return error

    def _until(self, stop: Told, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Batches, but UserError once a signal has come."""
        for batch in batches:
            if stop.code is not None:
                raise self._stopped(stop.code)
            yield batch

    def _row(self, kind: str, sums: "Sums", extra: dict[str, Any] | None = None) -> None:
        """Write a row of the journal: what sums hold, the schedule, and more."""
        row: dict[str, Any] = {
            "kind": kind,
            "iteration": self.iteration,
            "epoch": self.iteration / self.per_epoch,
            "images": self._images_at(self.iteration),
            "train_loss": sums.loss,
            "train_error": sums.error,
            "lr": self._lr_set,
            "images_per_second": round(self.images_per_second(), 1),
        }
        if self.change and self.change.logged:
            row[self.change.logged] = self.changed_to[0]
        self.journal.write(row | (extra or {}))
        if kind == "train":
            self.row_sums = Sums()

    def images_per_second(self) -> float:
        """Training images a second since the run began, evaluation and saving left out."""
        return self._images_at(self.iteration) / max(self.training_seconds, 1e-9)

    def _images_at(self, iteration: int) -> int:
        """Training images seen before a 0-based iteration."""
        epochs, batches = divmod(iteration, self.per_epoch)
        n = self.config.dataset.train_images
        return epochs * n + min(batches * self.config.batch_size, n)

    # The end.

    def finish(self, stop: Told) -> dict[str, Any]:
        """Write the record of a run that has reached its end, and return it. Errors: UserError after a signal."""
        rows = list(self.journal.rows())
        epochs = [row for row in rows if row["kind"] == "epoch"]
        last = epochs[-1]
        train_loss, train_error = last_epoch(rows, self.config.dataset.train_images)
        content = {
            "name": self.name,
            "config": record.config_for_record(self.config),
            "test_error": last["test_error"],
            "test_error_best": min(row["test_error"] for row in epochs),
            "train_error": train_error,
            "test_error_top5": last["test_error_top5"],
            "test_error_precise": self.precise_error(stop) if self.config.evaluate.precise else None,
            "test_loss": last["test_loss"],
            "train_loss": train_loss,
            "iterations": self.length,
            "images": self._images_at(self.length),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "seconds": round(self.seconds, 1),
            "images_per_second": round(self.images_per_second(), 1),
            "device": ", then ".join(self.devices),
            "mode": self.update.mode,
            "threads": self.threads,
            "commit": self.commit,
            "dirty": self.dirty,
            "versions": provenance.versions(),
            "curves": curves(rows),
        }
        return record.write(self.results, content)


class Sums:
    """Losses, errors and images added up: added in the order of iterations, so that a resume gives the same bits."""

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
        """Mean loss an image."""
        return self.losses / max(self.images, 1)

    @property
    def error(self) -> float:
        """Percent of the images."""
        return 100 * self.errors / max(self.images, 1)

    def shown(self, speed: float) -> str:
        return f"loss {self.loss:.4f}, error {self.error:.2f} %, {speed:.0f} images/s"


def choose_device(wanted: str, earlier: str | None) -> torch.device:
    """The device that is asked for; for auto the one the run began on, else CUDA where there is one, else the CPU."""
    name = wanted
    if wanted == "auto":
        name = earlier or ("cuda" if torch.cuda.is_available() else "cpu")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[name.split(":")[0]]:
        began = "the run began on it, and " if wanted == "auto" else ""
        raise UserError(f"there is no {name} here: {began}machine.device=cpu goes on on the CPU.")
    if earlier and name != earlier:
        print(
            f"warning: the run began on {earlier}; on {name} it will not end with the same bits.",
            file=sys.stderr,
        )
    return torch.device(name)


def devices_so_far(state: dict[str, Any] | None, device: torch.device) -> list[str]:
    """The names of the devices that a run has used, in their order, device as the last one."""
    name = provenance.device_name(device)
    earlier: list[str] = state.get("devices", []) if state else []
    if state and not earlier and state["machine"]["device"] != str(device):
        earlier = [state["machine"]["device"]]  # before names were kept
    return earlier if earlier[-1:] == [name] else [*earlier, name]


def set_arithmetic(device: torch.device, tf32: bool, deterministic: bool) -> None:
    """What machine.tf32 and machine.deterministic ask of torch, for this process."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = not deterministic
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # Which finds bugs, and costs a launch a tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def choose_threads(wanted: int | None, earlier: int | None) -> int:
    """CPU threads: as asked for, or as the run began, or torch's choice. Another number changes the last bits."""
    threads = wanted or earlier or torch.get_num_threads()
    if earlier and threads != earlier:
        print(
            f"warning: the run began with {earlier} threads; with {threads} it will not end with the same bits.",
            file=sys.stderr,
        )
    return threads


def first_nonfinite(model: nn.Module) -> str | None:
    """The name of the first parameter or buffer that holds a NaN or an infinity. Waits for the device once if none."""
    tensors = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
    # A sum is finite only if all its terms are (a finite sum that overflows is no state to go on from either).
    sums = torch.stack([t.sum(dtype=torch.float32) for t in tensors.values()])
    bad = ~torch.isfinite(sums)
    if not bad.any().item():
        return None
    return list(tensors)[int(bad.nonzero()[0].item())]
