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

COMMITTED = sorted((REPOSITORY / "results" / "records").rglob("*.json"))


@pytest.fixture(scope="module")
def configuration():
    return config.load(["dataset=digits", "schedule.iterations=8"])


@pytest.fixture
def content(configuration):
    """A record without what `write` adds."""
    return {
        "name": config.run_name(configuration),
        "config": record.config_for_record(configuration),
        **dict.fromkeys(("test_error", "test_error_best"), 40.0),
        **dict.fromkeys(("train_error", "test_loss", "train_loss", "seconds", "images_per_second"), 1.5),
        "test_error_top5": 2.5,
        "test_error_precise": None,
        "iterations": 8,
        "images": 1024,
        "parameters": 3,
        "threads": 1,
        "device": "cpu: ü",
        "mode": "eager",
        "commit": "0123456789" * 4,
        "dirty": False,
        "code": "0" * 64,
        "versions": {"torch": "2"},
        **dict.fromkeys(("parts", "journal", "controls", "diverged_at")),
        "curves": {"images": [512, 1024], "test_error": [50.0, 40.0]},
    }


@pytest.fixture
def path(tmp_path, content):
    """A record's file."""
    record.write(tmp_path, content)
    return record.path_of(tmp_path, content["name"])


def edit(path, change, sign=False):
    """Change a record's file; sign: with a checksum that fits."""
    result = json.loads(path.read_text())
    change(result)
    if sign:
        result["checksum"] = record.checksum(result)
    path.write_text(json.dumps(result))


def refusal(path):
    with pytest.raises(UserError) as caught:
        record.read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_record_is_read_as_it_was_written(tmp_path, content):
    written = record.write(tmp_path, content)
    path = record.path_of(tmp_path, content["name"])
    assert record.read(path) == written
    assert list(written) == list(record.FIELDS)
    assert {key: written[key] for key in content} == content
    assert written["version"] == record.VERSION
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", written["date"])
    rewritten = record.rewrite(path, test_error_precise=2.5)
    assert rewritten == record.read(path)
    changed = {"test_error_precise": 2.5, "checksum": rewritten["checksum"]}
    assert rewritten == written | changed != written


def test_the_checksum_is_the_sha256_of_all_the_rest(path):
    written = json.loads(path.read_text())
    checksum = written.pop("checksum")
    canonical = json.dumps(written, sort_keys=True, separators=(",", ":"))
    assert checksum == hashlib.sha256(canonical.encode()).hexdigest()


def test_a_record_is_small_and_readable(path):
    text = path.read_text()
    assert '"images": [512, 1024],\n' in text
    assert text.endswith("}\n")
    assert max(len(line) for line in text.splitlines()) < 200


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(test_error=0.1),
        lambda r: r["config"].update(seed=1),
        lambda r: r["curves"]["test_error"].append(1),
        lambda r: r.update(commit=None),
        lambda r: r.update(checksum="0" * 64),
        lambda r: (r.pop("version"), r.pop("code")),
    ],
)
def test_an_edited_record_is_refused(path, change):
    edit(path, change)
    assert "checksum" in refusal(path)


# Versions.


@pytest.mark.parametrize("committed", COMMITTED, ids=lambda p: p.stem)
def test_every_committed_record_is_valid(committed):
    assert record.path_of(REPOSITORY / "results", record.read(committed)["name"]) == committed


@pytest.mark.parametrize("lacks", ["version", "code"])
def test_what_an_older_record_lacks_reads_as_none(path, lacks):
    edit(path, lambda r: [r.pop(key, None) for key in ("version", lacks)], sign=True)
    read = record.read(path)
    assert set(read) == set(record.FIELDS)
    assert {key for key, value in read.items() if value is None} == {
        "version",
        lacks,
        "test_error_precise",
        "parts",
        "journal",
        "controls",
        "diverged_at",
    }
    assert record.rewrite(path, test_error_precise=2.5)["version"] == record.VERSION
    assert record.read(path)[lacks] == (record.VERSION if lacks == "version" else None)


def test_a_field_of_a_later_version_is_none_in_todays_records(path, monkeypatch):
    monkeypatch.setattr(record, "VERSION", record.VERSION + 1)
    monkeypatch.setattr(record, "FIELDS", (*record.FIELDS, "joules"))
    monkeypatch.setattr(record, "LATER", (*record.LATER, "joules"))
    assert record.read(path)["joules"] is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r.update(version=record.VERSION + 1, joules=1), "newer version.*joules"),
        (lambda r: r.update(comment="good"), "comment"),
        (lambda r: r.update(version=record.VERSION + 1), "newer version"),
        (lambda r: r.update(version="old"), 'version "old"'),
        (lambda r: r.update(version=True), "version true"),
        (lambda r: r.pop("test_loss"), "lacks test_loss"),
        (lambda r: (r.pop("version"), r.pop("test_error")), "lacks test_error"),
        (lambda r: r.update(name="digits/resnet20/mbn-f2-b128-s0-00000000"), "its configuration gives digits/resnet20"),
        (lambda r: r["config"]["norm"].update(decay=2), r"norm\.decay"),
        (
            lambda r: r["config"].update(batch_size="128"),
            "impossible configuration \\(batch_size must be a whole number",
        ),
        (lambda r: r.update(config=[]), "impossible configuration"),
    ],
)
def test_a_wrong_record_is_refused_even_with_a_right_checksum(path, change, says):
    edit(path, change, sign=True)
    assert re.search(says, refusal(path))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", "<<<<<<< HEAD\n"])
def test_a_file_that_is_no_record_is_refused_by_name(path, text):
    path.write_text(text)
    assert "json is not" in refusal(path)


@pytest.mark.parametrize(
    ("name", "folder"),
    [("cifar10/nin/bn", "records"), ("imagenet/nin/bn", "records"), ("digits/nin/bn", "other_records")],
)
def test_a_record_is_in_git_s_sight_if_tables_have_its_data_set(tmp_path, name, folder):
    assert record.path_of(tmp_path, name) == tmp_path / folder / f"{name}.json"


def test_git_ignores_the_records_of_other_data_sets():
    ignored = subprocess.run(["git", "check-ignore", "-q", "results/other_records/x.json"], cwd=REPOSITORY).returncode
    assert ignored == 0
    assert subprocess.run(["git", "check-ignore", "-q", "results/records/x.json"], cwd=REPOSITORY).returncode == 1
