"""Records from elsewhere: which are taken, which are refused."""

import io
import json
import tarfile
import zipfile

import pytest

from mbn.config import REPOSITORY, load, run_name
from mbn.records import record
from mbn.records.import_records import gather
from mbn.system.errors import UserError


def a_record(results, *overrides, **fields):
    config = load(["dataset=digits", *overrides])
    about = {"name": run_name(config), "config": record.config_for_record(config), "commit": "c" * 40, "dirty": False}
    record.write(results, dict.fromkeys(record.FIELDS, 0.0) | about | fields)


def records(folder):
    return sorted(folder.rglob("records/**/*.json"))


@pytest.fixture
def there(tmp_path):
    """A folder with three records, and other JSON."""
    folder = tmp_path / "there"
    for seed in range(3):
        a_record(folder / "results", f"seed={seed}")
    (folder / "package.json").write_text('{"name": "other"}')
    return folder


@pytest.fixture
def here(tmp_path):
    return tmp_path / "here"


def packed(folder, suffix):
    path = folder.parent / f"packed{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in folder.rglob("*.json"):
                archive.write(file, file.relative_to(folder))
    else:
        with tarfile.open(path, "w:gz") as archive:
            archive.add(folder, "deep/inside")
    return path


@pytest.mark.parametrize("suffix", ["", ".tar.gz", ".zip"])
def test_records_are_taken_once_wherever_they_stand(there, here, suffix):
    source = packed(there, suffix) if suffix else there
    gathered = gather(source, here)
    assert (len(gathered.taken), gathered.known, gathered.refused, gathered.others) == (3, [], [], 1)
    assert [(p.relative_to(here), p.read_bytes()) for p in records(here)] == [
        (p.relative_to(there / "results"), p.read_bytes()) for p in records(there)
    ]
    gathered = gather(source, here)
    assert (gathered.taken, len(gathered.known)) == ([], 3)


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    content["checksum"] = record.checksum(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda p: p.write_text(p.read_text().replace("0.0", "1.0", 1)), "checksum"),
        (lambda p: p.write_text(p.read_text()[:100]), "not JSON"),
        (lambda p: p.write_bytes(b"\xff\xfe" + p.read_bytes()), "not JSON"),
        (lambda p: edit(p, name="../../outside"), "its configuration gives"),
        (lambda p: edit(p, more=1), "more"),
        (lambda p: edit(p, dirty=True), "--allow-dirty"),
        (lambda p: edit(p, commit=None, dirty=None), "--allow-dirty"),
        (lambda p: p.write_text(" " * (2 << 20)), "too large"),
    ],
)
def test_one_is_refused_and_the_others_are_taken(there, here, spoil, says):
    path = records(there)[0]
    spoil(path)
    gathered = gather(packed(there, ".tar.gz"), here)
    assert len(gathered.taken) == len(records(here)) == 2
    (sentence,) = gathered.refused
    assert says in sentence
    assert path.name in sentence
    if says == "--allow-dirty":
        assert len(gather(there, here, allow_dirty=True).taken) == 1


def test_no_record_is_overwritten(there, here):
    a_record(here, "seed=1", test_error=50.0)
    (mine,) = records(here)
    before = mine.read_bytes()
    gathered = gather(there, here)
    assert len(gathered.taken) == 2
    assert "differs from" in gathered.refused[0]
    assert mine.read_bytes() == before


def test_what_holds_no_records_is_refused(tmp_path, here):
    (tmp_path / "text.zip").write_bytes(b"no archive")
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 broken")
    (tmp_path / "empty").mkdir()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(REPOSITORY / "mbn")
    (tmp_path / "cut.tar.gz").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    for name, says in {
        "nowhere": "cannot import",
        "text.zip": "cannot import",
        "broken.zip": "cannot import",
        "empty": "no records",
        "cut.tar.gz": "cannot read",
    }.items():
        with pytest.raises(UserError, match=says):
            gather(tmp_path / name, here)
