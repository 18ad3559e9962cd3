"""A toy grid, and checkouts whose reproduce.py trains it."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mbn.config import REPOSITORY

TOY = """
title: Toy
about: Toy.
base: [dataset=digits, model=resnet20, batch_size=64, schedule.iterations={iterations}]
rows:
  BN: [norm=bn]
  MBN: [norm=mbn, forwards=1]
columns:
  ResNet-20: []
"""


@pytest.fixture
def write_toy():
    """A function that writes a grid of two methods."""
    return lambda path, iterations, more="": path.write_text(TOY.format(iterations=iterations) + more)


class Checkout:
    """A tree whose reproduce.py is run; results: where its runs are."""

    def __init__(self, folder, results):
        self.folder, self.results = folder, results
        self.toy = folder / "scripts" / "grids" / "toy.yaml"
        self.begun = []

    def begin(self, *arguments):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, self.folder / "scripts" / "reproduce.py", *arguments]
        self.begun.append(subprocess.Popen(command, **pipes))
        return self.begun[-1]

    def call(self, *arguments, code=0):
        """What reproduce.py prints, to its end."""
        process = self.begin(*arguments)
        out, error = process.communicate()
        assert process.returncode == code, out + error
        assert "Traceback" not in error
        return out, error

    def end(self):
        """Stop what a failed test has left running."""
        for process in self.begun:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.communicate()

    def records(self):
        return sorted(self.results.rglob("records/**/*.json"))

    def checkpoints(self):
        return list(self.results.rglob("checkpoint.pt"))

    def logs(self):
        return [path.read_text() for path in self.results.rglob("log.txt")]

    def starts(self):
        """The names of the runs, as often as they were begun or resumed."""
        return (self.results / "starts").read_text().splitlines()


@pytest.fixture
def checkout(tmp_path, write_toy):
    """A copy of this tree with a toy grid, and a train.py that only pretends."""
    folder = tmp_path / "checkout"
    for part in ("mbn", "configs", "scripts"):
        shutil.copytree(REPOSITORY / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "grids"))
    shutil.copy(Path(__file__).with_name("fake_train.py"), folder / "train.py")
    made = Checkout(folder, folder / "results")
    made.toy.parent.mkdir()
    write_toy(made.toy, 12)
    yield made
    made.end()
