"""Records: one small JSON file a finished run, the only thing that tables and figures are made of."""

import datetime
import hashlib
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from mbn import __version__
from mbn.config import REPOSITORY, Config, ConfigError, from_dict, run_name, to_dict
from mbn.system.errors import UserError
from mbn.system.files import write_atomically

FIELDS = (
    *("name", "config", "test_error", "test_error_best", "train_error", "test_error_top5", "test_error_precise"),
    *("test_loss", "train_loss", "iterations", "images", "parameters", "seconds", "images_per_second"),
    *("device", "mode", "threads", "commit", "dirty", "versions", "date", "curves", "checksum"),
)


def path_of(results: Path, name: str) -> Path:
    return results / "records" / f"{name}.json"


def config_for_record(config: Config) -> dict[str, Any]:
    """The full configuration but for the two paths, which say where the files of one machine were."""
    plain = to_dict(config)
    del plain["machine"]["data"], plain["machine"]["results"]
    return plain


def config_of(record: dict[str, Any]) -> Config:
    """The Config that a record's run had. Errors: ConfigError."""
    plain = {
        **record["config"],
        "machine": {**record["config"]["machine"], "data": "data", "results": "results"},
    }
    return from_dict(plain)


def checksum(record: dict[str, Any]) -> str:
    """SHA-256 of all other fields, as JSON with sorted keys and without spaces."""
    rest = {key: value for key, value in record.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write(results: Path, record: dict[str, Any]) -> Path:
    """Complete a record with its date and checksum and write it. Errors: UserError."""
    record = {**record, "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    path = path_of(results, record["name"])
    _write(path, record)
    return path


def rewrite(path: Path, **changes: Any) -> Path:
    """Replace fields of a record by what was measured later. Errors: UserError."""
    _write(path, read(path) | changes)
    return path


def _write(path: Path, record: dict[str, Any]) -> None:
    record["checksum"] = checksum(record)
    record = {key: record[key] for key in FIELDS}
    write_atomically(path, (_layout(record) + "\n").encode())


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
    if not isinstance(record, dict) or set(record) != set(FIELDS):
        wrong = sorted(set(FIELDS) ^ set(record)) if isinstance(record, dict) else "all"
        raise UserError(f"{path} is not a record (wrong fields: {wrong}): restore it from git, or delete it.")
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
    return record


def commit_and_dirty() -> tuple[str | None, bool | None]:
    """The commit of the tree that holds this package, and whether tracked files outside results/ differ from it.

    Without git both come from MBN_COMMIT, which holds what `git describe --always --dirty --abbrev=40 --exclude '*'`
    printed where there was one; (None, None) without either.
    """
    try:
        head = _git("rev-parse", "HEAD").strip()
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)results").strip()
        return head, bool(changed)
    except (OSError, subprocess.CalledProcessError):
        described = os.environ.get("MBN_COMMIT", "").strip()
        if not described:
            return None, None
        return described.removesuffix("-dirty"), described.endswith("-dirty")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(REPOSITORY), *arguments], check=True, capture_output=True, text=True).stdout


def versions() -> dict[str, str]:
    import numpy
    import torch
    import torchvision

    return {
        "mbn": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
    }


def device_name(device: Any) -> str:
    """What ran it, as 'cpu: AMD EPYC' or 'cuda: NVIDIA H100 80GB HBM3'."""
    import torch

    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{device.type}: {model}"


def summary(record: dict[str, Any]) -> str:
    """One line for the end of a run."""
    precise = record["test_error_precise"]
    return (
        f"{record['name']}: test error {record['test_error']:.2f} % (best epoch {record['test_error_best']:.2f} %"
        + (f", with precise statistics {precise:.2f} %), " if precise is not None else "), ")
        + f"training error {record['train_error']:.2f} %, {record['iterations']} iterations in "
        f"{record['seconds']:.0f} s"
    )
