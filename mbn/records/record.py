"""Records: one small JSON file for each finished run. Tables and figures are made from them alone."""

import datetime
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from mbn.config import DATASETS, Config, from_dict, run_name, to_dict
from mbn.records.sense import as_json, fault
from mbn.system.durations import duration
from mbn.system.errors import UserError
from mbn.system.files import write_atomically

# Version 1 had no field for its version; version 2 had no hash of the code; version 3 had no parts and no hash of the
# journal; version 4 had no controls, and no records of runs that diverged. Up to version 4 `test_error_precise` was
# measured with the memory held.
VERSION = 5
FIELDS = (
    "version",
    *("name", "config", "test_error", "test_error_best", "train_error", "test_error_top5", "test_error_precise"),
    *("test_loss", "train_loss", "iterations", "images", "parameters", "seconds", "images_per_second", "diverged_at"),
    *("device", "mode", "threads", "commit", "dirty", "code", "versions", "parts", "journal", "date", "curves"),
    "controls",
    "checksum",
)
# Fields that records of earlier versions lack; they are then read as None.
LATER = ("version", "code", "parts", "journal", "controls", "diverged_at")


def path_of(results: Path, name: str) -> Path:
    """Where the record of a run is: in records/, or in other_records/, which git ignores, if no table has its data."""
    source = DATASETS.get(name.partition("/")[0])
    folder = "records" if source is None or source.in_tables else "other_records"
    return results / folder / f"{name}.json"


def run_folder(results: Path, name: str) -> Path:
    """The folder of a run's checkpoints and journal."""
    return results / "runs" / name


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
    return from_dict(record["config"])


def checksum(record: dict[str, Any]) -> str:
    """SHA-256 of all other fields that it has, as JSON with sorted keys and without spaces."""
    rest = {key: value for key, value in record.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write(results: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Complete a record with its version, date and checksum, write it, and return it.

    Errors: UserError, also for a record that cannot be true.
    """
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return _write(path_of(results, record["name"]), {**record, "date": date})


def rewrite(path: Path, **changes: Any) -> dict[str, Any]:
    """Replace fields of a record by what was measured later, and return the record. Errors: UserError."""
    return _write(path, read(path) | changes)


def _write(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    if wrong := fault(record, config_of(record)):
        raise UserError(
            f"{path} is not written, because it would not be true: {wrong}; report this as a fault of the program."
        )
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
    """Read a record and check that it is whole, unedited, named after its configuration, and can be true.

    Errors: UserError.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): make it readable, or delete it.") from None
    return parse(content, path)


def parse(content: bytes, path: Path) -> dict[str, Any]:
    """The record that a file holds, checked as in `read`; path: the file, for the messages. Errors: UserError."""
    record = load(content, path)
    fields = set(record) if isinstance(record, dict) else set()
    version = record.get("version", 1) if fields else None
    lacking = sorted({*FIELDS} - fields - ({*LATER} if version != VERSION else set()))
    if lacking:
        raise UserError(f"{path} is not a record (it lacks {', '.join(lacking)}): restore it from git, or delete it.")
    unknown = sorted(fields - set(FIELDS))
    if unknown or type(version) is not int or version not in range(1, VERSION + 1):
        what = f"unknown fields: {', '.join(unknown)}" if unknown else f"version {as_json(version)}"
        raise UserError(f"{path} is of a newer version than this code ({what}): update the code, or delete it.")
    if record["checksum"] != checksum(record):
        raise UserError(
            f"{path} was changed after it was written (its checksum is wrong): restore it from git, or delete it and "
            "train again."
        )
    try:
        config = config_of(record)
    except Exception as error:  # whatever the libraries that check a configuration raise
        reason = str(error).removesuffix(".")
        raise UserError(f"{path} has an impossible configuration ({reason}): delete it and train again.") from None
    if record["name"] != (named := run_name(config)):
        raise UserError(f"{path} is named {as_json(record['name'])}, but its configuration gives {named}: delete it.")
    record = {key: record.get(key) for key in FIELDS}
    if wrong := fault(record, config):
        raise UserError(f"{path} cannot be true: {wrong}; delete it and train again.")
    return record


def load(content: bytes, path: Path) -> Any:
    """What a JSON file holds, parsed strictly; path: the file, for the messages. Errors: UserError."""
    try:
        loaded = json.loads(content.decode(), object_pairs_hook=_once_each)
        text = json.dumps(loaded)
        if "${" in text:  # would be looked up, in the environment too
            raise ValueError("it holds ${")
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else error
        raise UserError(f"{path} is not JSON ({reason}): restore it from git, or delete it and train again.") from None
    return loaded


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {as_json(twice)} stands twice")
    return found


def in_a_sentence(record: dict[str, Any]) -> str:
    """One line for the end of a run."""
    if diverged(record):
        return f"{record['name']}: {divergence(record)}"
    precise, iterations = (record["controls"] or {}).get("test_error_precise"), record["iterations"]
    return (
        f"{record['name']}: test error {record['test_error']:.2f} % (best epoch {record['test_error_best']:.2f} %"
        + (f", with precise statistics {precise:.2f} %), " if precise is not None else "), ")
        + f"training error {record['train_error']:.2f} %, {iterations:,} iteration{'s' * (iterations != 1)} in "
        f"{duration(record['seconds'])}"
    )


def diverged(record: dict[str, Any]) -> bool:
    """Whether its run diverged: then it has no errors, no losses and no curves. Files of older versions lack it."""
    return record.get("diverged_at") is not None


def divergence(record: dict[str, Any]) -> str:
    """Where a run diverged, in words. Example: diverged at iteration 91 of 78,200."""
    return f"diverged at iteration {record['diverged_at']:,} of {record['iterations']:,}"
