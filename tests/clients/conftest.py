"""Tests in other people's software, and what one run of them writes: see client_table.py."""

import importlib.metadata
import os
from pathlib import Path

import client_table
import pytest

# Nothing here needs a network, and Hugging Face's libraries are not to try.
os.environ["HF_HUB_OFFLINE"] = "1"

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
    if "client" in client_table.properties(report) and (report.when == "call" or report.failed):
        cases.append(report)


def pytest_sessionfinish(session):
    option = session.config.option
    a_part = option.keyword or option.markexpr or option.lf or any("::" in each for each in session.config.args)
    if cases and not a_part and not hasattr(session.config, "workerinput"):
        client_table.update(cases)
