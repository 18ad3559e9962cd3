"""Taking in records that were trained elsewhere, from a folder or an archive. Does not import torch."""

import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mbn.records import record
from mbn.system.errors import UserError
from mbn.system.files import write_atomically

# Records are under 20 kB. A larger file is no record, and is not unpacked.
LARGEST = 1 << 20


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
    it differs from the one that is here already. Errors: UserError if source cannot be read.
    """
    gathered = Gathered()
    for path, content in _files(source):
        if content is not None and not _meant_as_record(path, content):
            gathered.others += 1
            continue
        try:
            _take(path, content, results, allow_dirty, gathered)
        except UserError as error:
            gathered.refused.append(str(error))
    if not gathered.taken and not gathered.known and not gathered.refused:
        raise UserError(f"there are no records in {source}: name a folder or an archive that holds results/records.")
    return gathered


def _take(path: Path, content: bytes | None, results: Path, allow_dirty: bool, gathered: Gathered) -> None:
    if content is None:
        raise UserError(f"{path} is too large to be a record.")
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


def _meant_as_record(path: Path, content: bytes) -> bool:
    """Whether a JSON file is meant as a record, and so is taken or refused. Other JSON files are skipped."""
    if {"records", "other_records"} & set(path.parts[:-1]):
        return True
    try:
        parsed = json.loads(content)
    except ValueError:
        return True
    return isinstance(parsed, dict) and ("checksum" in parsed or {"config", "test_error"} <= set(parsed))


def _files(source: Path) -> Iterator[tuple[Path, bytes | None]]:
    """Path and content of every JSON file; None instead of the content of one that is too large. Errors: UserError."""
    try:
        for path, size, read in _members(source):
            if path.suffix == ".json":
                yield path, read() if size <= LARGEST else None
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, RuntimeError) as error:
        raise UserError(f"cannot read {source} ({error}): get it again, or name another.") from None


def _members(source: Path) -> Iterator[tuple[Path, int, Callable[[], bytes]]]:
    """Path and size of every file in a folder or archive, and a function that reads it. Errors: UserError."""
    if source.is_dir():
        for path in sorted(path for path in source.rglob("*.json") if path.is_file()):
            yield path, path.stat().st_size, path.read_bytes
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    yield source / entry.filename, entry.file_size, partial(archive.read, entry)
    elif source.is_file() and tarfile.is_tarfile(source):
        with tarfile.open(source) as tar:
            for member in tar:
                if member.isfile() and (file := tar.extractfile(member)):
                    yield source / member.name, member.size, file.read
    else:
        wanted = "a folder, or a .tar, .tar.gz or .zip archive" if source.exists() else "something that exists"
        raise UserError(f"cannot import {source}: name {wanted}.")
