"""Files that survive a crash."""

import contextlib
import errno
import fcntl
import itertools
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mbn.config import REPOSITORY
from mbn.system import files
from mbn.system.errors import UserError
from mbn.system.files import LOCKED, is_locked, lock, remove_partials, write_atomically


@contextlib.contextmanager
def small_disk(size):
    """No file may grow beyond so many bytes.

    A context and no fixture: pytest writes its own progress, often into a file, before fixtures are torn down.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    for content in (b"one", b"two"):
        write_atomically(path, content)
        assert path.read_bytes() == content
        assert names(path.parent) == ["file"]


def test_a_write_never_touches_the_old_version(tmp_path):
    """A process that has it open can go on reading it, and a crash in the middle leaves it whole."""
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with path.open("rb") as reader:
        write_atomically(path, b"new")
        assert reader.read() == b"old"


def test_a_write_that_fails_leaves_the_old_file_and_says_how_much_it_needs(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with small_disk(1000), pytest.raises(UserError, match="2000 bytes: free some space"):
        write_atomically(path, b"x" * 2000)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


class CrashError(BaseException):
    pass


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("crash_at", [1, 2, 3])
def test_a_crash_at_any_step_of_a_write_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch, step, crash_at):
    """Each kind of step is done twice, so there is no third at which it could crash."""
    path, kept = tmp_path / "file", tmp_path / "kept"
    write_atomically(path, b"old")
    owner, number = files.os if step == "fsync" else type(path), itertools.count(1)
    original = getattr(owner, step)

    def crash(*args):
        if next(number) == crash_at:
            raise CrashError
        return original(*args)

    monkeypatch.setattr(owner, step, crash)
    with contextlib.nullcontext() if crash_at == 3 else pytest.raises(CrashError):
        write_atomically(path, b"new", keep_as=kept)
    whole = {p.read_bytes() for p in (path, kept) if p.exists()}
    assert whole == {b"old", b"new"} if crash_at == 3 else whole and whole <= {b"old", b"new"}


def test_a_file_that_may_not_be_written_is_a_users_error(tmp_path):
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*folder/file"):
        write_atomically(tmp_path / "folder" / "file", b"")


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EACCES, "make it writable"),
        (errno.EROFS, "choose another folder"),
        (errno.ENOTDIR, "move away the file"),
        (errno.EIO, "check the disk"),
        (errno.ENOSPC, "it needs 3 bytes: free some space"),
        (errno.EBUSY, "make it writable"),
    ],
)
def test_the_advice_fits_the_error(tmp_path, monkeypatch, number, advice):
    """Faked: the administrator, who often runs tests in a container, may do everything."""

    def replace(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(UserError, match=rf"^cannot write {re.escape(str(tmp_path))}/file \(.*\): {advice}"):
        write_atomically(tmp_path / "file", b"new")
    assert names(tmp_path) == []


def test_only_partial_files_of_the_program_itself_are_deleted(tmp_path):
    kept = (
        "file",
        "file.notes.partial",
        "file.1.partial.txt",
        "other.1.partial",
        "file.12 old.partial",
        "file..partial",
    )
    for name in (*kept, "file.1.partial", "file.4194304.partial"):
        (tmp_path / name).touch()
    (tmp_path / "file.7.partial").mkdir()  # nor does something that cannot be deleted end anything
    remove_partials(tmp_path / "file")
    assert names(tmp_path) == sorted((*kept, "file.7.partial"))


# File systems that lack something. Each is faked by the error that it gives.


@pytest.fixture
def lacks(monkeypatch):
    """A function that lets flock, or fsync of files or folders, fail with an error number."""
    monkeypatch.setattr(files, "_warned", set())

    def fake(what, number):
        def fail(descriptor, *_):
            if what in ("flock", "folders" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "files"):
                raise OSError(number, os.strerror(number))

        if what == "flock":
            monkeypatch.setattr(fcntl, "flock", lambda file, _: fail(file.fileno()))
        else:
            monkeypatch.setattr(files.os, "fsync", fail)

    return fake


@pytest.mark.parametrize("what", ["folders", "files"])
@pytest.mark.parametrize("name", ["EINVAL", "ENOTSUP", "ENOSYS", "EBADF"])
def test_a_file_system_without_fsync_works_with_one_warning(tmp_path, capsys, lacks, what, name):
    lacks(what, getattr(errno, name))
    for number in range(3):
        write_atomically(tmp_path / "file", b"%d" % number)
    assert (tmp_path / "file").read_bytes() == b"2"
    assert re.fullmatch(
        rf"warning: the file system of {re.escape(str(tmp_path))}.* power cut .*\n", capsys.readouterr().err
    )


@pytest.mark.parametrize("what", ["folders", "files"])
def test_another_error_of_fsync_is_an_error(tmp_path, lacks, what):
    lacks(what, errno.EIO)
    with pytest.raises(UserError, match=r"^cannot write .*: check the disk"):
        write_atomically(tmp_path / "file", b"")


def test_a_folder_that_can_be_written_but_not_listed_is_written(tmp_path, monkeypatch):
    original = os.open

    def refuse(path, *more, **others):
        if Path(path) == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, *more, **others)

    monkeypatch.setattr(files.os, "open", refuse)
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("name", ["ENOLCK", "ENOSYS", "ENOTSUP", "EINVAL", "EPERM", "EACCES", "EIO"])
def test_a_file_system_without_locks_works_with_one_warning(tmp_path, capsys, lacks, name):
    lacks("flock", getattr(errno, name))
    for run in "ab":
        path = tmp_path / run / "lock"
        with lock(path) as held:
            assert not is_locked(path)
            held.check()
    assert re.fullmatch(r"warning: .*/a has no locks \(.*\): .* not kept apart there\.\n", capsys.readouterr().err)


def test_a_lock_that_another_process_holds_counts_as_held(tmp_path, lacks):
    path = tmp_path / "lock"
    path.write_text("process 7 on another machine\n")
    lacks("flock", errno.EWOULDBLOCK)
    assert is_locked(path)
    with pytest.raises(UserError, match="trained by process 7 on another machine") as caught, lock(path):
        pass
    assert caught.value.code == LOCKED


def test_a_lock_that_is_held_here_is_held_for_others(tmp_path):
    path = tmp_path / "lock"
    assert not is_locked(path)
    with lock(path):
        assert is_locked(path)
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), lock(path):
            pass
    assert not is_locked(path)


@pytest.fixture
def forbidden(monkeypatch):
    """A function that lets a file be opened in no mode that starts with one of these letters."""

    def fake(path, modes, number=errno.EACCES):
        original = Path.open

        def refuse(self, mode="r", *more, **others):
            if self == path and mode[0] in modes:
                raise OSError(number, os.strerror(number), str(path))
            return original(self, mode, *more, **others)

        monkeypatch.setattr(Path, "open", refuse)

    return fake


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ELOOP])
def test_a_lock_file_that_cannot_be_opened_is_an_error_that_names_it_and_is_not_held(tmp_path, forbidden, number):
    path = tmp_path / "lock"
    path.touch()
    forbidden(path, "ar", number)
    assert not is_locked(path)
    with pytest.raises(UserError, match=rf"^cannot write {re.escape(str(path))} \(") as caught, lock(path):
        pass
    assert caught.value.code != LOCKED


def test_a_folder_in_place_of_a_lock_is_an_error(tmp_path):
    (tmp_path / "lock").mkdir()
    assert not is_locked(tmp_path / "lock")
    with pytest.raises(UserError, match="move away the folder"), lock(tmp_path / "lock"):
        pass


def test_a_lock_file_of_another_user_that_can_be_read_is_locked(tmp_path, forbidden):
    path = tmp_path / "lock"
    path.write_text("process 7 on another machine\n")
    forbidden(path, "a")
    with lock(path) as held:
        held.check()
        assert is_locked(path)
        path.unlink()
        with pytest.raises(UserError, match="was removed, replaced or taken"):
            held.check()
    assert not path.exists()


def test_those_who_ask_whether_a_lock_is_held_do_not_keep_a_trainer_out(tmp_path):
    path = tmp_path / "lock"
    path.touch()
    with path.open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        timer = threading.Timer(0.05, lambda: fcntl.flock(asking, fcntl.LOCK_UN))
        timer.start()
        with lock(path):
            assert is_locked(path)
        timer.join()


# A lock that is taken away while it is held.


def taken(path):
    path.unlink()
    path.write_text("process 7 on another machine\n")


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
@pytest.mark.parametrize(
    "remove",
    [
        Path.unlink,
        taken,
        lambda path: path.rename(path.with_name("away")),
        lambda path: shutil.rmtree(path.parent),
        lambda path: (path.unlink(), path.symlink_to("away")),
    ],
    ids=["removed", "replaced", "renamed", "the folder removed", "a broken link"],
)
def test_a_lock_that_is_removed_or_replaced_is_noticed(tmp_path, lacks, locks, remove):
    if not locks:
        lacks("flock", errno.ENOLCK)
    path = tmp_path / "run" / "lock"
    with lock(path) as held:
        held.check()
        remove(path)
        with pytest.raises(
            UserError, match=rf"^{re.escape(str(path))} was removed, replaced or taken [^.]*\.$"
        ) as caught:
            held.check()
    assert caught.value.code == 1


@pytest.mark.parametrize("locks", [True, False], ids=["locks of this machine alone", "no locks"])
def test_the_process_that_came_first_notices_a_second_one_that_got_in(tmp_path, lacks, locks):
    if not locks:
        lacks("flock", errno.ENOLCK)
    path = tmp_path / "lock"
    with lock(path) as held:
        path.write_text("process 7 on another machine\n")  # into the same file
        with pytest.raises(UserError, match="was removed, replaced or taken"):
            held.check()


def test_a_file_system_whose_numbers_of_files_change_raises_no_alarm(tmp_path, monkeypatch):
    with lock(tmp_path / "lock") as held:
        monkeypatch.setattr(files.os.path, "samestat", lambda *_: False)
        held.check()


def test_a_second_process_gets_in_once_the_file_is_removed_and_the_first_one_notices(tmp_path):
    path = tmp_path / "lock"
    code = "import sys; from pathlib import Path; from mbn.system.files import lock\n"
    code += "with lock(Path(sys.argv[1])): print('in')"
    with lock(path) as held:
        path.unlink()
        second = subprocess.run([sys.executable, "-c", code, str(path)], cwd=REPOSITORY, capture_output=True, text=True)
        assert second.stdout == "in\n"
        with pytest.raises(UserError, match="once no other process trains it"):
            held.check()
