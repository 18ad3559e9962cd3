"""Records: one small JSON file for each finished run. Tables and figures are made from them alone."""

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

from mbn.config import DATASETS, Config, ConfigError, from_dict, run_name, to_dict
from mbn.system.durations import duration
from mbn.system.errors import UserError
from mbn.system.files import write_atomically

# Version 1 had no field for its version; version 2 had no hash of the code; version 3 had no parts and no hash of the
# journal.
VERSION = 4
FIELDS = (
    "version",
    *("name", "config", "test_error", "test_error_best", "train_error", "test_error_top5", "test_error_precise"),
    *("test_loss", "train_loss", "iterations", "images", "parameters", "seconds", "images_per_second"),
    *("device", "mode", "threads", "commit", "dirty", "code", "versions", "parts", "journal", "date", "curves"),
    "checksum",
)
# Fields that records of every version have. Any other field that an older record lacks is read as None.
NEEDED = ("name", "config", "test_error", "checksum")


def path_of(results: Path, name: str) -> Path:
    """Where the record of a run is: in records/, or in other_records/, which git ignores, if no table has its data."""
    source = DATASETS.get(name.partition("/")[0])
    folder = "records" if source is None or source.in_tables else "other_records"
    return results / folder / f"{name}.json"


def content_hash(results: Path, name: str) -> str | None:
    """SHA-256 of a run's record file, or None where there is none."""
    path = path_of(results, name)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def config_for_record(config: Config) -> dict[str, Any]:
    """The full configuration except its two paths, which say where the files of one machine were."""
    plain = to_dict(config)
    del plain["machine"]["data"], plain["machine"]["results"]
    return plain


def config_of(record: dict[str, Any]) -> Config:
    """The Config that a record's run had. Errors: ConfigError."""
    machine = record["config"]["machine"] | {"data": "data", "results": "results"}
    return from_dict(record["config"] | {"machine": machine})


def checksum(record: dict[str, Any]) -> str:
    """SHA-256 of all other fields that it has, as JSON with sorted keys and without spaces."""
    rest = {key: value for key, value in record.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write(results: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Complete a record with its version, date and checksum, write it, and return it. Errors: UserError."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return _write(path_of(results, record["name"]), {**record, "date": date})


def rewrite(path: Path, **changes: Any) -> dict[str, Any]:
    """Replace fields of a record by what was measured later, and return the record. Errors: UserError."""
    return _write(path, read(path) | changes)


def _write(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    record["version"] = VERSION
    record["checksum"] = checksum(record)
    record = {key: record[key] for key in FIELDS}
    write_atomically(path, (_layout(record) + "\n").encode())
    return record


def _layout(value: Any, indent: int = 0) -> str:
    """JSON with one line a key, and lists on one line."""
    if isinstance(value, dict) and value:
        pad = " " * (indent + 1)
        inner = ",\n".join(f"{pad}{json.dumps(k)}: {_layout(v, indent + 1)}" for k, v in value.items())
        return "{\n" + inner + "\n" + " " * indent + "}"
    return json.dumps(value)


def read(path: Path) -> dict[str, Any]:
    """Read a record and check that it is whole, unedited, and named after its configuration. Errors: UserError."""
    return parse(path.read_bytes(), path)


def parse(content: bytes, path: Path) -> dict[str, Any]:
    """The record that a file holds, checked as in `read`; path: the file, for the messages. Errors: UserError."""
    try:
        record = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): restore it from git, or delete it and train again.") from None
    fields = set(record) if isinstance(record, dict) else set()
    version = record.get("version", 1) if fields else None
    lacking = sorted({*(FIELDS if version == VERSION else NEEDED)} - fields)
    if lacking:
        raise UserError(f"{path} is not a record (it lacks {', '.join(lacking)}): restore it from git, or delete it.")
    unknown = sorted(fields - set(FIELDS))
    if unknown or version not in range(1, VERSION + 1):
        what = f"unknown fields: {', '.join(unknown)}" if unknown else f"version {version}"
        raise UserError(f"{path} is of a newer version than this code ({what}): update the code, or delete it.")
    if record["checksum"] != checksum(record):
        raise UserError(
            f"{path} was changed after it was written (its checksum is wrong): restore it from git, or delete it and "
            "train again."
        )
    try:
        named = run_name(config_of(record))
    except (ConfigError, KeyError, TypeError) as error:
        raise UserError(f"{path} has an impossible configuration ({error}): delete it and train again.") from None
    if named != record["name"]:
        raise UserError(f"{path} is named {record['name']}, but its configuration gives {named}: delete it.")
    return {key: record.get(key) for key in FIELDS}


def in_a_sentence(record: dict[str, Any]) -> str:
    """One line for the end of a run."""
    precise, iterations = record["test_error_precise"], record["iterations"]
    return (
        f"{record['name']}: test error {record['test_error']:.2f} % (best epoch {record['test_error_best']:.2f} %"
        + (f", with precise statistics {precise:.2f} %), " if precise is not None else "), ")
        + f"training error {record['train_error']:.2f} %, {iterations:,} iteration{'s' * (iterations != 1)} in "
        f"{duration(record['seconds'])}"
    )
