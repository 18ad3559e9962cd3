"""Several runs trained at the same time in one process, each in a thread: one alone leaves most of a GPU idle."""

import contextlib
import contextvars
import dataclasses
import gc
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from mbn.config import DATASETS, Config, Dropout
from mbn.data.datasets import SharedData
from mbn.data.in_memory import Data
from mbn.launch.missing_runs import PlannedRun
from mbn.launch.pool import Child
from mbn.system.command_line import LastingStream, failure
from mbn.system.cuda_graph import allow_many_streams, one_at_a_time, shared_thread
from mbn.system.errors import UserError
from mbn.system.signals import StopRequest, say

# A function that trains a run, given its configuration, the request to stop, and a function that opens its data set.
Train = Callable[[Config, StopRequest, Callable[[Config, torch.device], Data]], None]
# Settings of the process: all its lanes (runs in threads) share them.
OF_THE_PROCESS = ("device", "deterministic", "tf32", "threads", "data", "results")


@contextlib.contextmanager
def switching_often() -> Iterator[None]:
    """Inside, Python switches between threads more often: a thread that compiles must not delay those that only launch
    graphs.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def fits(config: Config) -> bool:
    """Whether a run can be a lane. Not with dropout, which draws from the process's generator, nor with loaders, which
    fork the process.
    """
    dropout = isinstance(config.model, Dropout) and config.model.dropout > 0
    return not dropout and not DATASETS[config.dataset.name].streamed


def check_alike(configs: list[Config]) -> None:
    """Check that runs agree in the settings that lanes share. Errors: UserError where they do not."""
    for key in OF_THE_PROCESS:
        values = {str(getattr(config.machine, key)) for config in configs}
        if len(values) > 1:
            raise UserError(
                f"runs in one process have one machine.{key}, not {' and '.join(sorted(values))}: give them the same, "
                "or leave machine.together out.",
                code=2,
            )


class Lanes:
    """Starts each run as a thread of this process; `pool.Process` starts each as a process of its own.

    Used as a context manager: inside, what a lane prints goes to its own log. jobs: how many train at a time, for the
    record.
    """

    def __init__(self, train: Train, jobs: int) -> None:
        self.train, self.jobs = train, jobs
        self.open_data = SharedData()
        self.output = PerThread(sys.stdout), PerThread(sys.stderr)
        self.inside = contextlib.ExitStack()
        allow_many_streams()

    def __enter__(self) -> "Lanes":
        out, err = self.output
        redirected = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
        for context in (*redirected, switching_often(), shared_thread()):
            self.inside.enter_context(context)
        return self

    def __exit__(self, *_: object) -> None:
        self.inside.close()

    def __call__(self, run: PlannedRun, results: Path) -> "Lane":
        machine = dataclasses.replace(run.config.machine, together=self.jobs)
        config = dataclasses.replace(run.config, machine=machine)
        log = run.folder(results) / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)  # an error is this run's alone
        return Lane(run, log, lambda stop: self.train(config, stop, self.open_data), self.output)


class Lane(Child):
    """A run in a thread."""

    def __init__(
        self, run: PlannedRun, log: Path, train: Callable[[StopRequest], None], output: tuple["PerThread", ...]
    ) -> None:
        self.run, self.log, self.asked = run, log, False
        self.train, self.output = train, output
        self.signal = StopRequest()
        self.result = 1
        self.reason: str | None = None
        # Opened here, so that a log that cannot be written is an error of the start.
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(log.open("a", buffering=1, encoding="utf-8"))
            self.thread = threading.Thread(target=self._work, args=(file,), name=run.name, daemon=True)
            self.thread.start()
            stack.pop_all()  # the thread closes it

    def _work(self, file: TextIO) -> None:
        with file, contextlib.ExitStack() as stack:
            log = LastingStream(file)
            for stream in self.output:
                stack.enter_context(stream.to(log))
            try:
                self.train(self.signal)
                self.result = 0
            except UserError as error:
                print(error.shown(), file=sys.stderr)
                self.result, self.reason = error.code, str(error)
            except torch.AcceleratorError as error:
                _end_process(self.run, error, log)
            except BaseException as error:
                self.reason = failure(error)
                print(f"error: {self.reason}", file=sys.stderr)
            log.flush()
        with one_at_a_time:
            gc.collect()  # a run is full of reference cycles, which hold the device's memory until then

    def code(self) -> int | None:
        return None if self.thread.is_alive() else self.result

    def stop(self) -> None:
        self.asked, self.signal.code = True, 75

    def went_on(self) -> None:
        self.signal.continued = True

    def wait(self) -> None:
        self.thread.join()

    def kill(self) -> None:
        """End the process: a thread cannot be ended alone."""
        say("stopped at once: the same command goes on from the last checkpoints.")
        os._exit(75)


def _end_process(run: PlannedRun, error: Exception, log: LastingStream) -> None:
    """End the process: after an error of the device, no lane of this process can use it any more."""
    traceback.print_exception(error)
    log.flush()
    what = str(error).strip().partition("\n")[0]
    say(
        f"error: {run.name}: {what}: the device no longer answers, so all runs of this process stop; the same command "
        "goes on from their last checkpoints."
    )
    os._exit(1)


class PerThread:
    """A text stream that writes to another stream for threads that ask for it by `to`, and for what they start."""

    def __init__(self, usual: TextIO) -> None:
        self.own: contextvars.ContextVar[TextIO | LastingStream] = contextvars.ContextVar("own", default=usual)

    @contextlib.contextmanager
    def to(self, stream: LastingStream) -> Iterator[None]:
        """Send what this thread writes to stream."""
        token = self.own.set(stream)
        try:
            yield
        finally:
            self.own.reset(token)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own.get(), name)
