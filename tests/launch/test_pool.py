"""The trouble of one run, under reproduce.py and in sweeps: that run fails with a sentence, and the others go on."""

import errno
import fcntl
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import toy_records
from running import TINY, Run, run_here
from test_reproduce import wait_until

import train
from mbn import grid
from mbn.launch import lanes, pool
from mbn.launch.missing_runs import PlannedRun
from mbn.launch.pool import Child, Pool, Process
from mbn.records import record
from mbn.system.errors import UserError

CELL = grid.read("table4").cell("8", "BN")


@pytest.fixture
def runs(tmp_path):
    """Three runs, and a function that writes the record of one."""
    made = []
    for seed in range(3):
        config = CELL.config(seed)
        made.append(PlannedRun(train.configuration.run_name(config), config, ()))

    def finish(run):
        toy_records.write(tmp_path, CELL, run.config.seed, 8.0)

    return made, finish


class Fake(Child):
    """A child that has ended when it is first looked at, by a function that gives its exit code."""

    def __init__(self, run, results, end):
        self.run, self.log, self.asked, self.reason = run, run.folder(results) / "log.txt", False, None
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_text("error: its own fault.\n")
        self.code = lambda: end(self)
        self.stop = self.wait = self.kill = lambda: None


def worked(results, runs, end, **more):
    def start(run, results):
        return Fake(run, results, end)

    return Pool(runs, results, 2, more.pop("start", start), **more).work()


def only_the_first_fails(outcome, runs, pattern):
    assert outcome.done == [run.name for run in runs[1:]]
    assert list(outcome.failed) == [runs[0].name]
    assert re.search(pattern, outcome.failed[runs[0].name])


def unreadable_log(child):
    child.log.unlink()
    child.log.mkdir()


def no_record(child):
    path = record.path_of(child.log.parents[4], child.run.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"test_error": null}')
    return 0


@pytest.mark.parametrize(
    ("trouble", "pattern"),
    [
        (lambda child: 1, r"^its own fault\. \(log: "),
        (lambda child: -9, r"^stopped from outside with exit code -9"),
        (lambda child: shutil.rmtree(child.log.parent) or 1, r"^its log cannot be read \(No such file"),
        (lambda child: unreadable_log(child) or 1, r"^its log cannot be read \(Is a directory\)"),
        (lambda child: child.log.write_text("a \x1b[31mred\x07 end") and 1, r"^a \\x1b\[31mred\\x07 end \(log"),
        (lambda child: child.log.write_bytes(b"\xff\xfe") and 1, "^\ufffd\ufffd"),
        (no_record, r"is not a record"),
    ],
    ids=["fault", "killed", "folder removed", "log a folder", "escape sequences", "bytes", "damaged record"],
)
def test_what_happens_to_one_run_stops_no_other(tmp_path, runs, trouble, pattern):
    runs, finish = runs

    def end(child):
        if child.run is runs[0]:
            return trouble(child)
        finish(child.run)
        return 0

    only_the_first_fails(worked(tmp_path, runs, end), runs, pattern)


@pytest.mark.parametrize(
    ("error", "pattern"),
    [
        (UserError("its log cannot be written."), r"^its log cannot be written\.$"),
        (OSError(errno.EAGAIN, "Resource temporarily unavailable", "fork"), r"^cannot use fork \("),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory is not enough"),
        (RuntimeError("can't start new thread"), "^RuntimeError: can't start new thread$"),
        (MemoryError(), "memory is not enough"),
    ],
)
def test_a_run_that_cannot_be_started_stops_no_other(tmp_path, runs, error, pattern):
    runs, finish = runs

    def start(run, results):
        if run is runs[0]:
            raise error
        return Fake(run, results, lambda child: finish(run) or 0)

    only_the_first_fails(worked(tmp_path, runs, None, start=start), runs, pattern)


def test_an_unreadable_lock_or_record_stops_no_other(tmp_path, runs, monkeypatch):
    """The lock counts as free, and the run itself then says what is wrong."""
    runs, finish = runs
    original = Path.exists

    def exists(path):
        if path == record.path_of(tmp_path, runs[0].name):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(Path, "exists", exists)
    (runs[0].folder(tmp_path) / "lock").mkdir(parents=True)
    only_the_first_fails(
        worked(tmp_path, runs, lambda child: finish(child.run) or int(child.run is runs[0])), runs, "its"
    )


@pytest.mark.parametrize("how", ["log a folder", "no program", "a file for a folder"])
def test_a_process_that_cannot_be_started_is_one_sentence(tmp_path, runs, how):
    (run, *_), _ = runs
    command = [str(tmp_path / "nothing")] if how == "no program" else [sys.executable, "-c", ""]
    if how == "log a folder":
        (run.folder(tmp_path) / "log.txt").mkdir(parents=True)
    if how == "a file for a folder":
        (tmp_path / "runs").touch()
    with pytest.raises(UserError, match=r"^it cannot be started with its log in \S+ \(.*\): make that writable.*\.$"):
        Process(run, command, tmp_path)


def test_a_child_that_got_the_signal_of_a_whole_job_itself_has_not_failed(tmp_path, runs):
    """Slurm signals every process of a job: the child has saved and ended before the pool asks it."""

    def end(child):
        os.kill(os.getpid(), signal.SIGTERM)
        return 75

    outcome = worked(tmp_path, runs[0][:1], end)
    assert (outcome.code, outcome.failed, outcome.left) == (75, {}, [runs[0][0].name])


# Waiting.


@pytest.fixture
def held(tmp_path, runs):
    """The locks of all three runs, held as by another process."""
    files = []
    for run in runs[0]:
        path = run.folder(tmp_path) / "lock"
        path.parent.mkdir(parents=True)
        files.append(path.open("w"))
        fcntl.flock(files[-1], fcntl.LOCK_EX)
    yield files
    for file in files:
        file.close()


@pytest.fixture
def clock(monkeypatch):
    """The pool's clock: its own sleeps alone move it. meanwhile: what is done in each."""

    def sleep(seconds):
        clock.now += seconds
        clock.meanwhile()

    clock = types.SimpleNamespace(now=0.0, meanwhile=lambda: None, monotonic=lambda: clock.now, sleep=sleep)
    monkeypatch.setattr(pool, "time", clock)
    monkeypatch.setattr(pool, "LOOK", 0.125)  # exact in binary
    return clock


def test_waiting_for_other_processes_ends_at_a_signal(tmp_path, runs, held, clock):
    clock.meanwhile = lambda: clock.now == 0.5 and os.kill(os.getpid(), signal.SIGTERM)
    outcome = worked(tmp_path, runs[0], None)
    assert clock.now == 0.5
    assert (outcome.code, outcome.done, outcome.failed) == (75, [], {})
    assert len(outcome.left) == 3


def test_waiting_for_other_processes_ends_at_the_budget(tmp_path, runs, held, clock):
    """When there is no time left to begin a run: 5 s to start it, 5 s to stop it."""
    outcome = worked(tmp_path, runs[0], None, budget=11.0)
    assert clock.now == 1.125
    assert (outcome.code, outcome.spent, len(outcome.left)) == (None, True, 3)


@pytest.mark.parametrize(
    ("seconds", "events"),
    [
        ([0.5, 0.5, 9.0], ["0 begins at 0.0", "1 begins at 0.5"]),
        ([0.5, 5.5, 9.0], ["0 begins at 0.0", "1 begins at 0.5"]),
        ([0.5, 99.0, 9.0], ["0 begins at 0.0", "1 begins at 0.5", "1 is asked at 6.125", "1 is killed at 11.125"]),
    ],
    ids=["no time to begin another", "ends by itself", "deaf"],
)
def test_a_budget_of_11_seconds_is_kept_to_the_look(tmp_path, runs, clock, seconds, events):
    """Nothing begins with 10 s left or less; with less than 5 s left runs are asked to stop, and killed after it."""
    runs, finish = runs
    seen = []

    def start(run, results):
        number, began = run.config.seed, clock.now

        def note(what):
            seen.append(f"{number} {what} at {clock.now}")

        def end(child):
            if seen[-1].startswith(f"{number} is killed"):
                return -9
            return None if clock.now < began + seconds[number] else finish(run) or 0

        def stop():
            if not child.asked:
                child.asked = True
                note("is asked")

        child = Fake(run, results, end)
        child.stop, child.kill = stop, lambda: note("is killed")
        note("begins")
        return child

    outcome = Pool(runs, tmp_path, 1, start, budget=11.0).work()
    assert seen == events
    names, deaf = [run.name for run in runs], len(events) == 4
    assert (outcome.code, outcome.spent, outcome.failed) == (None, True, {})
    assert (outcome.done, sorted(outcome.left)) == (names[: 2 - deaf], sorted(names[2 - deaf :]))


@pytest.mark.parametrize(("budget", "last"), [(1000.0, 849.0), (300.0, 239.0)], ids=["90 s", "a tenth"])
def test_no_run_begins_with_less_time_than_it_needs_to_start(tmp_path, runs, clock, monkeypatch, budget, last):
    """Beside the 60 s, here 30, to stop: 90 s, or a tenth of the budget, so that a short one trains at all."""
    monkeypatch.setattr(pool, "LOOK", 1.0)
    begun = []

    def start(run, results):
        begun.append(clock.now)
        return Fake(run, results, lambda _: 1)  # has failed after one look

    Pool([runs[0][0]] * 1000, tmp_path, 1, start, budget, starting=90.0).work()
    assert begun[-1] == last


def test_a_file_system_without_locks_is_not_waited_for(tmp_path, runs, held, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    runs, finish = runs
    outcome = worked(tmp_path, runs, lambda child: finish(child.run) or 0)
    assert outcome.done == [run.name for run in runs]


def test_a_child_that_does_not_stop_is_killed_after_a_while(tmp_path, runs, clock, monkeypatch):
    monkeypatch.setattr(pool, "DEAF_SECONDS", 1.0)
    deaf = (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)\ntime.sleep(600)"
    )
    (run, *_), _ = runs
    asked, killed, kill = [], [], Process.kill

    def meanwhile():
        time.sleep(0.01)  # the child's time is real
        if not asked and "deaf" in (run.folder(tmp_path) / "log.txt").read_text():
            asked.append(clock.now)
            os.kill(os.getpid(), signal.SIGTERM)

    clock.meanwhile = meanwhile
    monkeypatch.setattr(Process, "kill", lambda child: (killed.append(clock.now), kill(child)))
    outcome = Pool([run], tmp_path, 1, lambda *given: Process(given[0], [sys.executable, "-c", deaf], given[1])).work()
    assert killed[0] == asked[0] + 1.125
    assert (outcome.code, outcome.left) == (75, [run.name])


def test_a_continued_pool_says_so_to_its_lanes(tmp_path, runs):
    runs, finish = runs
    seen = []

    def start(run, results):
        def work(stop):
            wait_until(lambda: os.kill(os.getpid(), signal.SIGCONT) or stop.continued)
            seen.append((stop.continued, stop.code))
            finish(run)

        log = run.folder(results) / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        return lanes.Lane(run, log, work, ())

    assert worked(tmp_path, runs, None, start=start).code is None
    assert seen == [(True, None)] * 3


# reproduce.py as a whole.


def test_a_folder_that_is_removed_under_reproduce_fails_that_run_alone(checkout):
    held = checkout.hold()
    process = checkout.begin("toy", "--seeds", "2", "--jobs", "2")
    wait_until(lambda: len(checkout.checkpoints()) == 2)
    # In one step: files that the run writes meanwhile would be in the way of rmtree.
    next(path.parent for path in checkout.checkpoints() if "/bn-" in str(path)).rename(checkout.folder / "removed")
    held.unlink()
    out, error = process.communicate()
    assert process.returncode == 1, out + error
    assert "Traceback" not in out + error
    assert "3 of 4 runs are done" in out
    assert "its log cannot be read (No such file or directory)" in error


def test_a_log_that_cannot_be_written_fails_that_run_alone(checkout):
    out, _ = checkout.call("toy", "--seed", "0", "--dry-run")
    assert out.count("\n") == 2
    name = next(run.name for run in toy_runs(checkout))
    (checkout.results / "runs" / name / "log.txt").mkdir(parents=True)
    out, error = checkout.call("toy", "--seed", "0", "--jobs", "2", code=1)
    assert "1 of 2 runs are done" in out
    assert re.search(rf"{name}: it cannot be started with its log in \S+ \(Is a directory\)", error)


def test_a_closed_output_of_reproduce_stops_no_run(checkout):
    script = checkout.folder / "scripts" / "reproduce.py"
    line = f"{sys.executable} {script} toy --seed 0 --jobs 2 2>&1 | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(checkout.records()) == 2


def toy_runs(checkout):
    from mbn.launch.missing_runs import runs

    return runs(["toy"], [0], folder=checkout.toy.parent)


# Sweeps.


@pytest.fixture
def here(capsys, monkeypatch, tmp_path):
    return lambda *more: run_here(capsys, monkeypatch, *TINY, f"machine.results={tmp_path}", *more)


def spoiled(monkeypatch, error):
    """Let the network of seed 1 raise an error when it is built."""
    original = train.run

    def run(config, *more):
        if config.seed == 1:
            raise error
        original(config, *more)

    monkeypatch.setattr(train, "run", run)


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize(
    ("error", "said", "traceback"),
    [
        (OSError(errno.EIO, "Input/output error", "x"), r"cannot use x \(Input/output error\): check the disk", False),
        (KeyError("nothing"), "KeyError: 'nothing'", True),
        (MemoryError(), "this machine's memory is not enough", False),
    ],
    ids=["disk", "program", "memory"],
)
def test_no_error_of_one_run_ends_a_sweep(here, tmp_path, monkeypatch, together, error, said, traceback):
    spoiled(monkeypatch, error)
    done = here("-m", "norm=bn", "seed=1,0", f"machine.together={together}")
    assert done.code == 1
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert re.match(rf"error: digits/\S+-s1-\S+: {said}", line)
    assert [Run(tmp_path, [*TINY, "norm=bn", f"seed={s}"]).record_path.exists() for s in (1, 0)] == [False, True]
    assert re.search(r"^1 .*  failed: ", done.out, re.MULTILINE)
    log = "" if together == 1 else Run(tmp_path, [*TINY, "norm=bn", "seed=1"]).folder.joinpath("log.txt").read_text()
    assert ("Traceback" in done.err + log) == traceback


def test_a_signal_ends_a_sweep_all_the_same(here, tmp_path, monkeypatch):
    spoiled(monkeypatch, UserError("stopped.", code=75))
    done = here("-m", "norm=bn", "seed=1,0")
    assert done.code == 75
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("what", ["log", "folder", "record", "lock"])
@pytest.mark.parametrize("together", [1, 2])
def test_a_run_whose_files_are_in_the_way_fails_alone(here, tmp_path, what, together):
    one = Run(tmp_path, [*TINY, "norm=bn", "seed=1"])
    if what == "folder":
        one.folder.parent.mkdir(parents=True)
        one.folder.touch()
    else:
        names = {"log": one.folder / "log.txt", "record": one.record_path, "lock": one.folder / "lock"}
        names[what].mkdir(parents=True)
    done = here("-m", "norm=bn", "seed=1,0", f"machine.together={together}")
    if (what, together) == ("log", 1):  # which has no log
        assert done.code == 0
        return
    assert (done.code, "Traceback" in done.err) == (1, False)
    assert (
        len(re.findall(r"^error: digits/\S+-s1-\S+: cannot ", done.err, re.MULTILINE)) == done.err.count("error: ") == 1
    )
    assert re.search(r"^0 .* %", done.out, re.MULTILINE)


class ClosedOutput(io.StringIO):
    """Where nobody reads."""

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize("together", [1, 2])
def test_a_closed_output_of_train_stops_no_run(here, tmp_path, monkeypatch, together):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, ClosedOutput())
    assert here("-m", "norm=bn", "seed=0,1", f"machine.together={together}").code == 0
    assert all(Run(tmp_path, [*TINY, "norm=bn", f"seed={s}"]).record_path.exists() for s in (0, 1))
