"""Records: what they hold, and how a wrong one is noticed."""

import hashlib
import json
import re
import subprocess

import pytest

from mbn import config
from mbn.config import REPOSITORY
from mbn.records import record
from mbn.system.errors import UserError

# Of issue 3.
FIELDS = (
    *("name", "config", "test_error", "test_error_best", "train_error", "test_error_top5", "test_error_precise"),
    *("test_loss", "train_loss", "iterations", "images", "parameters", "seconds", "images_per_second", "device"),
    *("mode", "threads", "commit", "dirty", "versions", "date", "checksum", "curves"),
)


@pytest.fixture(scope="module")
def configuration():
    return config.load(["dataset=digits", "schedule.iterations=8"])


@pytest.fixture
def content(configuration):
    """A record without what `write` adds."""
    c = configuration
    numbers = dict.fromkeys((k for k in FIELDS if k not in ("date", "checksum")), 1.5)
    return numbers | {
        "name": config.run_name(c),
        "config": record.config_for_record(c),
        "test_error_precise": None,
        "iterations": 8,
        "device": "cpu: ü",
        "mode": "eager",
        "commit": "0" * 40,
        "dirty": False,
        "versions": {"torch": "2"},
        "curves": {"images": [1437, 1949], "test_error": [50.0, 40.0]},
    }


def test_a_record_is_read_as_it_was_written(tmp_path, content):
    path = record.write(tmp_path, content)
    assert path == tmp_path / "records" / f"{content['name']}.json"
    read = record.read(path)
    assert set(read) == set(FIELDS) == set(record.FIELDS)
    assert {key: read[key] for key in content} == content
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", read["date"])


def test_the_checksum_is_the_sha256_of_all_the_rest(tmp_path, content):
    written = json.loads(record.write(tmp_path, content).read_text())
    checksum = written.pop("checksum")
    canonical = json.dumps(written, sort_keys=True, separators=(",", ":"))
    assert checksum == hashlib.sha256(canonical.encode()).hexdigest()


def test_a_record_is_small_and_readable(tmp_path, content):
    text = record.write(tmp_path, content).read_text()
    assert '"images": [1437, 1949],\n' in text
    assert text.endswith("}\n")
    assert max(len(line) for line in text.splitlines()) < 200


def edited(path, change):
    result = json.loads(path.read_text())
    change(result)
    path.write_text(json.dumps(result))


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(test_error=0.1),
        lambda r: r["config"].update(seed=1),
        lambda r: r["curves"]["test_error"].append(1),
        lambda r: r.update(dirty=None),
        lambda r: r.update(checksum="0" * 64),
    ],
)
def test_an_edited_record_is_refused(tmp_path, content, change):
    path = record.write(tmp_path, content)
    edited(path, change)
    with pytest.raises(UserError, match=r"was changed after it was written.*checksum"):
        record.read(path)


@pytest.mark.parametrize("change", [lambda r: r.pop("test_loss"), lambda r: r.update(comment="good")])
def test_a_record_with_other_fields_is_refused(tmp_path, content, change):
    path = record.write(tmp_path, content)
    edited(path, change)
    with pytest.raises(UserError, match=r"test_loss|comment"):
        record.read(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "<<<<<<< HEAD\n"])
def test_a_file_that_is_no_record_is_refused_by_name(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"x\.json is not"):
        record.read(path)


def test_a_record_under_another_name_than_its_configurations_is_refused(tmp_path, content):
    path = record.write(tmp_path, content | {"name": "digits/resnet20/mbn-f2-b128-s0-00000000"})
    with pytest.raises(UserError, match="its configuration gives digits/resnet20/mbn-f2-b128-s0-"):
        record.read(path)


def test_a_record_with_an_impossible_configuration_is_refused(tmp_path, content):
    content["config"]["norm"]["decay"] = 2
    path = record.write(tmp_path, content)
    with pytest.raises(UserError, match=r"norm\.decay"):
        record.read(path)


def test_a_records_configuration_runs_again(content):
    c = record.config_of(content)
    assert config.run_name(c) == content["name"]
    assert config.iterations(c) == 8


# Commit and dirty.


def git(folder, *arguments):
    subprocess.run(
        ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false", *arguments],
        cwd=folder,
        check=True,
        capture_output=True,
    )


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with a tracked file beside results/ and one in it, which record takes for its own."""
    monkeypatch.setattr(record, "REPOSITORY", tmp_path)
    monkeypatch.delenv("MBN_COMMIT", raising=False)
    git(tmp_path, "init")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "tracked").write_text("1")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def described(folder):
    """What issue 3 has MBN_COMMIT hold."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def test_a_clean_tree_is_its_commit(repository):
    assert record.commit_and_dirty() == (described(repository).strip(), False)


def test_a_changed_tracked_file_is_dirty(repository):
    (repository / "code.py").write_text("2")
    assert record.commit_and_dirty()[1] is True
    git(repository, "add", ".")
    assert record.commit_and_dirty()[1] is True


def test_results_and_untracked_files_are_not_dirt(repository):
    (repository / "results" / "tracked").write_text("2")
    (repository / "notes.txt").write_text("2")
    assert record.commit_and_dirty()[1] is False


def test_git_goes_before_the_environment(repository, monkeypatch):
    monkeypatch.setenv("MBN_COMMIT", "f" * 40 + "-dirty")
    assert record.commit_and_dirty() == (described(repository).strip(), False)


@pytest.mark.parametrize("dirty", [False, True])
def test_without_git_both_come_from_the_environment(repository, monkeypatch, dirty):
    if dirty:
        (repository / "code.py").write_text("2")
    expected = record.commit_and_dirty()
    monkeypatch.setenv("MBN_COMMIT", described(repository))

    def no_git(*_):
        raise FileNotFoundError("git")

    monkeypatch.setattr(record, "_git", no_git)
    assert record.commit_and_dirty() == expected == (expected[0], dirty)
    assert re.fullmatch("[0-9a-f]{40}", expected[0])


def test_outside_any_repository_both_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("MBN_COMMIT", "a" * 40 + "-dirty")
    assert record.commit_and_dirty() == ("a" * 40, True)
    monkeypatch.delenv("MBN_COMMIT")
    assert record.commit_and_dirty() == (None, None)


def test_the_commit_is_that_of_the_tree_that_holds_the_package():
    assert (REPOSITORY / "mbn" / "records" / "record.py").samefile(record.__file__)
