"""Started by torchrun itself: any process may be killed at any moment, and the same command goes on."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import assert_same_run
from several_runs import command, left

from mbn.config import REPOSITORY

RUNS = ("norm=mbn", "schedule.iterations=60", "machine.checkpoint_seconds=0.05")
# Seconds in which all have to end, and in which they have to begin.
SOON, BEGINS = 30, 120


class Torchrun:
    """A run in several processes under torchrun. Context manager: at its end all have ended."""

    def __init__(self, results, size):
        self.results, self.size, self.started = results, size, time.time()
        (results / "pids").mkdir(parents=True, exist_ok=True)
        for old in (results / "pids").iterdir():
            old.unlink()
        tests = REPOSITORY / "tests"
        paths = [REPOSITORY, tests, *(path for path in tests.iterdir() if path.is_dir())]
        self.log = results / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"),
                    *(str(tests / "several" / "torchrun_train.py"), str(results), *RUNS),
                ],
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in (self.process.pid, *self.pids()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def pids(self):
        """By rank."""
        found = {int(path.name): path.read_text() for path in (self.results / "pids").iterdir()}
        return [int(found[rank]) for rank in sorted(found) if found[rank]]

    def alive(self):
        return [pid for pid in self.pids() if is_alive(pid)] + [0] * (self.process.poll() is None)

    def begun(self):
        """Whether all its processes are there."""
        return len(self.pids()) == self.size

    def trains(self):
        """Whether it has opened its journal, which writes it again."""
        journals = self.results.rglob("metrics.jsonl")
        return self.begun() and any(path.stat().st_mtime > self.started for path in journals)

    def wait_until(self, condition):
        end = time.monotonic() + BEGINS
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)

    def ends(self, within):
        end = time.monotonic() + within
        while self.alive():
            assert time.monotonic() < end, f"{self.alive()} still run:\n{self.log.read_text()}"
            time.sleep(0.05)
        return self.process.wait()


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def policies(pid, name):
    """How the threads of a process with this in their name are scheduled."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [os.sched_getscheduler(int(one.name)) for one in threads if name in (one / "comm").read_text()]


def kill(torchrun, victim, seconds, begins):
    """Kill one process some time after `begins` holds: a rank, or "launcher"; the others end soon.

    They end with a sentence, or with nothing to say because the run is finished.
    """
    torchrun.wait_until(begins)
    time.sleep(seconds)
    if torchrun.process.poll() is not None:
        return
    try:
        os.kill(torchrun.process.pid if victim == "launcher" else torchrun.pids()[victim], signal.SIGKILL)
    except ProcessLookupError:  # it has just ended by itself
        return
    torchrun.ends(SOON)
    said = torchrun.log.read_text()
    assert re.search(f"{SENTENCES}|^curves: ", said, re.MULTILINE), said
    assert not re.search(r'Traceback(?s:.)*train\.py", line', said), said  # of ours; torchrun's own may follow


SENTENCES = (
    "lost another one, which has ended: |stopped at iteration |launcher of this process has ended|stopped by SIGTERM"
)


@pytest.mark.timeout(600)
def test_killed_processes_end_the_others_and_the_same_command_goes_on_with_the_same_bits(tmp_path, processes):
    for victim in (1, "launcher"):
        with Torchrun(tmp_path / "killed", 2) as torchrun:
            kill(torchrun, victim, 0.3, torchrun.trains)
    assert "stopped at iteration " in torchrun.log.read_text()
    with Torchrun(tmp_path / "killed", 2) as torchrun:
        torchrun.wait_until(torchrun.trains)
        assert {policy for pid in torchrun.pids() for policy in policies(pid, "gloo")} == {os.SCHED_BATCH}
        assert [os.sched_getscheduler(pid) for pid in torchrun.pids()] == 2 * [os.SCHED_OTHER]
        torchrun.process.terminate()
        torchrun.ends(SOON)
    assert re.search("stopped at iteration |stopped by SIGTERM ", torchrun.log.read_text())  # begun, or not yet
    with Torchrun(tmp_path / "killed", 2) as torchrun:
        assert torchrun.ends(BEGINS) == 0, torchrun.log.read_text()
    assert "resuming at iteration" in torchrun.log.read_text()
    assert_same_run(whole_run(processes, tmp_path), left(tmp_path / "killed", *RUNS))


def whole_run(processes, folder):
    results = folder / "whole"
    results.mkdir()
    processes.run(2, command, str(results), *RUNS, float64=False)
    return left(results, *RUNS)


@pytest.mark.long("1", "Processes of a run under torchrun killed: the others end within 30 s; resumed to the same bits")
@pytest.mark.timeout(3600)
def test_kills_at_any_moment(tmp_path, processes, count, figure):
    draw, whole, total = random.Random(0), whole_run(processes, tmp_path), count(30)
    for i in range(total):
        results = tmp_path / str(i)
        with Torchrun(results, 2) as torchrun:
            kill(torchrun, draw.choice([0, 1, "launcher"]), draw.uniform(0, 9), torchrun.begun)
        with Torchrun(results, 2) as torchrun:
            assert torchrun.ends(BEGINS) == 0, torchrun.log.read_text()
        assert_same_run(whole, left(results, *RUNS))
    figure(total, total)
