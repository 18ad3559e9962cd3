"""Runs side by side, each a `train.py` of its own or a thread; they can be stopped together and resumed later."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from mbn.launch.missing_runs import PlannedRun
from mbn.records import record
from mbn.system import signals
from mbn.system.command_line import failure
from mbn.system.errors import UserError, printable
from mbn.system.files import LOCKED, is_locked

# Seconds between two looks at the children.
LOOK = 0.1
# Seconds after which children that were asked to stop are killed: no iteration and no checkpoint takes so long.
DEAF_SECONDS = 600.0
# Seconds that a process needs to import torch: before that there is nothing to save.
START_SECONDS = 5.0
# Seconds for which a lane compiles. Tests of other lanes wait meanwhile, which then could not stop in time.
LANE_START_SECONDS = 90.0


class StopAll(signals.Stop):
    """Context manager: inside, the first signal is noted in `code`; after it Ctrl-C calls `kill` and exits at once.

    SIGCONT calls `went_on`. The children have sessions of their own: a closed terminal (SIGHUP) reaches this process.
    """

    first_answer = "stopping: the runs save after their iteration; a second Ctrl-C ends them at once, without saving."

    def __init__(self, kill: Callable[[], None], went_on: Callable[[], None]) -> None:
        super().__init__()
        self._kill, self._went_on = kill, went_on

    def _end(self, code: int) -> None:
        self._kill()
        super()._end(code)

    def _continue(self) -> None:
        self._went_on()


@dataclass
class Outcome:
    """What became of the runs: their names, and the reason for each that failed.

    diverged: those of the runs in `done` that diverged, and what they said: they are finished, and have no errors.
    """

    done: list[str] = field(default_factory=list)
    diverged: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    code: int | None = None  # exit code for the signal that stopped it
    spent: bool = False  # whether the budget was spent


class Child(Protocol):
    """A run that is being trained, as a process or a thread. asked: whether it was asked to stop.

    reason: why it failed, where that is known without its log.
    """

    run: PlannedRun
    log: Path
    asked: bool
    reason: str | None

    def code(self) -> int | None:
        """The exit code of train.py, None while it runs."""

    def stop(self) -> None:
        """Ask it to save and exit."""

    def went_on(self) -> None:
        """Note that this process was suspended and has continued."""

    def wait(self) -> None:
        """Return when it has ended."""

    def kill(self) -> None:
        """End it at once, with all that it started."""


class Process(Child):
    """A run as a `train.py` of its own, whose output goes to log.txt in its folder. Errors: UserError."""

    def __init__(self, run: PlannedRun, command: Sequence[str], results: Path) -> None:
        self.run, self.log, self.asked = run, run.folder(results) / "log.txt", False
        self.reason = None
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as output:
                # A session of its own, so that Ctrl-C in the terminal reaches it only once, through this process.
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=os.environ | {"PYTHONIOENCODING": "utf-8:backslashreplace"},  # in which its log is read
                )
        except OSError as error:
            raise UserError(
                f"it cannot be started with its log in {self.log} ({error.strerror}): make that writable and run the "
                "command again."
            ) from None

    def code(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        if not self.asked:
            self.asked = True
            with contextlib.suppress(ProcessLookupError):
                # To the process, not its group: workers that read images must live until it has saved.
                self.process.send_signal(signal.SIGTERM)

    def went_on(self) -> None:
        """It has a session of its own, and was not suspended."""

    def wait(self) -> None:
        self.process.wait()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Pool:
    """Trains runs, `jobs` at a time, in their order.

    start: a function that starts a run, given the results folder. budget: seconds after which nothing runs any more,
    or None. margin: runs are asked to stop at most this many seconds earlier, to finish their iteration or evaluation
    and to save. starting: at most so many seconds a run needs until its first iteration: none begins with less left.
    """

    def __init__(
        self,
        runs: Sequence[PlannedRun],
        results: Path,
        jobs: int,
        start: Callable[[PlannedRun, Path], Child],
        budget: float | None = None,
        margin: float = 60.0,
        starting: float = START_SECONDS,
    ) -> None:
        self.results, self.jobs, self.start = results, jobs, start
        self.queue = deque(runs)
        self.elsewhere: list[PlannedRun] = []  # held by another process
        self.children: list[Child] = []
        self.outcome = Outcome()
        self.deadline = None if budget is None else time.monotonic() + budget
        most = max(START_SECONDS, (budget or 0.0) / 10)
        self.margin, self.starting = min(margin, most), min(starting, most)
        self.said_waiting = False
        self.stopped_at: float | None = None  # when the children were asked to stop
        # smoothing=0: many runs end at about the same time, so the mean speed since the start predicts best
        self.bar = tqdm(total=len(runs), unit="run", disable=None, dynamic_ncols=True, smoothing=0)

    def work(self) -> Outcome:
        """Train until nothing is left, the budget is spent or a signal comes; no child is left behind."""
        with StopAll(self.kill, self.went_on) as stop, self.bar:
            try:
                while self._step(stop):
                    time.sleep(LOOK)
            finally:
                for child in self.children:
                    child.stop()
                for child in self.children:
                    child.wait()
            self.outcome.code = stop.code
        self.outcome.left += [run.name for run in (*self.elsewhere, *self.queue)]
        return self.outcome

    def went_on(self) -> None:
        for child in self.children:
            child.went_on()

    def kill(self) -> None:
        # Processes first: killing a thread ends this process, before the rest of the list is reached.
        for child in sorted(self.children, key=lambda c: not isinstance(c, Process)):
            child.kill()

    def _step(self, stop: StopAll) -> bool:
        """Look after the children once; False when there is nothing more to do."""
        for child, code in [(c, c.code()) for c in self.children]:
            if code is not None:
                self.children.remove(child)
                with self._alone(child.run):
                    self._ended(child, code, stop.code is not None)
        remaining = float("inf") if self.deadline is None else self.deadline - time.monotonic()
        unfinished = bool(self.queue or self.elsewhere or self.children)
        if remaining < self.margin + self.starting and not self.children:
            self.outcome.spent = unfinished
            return False
        if stop.code is not None or remaining < self.margin:
            self.outcome.spent = self.outcome.spent or stop.code is None
            for child in self.children:
                child.stop()
            self.stopped_at = self.stopped_at or time.monotonic()
            if remaining < 0 or time.monotonic() - self.stopped_at > DEAF_SECONDS:
                self.kill()
            return bool(self.children)
        if remaining > self.margin + self.starting:
            self._start()
        return unfinished

    def _start(self) -> None:
        """Fill the free places."""
        self.queue.extend(self.elsewhere)
        self.elsewhere = []
        while self.queue and len(self.children) < self.jobs:
            run = self.queue.popleft()
            with self._alone(run):
                if is_locked(run.folder(self.results) / "lock"):
                    self.elsewhere.append(run)
                elif run.finished(self.results):  # by another process, since the start
                    self._finished(run, " (by another process)")
                else:
                    self.children.append(self.start(run, self.results))
        if self.elsewhere and not self.children and not self.queue and not self.said_waiting:
            self.said_waiting = True
            self._say(f"waiting for {len(self.elsewhere)} runs that other processes train")

    @contextlib.contextmanager
    def _alone(self, run: PlannedRun) -> Iterator[None]:
        """Inside, an error is this run's own: it has failed, and the others go on."""
        try:
            yield
        except Exception as error:
            self._failed(run, failure(error))

    def _ended(self, child: Child, code: int, stopping: bool) -> None:
        """stopping: whether a signal has come, which a cluster may have sent to the child too."""
        run = child.run
        if code == 0 and run.finished(self.results):
            self._finished(run)
        elif code == LOCKED:
            self.elsewhere.append(run)
        elif (child.asked or stopping) and (code in signals.CODES.values() or code < 0):
            self.queue.appendleft(run)
        else:
            reason = child.reason or last_line(child.log)
            if code in signals.CODES.values() or code < 0:
                reason = f"stopped from outside with exit code {code}"
            elif run.finished(self.results) and record.diverged(self._record(run)):
                self._finished(run, reason=reason)
                return
            self._failed(run, reason, f" (log: {child.log})")

    def _record(self, run: PlannedRun) -> dict[str, Any]:
        return record.read(record.path_of(self.results, run.name))

    def _finished(self, run: PlannedRun, how: str = "", reason: str | None = None) -> None:
        result = self._record(run)
        if record.diverged(result):
            end = record.divergence(result)
            self.outcome.diverged[run.name] = printable(reason or end)
        else:
            end = f"test error {result['test_error']:.2f} %"
        text = f"{run.name}: {end}, {result['seconds']:.0f} s{how}"
        self.outcome.done.append(run.name)
        self.bar.update()
        self._say(text)

    def _failed(self, run: PlannedRun, reason: str, where: str = "") -> None:
        reason = printable(reason)
        self.outcome.failed[run.name] = reason + where
        self.bar.update()
        self._say(f"{run.name}: failed: {reason}")

    def _say(self, text: str) -> None:
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()


def last_line(log: Path) -> str:
    """The last line of a failed run's log; progress bars are not written to it."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"its log cannot be read ({error.strerror})"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else "its log is empty"
