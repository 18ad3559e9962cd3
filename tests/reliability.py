"""Tables of figures that only tests write: results/reliability.md has one row for each long test, with its commit."""

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
    """The rows of the long tests by their commands."""
    return {row["command"]: row for row in rows_of(path, COLUMNS)}


def rows_of(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a table. Errors: ValueError where the file is no such table."""
    if not path.exists():
        return []
    table = [line for line in path.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    if rows[:1] != [list(columns)] or any(len(row) != len(columns) for row in rows):
        raise ValueError(f"{path} is not the table that tests write: restore it from git")
    return [dict(zip(columns, row, strict=True)) for row in rows[2:]]


def write(path: Path, head: str, columns: tuple[str, ...], rows: list[dict[str, str]]) -> None:
    """Write a whole table below its head."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row[column]) for column in columns) + " |" for row in rows]
    write_atomically(path, (head + "\n".join(lines) + "\n").encode())


def cell(text: str) -> str:
    """As it can stand in a table."""
    return " ".join(text.replace("|", "/").split())


def made_by() -> dict[str, str]:
    """The date and the commit of a row."""
    commit, dirty = COMMIT
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": f"{(commit or 'none')[:10]}{' (changed)' if dirty else ''}",
    }


def put(item: str, what: str, figure: str, seconds: float, command: str, path: Path = PATH) -> None:
    """Write the row of one command; the others stay as they are."""
    versions = provenance.versions()
    row = {
        "item": item,
        "what": what,
        "figure": figure,
        "seconds": f"{seconds:.0f}",
        "command": f"`{command}`",
        **made_by(),
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "numpy")),
        "machine": f"{provenance.device_name(torch.device('cpu'))}, {os.cpu_count()} cores",
    }
    rows = (read(path) | {cell(row["command"]): row}).values()
    write(path, HEAD, COLUMNS, sorted(rows, key=lambda r: (int(r["item"]), r["command"])))
