"""Stopping on a signal: finish the iteration, save, exit."""

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, Self, TypeVar

Item = TypeVar("Item")

# Exit codes: 130 for Ctrl-C, as in shells; 75 (EX_TEMPFAIL) for a pre-emption, or a closed terminal (SIGHUP), after
# which the same command resumes.
CODES = {"SIGINT": 130, "SIGTERM": 75, "SIGHUP": 75, "SIGUSR1": 75, "SIGUSR2": 75}


def say(text: str) -> None:
    """Write a line to stderr at once, as far as it is open."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))


class Answered:
    """Context manager: inside, `_answer` handles these signals; afterwards the earlier handlers do again."""

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[int, Any] = {}

    def _numbers(self) -> list[int]:
        # Windows lacks some. Where nohup has set SIGHUP to be ignored, it stays ignored. SIGINT, which a shell script
        # sets to be ignored in its background jobs, is answered all the same.
        known = [getattr(signal, name) for name in CODES if hasattr(signal, name)]
        ignored = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        return [number for number in known if not (ignored and number == signal.SIGHUP)]

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._answer) for number in self._numbers()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _answer(self, number: int, _: FrameType | None) -> None:
        raise NotImplementedError

    def _exit(self, number: int, when: str) -> None:
        """End the process with the signal's code and a line that says when it came."""
        name = signal.Signals(number).name
        say(f"stopped by {name} {when}: the same command goes on from there.")
        os._exit(CODES[name])


class Exit(Answered):
    """Context manager: inside, these signals end the process at once with their code, because nothing needs saving.

    They raise no exception: a module that is just being imported might catch it. silent: without a line, as for one of
    several processes, which torchrun ends when another has made a mistake.
    """

    def __init__(self, silent: bool = False) -> None:
        super().__init__()
        self.silent = silent

    def _answer(self, number: int, _: FrameType | None) -> None:
        if self.silent:
            os._exit(CODES[signal.Signals(number).name])
        self._exit(number, "outside training")


class _Loading(Answered):
    """As Exit, while a program is being imported. SIGINT is answered also in a background job of a shell script, which
    begins with it ignored: so it is while training.
    """

    def _answer(self, number: int, _: FrameType | None) -> None:
        self._exit(number, "while it started")


_loading = contextlib.ExitStack()


def answer_while_loading() -> None:
    """From now until `loaded`, these signals end the process at once with their code. A program calls it before its
    other imports, which take seconds.
    """
    _loading.enter_context(_Loading())


def loaded() -> None:
    """The signals do again what they did before `answer_while_loading`."""
    _loading.close()


# Seconds that a measurement may still take after a signal, to reach its end.
FINISH_WITHIN = 2.0


class StoppedError(Exception):
    """A measurement that a request to stop has ended early."""


class StopRequest:
    """Whether training is to stop: `code` is then the exit code, else None.

    nothing_to_save: whether a stop would lose nothing now. ignores_repeats: whether a second Ctrl-C changes nothing,
    because the terminal and torchrun both pass it on. continued: whether the process was suspended (Ctrl-Z)
    and has continued since this was last set to False: the time between was no training.
    """

    def __init__(self) -> None:
        super().__init__()
        self.code: int | None = None
        self.nothing_to_save = self.ignores_repeats = False
        self.continued = False

    def checked(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same items. Errors: StoppedError FINISH_WITHIN seconds after a request to stop."""
        asked = None
        for item in items:
            if self.code is not None:
                asked = asked or time.monotonic()
                if time.monotonic() - asked > FINISH_WITHIN:
                    raise StoppedError
            yield item


class Stop(StopRequest, Answered):
    """Context manager: inside, the first of these signals is noted in `code`. SIGCONT is noted in `continued`.

    While `nothing_to_save`, as before the first iteration, which may compile for minutes, each exits at once. After the
    first signal Ctrl-C exits at once (a line says so where the first one was Ctrl-C too), and others change nothing:
    clusters, terminals that are closed and the end of a session often send two.
    """

    first_answer = "stopping: it saves after this iteration; a second Ctrl-C ends it at once, without saving."

    def _numbers(self) -> list[int]:
        return super()._numbers() + [getattr(signal, name) for name in ("SIGCONT",) if hasattr(signal, name)]

    def _answer(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGCONT":
            self._continue()
            return
        code = CODES[name]
        if self.nothing_to_save:
            self._exit(number, "before the first iteration")
        if self.code is not None:
            if name == "SIGINT" and not self.ignores_repeats:
                self._end(code)
            return
        self.code = code
        if name == "SIGINT" and not self.ignores_repeats:
            say(self.first_answer)

    def _continue(self) -> None:
        self.continued = True

    def _end(self, code: int) -> None:
        os._exit(code)
