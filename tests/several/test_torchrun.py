"""Started by torchrun itself: any process may be killed at any moment, and the same command goes on."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jpegs
import pytest
from running import assert_same_bits, assert_same_run
from several_runs import RUN, command, from_files, left

from mbn.config import REPOSITORY

MORE = ("norm=mbn", "schedule.iterations=60", "machine.checkpoint_seconds=0.05")
# Seconds in which all have to end after a signal; in which a whole run is over, on any machine.
SOON, LONG = 30, 600


class Torchrun:
    """A run in several processes under torchrun. Context manager: at its end all have ended.

    signalled: which signal comes when, see torchrun_train.py.
    """

    def __init__(self, results, size, signalled="", run=(*RUN, *MORE)):
        self.results, self.size = results, size
        for folder in ("pids", "policies"):
            (results / folder).mkdir(parents=True, exist_ok=True)
        for old in (results / "pids").iterdir():
            old.unlink()
        tests = REPOSITORY / "tests"
        paths = [REPOSITORY, tests, *(path for path in tests.iterdir() if path.is_dir())]
        self.log = results / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"),
                    *(str(tests / "several" / "torchrun_train.py"), str(results), *run),
                ],
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    **{"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", "SIGNALLED": signalled},
                },
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

    def wait_until_begun(self):
        end = time.monotonic() + LONG
        while not self.begun():
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


def kill(torchrun, victim, seconds):
    """Kill one process some time after all are there: a rank, or "launcher"; the others end soon."""
    torchrun.wait_until_begun()
    time.sleep(seconds)
    if torchrun.process.poll() is not None:
        return
    try:
        os.kill(torchrun.process.pid if victim == "launcher" else torchrun.pids()[victim], signal.SIGKILL)
    except ProcessLookupError:  # it has just ended by itself
        return
    torchrun.ends(SOON)
    check_words(torchrun.log.read_text())


def check_words(said):
    """They end with a sentence, or with nothing to say because the run is finished."""
    assert re.search(f"{SENTENCES}|^curves: ", said, re.MULTILINE), said
    assert not re.search(r'Traceback(?s:.)*train\.py", line', said), said  # of ours; torchrun's own may follow


SENTENCES = (
    "lost another one, which has ended: |stopped at iteration |launcher of this process has ended|stopped by SIGTERM"
)


@pytest.mark.timeout(1800)
def test_killed_processes_end_the_others_and_the_same_command_goes_on_with_the_same_bits(tmp_path, processes):
    results, logs = tmp_path / "killed", []
    for signalled in (
        f"{signal.SIGKILL:d} 1 10 self",
        f"{signal.SIGKILL:d} 0 10 parent",
        f"{signal.SIGTERM:d} 0 10 parent",
        "",
    ):
        with Torchrun(results, 2, signalled) as torchrun:
            code = torchrun.ends(LONG)
            took = time.time() - (results / "signalled").stat().st_mtime
            assert took < SOON or signalled == "", f"{took} s from the signal on"
            logs.append(torchrun.log.read_text())
            check_words(logs[-1])
            assert (code == 0) == (signalled == ""), logs[-1]
    assert all("stopped at iteration " in log for log in logs[1:3]), logs
    assert all("resuming at iteration" in log for log in logs[1:]), logs
    for rank in ("0", "1"):
        found = json.loads((results / "policies" / rank).read_text())
        assert (found["main"], set(found["gloo"])) == (os.SCHED_OTHER, {os.SCHED_BATCH})
    assert_same_run(whole_run(processes, tmp_path, *MORE), left(results, *MORE))


def whole_run(processes, folder, *overrides, run=RUN):
    results = folder / "whole"
    results.mkdir()
    processes.run(2, command, str(results), *overrides, run=run, float64=False)
    return left(results, *overrides, run=run)


@pytest.mark.timeout(1800)
def test_processes_that_have_workers_decode_images_from_files(tmp_path, processes):
    """As README's command for ImageNet does. The same bits as without workers."""
    root, results = jpegs.make_tree(tmp_path / "images"), tmp_path / "workers"
    with Torchrun(results, 2, run=from_files(root, workers=2)) as torchrun:
        assert torchrun.ends(LONG) == 0, torchrun.log.read_text()
    whole = whole_run(processes, tmp_path, run=from_files(root))
    assert_same_bits(whole.checkpoint()["model"], left(results, run=from_files(root)).checkpoint()["model"])


def test_a_gpu_that_is_not_there_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with Torchrun(tmp_path, 2, run=(*RUN, "machine.device=cuda")) as torchrun:
        assert torchrun.ends(LONG) != 0
    said = torchrun.log.read_text()
    assert said.count("error: there is no cuda here: machine.device=cpu uses the CPU.") == 1, said
    ours = said.partition("ChildFailedError")[0]  # what follows is torchrun's own
    assert "train.py" not in ours.partition("Traceback")[2], said


@pytest.mark.long("1", "Processes of a run under torchrun killed: the others end within 30 s; resumed to the same bits")
@pytest.mark.timeout(3600)
def test_kills_at_any_moment(tmp_path, processes, count, figure):
    draw, whole, total = random.Random(0), whole_run(processes, tmp_path, *MORE), count(30)
    for i in range(total):
        results = tmp_path / str(i)
        with Torchrun(results, 2) as torchrun:
            kill(torchrun, draw.choice([0, 1, "launcher"]), draw.uniform(0, 9))
        with Torchrun(results, 2) as torchrun:
            assert torchrun.ends(LONG) == 0, torchrun.log.read_text()
        assert_same_run(whole, left(results, *MORE))
    figure(total, total)
