"""A toy grid, and trees whose reproduce.py is run."""

import signal
import subprocess
import sys

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

    def hold(self):
        """A file in the results; until it is removed, the runs of fake_train.py wait in their third iteration."""
        self.results.mkdir()
        (self.results / "hold").touch()
        return self.results / "hold"

    def call(self, *arguments, code=0):
        """What reproduce.py prints, to its end."""
        process = self.begin(*arguments)
        out, error = process.communicate()
        assert process.returncode == code, out + error
        assert "Traceback" not in error
        return out, error

    def end(self):
        """Stop the processes that a failed test has left running."""
        for process in self.begun:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.communicate()

    def records(self):
        return sorted(self.results.rglob("*records/**/*.json"))

    def checkpoints(self):
        return list(self.results.rglob("checkpoint.pt"))

    def logs(self):
        return [path.read_text() for path in self.results.rglob("log.txt")]

    def starts(self):
        """The names of the runs, one for each time that a run was begun or resumed."""
        starts = self.results / "starts"
        return starts.read_text().splitlines() if starts.exists() else []
