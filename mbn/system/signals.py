"""Stopping on a signal: finish the iteration, save, exit."""

import os
import signal
from types import FrameType
from typing import Self

# Exit codes: Ctrl-C as shells have it; EX_TEMPFAIL for a pre-emption, after which the same command resumes.
CODES = {"SIGINT": 130, "SIGTERM": 75, "SIGUSR1": 75, "SIGUSR2": 75}


class Answered:
    """While in use as a context, `_answer` answers these signals; afterwards whatever did before."""

    codes = CODES

    def _numbers(self) -> list[int]:
        return [getattr(signal, name) for name in self.codes if hasattr(signal, name)]  # Windows has not all of them

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._answer) for number in self._numbers()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _answer(self, number: int, _: FrameType | None) -> None:
        raise NotImplementedError


class Exit(Answered):
    """While in use as a context, these signals end the process with their code at once: where nothing is to be saved.

    Not by an exception, which code that is being imported may catch.
    """

    def _answer(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        os.write(2, f"error: stopped by {name} outside training: the same command goes on from there.\n".encode())
        os._exit(self.codes[name])


class StopRequest:
    """Whether training is to stop: `code` is the exit code that it then has."""

    def __init__(self) -> None:
        self.code: int | None = None


class Stop(StopRequest, Answered):
    """While in use as a context, notes the first of these signals in `code`; a second one exits at once."""

    def _answer(self, number: int, _: FrameType | None) -> None:
        code = self.codes[signal.Signals(number).name]
        if self.code is not None:
            os._exit(code)
        self.code = code
