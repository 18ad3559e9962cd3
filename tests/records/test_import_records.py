"""Records from elsewhere: which are taken, which are refused."""

import gzip
import io
import random
import re
import shutil
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

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
    return sorted(path for path in folder.rglob("*records/**/*.json") if not path.name.startswith("."))


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
    (there / "results" / "records" / "._macos.json").write_bytes(b"\0")
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
        (lambda p: record.rewrite(p, commit=None, dirty=None, parts=None), "--allow-dirty"),
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


# Foreign archives and what is in them.


def zipped(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tarred(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def changed(path, offset, content):
    path.write_bytes(path.read_bytes()[:offset] + content + path.read_bytes()[offset + len(content) :])


def three(there):
    """Three records by their paths in an archive."""
    return {f"records/{path.name}": path.read_bytes() for path in records(there)}


def damage_data(path):
    """Change the first member's compressed bytes."""
    changed(path, 200, bytes(50))


def encrypt(path):
    """Mark the first member as encrypted, in both of its headers."""
    changed(path, 6, b"\1")
    changed(path, path.read_bytes().index(b"PK\1\2") + 8, b"\1")


def compress_oddly(path):
    """Give the first member a compression that nobody knows."""
    changed(path, 8, b"\x63")
    changed(path, path.read_bytes().index(b"PK\1\2") + 10, b"\x63")


@pytest.mark.parametrize("spoil", [damage_data, encrypt, compress_oddly])
def test_a_bad_member_of_a_zip_hides_no_other(there, here, tmp_path, spoil):
    path = zipped(tmp_path / "x.zip", three(there))
    spoil(path)
    gathered = gather(path, here)
    assert len(gathered.taken) == 2
    (sentence,) = gathered.refused
    assert re.fullmatch(rf"cannot read {path}/records/mbn.*json \([^\n]+\): get it again, or name another\.", sentence)


def test_a_zip_without_its_directory_is_one_sentence(there, here, tmp_path):
    path = zipped(tmp_path / "x.zip", three(there))
    changed(path, path.read_bytes().index(b"PK\1\2"), b"PK\0\0")
    with pytest.raises(UserError, match=r"^cannot read \S+x\.zip \([^\n]+\): get it again, or name another\.$"):
        gather(path, here)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("where", [0.02, 0.5, 0.9])
def test_a_damaged_tar_is_one_sentence_and_what_came_before_is_taken(there, here, tmp_path, kind, where):
    path = tarred(tmp_path / "x.tar", three(there) | {"noise": random.Random(0).randbytes(100_000)}, f"w:{kind}")
    assert len(gather(path, here).taken) == 3
    shutil.rmtree(here)
    changed(path, int(where * path.stat().st_size), bytes(500))
    try:
        gathered = gather(path, here)
    except UserError as error:
        said = [str(error)]
    else:
        said = gathered.refused
        assert len(gathered.taken) == len(records(here)) >= (where > 0.1)
    assert said
    assert all(re.fullmatch(r"(cannot read|.* is not JSON)[^\n]+\.", sentence) for sentence in said)


def test_a_damaged_header_or_a_missing_end_of_a_tar_is_said(there, here, tmp_path):
    path = tarred(tmp_path / "x.tar", three(there))
    second = path.read_bytes().index(b"records/", 100)
    whole = path.read_bytes()
    for content in (whole[:second] + b"\1" + whole[second + 1 :], whole[:second]):
        path.write_bytes(content)
        gathered = gather(path, here)
        assert len(gathered.taken + gathered.known) == 1
        assert gathered.refused == [
            f"cannot read {path} (damaged or cut off after {second} bytes): get it again, or name another."
        ]


def test_a_huge_header_of_a_tar_is_not_read(here, tmp_path):
    """A pax header of 60 MB takes a few: it is refused at its size."""
    with gzip.open(tmp_path / "x.tar.gz", "wb", compresslevel=1) as file:
        header = tarfile.TarInfo("pax")
        header.type, header.size = tarfile.XHDTYPE, 60 << 20
        file.write(header.tobuf(tarfile.USTAR_FORMAT) + b"60000000 comment=")
        for _ in range(60):
            file.write(b"x" * (1 << 20))
    tracemalloc.start()
    with pytest.raises(UserError, match="a header in it is too large"):
        gather(tmp_path / "x.tar.gz", here)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 << 20


STRANGE = {
    "deep": (b"[" * 200_000, "too deeply nested"),
    "deep, and closed": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "too deeply nested"),
    "latin-1": ("{'a': 'é'}".encode("latin-1"), "is not JSON"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "is not JSON"),
    "a key twice": (b'{"test_error": 1, "test_error": 2}', 'the key "test_error" stands twice'),
    "a huge number": (b'{"seconds": ' + b"9" * 10_000 + b"}", "is not JSON"),
    "interpolation": (b'{"config": {"seed": "${oc.env:HOME}"}}', "it holds ${"),
    "escaped interpolation": (rb'{"config": {"seed": "\u0024{oc.env:HOME}"}}', "it holds ${"),
    "nothing": (b"", "is not JSON"),
    "an escape": (b'{"\\u001b[2J": 1, "checksum": 1}', "is not a record"),
}


@pytest.mark.parametrize(("content", "says"), STRANGE.values(), ids=list(STRANGE))
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_strange_json_is_one_sentence_and_hides_no_other(there, here, tmp_path, pack, content, says):
    gathered = gather(pack(tmp_path / "x", {"records/\x1b[2J\n\u202e.json": content} | three(there)), here)
    assert len(gathered.taken) == 3
    (sentence,) = gathered.refused
    assert says in sentence
    assert r"records/\x1b[2J\n\u202e.json" in sentence
    assert sentence.isprintable()
    assert len(sentence) < 450


def test_a_member_that_no_one_may_read_hides_no_other(there, here, monkeypatch):
    first = records(there)[0]
    original = Path.read_bytes

    def read_bytes(path):
        if path == first:
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    gathered = gather(there, here)
    assert len(gathered.taken) == 2
    assert "Permission denied" in gathered.refused[0]


def test_what_the_environment_holds_does_not_reach_a_record(there, monkeypatch):
    monkeypatch.setenv("SECRET", "0")
    path = records(there)[0]
    edit(path, lambda r: r["config"].update(seed="${oc.env:SECRET}"), sign=True)
    with pytest.raises(UserError, match=r"it holds \$\{"):
        record.read(path)
