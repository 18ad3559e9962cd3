"""Several runs in one process: each ends as it would have in a process of its own."""

import itertools
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import running
import torch
from running import TIMES, TINY, Run, assert_same_bits, assert_same_run, run_here, without
from torch import nn

from mbn.config import REPOSITORY, sweep_lines
from mbn.launch import lanes
from mbn.system import cuda_graph
from mbn.system.errors import UserError
from mbn.training import report, trained
from mbn.training.iteration import Update


def build(**given):
    """The tiny network without dropout: it draws nothing while it trains."""
    network = BUILD_TINY(**given)
    network.dropout = nn.Identity()
    return network


BUILD_TINY = running.build_tiny
LONGER = ("schedule.iterations=20",)


@pytest.fixture
def here(capsys, monkeypatch, tmp_path):
    """A function that runs `train.py` with TINY and more, in this process."""
    monkeypatch.setattr(running, "build_tiny", build)

    def call(*more, folder="lanes"):
        return run_here(capsys, monkeypatch, *TINY, *LONGER, f"machine.results={tmp_path / folder}", *more)

    return call


@pytest.fixture
def left(tmp_path):
    return lambda *more, folder="lanes": Run(tmp_path / folder, [*TINY, *LONGER, *more])


def after(monkeypatch, iterations, action, name=""):
    """Let an action be done in one lane after so many of its iterations."""
    original = Update.__call__
    counts = {}

    def call(self, images, labels):
        original(self, images, labels)
        lane = threading.current_thread().name
        counts[lane] = counts.get(lane, 0) + 1
        if name in lane and counts[lane] == iterations:
            action()

    monkeypatch.setattr(Update, "__call__", call)


@pytest.mark.parametrize("mode", ["eager", "graph-eager"])
@pytest.mark.parametrize("norms", [("norm=bn,mbn,brn,gn", "seed=0"), ("norm=mbn", "seed=0,1,2,3,4")], ids=" ".join)
def test_lanes_give_the_same_results_as_processes(here, left, graphs, mode, norms):
    done = here("-m", *norms, f"machine.mode={mode}", "machine.together=4")
    assert (done.code, done.err) == (0, "")
    lines = sweep_lines(list(norms))
    assert len(re.findall(r"^digits/\S+: test error", done.out, re.MULTILINE)) == len(lines)
    for line in lines:
        one = (*line, f"machine.mode={mode}", "machine.together=4")
        left(*one, folder="alone").results.mkdir(exist_ok=True)  # else train.py says that it is new
        alone = here(*one, folder="alone")
        assert alone.code == 0
        assert_same_run(left(*one), left(*one, folder="alone"))
        assert left(*one).record()["mode"] == mode
        log = (left(*one).folder / "log.txt").read_text()
        times = re.compile(r"[\d.]+ (images/)?s\b")
        assert times.sub("", log) == times.sub("", alone.out).replace("/alone/", "/lanes/")
    assert bool(graphs) == (mode == "graph-eager")


@pytest.mark.parametrize("network", ["without dropout", "with dropout"])
@pytest.mark.parametrize("norm", ["norm=bn", "norm=mbn", "norm=brn"])
def test_a_captured_run_equals_an_eager_one_and_goes_on_from_any_iteration(
    here, left, monkeypatch, graphs, norm, network
):
    """Stopped in the warm-up, right after a capture, and where iterations are replayed."""
    if network == "with dropout":
        monkeypatch.setattr(running, "build_tiny", BUILD_TINY)
    eager, replayed = ("machine.mode=eager", norm), ("machine.mode=graph-eager", norm)
    assert here(*eager, folder="eager").code == 0
    for stop in (2, 4, 5):
        with monkeypatch.context() as patch:
            after(patch, stop, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert here(*replayed).code == 75
    assert here(*replayed).code == 0
    assert graphs
    one, other = left(*eager, folder="eager"), left(*replayed)
    for key in ("model", "optimizer", "generators", "iteration"):
        assert_same_bits(one.checkpoint()[key], other.checkpoint()[key], key)
    assert [without(row, TIMES) for row in one.rows()] == [without(row, TIMES) for row in other.rows()]
    assert (one.record()["mode"], other.record()["mode"]) == ("eager", "graph-eager")


@pytest.mark.parametrize(
    ("mode", "fails", "eager"),
    [("graph-eager", False, 0), ("graph-eager", True, 1), ("eager", False, 3)],
    ids=["all captured", "one not captured", "none captured"],
)
def test_one_thread_does_for_all_lanes_what_is_not_replayed(here, left, monkeypatch, graphs, mode, fails, eager):
    """cuDNN waits for the device when a thread does a new convolution: that would spoil another thread's capture."""
    threads, busy, calls, capture = set(), threading.RLock(), itertools.count(), cuda_graph.capture

    def capture_but_the_first(function):
        if fails and next(calls) == 0:
            raise RuntimeError("cannot be captured")
        return capture(function)

    def watched(work):
        def call(*args):
            assert busy.acquire(blocking=False)  # no other thread does such work now
            try:
                threads.add(threading.current_thread().name)
                print("watched")
                return work(*args)
            finally:
                busy.release()

        return call

    with monkeypatch.context() as patch:
        patch.setattr(cuda_graph, "capture", watched(capture_but_the_first))
        for owner, name in ((trained, "evaluate"), (report, "training_statistics"), (Update, "_iterate")):
            patch.setattr(owner, name, watched(getattr(owner, name)))
        assert here("-m", "norm=mbn", "seed=0,1,2", f"machine.mode={mode}", "machine.together=3").code == 0
    assert threads == {"uncaptured_0"}
    modes = []
    for seed in (0, 1, 2):
        one = left("norm=mbn", f"seed={seed}")
        modes.append(one.record()["mode"])
        assert "watched" in (one.folder / "log.txt").read_text()
        assert here("norm=mbn", f"seed={seed}", "machine.mode=eager", folder="eager").code == 0
        alone = left("norm=mbn", f"seed={seed}", folder="eager")
        assert_same_bits(one.checkpoint()["model"], alone.checkpoint()["model"], "model")
    assert modes.count("eager") == eager


def test_one_lane_that_diverges_ends_alone(here, left, monkeypatch):
    def spoil():
        for update in updates:
            if update.optimizer.param_groups[0]["lr"].item() > 1:
                with torch.no_grad():
                    update.model.fc.bias.fill_(float("nan"))

    updates = []
    original = Update.__init__
    monkeypatch.setattr(Update, "__init__", lambda self, *a: updates.append(self) or original(self, *a))
    after(monkeypatch, 3, spoil, name=left("schedule.lr=[9,9,9]").name)  # of its own iterations, not of the other's
    done = here("-m", "schedule.lr=[0.1,0.01,0.001],[9,9,9]", "machine.together=2")
    assert done.code == 1
    assert re.search(r"^error: \S+: training diverged: the loss was nan", done.err, re.MULTILINE)
    assert left("schedule.lr=[0.1,0.01,0.001]").record_path.exists()
    assert left("schedule.lr=[9,9,9]").record()["diverged_at"] == 3
    assert re.search(r"^\[9,9,9\] .*  diverged at iteration \d+ of 20$", done.out, re.MULTILINE)
    assert re.search(r"^\[0.1,0.01,0.001\] +\d+\.\d\d %", done.out, re.MULTILINE)


def test_a_lack_of_memory_ends_one_lane_with_one_sentence(here, left, monkeypatch):
    def lack():
        raise torch.OutOfMemoryError("CUDA out of memory")

    after(monkeypatch, 8, lack, name="bn-f1-b256-s1")
    done = here("-m", "norm=bn", "seed=0,1,2", "machine.together=3")
    assert done.code == 1
    assert done.err.count("error:") == 1
    assert "the device's memory is not enough: try a smaller batch_size than 256, machine.together" in done.err
    assert [left("norm=bn", f"seed={s}").record_path.exists() for s in (0, 1, 2)] == [True, False, True]
    monkeypatch.undo()


def test_a_signal_stops_all_with_checkpoints_and_the_same_command_goes_on(here, left, monkeypatch):
    asked, stop = threading.Event(), lanes.Lane.stop

    def ask():
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.wait(200)  # else the lane could end before the pool looks at it

    def note(lane):
        stop(lane)
        if "s1" in lane.run.name:
            asked.set()

    with monkeypatch.context() as patch:
        after(patch, 7, ask, name="s1")
        patch.setattr(lanes.Lane, "stop", note)
        stopped = here("-m", "norm=mbn", "seed=0,1,2", "machine.together=2")
    assert stopped.code == 75
    assert "runs are left, and the same command goes on with them" in stopped.err
    assert re.search(r"^1 .*  unfinished$", stopped.out, re.MULTILINE)
    assert left("norm=mbn", "seed=1").checkpoint()["iteration"] == 7
    done = here("-m", "norm=mbn", "seed=0,1,2", "machine.together=2")
    assert done.code == 0
    for seed in (0, 1, 2):
        one = ("norm=mbn", f"seed={seed}", "machine.together=2")
        here(*one, folder="alone")
        assert_same_run(left(*one), left(*one, folder="alone"))


@pytest.mark.parametrize("key", ["threads=1,2", "deterministic=true,false", "tf32=true,false", "device=cpu,auto"])
def test_lanes_must_agree_in_the_settings_of_the_process(here, key, tmp_path):
    done = here("-m", f"machine.{key}", "machine.together=2")
    assert done.code == 2
    assert f"one machine.{key.partition('=')[0]}, not" in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "lanes").exists()


def test_a_finished_run_is_shown_and_again_is_refused(here):
    assert here("norm=bn").code == 0
    done = here("-m", "norm=bn,gn", "machine.together=2")
    assert done.code == 0
    assert "The run is finished" in done.out
    again = here("-m", "norm=bn,gn", "machine.together=2", "machine.again=true")
    assert (again.code, again.out, again.err.count("\n")) == (2, "", 1)


def test_runs_with_dropout_or_loaders_are_no_lanes():
    networks = ("model=resnet20", "model=nin", "model=nin model.dropout=0", "dataset=imagenet model=resnet18")
    assert [lanes.fits(running.compose(*o.split())) for o in networks] == [True, False, True, False]


def test_a_run_that_cannot_be_a_lane_comes_first_and_stops_no_other_if_it_fails(here, left, monkeypatch):
    def fail():
        raise UserError("a fault of its own")

    after(monkeypatch, 3, fail, name="MainThread")
    done = here("-m", "norm=bn", "model=nin,resnet20", "machine.together=2")
    assert done.code == 1
    assert done.err.count("a fault of its own") == 1
    assert not left("norm=bn", "model=nin").record_path.exists()
    assert left("norm=bn", "model=resnet20").record_path.exists()


SCRIPT = """
import sys, threading
sys.path[:0] = {folders}
import models, pytest, test_lanes, torch, train
models.build = test_lanes.build
def fail():
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
if {faulty}:
    test_lanes.after(pytest.MonkeyPatch(), 8, fail, name="-s1-")
    for other in ("-s0-", "-s2-"):  # which must not end before
        test_lanes.after(pytest.MonkeyPatch(), 8, threading.Event().wait, name=other)
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.timeout(900)
def test_a_device_error_ends_the_process_and_every_lane_can_be_resumed(tmp_path):
    overrides = [*TINY, *LONGER, f"machine.results={tmp_path}", "machine.checkpoint_seconds=1e-9"]

    def call(faulty, *more):
        tests = REPOSITORY / "tests"
        code = SCRIPT.format(folders=[str(tests / "launch"), str(tests), str(REPOSITORY)], faulty=faulty)
        return subprocess.run(
            [sys.executable, "-c", code, "-m", *overrides, "norm=bn", "seed=0,1,2", "machine.together=3", *more],
            capture_output=True,
            text=True,
        )

    ended = call(True)
    assert ended.returncode == 1
    assert re.search(r"error: digits/\S+-s1-\S+: CUDA error: an illegal memory access.*the same command", ended.stderr)
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "other_records").exists()
    ended = call(False)
    assert ended.returncode == 0, ended.stderr
    assert len(list((tmp_path / "other_records").rglob("*.json"))) == 3
    assert any("resuming at iteration" in log.read_text() for log in tmp_path.rglob("log.txt"))
