"""The benchmark on the CPU, with the stand-in for CUDA graphs."""

import pytest
import torch
from little_work import small_place

from mbn.benchmark import kernels, suites
from mbn.training import iteration


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch):
    """The stand-in cannot note compiled code, so nothing is compiled."""
    monkeypatch.setattr(iteration, "compiled", lambda method, kind: method)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(suites, "cores", lambda: 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def profiler(monkeypatch):
    """A profiler that sees two kernels: on a CPU the real one does not see other threads."""

    def seen(work, device):
        return work(), [(0, 10**9, "convolution"), (10**9, 2 * 10**9, "sum")]

    monkeypatch.setattr(kernels, "kernels", seen)


@pytest.fixture
def setup():
    return small_place()
