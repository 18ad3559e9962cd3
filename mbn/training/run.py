"""A run from its configuration to its record."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mbn.config import Config, run_name, to_dict, to_yaml
from mbn.data.datasets import load_data
from mbn.data.in_memory import Batch, Data
from mbn.measure.first_nonfinite import first_nonfinite
from mbn.methods import MBN, METHODS, group_of
from mbn.network_layers import Layers, from_config
from mbn.norm.base import norm_layers
from mbn.records import controls, provenance, record
from mbn.records.curves import curves, last_epoch
from mbn.records.sense import RESULTS
from mbn.system.cuda_graph import one_at_a_time, own_stream
from mbn.system.errors import DivergedError, UserError, first_line, lacks_memory
from mbn.system.files import lock, remove_partials, write_atomically
from mbn.system.processes import ALONE, Processes, from_environment, join
from mbn.system.signals import CODES, Stop, StoppedError, StopRequest
from mbn.training import checkpoint_file, report
from mbn.training.conditions import conditions, devices, made_by, parts_of
from mbn.training.execution import (
    COMPILED,
    GRAPHS,
    choose_device,
    choose_mode,
    choose_threads,
    eager_seconds,
    set_arithmetic,
)
from mbn.training.iteration import READ_EVERY, Update
from mbn.training.journal import Journal, NoJournal
from mbn.training.progress import Pace, Progress, say_if_busy, say_where
from mbn.training.schedule import scheduled
from mbn.training.state import State, Sums, other_version, remove_training, saved_state
from mbn.training.trained import Trained

# The files in a run's folder that are written atomically.
WRITTEN = ("checkpoint.pt", "metrics.jsonl", "config.yaml")
# Rows of the journal within an epoch.
ROWS_PER_EPOCH = 10
# At least so many seconds pass between two checkpoints at ends of epochs: on a GPU an epoch may take only a second.
SAVES_APART = 10.0

Build = Callable[[Layers], nn.Module]
OpenData = Callable[[Config, torch.device], Data]
Saved = dict[str, Any] | None  # a checkpoint


def train(
    config: Config, build: Build, stop: StopRequest | None = None, open_data: OpenData | None = None
) -> dict[str, Any] | None:
    """Train the run that config describes, from its last checkpoint if there is one, and return its record.

    None where another process has finished it until this one could lock it, unless machine.again asks for it again.

    build: makes the network from its layers. stop: says when to stop; None means on this process's signals. open_data:
    opens the data set. Runs in threads need both: a thread cannot answer signals, and threads share their images.

    All processes that torchrun started for the run call it; the main one alone reads and writes files.

    Errors: UserError, with code 75 or 130 when a signal stopped the run; the same call continues it. DivergedError when
    it diverged: its record is written.
    """
    results, name = Path(config.machine.results), run_name(config)
    folder, processes = record.run_folder(results, name), from_environment()
    join(processes, config.machine.device)
    with _memory_is_enough(config), contextlib.ExitStack() as stack:
        run_lock = processes.on_main(lambda: stack.enter_context(lock(folder / "lock")))
        if not config.machine.again and processes.from_main(record.path_of(results, name).exists):
            return None
        with one_at_a_time:  # seeds and generators belong to the process
            run = Run(config, build, folder, run_lock.check if run_lock else _nothing, open_data, processes)
        run.go_on()
        if processes.main:
            if config.machine.again and run.saved_iteration is None:  # only now, when it is known to be possible
                remove_training(folder)
            for path in (*(folder / file for file in WRITTEN), record.path_of(results, name)):
                remove_partials(path)
        run.journal = processes.on_main(run.open_journal) or NoJournal()
        with own_stream(run.state.device):
            try:
                with _signals(stop) as request:
                    run.answer(request)
                    try:
                        run.train()
                    except DivergedError as error:
                        run.end_diverged(error)
                        raise
                    return run.finish()
            finally:
                run.update.captured.clear()  # frees the memory that graphs hold


def _nothing() -> None:
    pass


def _signals(stop: StopRequest | None) -> contextlib.AbstractContextManager[StopRequest]:
    return Stop() if stop is None else contextlib.nullcontext(stop)


@contextlib.contextmanager
def _memory_is_enough(config: Config) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        few = ", machine.together" if config.machine.together > 1 else ""
        few += ", norm.memory" if getattr(config.norm, "memory", 0) > MBN.memory else ""
        raise UserError(
            f"the device's memory is not enough: try a smaller batch_size than {config.batch_size}{few}, or "
            "evaluate.batch_size; the same command goes on from the last checkpoint, and machine.mode=eager needs less "
            "memory on a GPU."
        ) from None


def add_controls(
    config: Config, build: Build, wanted: Collection[str], stop: StopRequest | None = None
) -> dict[str, Any]:
    """Measure the wanted of `controls.MEASURED` from a finished run's final checkpoint, and return its record.

    Those that other code or another machine has measured before are measured again: `by`, which says what measured, is
    one for all.
    Nothing else in the record changes except its version and checksum. stop: as for `train`.
    Errors: UserError where the final checkpoint is gone, or is not the one that the record is of, or has another test
    error here; when a signal stopped the measurement.
    """
    results, name = Path(config.machine.results), run_name(config)
    folder, path = record.run_folder(results, name), record.path_of(results, name)
    with lock(folder / "lock") as run_lock, _memory_is_enough(config):
        result = record.read(path)
        run = Run(config, build, folder, run_lock.check)
        ended = run.state.iteration == run.state.length
        controls.check_end(result, path, run.checkpoint_path, ended, run.journal_hash)
        with own_stream(run.state.device), _signals(stop) as request:
            run.answer(request)
            wanted = sorted({*wanted, *controls.elsewhere(result["controls"], run.state.now)})
            new = run.measure(wanted, result["test_error"])
            return record.rewrite(path, controls=controls.completed(result["controls"], new, run.state.now))


class Run:
    """A run: its state, its data, its journal, and the loop that trains it.

    check_lock: called before anything is written; raises UserError where the run's lock is lost.
    """

    def __init__(
        self,
        config: Config,
        build: Build,
        folder: Path,
        check_lock: Callable[[], None],
        open_data: OpenData | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.config, self.folder, self.check_lock, self.processes = config, folder, check_lock, processes
        self.checkpoint_path = folder / "checkpoint.pt"
        self.stop = StopRequest()
        self.journal: Journal | NoJournal = NoJournal()
        saved = processes.from_main(lambda: saved_state(config, folder))
        machine, earlier = config.machine, _earlier(saved, processes)
        device = choose_device(machine.device, earlier.get("device"), processes)
        threads = choose_threads(machine.threads, earlier.get("threads"), processes)
        torch.set_num_threads(threads)
        set_arithmetic(device, machine.tf32, machine.deterministic)
        # Before anything is compiled: data that are missing are said at once.
        self.data = processes.main_first(lambda: (open_data or load_data)(config, device))
        # No group of images whose statistics are taken together is in two processes.
        share = partial(processes.share, whole=group_of(config.norm) or 1)
        self.data.share = share
        torch.manual_seed(config.seed)
        model = build(from_config(config))
        for layer in norm_layers(model):
            layer.sync = processes.several  # statistics of the whole batch
        # Another kind of device has other modes: a run that a GPU goes on with is captured.
        mode_before = earlier.get("mode") if torch.device(earlier.get("device", device)).type == device.type else None
        left = 1 - saved["iteration"] / max(saved["length"], 1) if saved else 1.0
        mode = choose_mode(machine.mode, mode_before, config, model, device, threads, processes, left)
        now = conditions(machine, device, threads, mode, self.data.fingerprint, processes.size)
        trained_with = {key: now[key] for key in ("code", "data", "versions", "mode")}
        processes.check_alike(trained_with, "give all machines the same checkout, packages and data.")
        self.state = State(config, model, device, now, processes)
        self.model = self.state.model
        self.method = METHODS[config.norm.name]
        self.update = Update(
            *(self.model, self.state.optimizer, config.forwards, mode, config.precision, device),
            *(config.batch_size, processes, share),
        )
        if config.forwards == 2 and not self.method.statistics:
            print(
                f"warning: norm={config.norm.name} has no batch statistics: the second forward is skipped.",
                file=sys.stderr,
            )
        # Of the journal that goes with the checkpoint: its lines, and their SHA-256. None: there is no checkpoint.
        self.journal_lines: int | None = None
        self.journal_hash: str | None = None
        if saved:
            self._restore(saved)
            self.journal_lines, self.journal_hash = saved["journal_lines"], saved.get("journal")
        # The last checkpoint: its iteration, and when it was written.
        self.saved_iteration = self.state.iteration if saved else None
        self.saved_at = time.monotonic()

    def answer(self, request: StopRequest) -> None:
        """Stop when this request says so."""
        self.stop, request.ignores_repeats = request, self.processes.several
        request.nothing_to_save = False
        if not self.processes.several:  # else the others would wait for what this process did not get
            self.data.stop = request

    def go_on(self) -> None:
        """Say where a run that was stopped goes on, if it was one."""
        if self.saved_iteration is not None:
            self.state.go_on()

    def _restore(self, saved: dict[str, Any]) -> None:
        """Take over what a checkpoint holds. Errors: UserError for one of other code."""
        try:
            self.state.restore(saved)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if lacks_memory(error) or isinstance(error, torch.AcceleratorError):
                raise
            raise other_version(self.checkpoint_path, first_line(error)) from None

    def open_journal(self) -> Journal:
        """The journal, opened to continue from the checkpoint; rows after the checkpoint are cut off."""
        plain = to_dict(self.config)
        plain["machine"]["data"] = str(Path(self.config.machine.data).absolute())  # says where, wherever it is read
        text = to_yaml(plain)
        write_atomically(self.folder / "config.yaml", text.encode())
        return Journal(self.folder, text, self.journal_lines, self.journal_hash)

    def train(self) -> None:
        """Train to the end, or until a signal: then save and raise UserError."""
        state, update = self.state, self.update
        self._say_where()
        batches = self.data.train_batches(state.iteration, self.config.batch_size)
        row_every = iterations_between_rows(state.per_epoch)
        state.model.train()
        state.clock.start(self.stop)
        self.saved_at = time.monotonic()
        with Progress(state) as progress:
            if state.untested is not None:  # a signal came during the test that ends an epoch
                self.set_schedule(state.iteration - 1)
                self._end_epoch(progress, Pace(state))
                self.save()
            rows = Pace(state)
            self.stop.nothing_to_save = update.mode in COMPILED
            while state.iteration < state.length:
                ends = self._iterate(batches)
                progress.bar.update()
                row_due = state.iteration % state.per_epoch % row_every == 0 and not ends
                line_due = progress.line_is_due() and not self.processes.several  # whose clocks differ
                if ends or row_due or update.pending == READ_EVERY or line_due:
                    self.drain()
                    progress.show()
                if row_due:
                    self._write_row(report.row("train", state, state.row_sums, rows.look()))
                    state.row_sums = Sums()
                if ends:
                    self._end_epoch(progress, rows)
                due, stopped = self._agree(self.save_is_due(ends))
                if due or (stopped and self.saved_iteration != state.iteration):
                    self.save()
                if stopped:
                    raise self._stopped()

    def _say_where(self) -> None:
        """Print where and how this run trains, and a guess at how long."""
        state, expected = self.state, None
        on_cpu = state.device.type == "cpu"
        if on_cpu:
            expected = eager_seconds(self.config, state.model, state.device, state.threads * self.processes.size)
        say_where(state, self.update.mode, expected)
        if on_cpu and self.config.machine.threads is None and not self.processes.several:
            say_if_busy(state.threads)

    def _iterate(self, batches: Iterator[Batch]) -> bool:
        """Train on the next batch. Returns whether an epoch ends with it. Errors: UserError after a signal."""
        state, update = self.state, self.update
        self.set_schedule(state.iteration)
        try:
            images, labels = next(batches)
        except StoppedError:  # while it waited for images
            if self.saved_iteration != state.iteration:
                self.save()
            raise self._stopped() from None
        except UserError:  # an image that cannot be decoded, a worker that died: what is trained so far is sound
            if state.iteration not in (0, self.saved_iteration) and not self.processes.several:  # who save together
                self.save()
            raise
        ends = (state.iteration + 1) % state.per_epoch == 0 or state.iteration + 1 == state.length
        state.untested = report.statistics_of(state, images) if ends else None
        update.n = state.images_before(state.iteration + 1) - state.images
        update(images, labels)
        self.stop.nothing_to_save = False
        state.clock.tick()
        state.iteration += 1
        return ends

    def _agree(self, save_is_due: bool) -> tuple[bool, bool]:
        """Whether to save, and whether to stop, as all processes do it: if one is to."""
        if self.processes.lost_launcher:
            self.stop.code = self.stop.code or CODES["SIGTERM"]
        due, code = self.processes.highest(save_is_due, self.stop.code or 0)
        if code:  # else a signal may have come meanwhile, which is for the next time
            self.stop.code = int(code)
        return bool(due), bool(code) and self.state.iteration < self.state.length

    def set_schedule(self, iteration: int) -> None:
        """Set the learning rate and the method's scheduled values for this 0-based iteration."""
        for name, value in scheduled(self.config, iteration, self.state.length).items():
            if value == self.state.scheduled.get(name):
                continue
            self.state.scheduled[name] = value
            if name == "lr":
                self.state.lr.fill_(value)
            elif self.method.change:
                self.method.change.put(self.model, *value)

    def drain(self) -> None:
        """Read the losses of the iterations since the last time, and stop if one of them is not finite."""
        state, first = self.state, self.state.iteration - self.update.pending
        measured = self.update.drain()
        state.clock.count(training=True)
        for iteration, (loss, errors) in enumerate(measured, first):
            if not math.isfinite(loss):
                name = self.update.watch.first_bad(state.iteration - iteration)
                blame = f" with the norm of {name} not finite before it" if name else ""
                raise self._diverged(f"the loss was {loss} at iteration {iteration}{blame}", iteration)
            state.add(iteration, loss, errors)

    def _end_epoch(self, progress: Progress, rows: Pace) -> None:
        """Test, write the epoch's row, show it. Errors: UserError where a signal ends the test, which is then saved."""
        state, began = self.state, time.monotonic()
        assert state.untested is not None
        try:
            row = report.epoch_row(state, self.data, state.untested, rows.look(), self.stop)
        except StoppedError:
            state.model.train()
            self._agree(False)  # the signal may have come to another process alone
            self.save()
            raise self._stopped() from None
        if not math.isfinite(row["test_loss"]):
            raise self._diverged(f"the test loss was {row['test_loss']}", state.iteration - 1)
        state.untested = None
        self._write_row(row)
        progress.tested = time.monotonic() - began
        progress.show_epoch(row)
        state.row_sums, state.epoch_sums = Sums(), Sums()
        state.clock.count(training=False)

    def _write_row(self, row: dict[str, Any]) -> None:
        self.check_lock()  # a row among those of another process would make its journal useless
        self.journal.write(row)

    def save_is_due(self, epoch_ends: bool) -> bool:
        """Whether the run has ended, or the last checkpoint is old: at an epoch's end, over SAVES_APART seconds."""
        wait = min(self.config.machine.checkpoint_seconds, SAVES_APART if epoch_ends else math.inf)
        return self.state.iteration == self.state.length or time.monotonic() - self.saved_at > wait

    def save(self) -> None:
        """Write a checkpoint, unless the state is no longer finite. Errors: UserError."""
        if self.update.pending:
            self.drain()
        state, last = self.state, self.state.iteration - 1
        name = first_nonfinite(state.model)
        if name is not None:
            raise self._diverged(f"{name} is no longer finite after iteration {last}", last)
        self.check_lock()
        self.journal.sync()
        content = state.content(self.update.mode, self.journal.lines, self.journal.hash)
        if self.processes.main:
            checkpoint_file.save(content, self.checkpoint_path)
        self.saved_iteration, self.saved_at = state.iteration, time.monotonic()
        state.clock.count(training=False)

    def _stopped(self) -> UserError:
        assert self.stop.code is not None
        return UserError(
            f"stopped at iteration {self.state.iteration:,} of {self.state.length:,}, saved in {self.checkpoint_path}: "
            "the same command goes on from there.",
            code=self.stop.code,
            everywhere=True,
        )

    def _diverged(self, what: str, iteration: int) -> DivergedError:
        path, written = self.checkpoint_path, record.path_of(Path(self.config.machine.results), self.state.name)
        last = f"{path} holds the last good state" if path.exists() else "no checkpoint had been written yet"
        epoch = iteration // self.state.per_epoch + 1
        lr = scheduled(self.config, iteration, self.state.length)["lr"]
        return DivergedError(
            f"training diverged: {what} (epoch {epoch}, learning rate {lr}); {written} records that, and {last}; try a "
            "smaller schedule.lr, or delete the record and run the same command again if the machine was at fault.",
            iteration,
        )

    def end_diverged(self, error: DivergedError) -> None:
        """Write the record of a run that diverged. Errors: UserError."""
        self.state.trained_in(self.update.mode)
        nothing: dict[str, Any] = {**dict.fromkeys(RESULTS), "curves": {}, "controls": None}
        self.processes.on_main(lambda: self._write_record(nothing | {"diverged_at": error.iteration}))

    def measure(self, wanted: Collection[str], expected: float | None = None) -> dict[str, Any]:
        """The wanted of `controls.MEASURED`. expected: the test error that a finished run's network must have.

        Errors: UserError where it has another one, and after a signal.
        """
        graphs = self.update.mode in GRAPHS
        trained = Trained(self.config, self.model, self.data, self.state.device, self.stop, self.processes, graphs)
        asked = " and ".join(f"evaluate.{name}" for name in wanted)
        print(f"{self.state.name}: measuring what {asked} asks for.", flush=True)
        try:
            if expected is not None:
                self.model.eval()
                controls.check_near(trained.evaluation().error, expected, self.checkpoint_path)
            # All processes do the same steps: their own conditions, by which each has judged these, may differ.
            self.state.controls_done = self.processes.from_main(lambda: self.state.controls_done)
            return trained.controls(wanted, self.state.controls_done)
        except StoppedError:
            self._agree(False)  # the signal may have come to another process alone
            if expected is None:  # the run has not ended: what is measured is kept for the same command
                self.save()
            raise self._stopped() from None

    def finish(self) -> dict[str, Any]:
        """Write the record of a run that has reached its end, and return it. Errors: UserError after a signal."""
        wanted = controls.asked(self.config)
        measured = controls.completed(None, self.measure(wanted), self.state.now) if wanted else None
        return self.processes.from_main(lambda: self._write_record(self._results() | {"controls": measured}))

    def _results(self) -> dict[str, Any]:
        """The errors, losses and curves of a run that has reached its end."""
        assert isinstance(self.journal, Journal)
        rows = list(self.journal.rows())
        epochs = [row for row in rows if row["kind"] == "epoch"]
        last = epochs[-1]
        train_loss, train_error = last_epoch(rows, self.config.dataset.train_images)
        return {
            **{key: last[key] for key in ("test_error", "test_error_top5", "test_loss")},
            "test_error_best": min(row["test_error"] for row in epochs),
            "train_error": train_error,
            "train_loss": train_loss,
            "test_error_precise": None,  # of older records
            "curves": curves(rows),
            "diverged_at": None,
        }

    def _write_record(self, measured: dict[str, Any]) -> dict[str, Any]:
        state, results = self.state, Path(self.config.machine.results)
        content = {
            "name": state.name,
            "config": record.config_for_record(self.config),
            **measured,
            "iterations": state.length,
            "images": state.images_before(state.length),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "seconds": round(state.clock.seconds, 1),
            "images_per_second": round(state.images_per_second, 1),
            "device": devices(state.parts),
            "mode": self.update.mode,
            "threads": state.threads,
            **made_by(state.parts),
            "versions": provenance.versions(),
            "parts": state.parts,
            "journal": self.journal.hash,
        }
        self.check_lock()
        if record.content_hash(results, state.name) not in (None, state.replaces):
            raise UserError(
                f"{record.path_of(results, state.name)} appeared while this run was trained, and stays: move it away "
                "and run the command again to write this run's record, which needs no more training."
            )
        return record.write(results, content)


def _earlier(saved: Saved, processes: Processes) -> dict[str, Any]:
    """Device, threads and mode by which a run goes on as it began: threads only in as many processes."""
    if not saved:
        return {}
    as_many = parts_of(saved)[-1].get("processes", 1) == processes.size
    return {key: value for key, value in saved["machine"].items() if key != "threads" or as_many}


def iterations_between_rows(per_epoch: int) -> int:
    """Iterations between two rows of the journal within an epoch.

    A large number is rounded up to a multiple of READ_EVERY, because the losses are read then anyway.
    """
    every = max(1, per_epoch // ROWS_PER_EPOCH)
    return every if every <= READ_EVERY // 2 else -(-every // READ_EVERY) * READ_EVERY
