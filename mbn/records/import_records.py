"""Taking in records that were trained elsewhere, from a folder or an archive. Does not import torch."""

import bz2
import contextlib
import gzip
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from mbn.records import record
from mbn.system.errors import UserError
from mbn.system.files import write_atomically

# Records are under 20 kB. A larger file is no record, and is not unpacked.
LARGEST = 1 << 20
# What a compressed tar begins with, and what opens it.
COMPRESSED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}

# Path and size of a file in a folder or an archive, and a function that reads it.
Member = tuple[Path, int, Callable[[], bytes]]


@dataclass
class Gathered:
    """Names of the records taken and of those known already, sentences about those refused, and other JSON files."""

    taken: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    others: int = 0


def gather(source: Path, results: Path, allow_dirty: bool = False) -> Gathered:
    """Check each record in a folder or archive, wherever it is in there, and copy it to its place in results.

    A record is refused if `record.read` would refuse it, if changed or unknown code made it (unless allow_dirty), or if
    it differs from the one that is here already. So is what cannot be read; the rest is taken where it can be read.

    Errors: UserError if source cannot be read, or holds no records.
    """
    gathered = Gathered()
    try:
        for path, size, read in _members(source):
            if path.suffix == ".json" and not path.name.startswith("."):  # macOS's ._ files
                try:
                    _take(path, size, read, results, allow_dirty, gathered)
                except UserError as error:
                    gathered.refused.append(str(error))
    except UserError:
        raise
    except Exception as error:  # whatever those who read archives raise
        broken = _unreadable(source, error)
        if not gathered.taken and not gathered.known and not gathered.refused:
            raise broken from None
        gathered.refused.append(str(broken))
    if not gathered.taken and not gathered.known and not gathered.refused:
        raise UserError(f"there are no records in {source}: name a folder or an archive that holds results/records.")
    return gathered


def _take(
    path: Path, size: int, read: Callable[[], bytes], results: Path, allow_dirty: bool, gathered: Gathered
) -> None:
    if size > LARGEST:
        raise UserError(f"{path} is too large to be a record.")
    try:
        content = read()
    except Exception as error:  # whatever those who read archives raise
        raise _unreadable(path, error) from None
    if not _meant_as_record(path, content):
        gathered.others += 1
        return
    new = record.parse(content, path)
    if not allow_dirty and (new["commit"] is None or new["dirty"] is not False):
        raise UserError(
            f"{path} was made by code that is in no commit: repeat it from a clean checkout, or take it with "
            "--allow-dirty."
        )
    home = record.path_of(results, new["name"])
    if not home.exists():
        write_atomically(home, content)
        gathered.taken.append(new["name"])
    elif record.read(home)["checksum"] == new["checksum"]:
        gathered.known.append(new["name"])
    else:
        raise UserError(f"{path} differs from {home}, which stays: delete that one first if this one is better.")


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"cannot read {path} ({str(error) or type(error).__name__}): get it again, or name another.")


def _meant_as_record(path: Path, content: bytes) -> bool:
    """Whether a JSON file is meant as a record, and so is taken or refused. Other JSON files are skipped."""
    if {"records", "other_records"} & set(path.parts[:-1]):
        return True
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        return True
    return isinstance(parsed, dict) and ("checksum" in parsed or {"config", "test_error"} <= set(parsed))


def _members(source: Path) -> Iterator[Member]:
    """Every file in a folder or archive. Errors: UserError for what is neither, and whatever reading it raises."""
    if source.is_dir():
        for path in sorted(path for path in source.rglob("*.json") if path.is_file()):
            yield path, path.stat().st_size, path.read_bytes
    elif source.is_file() and _is_tar(source):
        yield from _members_of_tar(source)
    elif zipfile.is_zipfile(source) or (source.is_file() and source.suffix == ".zip"):
        with zipfile.ZipFile(source) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    yield source / entry.filename, entry.file_size, partial(archive.read, entry)
    else:
        wanted = "a folder, or a .tar, .tar.gz or .zip archive" if source.exists() else "something that exists"
        raise UserError(f"cannot import {source}: name {wanted}.", code=2)


class _Bounded:
    """A file that gives no more than LEFT bytes until `left` is set again: a header of a tar may claim any size, and
    would be read as a whole.
    """

    LEFT = 4 * LARGEST

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self._read, self.left = file.seek, file.tell, file.read, self.LEFT

    def read(self, size: int) -> bytes:
        self.left -= size
        if self.left < 0:
            raise tarfile.StreamError("a header in it is too large")
        return self._read(size)


def _opener(source: Path) -> Any:
    with source.open("rb") as file:
        start = file.read(6)
    return next((opener for magic, opener in COMPRESSED.items() if start.startswith(magic)), open)


def _is_tar(source: Path) -> bool:
    opener = _opener(source)
    if opener is open:
        with source.open("rb") as file, contextlib.suppress(tarfile.ReadError):
            return tarfile.TarFile(fileobj=_Bounded(file)) is not None  # type: ignore[arg-type]
    return opener is not open


def _members_of_tar(source: Path) -> Iterator[Member]:
    """As `_members`. Nothing of a member is kept, and nothing that is not asked for is unpacked."""
    with _opener(source)(source, "rb") as file:
        bounded = _Bounded(file)
        tar: Any = tarfile.TarFile(fileobj=bounded)  # type: ignore[arg-type]
        while (member := tar.next()) is not None:
            if member.isfile() and (opened := tar.extractfile(member)):
                yield source / member.name, member.size, opened.read
            tar.members.clear()
            tar.pax_headers.clear()
            bounded.left = bounded.LEFT
        # A damaged header ends the loop as the right end does, which is a block of zeros.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"damaged or cut off after {tar.offset} bytes")
        while file.read(LARGEST):  # to the checksum of what is compressed
            pass
