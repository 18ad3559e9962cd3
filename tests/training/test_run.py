"""Whole runs in this process, of a tiny network: signals, locks, divergence, finished runs, sweeps."""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import signal
import subprocess
import sys
import types

import pytest
import running
import torch
from running import TIMES, assert_same_bits, cut, send, without

from mbn.config import DATASETS, NETWORKS, REPOSITORY
from mbn.methods import METHODS
from mbn.records import sense
from mbn.system.errors import UserError
from mbn.system.files import lock
from mbn.system.signals import Stop, StopRequest
from mbn.training import run as run_module
from mbn.training.iteration import Update

SIGNALS = {"SIGINT": 130, "SIGTERM": 75, "SIGUSR1": 75, "SIGUSR2": 75}
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
    SIGNALS["SIGHUP"] = 75


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_finishes_the_iteration_saves_and_ends_with_its_code(here, left, after, name):
    before = [signal.getsignal(getattr(signal, other)) for other in SIGNALS]
    after(4, send(name))
    stopped = here()
    assert stopped.code == SIGNALS[name]
    assert "stopped at iteration 4 of 8" in stopped.err
    assert left().checkpoint()["iteration"] == 4
    assert [signal.getsignal(getattr(signal, other)) for other in SIGNALS] == before


def test_a_signal_that_comes_while_processes_agree_is_kept_for_the_next_time():
    stop, state = StopRequest(), types.SimpleNamespace(iteration=3, length=8)

    class Others:
        lost_launcher = False

        def highest(self, *numbers):
            stop.code = 75  # a handler of signals runs meanwhile
            return list(numbers)

    run = types.SimpleNamespace(processes=Others(), state=state, stop=stop)
    assert run_module.Run._agree(run, True) == (True, False)
    assert stop.code == 75
    assert run_module.Run._agree(run, False) == (False, True)


def test_a_signal_in_the_last_iteration_still_ends_the_run(here, left, after):
    after(8, send("SIGTERM"))
    assert here().code == 0
    assert left().record()["iterations"] == 8


def python(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("first", "second", "code", "says"),
    [
        ("SIGTERM", "SIGINT", 130, ""),
        ("SIGINT", "SIGINT", 130, "stopping: it saves after this iteration; a second Ctrl-C ends it at once, without "),
    ],
)
def test_ctrl_c_after_a_signal_exits_at_once_and_the_first_ctrl_c_says_so(first, second, code, says):
    script = (
        "import os, signal\n"
        "from mbn.system.signals import Stop\n"
        "with Stop() as stop:\n"
        f"    os.kill(os.getpid(), signal.{first})\n"
        "    assert stop.code is not None\n"
        f"    os.kill(os.getpid(), signal.{second})\n"
        "    print('went on')\n"
    )
    ended, out, err = python(script)
    assert (ended, out) == (code, "")
    assert err.startswith(says)
    assert err.count("\n") == bool(says)


@pytest.mark.parametrize(
    ("first", "second"),
    [("SIGTERM", "SIGHUP"), ("SIGHUP", "SIGHUP"), ("SIGUSR2", "SIGTERM"), ("SIGINT", "SIGUSR1")],
)
def test_a_second_signal_that_nobody_typed_changes_nothing(first, second):
    """systemd sends SIGHUP after SIGTERM, a shell and the kernel one SIGHUP each, Slurm signals parent and child."""
    script = (
        "import os, signal\n"
        "from mbn.system.signals import Stop\n"
        "with Stop() as stop:\n"
        f"    os.kill(os.getpid(), signal.{first})\n"
        f"    os.kill(os.getpid(), signal.{second})\n"
        "    print(stop.code)\n"
    )
    ended, out, _ = python(script)
    assert (ended, out) == (0, f"{SIGNALS[first]}\n")


def test_a_process_beside_the_main_one_is_ended_without_a_word():
    """By torchrun, after a mistake in the command that the main one has named."""
    script = "import os, signal\nfrom mbn.system.signals import Exit\nwith Exit(silent=True):\n"
    assert python(script + "    os.kill(os.getpid(), signal.SIGTERM)\n    print('went on')\n") == (75, "", "")


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_before_training_has_begun_exits_at_once(name):
    code = (
        "import os, signal, train\n"
        f"train.run = lambda config: os.kill(os.getpid(), signal.{name}) or print('went on')\n"
        "train.main([])\n"
    )
    said = f"stopped by {name} outside training: the same command goes on from there.\n"
    assert python(code) == (SIGNALS[name], "", said)


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_while_nothing_would_be_lost_exits_at_once_and_says_so(name):
    code = (
        "import os, signal\n"
        "from mbn.system.signals import Stop\n"
        "with Stop() as stop:\n"
        "    stop.nothing_to_save = True\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        "    print('went on')\n"
    )
    said = f"stopped by {name} before the first iteration: the same command goes on from there.\n"
    assert python(code) == (SIGNALS[name], "", said)


@pytest.mark.parametrize("mode", ["eager", "compile"])
def test_nothing_would_be_lost_until_the_first_iteration_is_compiled(here, monkeypatch, mode):
    stops, noted = [], []
    enter, call = Stop.__enter__, Update.__call__
    monkeypatch.setattr("mbn.training.run.choose_mode", lambda *_: mode)
    monkeypatch.setattr("mbn.training.iteration.compiled", lambda method, kind: method)
    monkeypatch.setattr(Stop, "__enter__", lambda self: (stops.append(self), enter(self))[1])
    monkeypatch.setattr(Update, "__call__", lambda *a: (noted.append(stops[-1].nothing_to_save), call(*a)))
    assert here().code == 0
    assert noted == [mode == "compile", *[False] * 7]


@pytest.mark.parametrize(
    ("registry", "entry", "change", "says"),
    [
        (METHODS, "mbn", {"layers": "mbn.network_layers:ln"}, "mbn/methods.py names mbn.network_layers:ln"),
        (DATASETS, "digits", {"path": "mbn.data.noise:noise"}, "mbn/config/registry.py names mbn.data.noise:noise"),
        (NETWORKS, "resnet20", {"small": "nin.NAN"}, "mbn/config/registry.py names models.nin.NAN"),
    ],
    ids=["method", "data set", "network"],
)
def test_an_entry_that_names_nothing_is_refused_in_a_sentence(here, monkeypatch, registry, entry, change, says):
    monkeypatch.setitem(registry, entry, dataclasses.replace(registry[entry], **change))
    done = here()
    assert done.code == 1
    assert done.err.startswith(f"error: {says}, which cannot be loaded (")
    assert done.err.count("\n") == 1


def test_partial_files_of_killed_processes_are_removed(here, left):
    run = left()
    run.folder.mkdir(parents=True)
    run.record_path.parent.mkdir(parents=True)
    for path in (run.checkpoint_path, run.folder / "metrics.jsonl", run.record_path):
        path.with_name(f"{path.name}.123.partial").write_bytes(b"half")
    other = run.record_path.with_name("another.json.123.partial")
    other.write_bytes(b"half")
    assert here().code == 0
    assert list(run.results.rglob("*.partial")) == [other]


# Finished runs.


def test_a_finished_run_says_so_and_trains_nothing(here, left, monkeypatch):
    here()
    before = left().record_path.read_bytes()
    monkeypatch.setattr("mbn.training.run.train", cut)
    done = here()
    assert done.code == 0
    error = f"test error {left().record()['test_error']:.2f} %"
    for part in ("finished", "machine.again=true", str(left().record_path), "tensorboard --logdir", error):
        assert part in done.out
    assert left().record_path.read_bytes() == before


def test_a_finished_run_of_another_folder_of_images_is_shown_with_a_warning(here, left, tmp_path, monkeypatch):
    load = running.load_quickly

    def with_data(folder):
        def load_with_data(overrides):
            loaded = load(overrides)
            loaded.machine.data = str(folder)
            return loaded

        monkeypatch.setattr(running, "load_quickly", load_with_data)

    with_data(tmp_path / "a")
    here()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with_data(tmp_path / "b")
    assert here().err == ""  # whose images are the same everywhere
    monkeypatch.setitem(DATASETS, "digits", dataclasses.replace(DATASETS["digits"], streamed=True))
    for same in (tmp_path / "a", tmp_path / "b" / ".." / "a", tmp_path / "link"):
        with_data(same)
        assert here().err == ""
    with_data(tmp_path / "b\x1b")
    done = here()
    assert done.code == 0
    assert done.err == (
        f"warning: this run was trained on the images in {tmp_path / 'a'}, not on those in {tmp_path / 'b'}\\x1b: "
        "machine.again=true trains it again, on these.\n"
    )
    for text in ("", "[", "machine: 3", "machine: {data: 3}", "machine: {data: a}"):  # the last says not where
        (left().folder / "config.yaml").write_text(text)
        assert here().err == ""
    (left().folder / "config.yaml").unlink()
    assert here().err == ""


def test_again_trains_a_finished_run_again_each_time_and_ends_with_the_same_numbers(here, left, whole, monkeypatch):
    here()
    first = left().record()
    passes = []
    original = Update.__call__
    monkeypatch.setattr(Update, "__call__", lambda *a: (passes.append(1), original(*a)))
    for time in (1, 2):
        assert here("machine.again=true").code == 0
        assert len(passes) == 8 * time
    ignored = TIMES | {"config"}
    assert without(left().record(), ignored) == without(first, ignored)
    assert_same_bits(left().checkpoint()["model"], whole().checkpoint()["model"])
    assert len(left().rows()) == len(whole().rows())


def test_training_again_that_was_stopped_goes_on(here, left, after):
    here()
    before = left().record_path.read_bytes()
    after(3, send("SIGTERM"))
    assert here("machine.again=true").code == 75
    assert left().record_path.read_bytes() == before
    assert "finished" in here().out  # the record of the first time is still there
    done = here("machine.again=true")
    assert "resuming at iteration 3 of 8" in done.out
    assert done.code == 0


# Two at once.


def test_a_second_process_learns_who_holds_the_run(here, left):
    code = (
        "import sys\nfrom pathlib import Path\nfrom mbn.system.files import lock\n"
        "with lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(left().folder / "lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=REPOSITORY, **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        refused = here()
        assert refused.code not in (0, 75, 130)
        assert f"process {holder.pid} on {os.uname().nodename}" in refused.err
        holder.kill()
    assert here().code == 0  # the lock died with its holder


def test_what_is_left_of_a_run_decides_whether_it_is_compiled_elsewhere(here, after, monkeypatch):
    seen = []
    monkeypatch.setattr("mbn.training.run.choose_mode", lambda *given: (seen.append(given[-1]), "eager")[1])
    after(2, send("SIGTERM"))
    assert here().code == 75
    here()
    assert seen == [1.0, 0.75]  # of 8 iterations


@pytest.mark.parametrize("more", [(), ("machine.again=true",)], ids=["first", "again"])
def test_a_run_is_locked_while_it_trains(here, left, after, more):
    """Also one that is trained again, for which the folder is emptied first."""
    if more:
        here()
    refusals = []

    def try_it(_):
        with pytest.raises(UserError) as caught, lock(left().folder / "lock"):
            pass
        refusals.append(str(caught.value))

    after(3, try_it)
    here(*more)
    assert len(refusals) == 1
    assert f"process {os.getpid()}" in refusals[0]


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (("norm=bn",), 0, "The run is finished; machine.again=true trains it again."),
        (("norm=bn", "evaluate.rules=true"), 0, "The run is finished"),
        (("norm=bn", "schedule.lr=[1e30]"), 1, "says; machine.again=true trains it again."),
    ],
    ids=["done", "controls", "diverged"],
)
def test_a_run_that_ends_while_another_process_begins_it_is_shown_as_finished(
    here, left, monkeypatch, more, code, says
):
    here(*(one for one in more if not one.startswith("evaluate.")))
    folder, run = left().results / "theirs", left(*more)
    folder.mkdir()
    run.record_path.rename(folder / "record.json")
    original = run_module.lock

    @contextlib.contextmanager
    def late(path):
        with original(path) as held:
            if (folder / "record.json").exists():
                (folder / "record.json").rename(run.record_path)
            yield held

    monkeypatch.setattr(run_module, "lock", late)
    monkeypatch.setattr(run_module.Run, "train", cut)
    done = here(*more)
    assert done.code == code
    assert says in done.out + done.err
    assert (run.record()["controls"] is not None) == ("evaluate.rules=true" in more)


# Divergence.


def test_divergence_names_the_iteration_and_the_learning_rate_of_the_first_bad_loss_and_what_to_do(here, left):
    """The learning rate drops between the first bad loss and the moment at which losses are read."""
    more = ["batch_size=16", "schedule.iterations=20", "schedule.lr=[1e30,0.5]", "schedule.milestones=[0.2]"]
    more += ["norm.lam=[0.1]"]
    done = here(*more)
    assert done.code == 1
    assert [t for t in range(4) if f"at iteration {t} " in done.err], done.err
    first_bad = next(t for t in range(4) if f"at iteration {t} " in done.err)
    run = left(*more)
    for part in ("diverged", "epoch 1", "learning rate 1e+30", f"{run.record_path} records that", "schedule.lr"):
        assert part in done.err
    assert run.record()["diverged_at"] == first_bad
    assert not left(*more).checkpoint_path.exists()


def test_divergence_keeps_the_last_good_checkpoint(here, left):
    """The second epoch's learning rate is too large; the end of the first one left a checkpoint."""
    more = ("schedule.lr=[0.1,1e30]", "schedule.milestones=[0.75]", "norm.lam=[0.1]")
    done = here(*more)
    assert done.code == 1
    for part in ("epoch 2", "learning rate 1e+30", str(left(*more).checkpoint_path)):
        assert part in done.err
    state = left(*more).checkpoint()
    assert state["iteration"] == 6
    assert all(t.isfinite().all() for t in state["model"].values())


# Iteration 6 begins the second epoch, with a learning rate that is too large.
TOO_LARGE = ("schedule.lr=[0.1,1e30]", "schedule.milestones=[0.75]", "norm.lam=[0.1]")


def test_a_run_that_diverged_has_a_record_without_results(here, left):
    here(*TOO_LARGE)
    run, result = left(*TOO_LARGE), left(*TOO_LARGE).record()
    assert {key for key, value in result.items() if value is None} == {*sense.RESULTS, "controls"}
    assert (result["curves"], result["iterations"], result["images"]) == ({}, 8, 1437 + 2 * 256)
    assert result["diverged_at"] in (6, 7)
    assert [part["from"] for part in result["parts"]] == [0]
    assert result["journal"] == hashlib.sha256((run.folder / "metrics.jsonl").read_bytes()).hexdigest()
    assert 0 < result["images_per_second"] < 1e7


@pytest.mark.parametrize("more", [(), ("evaluate.precise=true",)])
def test_the_same_command_again_says_that_the_run_diverged_and_how_to_train_it_again(here, left, after, more):
    here(*TOO_LARGE)
    after(1, cut)
    done, run = here(*TOO_LARGE, *more), left(*TOO_LARGE)
    at = run.record()["diverged_at"]
    assert (done.code, done.out) == (1, "")
    assert done.err == (
        f"error: {run.name}: diverged at iteration {at} of 8, as {run.record_path} says; machine.again=true trains it "
        "again.\n"
    )


def test_a_run_that_diverged_is_trained_again_from_its_start_as_often_as_it_is_asked_for(here, left):
    here(*TOO_LARGE)
    run = left(*TOO_LARGE)
    for _ in range(2):
        before = run.record_path.read_bytes()
        done = here(*TOO_LARGE, "machine.again=true")
        assert done.code == 1
        assert "training diverged" in done.err
        assert "resuming" not in done.out
        assert run.record_path.read_bytes() != before


@pytest.mark.parametrize(
    ("more", "stop"), [(TOO_LARGE, 2), (("batch_size=16", "schedule.lr=[1e30]"), 1)], ids=["rows", "no row yet"]
)
def test_a_training_again_that_was_stopped_goes_on_beside_the_record_of_a_divergence(here, after, more, stop):
    assert here(*more).code == 1
    after(stop, send("SIGTERM"))
    assert here(*more, "machine.again=true").code == 75
    assert f"resuming at iteration {stop} of 8" in here(*more, "machine.again=true").out


def test_without_its_record_a_run_that_diverged_goes_on_from_its_last_checkpoint(here, left):
    """After a fault of the machine at the end of a long run."""
    here(*TOO_LARGE)
    left(*TOO_LARGE).record_path.unlink()
    done = here(*TOO_LARGE)
    assert "resuming at iteration 6 of 8" in done.out
    assert left(*TOO_LARGE).record()["diverged_at"] in (6, 7)


def test_a_run_that_could_not_be_captured_and_diverged_has_the_mode_that_trained_it(here, left, monkeypatch):
    original = Update.__call__

    def call(self, *batch):
        self.mode = "eager"
        original(self, *batch)

    monkeypatch.setattr(run_module, "choose_mode", lambda *_: "graph")
    monkeypatch.setattr(Update, "__call__", call)
    assert here("schedule.lr=[1e30]").code == 1
    result = left("schedule.lr=[1e30]").record()
    assert [result["mode"], *(part["mode"] for part in result["parts"])] == ["eager", "eager"]


def test_a_bad_loss_stops_the_run_within_50_iterations(here, monkeypatch):
    seen = []
    original = Update._first

    def first(self, images, labels):
        seen.append(1)
        loss, measured = original(self, images, labels)
        return loss, measured * float("nan") if len(seen) == 60 else measured

    monkeypatch.setattr(Update, "_first", first)
    done = here("batch_size=1", "schedule.iterations=1000", "norm=bn")
    assert done.code == 1
    assert 60 <= len(seen) <= 110
    assert "at iteration 59" in done.err


def test_weights_that_are_not_finite_are_never_saved(here, left, after):
    """Those of the last step before a checkpoint, whose own loss was finite."""

    @torch.no_grad()
    def spoil(update):
        update.model.fc.weight[0, 0] = float("inf")

    after(4, spoil)
    done = here("machine.checkpoint_seconds=1e-9")
    assert done.code == 1
    assert "fc.weight" in done.err
    state = left().checkpoint()
    assert state["iteration"] == 3
    assert all(t.isfinite().all() for t in state["model"].values())


def test_an_iteration_reads_nothing_from_the_device(here, reads, monkeypatch):
    marks = []
    original = Update.__call__
    monkeypatch.setattr(Update, "__call__", lambda *a: (marks.append(len(reads)), original(*a)))
    here("batch_size=8", "schedule.iterations=40")  # rows of the journal every 18
    quiet = [after - before for before, after in itertools.pairwise(marks[1:])]
    assert sum(n == 0 for n in quiet) >= len(quiet) - 2, (quiet, reads)


def test_a_second_forward_that_would_do_nothing_is_skipped_with_one_warning(here):
    done = here("norm=gn", "forwards=2")
    assert done.code == 0
    assert done.err.count("warning: norm=gn has no batch statistics") == 1


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), 1),
        (RuntimeError("CUDA error: out of memory"), 1),
        (MemoryError(), 1),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 0),
    ],
    ids=lambda e: str(e)[:20],
)
def test_a_lack_of_memory_is_one_sentence_that_names_the_batch_size(here, monkeypatch, error, lacks):
    def full(*_):
        raise error

    monkeypatch.setattr(Update, "__call__", full)
    if not lacks:
        with pytest.raises(RuntimeError, match="mat1"):
            here()
        return
    done = here()
    assert done.code == 1
    assert done.err.startswith("error: the device's memory is not enough: try a smaller batch_size than 256, or eval")
    more = here("norm.memory=400")
    assert "try a smaller batch_size than 256, norm.memory, or evaluate.batch_size" in more.err


# Sweeps.


def table(out):
    """The words of each line of the table that ends a sweep."""
    return [line.split() for line in out.partition("\n\n")[2].splitlines()]


def test_a_sweep_in_which_two_are_one_run_is_refused_before_it_trains(here, left):
    for line in (("norm=bn", "machine.mode=eager,compile"), ("evaluate.rules=true,false", "seed=0,1")):
        done = here("-m", *line)
        assert (done.code, "this is the run digits/" in done.err) == (2, True)
        assert line[-1].partition("=")[0].removeprefix("seed") in done.err
    assert not left("norm=bn").record_path.exists()
    assert here("-m", "seed=0,0").code == 0  # the same command twice


def test_a_sweep_runs_one_after_another(here, left):
    sweep = ("-m", "norm=bn,mbn", "seed=0,1")
    done = here(*sweep)
    assert done.code == 0
    for norm, seed in itertools.product(("bn", "mbn"), (0, 1)):
        assert left(f"norm={norm}", f"seed={seed}").record()["iterations"] == 8
    again = here(*sweep)
    assert again.out.count("The run is finished") == 4
    for out in (done.out, again.out):
        lines = table(out)
        assert len(lines) == 5 + 2 + 3
        assert lines[4][:3] == ["mbn", "1", f"{left('norm=mbn', 'seed=1').record()['test_error']:.2f}"]


def test_a_run_of_a_sweep_that_diverges_does_not_stop_the_others_but_is_no_success(here, left):
    done = here("-m", "schedule.lr=[1e30],[0.1]")
    assert done.code == 1
    assert f"error: {left('schedule.lr=[1e30]').name}: training diverged" in done.err
    assert left("schedule.lr=[0.1]").record()["iterations"] == 8
    _, failed, done_line = table(done.out)
    assert failed[0] == "[1e+30]"
    at = left("schedule.lr=[1e30]").record()["diverged_at"]
    assert failed[-6:] == ["diverged", "at", "iteration", str(at), "of", "8"]
    assert done_line[:2] == ["[0.1]", f"{left('schedule.lr=[0.1]').record()['test_error']:.2f}"]


def test_a_run_of_a_sweep_that_another_process_is_training_does_not_stop_the_others(here, left):
    with lock(left("seed=0").folder / "lock"):
        done = here("-m", "seed=0,1")
    assert done.code != 0
    assert left("seed=0").name in done.err
    assert left("seed=1").record()["iterations"] == 8


def test_a_signal_stops_a_sweep(here, left, after):
    after(10, send("SIGTERM"))  # in the second run
    done = here("-m", "seed=0,1,2")
    assert done.code == 75
    _, first, second, third, *_ = table(done.out)
    assert first[:3] == ["0", f"{left('seed=0').record()['test_error']:.2f}", "%"]
    assert (second[0], second[5:], third[0], third[5:]) == ("1", ["unfinished"], "2", ["not", "begun"])
    assert left("seed=0").record_path.exists()
    assert left("seed=1").checkpoint()["iteration"] == 2
    assert not left("seed=2").folder.exists()


@pytest.mark.parametrize(("more", "end"), [((), "finish"), (TOO_LARGE, "end_diverged")], ids=["finishes", "diverges"])
def test_a_signal_at_the_end_of_a_run_stops_the_sweep_after_it(here, left, monkeypatch, more, end):
    original = getattr(run_module.Run, end)
    monkeypatch.setattr(run_module.Run, end, lambda *args: (send("SIGTERM")(), original(*args))[1])
    done = here("-m", "seed=0,1,2", *more)
    assert done.code == 75
    assert "stopped: the same command goes on with the other runs." in done.err
    assert left("seed=0", *more).record_path.exists()
    assert not left("seed=1", *more).folder.exists()


def test_a_signal_in_the_last_iteration_of_a_sweep_changes_nothing(here, left, after):
    after(16, send("SIGTERM"))
    assert here("-m", "seed=0,1").code == 0
    assert left("seed=1").record_path.exists()


def test_a_sweep_that_is_trained_again_and_stopped_shows_no_earlier_result(here, after):
    assert here("-m", "seed=0,1").code == 0
    after(4, send("SIGTERM"))
    done = here("-m", "seed=0,1", "machine.again=true")
    assert done.code == 75
    assert done.out.count("  not trained again\n") == 2
    assert "note: with machine.again=true" not in done.err  # the first run itself was stopped


def test_a_sweep_that_is_trained_again_and_stopped_later_says_what_the_same_command_would_do(here, after):
    after(10, send("SIGTERM"))  # in the second run
    done = here("-m", "seed=0,1", "machine.again=true")
    assert done.code == 75
    assert "note: with machine.again=true the same command trains 1 run again that is finished now" in done.err
