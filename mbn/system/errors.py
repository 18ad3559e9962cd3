"""Errors a user can cause or mend: shown as one sentence, without a traceback."""

import errno

from mbn.system.signals import CODES


def printable(text: str) -> str:
    """The text with escapes in place of all that a terminal would obey or could not show, such as control characters.

    Example: a tab becomes the two characters \\t.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UserError(Exception):
    """The message is one sentence that says what to do; it is printable. `code` is the exit code.

    everywhere: whether all processes of a run raise it, so that the main one alone shows it.
    """

    def __init__(self, message: str, code: int = 1, everywhere: bool = False) -> None:
        super().__init__(printable(message))
        self.code = code
        self.everywhere = everywhere

    def shown(self) -> str:
        """The line that a person sees. A stop by a signal lost nothing, so it is not called an error."""
        return str(self) if self.code in CODES.values() else f"error: {self}"


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:100]}"


def lacks_memory(error: Exception) -> bool:
    """Whether an error says that memory is lacking, on a GPU or on the CPU, where torch has no class for it."""
    texts = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return any(text in str(error) for text in texts)


class DivergedError(UserError):
    """Training diverged at this 0-based iteration. The run is finished: its record says so."""

    def __init__(self, message: str, iteration: int) -> None:
        super().__init__(message, everywhere=True)
        self.iteration = iteration


class ConfigError(UserError):
    """A configuration that cannot be run; the message says what would be right."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=2)
