"""Files that hold either the old or the new version, no matter when the process or the machine dies."""

import contextlib
import errno
import glob
import os
import platform
import re
import sys
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
            sync(file.fileno(), path)
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
    return _cannot("write", path, error, "make it writable", needed)


def cannot_use(path: Path | str, error: OSError) -> UserError:
    """The error for a file or folder that could not be read, or of which it is not known what failed."""
    return _cannot("write" if is_full(error) or error.errno == errno.EROFS else "use", path, error, "check it", None)


# What a user can do about an error, by its number.
_ADVICE = {
    errno.ENOENT: "check that it and its folder are there",
    errno.EACCES: "make it and its folders readable and writable",
    errno.EPERM: "make it and its folders readable and writable",
    errno.EROFS: "choose another folder (machine.results=DIR, machine.data=DIR)",
    errno.ENOTDIR: "move away the file that stands where a folder must be",
    errno.EEXIST: "move it away",
    errno.EISDIR: "move away the folder that stands where a file must be",
    errno.ELOOP: "mend its links, which lead in a circle,",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs, which have too many files open",
    errno.EIO: "check the disk or the network drive",
    errno.ESTALE: "check the network drive",
}


def _cannot(do: str, path: Path | str, error: OSError, advice: str, needed: int | None) -> UserError:
    if is_full(error):
        advice = "free some space" if needed is None else f"it needs {needed} bytes: free some space"
    elif not (do == "write" and error.errno in (errno.EACCES, errno.EPERM)):
        advice = _ADVICE.get(error.errno or 0, advice)
    return UserError(f"cannot {do} {path} ({error.strerror or error}): {advice} and run the command again.")


def is_full(error: OSError) -> bool:
    """Whether a write failed for lack of space: the disk, a quota, or the limit on a file's size."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def visible(path: Path) -> bool:
    """Whether a file is at path, as far as can be seen; False in a folder that cannot be read."""
    try:
        return path.exists()
    except OSError:
        return False


def remove_partials(path: Path) -> None:
    """Delete the partial files that killed processes left of path. The caller must hold the lock."""
    own = re.compile(re.escape(path.name) + r"\.\d+\.partial")
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        if own.fullmatch(left.name):
            with contextlib.suppress(OSError):  # one that stays does no harm
                left.unlink()


# What fsync says where a file system does not have it, as CIFS, vboxsf and some of FUSE for folders.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)


def sync(descriptor: int, path: Path) -> None:
    """Return when an open file or folder is on the disk; where the file system cannot say, warn once and go on.

    path: what the warning names.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        _warn_once(
            "sync",
            f"the file system of {path} cannot say when a file is on the disk ({error.strerror}): a power cut may lose "
            "what was saved last.",
        )


_warned: set[str] = set()


def _warn_once(what: str, text: str) -> None:
    """Print a warning, once a process for each kind."""
    if what not in _warned:
        _warned.add(what)
        print(f"warning: {text}", file=sys.stderr)


def _fsync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows cannot open a folder, nor one who may write in it but not list it
        return
    try:
        sync(descriptor, folder)
    finally:
        os.close(descriptor)


class Lock:
    """A lock that this process holds.

    named: whether the file holds this process's name.
    """

    def __init__(self, path: Path, file: IO[str]) -> None:
        self.path, self.file = path, file
        self.name = f"process {os.getpid()} on {platform.node()}".strip()
        self.named = False

    def check(self) -> None:
        """Check that no other process has taken the place of this one.

        Errors: UserError where the file was removed or replaced, or holds another name: on some network drives two
        machines can hold the same lock at once.
        """
        try:
            if self.named:  # numbers of files change on some network drives, so the name alone counts
                same = self.path.read_text(encoding="utf-8", errors="replace").strip() == self.name
            else:
                same = os.path.samestat(os.fstat(self.file.fileno()), self.path.stat())
        except FileNotFoundError:
            same = False
        except OSError:  # cannot tell, and what is written next says why
            return
        if not same:
            raise UserError(
                f"{self.path} was removed, replaced or taken by another process while this one held it: nothing more "
                "is written, and the same command goes on from the last checkpoint once no other process trains it."
            )


@contextlib.contextmanager
def lock(path: Path) -> Iterator[Lock]:
    """Lock path for this process; the operating system releases it when the process dies, however it dies.

    Where the file system has no locks, a warning says once that two processes are not kept apart there.

    Errors: UserError with code LOCKED when another process holds it; the message names that process. UserError where
    path cannot be opened or written.
    """
    with _opened(path) as file:
        held = Lock(path, file)
        try:
            _flocked_alone(file, path)
        except BlockingIOError:
            message = f"{path.parent} is being trained by {_holder(file)}: wait for it, or stop it."
            raise UserError(message, code=LOCKED) from None
        if file.writable():
            try:
                file.seek(0)
                file.truncate()
                name = f"{held.name}\n".encode()
                while name:  # a full disk takes a part of it
                    name = name[os.write(file.fileno(), name) :]
            except OSError as error:
                raise cannot_write(path, error, len(held.name) + 1) from None
            held.named = True
        held.check()  # it may have been removed before it was locked
        _held.append(file.fileno())
        try:
            yield held
        finally:
            _held.remove(file.fileno())


@contextlib.contextmanager
def turn(path: Path, others_do: str) -> Iterator[None]:
    """Inside, no other process is inside for the same path. One that comes later waits, and says so.

    path: a file that serves for this alone, and stays. others_do: what is waited for, as "downloads it".
    Errors: OSError where path cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        waited = False
        while True:
            try:
                _flocked(file, path, "LOCK_EX")
                break
            except BlockingIOError:
                if not waited:
                    print(f"waiting: another process {others_do}", file=sys.stderr)
                waited = True
                time.sleep(0.2)
        yield


def _opened(path: Path) -> IO[str]:
    """The file of a lock. One of another user that can only be read can be locked all the same."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return path.open("a+", encoding="utf-8", errors="replace")
        except PermissionError:
            return path.open(encoding="utf-8", errors="replace")
    except OSError as error:
        raise cannot_write(path, error) from None


def _flocked(file: IO[str], path: Path, kind: str) -> bool:
    """Lock an open file; False, with a warning, where the file system has no locks.

    Errors: BlockingIOError where another process holds it: the one error that means so.
    """
    try:
        import fcntl

        fcntl.flock(file, getattr(fcntl, kind) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError) as error:  # Windows; NFS and Lustre without locks
        _warn_once(
            "lock",
            f"the file system of {path.parent} has no locks ({getattr(error, 'strerror', error)}): two processes that "
            "train one run, or download one data set, are not kept apart there.",
        )
        return False
    return True


def _flocked_alone(file: IO[str], path: Path) -> None:
    """Lock an open file for this process alone; wait for those who only ask (`is_locked`), who share it for a moment.

    Errors: BlockingIOError where another process holds it alone.
    """
    for _ in range(100):
        try:
            _flocked(file, path, "LOCK_EX")
            return
        except BlockingIOError:
            _flocked(file, path, "LOCK_SH")  # raises where it is held alone
            _flocked(file, path, "LOCK_UN")
            time.sleep(0.01)
    _flocked(file, path, "LOCK_EX")


def _holder(file: IO[str]) -> str:
    """The process that holds a lock. If it still names a dead one, the new holder has yet to write: wait for it."""
    for _ in range(20):
        file.seek(0)
        holder = file.read(200).strip()
        if holder and not _is_dead(holder):
            return holder
        time.sleep(0.05)
    return "another process"


def _is_dead(holder: str) -> bool:
    """Whether the process that a lock names was on this machine and has ended."""
    named = re.fullmatch(r"process (\d{1,9}) on (.*)", holder)
    if named is None or named[2] != platform.node():
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
    """Whether another process holds path by `lock`. Of a file that cannot be opened nobody can tell: False."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            # Shared, so that two processes that ask at once do not take each other for the holder.
            _flocked(file, path, "LOCK_SH")
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
