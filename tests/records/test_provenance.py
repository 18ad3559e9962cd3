"""Where a run's numbers come from: commit and dirty, with git and without; the hash of the code."""

import subprocess

import pytest

from mbn.records import provenance

# What the environment holds where there is no git.
DESCRIBE = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*")


def git(folder, *arguments):
    user = ("-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *user, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with a tracked file beside results/ and one in it; it stands in for this one."""
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    monkeypatch.delenv("MBN_COMMIT", raising=False)
    git(tmp_path, "init")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "tracked").write_text("1")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


@pytest.mark.parametrize(
    ("file", "dirty"), [(None, False), ("code.py", True), ("results/tracked", False), ("untracked.txt", False)]
)
def test_only_changes_of_tracked_files_outside_results_are_dirt(repository, file, dirty, monkeypatch):
    monkeypatch.setenv("MBN_COMMIT", "f" * 40)  # read only where git is not
    commit = git(repository, "rev-parse", "HEAD").strip()
    if file:
        (repository / file).write_text("2")
    assert provenance.commit_and_dirty() == (commit, dirty)
    if dirty:
        git(repository, "add", ".")
        assert provenance.commit_and_dirty() == (commit, dirty)


@pytest.mark.parametrize("dirty", [False, True])
def test_without_git_both_come_from_the_environment(repository, monkeypatch, dirty):
    if dirty:
        (repository / "code.py").write_text("2")
    expected = provenance.commit_and_dirty()
    monkeypatch.setenv("MBN_COMMIT", git(repository, *DESCRIBE))
    monkeypatch.setenv("PATH", "")
    assert provenance.commit_and_dirty() == expected == (expected[0], dirty)


def test_outside_any_repository_both_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("MBN_COMMIT", "a" * 40 + "-dirty")
    assert provenance.commit_and_dirty() == ("a" * 40, True)
    monkeypatch.delenv("MBN_COMMIT")
    assert provenance.commit_and_dirty() == (None, None)


# The code.

MODULE = """
'''A module.'''
X = 1  # one


class A:
    '''A class,
    in two lines.'''

    def f(self, a="# not a comment"):
        '''A method.'''
        return a


def g():
    '''Nothing else.'''
"""
BARE = 'X = 1\nclass A:\n    def f(self, a="# not a comment"):\n        return a\ndef g():'


def test_comments_docstrings_and_blank_lines_do_not_count():
    assert provenance.statements(MODULE) == BARE


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A function that hashes the code of a small checkout, with a file changed or added."""
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)

    def hashed(name=None, text=""):
        for path in ("mbn/norm/base.py", "mbn/methods.py", "mbn/tables/page.py", "models/nin.py", "train.py"):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text("a = 1\n")
        if name:
            (tmp_path / name).write_text(text)
        return provenance.code.__wrapped__()

    return hashed


@pytest.mark.parametrize(
    ("name", "text", "counts"),
    [
        ("mbn/norm/base.py", "a = 2\n", True),
        ("mbn/norm/base.py", "# why\n\na = 1  # how\n", False),
        ("mbn/methods.py", "b = 1\n", True),
        ("models/nin.py", "\n", True),
        ("models/another.py", "a = 1\n", True),
        ("mbn/tables/page.py", "a = 2\n", False),
        ("train.py", "a = 2\n", False),
        ("mbn/norm/README.md", "text", False),
    ],
)
def test_the_code_that_trains_counts(code, name, text, counts):
    before = code()
    assert len(before) == 64
    assert (code(name, text) != before) == counts


def test_it_is_read_once_in_a_process():
    assert provenance.code() is provenance.code()
