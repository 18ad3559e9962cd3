"""Other people's software: results/clients.md has a row for each test of this folder, written by the run itself."""

import importlib.metadata
import os
import re
from pathlib import Path

import pytest
import reliability
import torch

from mbn.config import REPOSITORY

# Nothing here needs a network, and Hugging Face's libraries are not to try.
os.environ["HF_HUB_OFFLINE"] = "1"

PATH = REPOSITORY / "results" / "clients.md"
COLUMNS = ("client", "version", "torch", "what holds", "passed", "figure", "seconds", "test", "date", "commit")
HEAD = """# The layers in other people's software

Written by `pytest tests/clients --clients` (after `pip install -e '.[clients]'`), which anyone can run. Each row is a
test: its name says what holds, "passed" in how many cases, and "figure" names the cases that FAILED. The rows of a file
are replaced when the whole file runs again.

"""
# What these libraries warn of in their own code.
THEIRS = (
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning",  # lightning 2.6 with torch 2.14
    "`torch.jit.script` is deprecated:FutureWarning",  # torch_geometric 2.8 with torch 2.14, when it is imported
)
# The reports of this run.
cases: list[pytest.TestReport] = []


def pytest_configure(config):
    for warning in THEIRS:
        config.addinivalue_line("filterwarnings", f"ignore:{warning}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A test without the mark would never run."""
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("clients") is None:
            raise pytest.UsageError(f"{item.nodeid} needs pytest.mark.clients('its package')")


@pytest.fixture
def figure(request):
    """A function that puts a short text into the row of a test."""
    return lambda text: request.node.user_properties.append(("figure", text))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Put what the row needs into the report, which alone reaches the process that writes."""
    report = (yield).get_result()
    marker = item.get_closest_marker("clients")
    if marker is not None:
        versions = [importlib.metadata.version(package) for package in marker.args]
        report.user_properties += [("client", ", ".join(marker.args)), ("version", ", ".join(versions))]
        if call.excinfo is not None:
            report.user_properties.append(("figure", f"FAILED: {call.excinfo.exconly().splitlines()[-1][:200]}"))


def pytest_runtest_logreport(report):
    if "client" in dict(report.user_properties) and (report.when == "call" or report.failed):
        cases.append(report)


def pytest_sessionfinish(session):
    """Write the rows of files that have run whole."""
    option = session.config.option
    a_part = option.keyword or option.markexpr or option.lf or any("::" in each for each in session.config.args)
    if a_part or not cases or hasattr(session.config, "workerinput"):
        return
    tests: dict[tuple[str, str], list[pytest.TestReport]] = {}
    for report in cases:
        key = (dict(report.user_properties)["client"], report.nodeid.partition("[")[0])
        tests.setdefault(key, []).append(report)
    ran = {file_of(name) for _, name in tests}
    rows = [row for row in reliability.rows_of(PATH, COLUMNS) if file_of(row["test"].strip("`")) not in ran]
    rows += [row_of(client, name, reports) for (client, name), reports in tests.items()]
    there = [row for row in rows if (REPOSITORY / file_of(row["test"].strip("`"))).exists()]
    reliability.write(PATH, HEAD, COLUMNS, sorted(there, key=lambda row: (row["client"], row["test"])))


def file_of(test):
    return test.partition("::")[0]


def row_of(client, name, reports):
    """One test's row: its cases with the same figure together."""
    figures: dict[str, list[str]] = {}
    for report in reports:
        which = re.fullmatch(r"[^\[]*(?:\[(.*)\])?", report.nodeid)[1] or ""
        figures.setdefault(dict(report.user_properties).get("figure", ""), []).append(which)
    texts = list(figures) if len(figures) == 1 else [f"{', '.join(which)}: {text}" for text, which in figures.items()]
    return {
        "client": client,
        "version": dict(reports[0].user_properties)["version"],
        "torch": torch.__version__,
        "what holds": name.partition("::test_")[2].replace("_", " ").capitalize(),
        "passed": f"{sum(report.passed for report in reports)} of {len(reports)}",
        "figure": "; ".join(texts),
        "seconds": f"{sum(report.duration for report in reports):.1f}",
        "test": f"`{name}`",
        **reliability.made_by(),
    }
