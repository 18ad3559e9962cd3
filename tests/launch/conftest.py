"""A toy grid, and a checkout whose reproduce.py trains it."""

import shutil
from pathlib import Path

import pytest
from checkouts import TOY, Checkout

from mbn.config import REPOSITORY


@pytest.fixture
def write_toy():
    """A function that writes a grid of two methods."""
    return lambda path, iterations, more="": path.write_text(TOY.format(iterations=iterations) + more)


@pytest.fixture
def checkout(tmp_path, write_toy):
    """A copy of this tree with a toy grid, and a train.py that only pretends."""
    folder = tmp_path / "checkout"
    for part in ("mbn", "configs", "scripts"):
        shutil.copytree(REPOSITORY / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "grids"))
    registry = folder / "mbn" / "config" / "registry.py"
    entry = 'Source("mbn.data.datasets:digits"'
    assert entry in registry.read_text()
    registry.write_text(registry.read_text().replace(entry, f"{entry}, in_tables=True"))  # the toy grid has the digits
    shutil.copy(Path(__file__).with_name("fake_train.py"), folder / "train.py")
    made = Checkout(folder, folder / "results")
    made.toy.parent.mkdir()
    write_toy(made.toy, 12)
    yield made
    made.end()
