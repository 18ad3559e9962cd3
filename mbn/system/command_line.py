"""What the commands share: options whose errors are one sentence, and exit codes."""

import argparse
import codecs
import functools
import io
import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec

from mbn.system.errors import UserError, lacks_memory
from mbn.system.files import cannot_write, is_full

P = ParamSpec("P")


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


def entry_point(main: Callable[P, int | None]) -> Callable[P, int]:
    """Decorate main: what a user can mend, and a stop, is one sentence on stderr. Returns the exit code, 0 for None."""

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        print_any_text()
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            print(error.shown(), file=sys.stderr)
            return error.code
        except BrokenPipeError:  # `--dry-run | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:
            if not is_full(error):
                raise
            print(f"error: {cannot_write(error.filename or 'a file', error)}", file=sys.stderr)
            return 1
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
            print(
                "error: this machine's memory is not enough: try a smaller batch_size or evaluate.batch_size.",
                file=sys.stderr,
            )
            return 1
        except KeyboardInterrupt:  # before training handles signals itself
            print("stopped by Ctrl-C: the same command starts it again.", file=sys.stderr)
            return 130

    return run


def print_any_text() -> None:
    """Let stdout show every text: a path's bytes that are no text as they are, letters that it lacks as escapes."""
    codecs.register_error("any text", _any_text)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="any text")


def _any_text(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    bytes_of_a_path = all("\udc80" <= letter <= "\udcff" for letter in error.object[error.start : error.end])
    return codecs.lookup_error("surrogateescape" if bytes_of_a_path else "backslashreplace")(error)
