"""Where a run's numbers come from: commit and dirty, with git and without."""

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
