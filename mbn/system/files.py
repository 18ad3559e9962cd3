"""Files that hold either the old or the new version, no matter when the process or the machine dies."""

import contextlib
import errno
import glob
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mbn.system.errors import UserError

# The exit code of a run that another process is training.
LOCKED = 76


def write_atomically(path: Path, content: bytes, keep_as: Path | None = None) -> None:
    """Write path through a temporary file, fsync, rename and fsync of the folder.

    keep_as: where the present version of path is kept. Between the two renames path does not exist, but keep_as is
    complete. Errors: UserError where the disk is full or the file may not be written; the version before is then in
    path, or already in keep_as.
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
        raise cannot_write(path, error, len(content)) from None


def cannot_write(path: Path | str, error: OSError, needed: int | None = None) -> UserError:
    """The error for a write that failed. needed: how many bytes were to be written."""
    reason = "make it writable"
    if is_full(error):
        reason = "free some space" if needed is None else f"it needs {needed} bytes: free some space"
    return UserError(f"cannot write {path} ({error.strerror}): {reason} and run the command again.")


def is_full(error: OSError) -> bool:
    """Whether a write failed for lack of space: the disk, a quota, or the limit on a file's size."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def remove_partials(path: Path) -> None:
    """Delete the partial files that killed processes left of path. The caller must hold the lock."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(FileNotFoundError):
            left.unlink()


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
    """Lock path for this process; the operating system releases it when the process dies, however it dies.

    Errors: UserError with code LOCKED when another process holds it; the message names that process. UserError where
    path cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise cannot_write(path, error) from None
    with opened as file:
        try:
            import fcntl
        except ImportError:  # Windows: two processes are not kept apart
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            message = f"{path.parent} is being trained by {_holder(file)}: wait for it, or stop it."
            raise UserError(message, code=LOCKED) from None
        name = f"process {os.getpid()} on {os.uname().nodename}\n"
        try:
            file.seek(0)
            file.truncate()
            os.write(file.fileno(), name.encode())
        except OSError as error:
            raise cannot_write(path, error, len(name)) from None
        _held.append(file.fileno())
        try:
            yield
        finally:
            _held.remove(file.fileno())


def _holder(file: IO[str]) -> str:
    """The process that holds a lock. If it still names a dead one, the new holder has yet to write: wait for it."""
    for _ in range(20):
        file.seek(0)
        holder = file.read().strip()
        if holder and not _is_dead(holder):
            return holder
        time.sleep(0.05)
    return "another process"


def _is_dead(holder: str) -> bool:
    """Whether the process that a lock names was on this machine and has ended."""
    named = re.fullmatch(r"process (\d+) on (.*)", holder)
    if named is None or named[2] != os.uname().nodename:
        return False
    try:
        os.kill(int(named[1]), 0)
    except OSError as error:  # another user's process is alive
        return isinstance(error, ProcessLookupError)
    return False


# Descriptors of the locks that this process holds.
_held: list[int] = []


def let_go_of_inherited_locks() -> None:
    """For a forked worker: it would hold its parent's locks for some seconds after the parent was killed."""
    while _held:
        os.close(_held.pop())


def is_locked(path: Path) -> bool:
    """Whether another process holds path by `lock`."""
    try:
        import fcntl

        with path.open(encoding="utf-8") as file:
            # Shared, so that two processes that ask at once do not take each other for the holder.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (ImportError, FileNotFoundError):
        return False
    except OSError:
        return True
    return False
