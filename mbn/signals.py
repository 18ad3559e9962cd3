"""Stopping on a signal: finish the iteration, save, exit."""

import os
import signal
from types import FrameType

# Exit codes: Ctrl-C as shells have it; EX_TEMPFAIL for a pre-emption, after which the same command resumes.
CODES = {"SIGINT": 130, "SIGTERM": 75, "SIGUSR1": 75, "SIGUSR2": 75}


def _number(name: str) -> int | None:
    return getattr(signal, name, None)  # Windows has not all of them


class Exit:
    """While in use as a context, these signals end the process with their code at once: where nothing is to be saved.

    Not by an exception, which code that is being imported may catch.
    """

    def __enter__(self) -> "Exit":
        numbers = [number for name in CODES if (number := _number(name)) is not None]
        self._before = {number: signal.signal(number, self._exit) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _exit(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        os.write(2, f"error: stopped by {name} outside training: the same command goes on from there.\n".encode())
        os._exit(CODES[name])


class Stop:
    """While in use as a context, notes the first of these signals in `code`; a second one exits at once."""

    def __init__(self) -> None:
        self.code: int | None = None

    def __enter__(self) -> "Stop":
        numbers = [number for name in CODES if (number := _number(name)) is not None]
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        code = CODES[signal.Signals(number).name]
        if self.code is not None:
            os._exit(code)
        self.code = code
