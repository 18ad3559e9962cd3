"""results/clients.md: a row for each test in other people's software, with its cases together."""

import re
from collections.abc import Iterable

import pytest
import reliability
import torch

from mbn.config import REPOSITORY

PATH = REPOSITORY / "results" / "clients.md"
COLUMNS = ("client", "version", "torch", "what holds", "passed", "figure", "seconds", "test", "date", "commit")
HEAD = """# The layers in other people's software

Written by `pytest tests/clients --clients` (after `pip install -e '.[clients]'`), which anyone can run. Each row is a
test: its name says what holds, "passed" in how many cases, and "figure" names the cases that FAILED. The rows of a file
are replaced when the whole file runs again.

"""


def read() -> list[dict[str, str]]:
    return reliability.rows_of(PATH, COLUMNS)


def update(reports: Iterable[pytest.TestReport]) -> None:
    """Write the rows of files that have run whole; those of other files stay while the file is there."""
    tests: dict[tuple[str, str], list[pytest.TestReport]] = {}
    for report in reports:
        key = (properties(report)["client"], report.nodeid.partition("[")[0])
        tests.setdefault(key, []).append(report)
    ran = {file_of(name) for _, name in tests}
    rows = [row for row in read() if file_of(row["test"]) not in ran and (REPOSITORY / file_of(row["test"])).exists()]
    rows += [row_of(client, name, cases) for (client, name), cases in tests.items()]
    reliability.write(PATH, HEAD, COLUMNS, sorted(rows, key=lambda row: (row["client"], row["test"])))


def row_of(client: str, name: str, cases: list[pytest.TestReport]) -> dict[str, str]:
    """One test's row, in which cases with the same figure stand together."""
    figures: dict[str, list[str]] = {}
    for report in cases:
        which = re.fullmatch(r"[^\[]*(?:\[(.*)\])?", report.nodeid, re.DOTALL)
        figures.setdefault(properties(report).get("figure", ""), []).append((which and which[1]) or "")
    texts = list(figures) if len(figures) == 1 else [f"{', '.join(which)}: {text}" for text, which in figures.items()]
    return {
        "client": client,
        "version": properties(cases[0])["version"],
        "torch": torch.__version__,
        "what holds": name.partition("::test_")[2].replace("_", " ").capitalize(),
        "passed": f"{sum(report.passed for report in cases)} of {len(cases)}",
        "figure": "; ".join(texts),
        "seconds": f"{sum(report.duration for report in cases):.1f}",
        "test": f"`{name}`",
        **reliability.made_by(),
    }


def properties(report: pytest.TestReport) -> dict[str, str]:
    return {name: str(value) for name, value in report.user_properties}


def file_of(test: str) -> str:
    return test.strip("`").partition("::")[0]
