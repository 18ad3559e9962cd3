"""results/reliability.md: a table with one row for each long test, its date and commit. Only long tests write it."""

import datetime
import os
from pathlib import Path

import torch

from mbn.config import REPOSITORY
from mbn.records import provenance
from mbn.system.files import write_atomically

# When the tests began. Tests replace it for the runs that they start.
COMMIT = provenance.commit_and_dirty()
PATH = REPOSITORY / "results" / "reliability.md"
HEAD = """# Nothing lost, nothing silent

Written by `pytest --long`, which anyone can run; a row is replaced when its own test runs again.

"""
COLUMNS = ("item", "what", "figure", "seconds", "command", "date", "commit", "versions", "machine")


def read(path: Path = PATH) -> dict[str, dict[str, str]]:
    """The rows by their commands. Errors: ValueError where the file is no such table."""
    if not path.exists():
        return {}
    table = [line for line in path.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    if rows[:1] != [list(COLUMNS)] or any(len(row) != len(COLUMNS) for row in rows):
        raise ValueError(f"{path} is not the table that the long tests write: restore it from git")
    return {row[4]: dict(zip(COLUMNS, row, strict=True)) for row in rows[2:]}


def put(item: str, what: str, figure: str, seconds: float, command: str, path: Path = PATH) -> None:
    """Write the row of one command; the others stay as they are."""
    commit, dirty = COMMIT
    versions = provenance.versions()
    row = {
        "item": item,
        "what": what,
        "figure": figure,
        "seconds": f"{seconds:.0f}",
        "command": f"`{command}`",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": f"{(commit or 'none')[:10]}{' (changed)' if dirty else ''}",
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "numpy")),
        "machine": f"{provenance.device_name(torch.device('cpu'))}, {os.cpu_count()} cores",
    }
    cells = {key: " ".join(value.replace("|", "/").split()) for key, value in row.items()}
    rows = sorted((read(path) | {cells["command"]: cells}).values(), key=lambda r: (int(r["item"]), r["command"]))
    lines = ["| " + " | ".join(r[key] for key in COLUMNS) + " |" for r in rows]
    head = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    write_atomically(path, (HEAD + "\n".join([*head, *lines]) + "\n").encode())
