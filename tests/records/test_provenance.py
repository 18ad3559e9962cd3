"""Where a run's numbers come from: commit and dirty, with git and without."""

import re
import subprocess

import pytest

from mbn.config import REPOSITORY
from mbn.records import provenance

# What the environment holds where git is not.
DESCRIBE = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*")


def git(folder, *arguments):
    user = ("-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *user, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with a tracked file beside results/ and one in it, in the place of this one."""
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    monkeypatch.delenv("MBN_COMMIT", raising=False)
    git(tmp_path, "init")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "tracked").write_text("1")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_a_clean_tree_is_its_commit_whatever_the_environment_says(repository, monkeypatch):
    monkeypatch.setenv("MBN_COMMIT", "f" * 40 + "-dirty")
    assert provenance.commit_and_dirty() == (git(repository, *DESCRIBE).strip(), False)


@pytest.mark.parametrize(("file", "dirty"), [("code.py", True), ("results/tracked", False), ("untracked.txt", False)])
def test_only_changes_of_tracked_files_outside_results_are_dirt(repository, file, dirty):
    (repository / file).write_text("2")
    assert provenance.commit_and_dirty()[1] is dirty
    if dirty:
        git(repository, "add", ".")
        assert provenance.commit_and_dirty()[1] is True


@pytest.mark.parametrize("dirty", [False, True])
def test_without_git_both_come_from_the_environment(repository, monkeypatch, dirty):
    if dirty:
        (repository / "code.py").write_text("2")
    expected = provenance.commit_and_dirty()
    monkeypatch.setenv("MBN_COMMIT", git(repository, *DESCRIBE))

    def no_git(*_):
        raise FileNotFoundError("git")

    monkeypatch.setattr(provenance, "_git", no_git)
    assert provenance.commit_and_dirty() == expected == (expected[0], dirty)
    assert re.fullmatch("[0-9a-f]{40}", expected[0])


def test_outside_any_repository_both_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("MBN_COMMIT", "a" * 40 + "-dirty")
    assert provenance.commit_and_dirty() == ("a" * 40, True)
    monkeypatch.delenv("MBN_COMMIT")
    assert provenance.commit_and_dirty() == (None, None)


def test_the_commit_is_that_of_the_tree_that_holds_the_package():
    assert (REPOSITORY / "mbn" / "records" / "provenance.py").samefile(provenance.__file__)
