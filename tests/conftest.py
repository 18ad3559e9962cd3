import contextlib
import shlex
import time
from pathlib import Path

import killing
import pytest
import reliability
import torch
from fake_cuda_graph import graphs  # noqa: F401
from processes import Processes
from torch import nn

from mbn.training import run

# These tensors are small: a second thread makes the tests slower, four times on a busy machine.
torch.set_num_threads(1)

with contextlib.suppress(ImportError):  # a rented GPU may lack Hypothesis
    from hypothesis import HealthCheck, settings

    # The same draws in every run, and no limit on time: a busy machine must not fail a test.
    settings.register_profile(
        "same",
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    settings.load_profile("same")


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="the long tests alone; they write results/reliability.md")
    parser.addoption("--clients", action="store_true", help="tests in other software; they write results/clients.md")
    parser.addoption("--long-scale", type=float, default=1.0, help="a part of their counts, to try them: no file")


def pytest_ignore_collect(collection_path, config):
    """Without --clients their folder is not even imported: what it imports need not be installed."""
    if collection_path == Path(__file__).with_name("clients") and not config.getoption("--clients"):
        return True


def pytest_collection_modifyitems(config, items):
    wanted = {mark for mark in ("long", "clients") if config.getoption(f"--{mark}")}
    left = [item for item in items if {mark.name for mark in item.iter_markers()} & {"long", "clients"} != wanted]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]
    for item in items:
        if "long" in wanted:
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture
def count(request):
    """A function that scales a long test's full count by --long-scale, to at least 1."""
    scale = request.config.getoption("--long-scale")
    return lambda full: max(1, round(full * scale))


@pytest.fixture
def figure(request, count):
    """A function that writes a long test's figure (done, of, remarks) to the table, and fails unless done == of.

    A test that ends before it has a figure is in the table as failed.
    """
    marker = request.node.get_closest_marker("long")
    began = time.monotonic()
    said = []

    def put(text):
        said.append(text)
        print(f"{marker.args[0]}: {text} in {time.monotonic() - began:.0f} s")
        if request.config.getoption("--long-scale") == 1:
            callspec = getattr(request.node, "callspec", None)
            what = marker.args[1].format(**(callspec.params if callspec else {}))
            command = f"pytest --long {shlex.quote(request.node.nodeid)}"
            reliability.put(marker.args[0], what, text, time.monotonic() - began, command)

    def tell(done, of, remarks=""):
        put(f"{done} of {of}" + (f": {remarks}" if remarks else ""))
        assert done == of, remarks

    yield tell
    if not said:
        put("failed before there was a figure")


@pytest.fixture(scope="session")
def forkers(tmp_path_factory):
    """Two processes that have imported torch, and fork for each job."""
    folder = tmp_path_factory.mktemp("forkers")
    with killing.Forker(folder / "one") as one, killing.Forker(folder / "other") as other:
        yield one, other


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Three processes that have imported torch, and work together."""
    with Processes(3, tmp_path_factory.mktemp("processes")) as processes:
        yield processes


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """Every test starts from the same state, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _a_checkpoint_at_the_end_of_every_epoch(monkeypatch):
    """Also when the epochs of these tests are short."""
    monkeypatch.setattr(run, "SAVES_APART", 0)


@pytest.fixture
def narrow(monkeypatch):
    """VGG-16 for ImageNet with 64 features where it has 4096: 120 of its 138 million weights are in those maps."""

    class NarrowLinear(nn.Linear):
        def __init__(self, in_features, out_features):
            super().__init__(*(64 if n == 4096 else n for n in (in_features, out_features)))

    monkeypatch.setattr(nn, "Linear", NarrowLinear)


@pytest.fixture(params=["native", "formula"])
def path(request, monkeypatch):
    """Both ways to compute a layer: around torch's batch-norm kernels, and the formula that a compiler gets."""
    if request.param == "formula":
        monkeypatch.setattr("mbn.norm.functional.has_native_kernels", lambda x: False)
    return request.param
