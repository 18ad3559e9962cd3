"""Records from elsewhere: which are taken, which are refused."""

import io
import tarfile
import zipfile

import pytest
import toy_records
from test_record import edit

from mbn import grid
from mbn.config import REPOSITORY
from mbn.records import record
from mbn.records.import_records import gather
from mbn.system.errors import UserError

CELL = grid.read("table6").cells[0]


def records(folder):
    return sorted(folder.rglob("*records/**/*.json"))


@pytest.fixture
def there(tmp_path):
    """A folder with three records, other JSON, and a text."""
    folder = tmp_path / "there"
    for seed in range(3):
        toy_records.write(folder / "results", CELL, seed, test_error=8.0)
    (folder / "package.json").write_text('{"name": "other"}')
    (folder / "results" / "records" / "notes.txt").write_text("mine")
    return folder


@pytest.fixture
def here(tmp_path):
    return tmp_path / "here"


def packed(folder, suffix):
    path = folder.parent / f"packed{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in folder.rglob("*"):
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


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda p: p.write_text(p.read_text().replace("8.0", "7.0", 1)), "checksum"),
        (lambda p: p.write_text(p.read_text()[:100]), "not JSON"),
        (lambda p: p.write_bytes(b"\xff\xfe" + p.read_bytes()), "not JSON"),
        (lambda p: edit(p, lambda r: r.update(name="../../outside"), sign=True), "its configuration gives"),
        (lambda p: edit(p, lambda r: r.update(more=1), sign=True), "more"),
        (lambda p: record.rewrite(p, dirty=True), "--allow-dirty"),
        (lambda p: record.rewrite(p, commit=None, dirty=None), "--allow-dirty"),
        (lambda p: p.write_text(" " * (2 << 20)), "too large"),
    ],
)
def test_a_wrong_record_is_refused_and_the_others_are_taken(there, here, spoil, says):
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
    toy_records.write(here, CELL, 1, test_error=50.0)
    (mine,) = records(here)
    before = mine.read_bytes()
    gathered = gather(there, here)
    assert len(gathered.taken) == 2
    assert "differs from" in gathered.refused[0]
    assert mine.read_bytes() == before


def test_what_holds_no_records_is_refused(tmp_path, here):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(REPOSITORY / "mbn")
    cut = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    source = tmp_path / "source"
    for content, says in ((None, "import"), (b"no archive", "import"), (b"PK\x03\x04 broken", "import"), (cut, "read")):
        if content is not None:
            source.write_bytes(content)
        with pytest.raises(UserError, match=f"cannot {says}"):
            gather(source, here)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no records"):
        gather(tmp_path / "empty", here)
