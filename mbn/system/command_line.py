"""What the commands share: options whose errors are one sentence, and exit codes."""

import argparse
import codecs
import contextlib
import errno
import functools
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TextIO

from mbn.system.errors import UserError, lacks_memory, printable
from mbn.system.files import cannot_use
from mbn.system.signals import loaded

P = ParamSpec("P")
# More than anybody trains, and few enough to be listed.
MOST_SEEDS = 10_000


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors. Errors: UserError."""

    def error(self, message: str) -> NoReturn:
        folder = re.match(r"unrecognized arguments: (?:.* )?--(data|results)\b", message)
        if folder and any(not action.option_strings for action in self._actions):  # it takes settings
            name = folder[1]
            raise UserError(
                f"there is no option --{name}: machine.{name}=DIR, without dashes, names the folder.", code=2
            )
        raise UserError(f"{message}; --help shows how it is used.", code=2)


def whole(least: int, most: int) -> Callable[[str], int]:
    """For an option's type: a whole number within limits."""

    def parse(text: str) -> int:
        if not (text.isdecimal() and text.isascii()) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, not {text!r}")
        return int(text)

    return parse


def finite_above_0(text: str) -> float:
    """For an option's type."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return number


def add_which_runs(parser: argparse.ArgumentParser, seeds: int) -> None:
    """Add the options that say which runs a table or a figure shows. seeds: the default of --seeds."""
    parser.add_argument(
        "--scale", type=finite_above_0, default=1.0, metavar="S", help="runs at S times the paper's length"
    )
    parser.add_argument(
        "--seeds", type=whole(1, MOST_SEEDS), default=seeds, metavar="N", help=f"seeds 0 to N - 1 (default {seeds})"
    )


def entry_point(main: Callable[P, int | None]) -> Callable[P, int]:
    """Decorate main: what a user can mend, and a stop, is one sentence on stderr. Returns the exit code, 0 for None.

    Nobody needs to read what it prints: a closed stdout or stderr ends no command.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        with _lasting_streams() as (out, _):
            code = _ended(lambda: main(*args, **kwargs))
            out.flush()
            lost = out.error
            if code == 0 and lost is not None and lost.errno not in GONE:
                print(f"error: {cannot_use('the output', lost)}", file=sys.stderr)
                return 1
            return code

    return run


def _ended(main: Callable[[], int | None]) -> int:
    """The exit code of main; its error is printed."""
    try:
        loaded()
        return main() or 0
    except KeyboardInterrupt:  # before training handles signals itself
        print("stopped by Ctrl-C: the same command starts it again.", file=sys.stderr)
        return 130
    except Exception as error:
        known = explained(error)
        if known is None:
            raise
        print(known.shown(), file=sys.stderr)
        return known.code


def explained(error: BaseException) -> UserError | None:
    """An error as one sentence that says what to do, or None where only a programmer can mend it."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, (RuntimeError, MemoryError, OSError)) and lacks_memory(error):
        return UserError("this machine's memory is not enough: try a smaller batch_size or evaluate.batch_size.")
    if isinstance(error, FileNotFoundError) and error.filename is None and not _has_working_folder():
        return UserError("the folder in which this was started is no longer there: cd to one that is.")
    if isinstance(error, OSError) and error.errno is not None:  # without a number it is a library's own error
        return cannot_use(error.filename or _place(error), error)
    return None


def _has_working_folder() -> bool:
    try:
        return bool(Path.cwd())
    except OSError:
        return False


def _place(error: BaseException) -> str:
    """Where in our code an error without a file's name arose: what was read or written there."""
    ours = Path(__file__).parents[2]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).is_relative_to(ours):
            return f"a file, in {Path(frame.filename).relative_to(ours)}, line {frame.lineno}"
    return "a file"


def failure(error: BaseException) -> str:
    """Why one run of several failed, in one sentence; the traceback of an error in the program goes to stderr."""
    known = explained(error)
    if known is not None:
        return str(known)
    traceback.print_exception(error)
    first = (str(error).strip().splitlines() or ["it says no more"])[0]
    return printable(f"{type(error).__name__}: {first}")


def _any_text(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    bytes_of_a_path = all("\udc80" <= letter <= "\udcff" for letter in error.object[error.start : error.end])
    return codecs.lookup_error("surrogateescape" if bytes_of_a_path else "backslashreplace")(error)


codecs.register_error("any text", _any_text)

# What writing to a reader that has gone gives: `| head`, and a terminal that was closed.
GONE = (errno.EPIPE, errno.EIO)


class LastingStream:
    """A text stream that goes on, and writes nowhere, once its reader has gone or its disk is full.

    error: why it writes nowhere, or None. Characters that its encoding lacks are written as \\x.. or \\u..., and bytes
    of a path that are no text as they are.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.error: OSError | None = None
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="any text")

    def write(self, text: str) -> int:
        with self._lasting():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._lasting():
            self.stream.flush()

    @contextlib.contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error
            with contextlib.suppress(OSError, ValueError):  # else what is left in its buffer fails at the very end
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def _lasting_streams() -> Iterator[tuple[LastingStream, LastingStream]]:
    """Inside, stdout and stderr are LastingStreams, also where the process began without them (`>&-`)."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # else the next file that is opened, such as a checkpoint, gets all that is printed
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        out, err = (LastingStream(nowhere if stream is None else stream) for stream in before)
        sys.stdout, sys.stderr = out, err
        try:
            yield out, err
        finally:
            out.flush()
            err.flush()
            sys.stdout, sys.stderr = before
