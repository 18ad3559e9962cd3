"""Files that survive a crash."""

import contextlib
import itertools
import resource
import signal

import pytest

from mbn.system import files
from mbn.system.errors import UserError
from mbn.system.files import write_atomically


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
