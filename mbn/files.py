"""Files that are either the old or the new version, whenever the process or the machine dies."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError

# The exit code of a run that another process is training.
HELD = 76


def write_atomically(path: Path, content: bytes, keep_as: Path | None = None) -> None:
    """Write path by way of a temporary file, fsync, rename and fsync of the folder.

    keep_as: where the version that path has now is kept. Between the two renames path is absent and keep_as whole.
    Errors: UserError where the disk is full or the file may not be written; path is untouched then.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            path.replace(keep_as)
        partial.replace(path)
        _fsync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = f"it needs {len(content)} bytes: free some space" if full else "see to it"
        raise UserError(f"cannot write {path} ({error.strerror}): {reason} and run the command again.") from None


def _fsync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold path for this process; the operating system lets go when the process dies, however it dies.

    Errors: UserError with code HELD, naming the process that holds it, when another does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            import fcntl
        except ImportError:  # Windows: two processes are not kept apart
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            message = f"{path.parent} is being trained by {holder}: wait for it, or stop it."
            raise UserError(message, code=HELD) from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        _held.append(file.fileno())
        try:
            yield
        finally:
            _held.remove(file.fileno())


# Descriptors of the locks that this process holds.
_held: list[int] = []


def let_go_of_inherited_locks() -> None:
    """For a forked worker, which would hold its parent's locks for some seconds after the parent was killed."""
    while _held:
        os.close(_held.pop())


def held(path: Path) -> bool:
    """Whether another process holds path by `lock`."""
    try:
        import fcntl

        with path.open() as file:
            # Shared, so that two that ask do not take each other for a holder.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (ImportError, FileNotFoundError):
        return False
    except OSError:
        return True
    return False
