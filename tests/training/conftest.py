import pytest
from running import TINY, Run, run_here


@pytest.fixture
def here(capsys, monkeypatch, tmp_path):
    """A function that runs `train.py` with TINY and more, in this process, its results in a temporary folder."""
    return lambda *more: run_here(capsys, monkeypatch, *TINY, f"machine.results={tmp_path / 'results'}", *more)


@pytest.fixture
def left(tmp_path):
    """What such a run has left."""
    return lambda *more: Run(tmp_path / "results", [*TINY, *more])
