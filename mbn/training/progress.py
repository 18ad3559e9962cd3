"""What a person sees while a run trains: where it runs, how far it is, how fast it goes, how long it still takes."""

import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mbn.records.provenance import described
from mbn.system.durations import duration
from mbn.training.conditions import made_by
from mbn.training.execution import COMPILED
from mbn.training.state import State

# Without a terminal, seconds between two lines.
LINES_APART = 30.0
# A rate is measured over at least so many seconds: over one iteration it would jump.
RATES_APART = 5.0


class Pace:
    """Training images a second since the last look; testing and saving are left out."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.images, self.seconds = state.images, state.clock.training_seconds

    @property
    def elapsed(self) -> float:
        """Seconds of training since the last look."""
        return self.state.clock.training_seconds - self.seconds

    def look(self) -> float:
        images, elapsed = self.state.images - self.images, self.elapsed
        self.images, self.seconds = self.state.images, self.state.clock.training_seconds
        return images / elapsed if elapsed > 0 else self.state.images_per_second


class Progress:
    """A bar in a terminal; elsewhere a line now and then. A context manager. `tested`: seconds of the last test."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.bar = tqdm(total=state.length, initial=state.iteration, unit="it", disable=None, dynamic_ncols=True)
        self.pace, self.rate = Pace(state), 0.0
        self.begun_at = state.iteration
        self.last_line = time.monotonic()
        self.tested = 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def line_is_due(self) -> bool:
        return self.bar.disable and time.monotonic() - self.last_line > LINES_APART

    def show(self) -> None:
        """Show the epoch's losses so far and the rate, beside the bar or in a line."""
        sums = self.state.epoch_sums
        if self.line_is_due():
            self._measure()
            self._print(
                f"iteration {self.state.iteration:,} of {self.state.length:,}: loss {sums.loss:.4f}, error "
                f"{sums.error:.2f} % in this epoch{self._rate_and_rest()}"
            )
        elif not self.bar.disable:
            self._measure()
            self.bar.set_postfix_str(f"loss {sums.loss:.4f}, error {sums.error:.2f} %, {self._rate()}")

    def show_epoch(self, row: dict[str, Any]) -> None:
        """The line that an epoch leaves."""
        self._measure()
        self._print(
            f"epoch {_short(row['epoch'])} of {_short(self.state.length / self.state.per_epoch)}: training loss "
            f"{row['train_loss']:.4f}, error {row['train_error']:.2f} %; test loss {row['test_loss']:.4f}, error "
            f"{row['test_error']:.2f} %{self._rate_and_rest()}"
        )

    def _measure(self) -> None:
        if self.state.iteration <= self.begun_at + 1:
            self.pace = Pace(self.state)  # the first iteration compiles
        elif self.pace.elapsed >= RATES_APART or (self.rate == 0 and self.pace.elapsed > 0):
            self.rate = self.pace.look()

    def _rate(self) -> str:
        return f"{self.rate:.0f} images/s" if self.rate >= 10 else f"{self.rate:.1f} images/s"

    def _rate_and_rest(self) -> str:
        state = self.state
        if self.rate == 0:
            return ""
        text = f"; {self._rate()}"
        if state.iteration == state.length:
            return text
        tests = -(-state.length // state.per_epoch) - state.iteration // state.per_epoch
        rest = (state.images_before(state.length) - state.images) / self.rate + tests * self.tested
        return f"{text}, {duration(rest)} left"

    def _print(self, text: str) -> None:
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()
        self.last_line = time.monotonic()


def _short(epochs: float) -> str:
    """3, 0.33, 0.0077: two digits of a fraction that count."""
    return f"{epochs:.2f}".rstrip("0").rstrip(".") if epochs >= 0.1 else f"{epochs:.2g}"


def say_where(state: State, mode: str, expected: float | None) -> None:
    """One line before the first iteration; expected: a guess at the seconds of the whole run, if there is one."""
    left = state.length - state.iteration
    compiling = " (compiling takes a minute or two before the first iteration)" if mode in COMPILED else ""
    threads = f"{state.threads} thread{'s' * (state.threads != 1)}"
    if state.processes.several:
        threads = f"{state.processes.size} processes, each with {threads}"
    rest = " left" if state.iteration else ""
    guess = "" if expected is None else f", about {duration(expected * left / state.length)}{rest} (a rough guess)"
    device = state.parts[-1]["device"]
    print(
        f"{state.name}: {state.length:,} iteration{'s' * (state.length != 1)} on {device}, mode {mode}"
        f"{compiling}, {threads}, commit {described(made_by(state.parts))}{guess}",
        flush=True,
    )


def say_if_busy(threads: int) -> None:
    """One line where other processes leave no processors for so many threads: they would wait for each other."""
    if threads > 1 and tasks_of_others() + threads > (os.cpu_count() or 1):
        print(
            f"note: other processes keep this machine busy, and the {threads} threads of this run will wait for each "
            "other: machine.threads=1 is faster then.",
            file=sys.stderr,
        )


def tasks_of_others() -> int:
    """How many other tasks are running or wait for a processor: the median of five looks. Without Linux's /proc: 0."""
    running = []
    for _ in range(5):
        try:
            # 0.20 0.18 0.12 3/80 11206: three of 80 tasks, this one among them.
            running.append(int(Path("/proc/loadavg").read_text(encoding="utf-8").split()[3].partition("/")[0]) - 1)
        except (OSError, ValueError, IndexError):
            return 0
        time.sleep(0.02)
    return round(statistics.median(running))
