"""Whole runs in this process, of a tiny network: resume to the bit, divergence, locks, what is reported."""

import dataclasses
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import running
import torch
import torch.nn.functional as F
from running import TIMES, TINY, Run, Tiny, assert_same_bits, assert_same_run, run_here, with_new_fields, without

from mbn import config
from mbn.config import REPOSITORY
from mbn.data.datasets import load
from mbn.layers import from_config
from mbn.system.errors import UserError
from mbn.system.files import lock
from mbn.training import checkpoint, execution, report
from mbn.training import run as trainer
from mbn.training.iteration import Update
from mbn.training.state import devices_so_far


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A function that gives an uninterrupted run of TINY and more, trained once."""
    done = {}

    def get(*more):
        if more not in done:
            results = tmp_path_factory.mktemp("whole")
            with pytest.MonkeyPatch.context() as patch:
                silent = types.SimpleNamespace(readouterr=lambda: ("", ""))  # capsys is for functions only
                result = run_here(silent, patch, *TINY, f"machine.results={results}", *more)
            assert result.code == 0
            done[more] = Run(results, [*TINY, *more])
        return done[more]

    return get


@pytest.fixture
def after(monkeypatch):
    """A function that has an action done after so many iterations from now on."""

    def arrange(iterations, action):
        count = 0
        original = Update.__call__

        def call(self, images, labels):
            nonlocal count
            original(self, images, labels)
            count += 1
            if count == iterations:
                monkeypatch.setattr(Update, "__call__", original)
                action()

        monkeypatch.setattr(Update, "__call__", call)

    return arrange


class PowerCutError(Exception):
    pass


def cut():
    raise PowerCutError


def send(name):
    return lambda: os.kill(os.getpid(), getattr(signal, name))


# Resume.


@pytest.mark.parametrize("more", [(), ("norm=bn",), ("norm=bn", "forwards=2"), ("norm=brn",)], ids=" ".join)
def test_a_run_stopped_after_every_iteration_ends_with_the_same_bits(here, left, whole, after, more):
    for iteration in range(1, 8):
        after(1, send("SIGTERM"))
        stopped = here(*more)
        assert stopped.code == 75
        assert f"stopped at iteration {iteration} of 8" in stopped.err
        assert "the same command goes on" in stopped.err
        assert ("resuming" in stopped.out) == (iteration > 1)
        assert not left(*more).record_path.exists()
    done = here(*more)
    assert done.code == 0
    assert "resuming at iteration 7 of 8" in done.out
    assert_same_run(left(*more), whole(*more))


@pytest.mark.parametrize("iteration", range(1, 9))
def test_a_crash_goes_on_from_the_last_checkpoint_with_the_same_bits(here, left, whole, after, iteration):
    after(iteration, cut)
    with pytest.raises(PowerCutError):
        here()
    done = here()
    # Only an epoch's end leaves a checkpoint within five minutes.
    assert ("resuming at iteration 6 of 8" in done.out) == (iteration > 6)
    assert_same_run(left(), whole())


@pytest.mark.parametrize("iteration", range(2, 9))
def test_checkpoints_in_mid_epoch_are_written_every_so_many_seconds(here, left, whole, after, iteration):
    after(iteration, cut)
    with pytest.raises(PowerCutError):
        here("machine.checkpoint_seconds=1e-9")
    done = here()
    assert f"resuming at iteration {iteration - 1} of 8" in done.out
    assert_same_run(left(), whole())


@pytest.mark.parametrize("iteration", [7, 8])
def test_short_epochs_do_not_each_leave_a_checkpoint_but_the_end_does(here, left, whole, after, monkeypatch, iteration):
    monkeypatch.setattr(trainer, "SAVES_APART", 3600)
    after(iteration, cut)
    with pytest.raises(PowerCutError):
        here()
    assert not left().checkpoint_path.exists()
    assert here().code == 0
    assert left().checkpoint()["iteration"] == 8
    assert not checkpoint.previous(left().checkpoint_path).exists()
    assert_same_run(left(), whole())


def test_checkpoints_that_are_wanted_more_often_are_written_at_the_ends_of_epochs_too(here, left, after, monkeypatch):
    monkeypatch.setattr(trainer, "SAVES_APART", 3600)
    after(7, cut)
    with pytest.raises(PowerCutError):
        here("machine.checkpoint_seconds=1e-9")
    assert left().checkpoint()["iteration"] == 6


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 75), ("SIGUSR1", 75), ("SIGUSR2", 75)])
def test_a_signal_finishes_the_iteration_saves_and_ends_with_its_code(here, left, after, name, code):
    after(4, send(name))
    stopped = here()
    assert stopped.code == code
    assert "stopped at iteration 4 of 8" in stopped.err
    assert left().checkpoint()["iteration"] == 4


@pytest.mark.parametrize("more", [("machine.checkpoint_seconds=1e-9",), ("schedule.iterations=14",)], ids=" ".join)
def test_a_signal_right_after_a_save_does_not_write_the_same_state_twice(here, left, after, more):
    """Two generations that are one: the second chance would be gone. The 12th iteration ends an epoch."""
    after(12 if "14" in more[0] else 4, send("SIGTERM"))
    assert here(*more).code == 75
    path = left(*more).checkpoint_path
    assert checkpoint.read(checkpoint.previous(path))["iteration"] < checkpoint.read(path)["iteration"]


def test_a_signal_in_the_last_iteration_still_ends_the_run(here, left, whole, after):
    after(8, send("SIGTERM"))
    assert here().code == 0
    assert_same_run(left(), whole())


def test_signal_handlers_are_put_back(here, after):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)]
    after(2, send("SIGTERM"))
    here()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)] == before


def test_a_second_signal_exits_at_once():
    code = (
        "import os, signal\n"
        "from mbn.system.signals import Stop\n"
        "with Stop() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert stop.code == 75\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize(("name", "exit_code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGUSR2", 75), ("SIGINT", 130)])
def test_a_signal_before_training_has_begun_exits_at_once(name, exit_code):
    code = (
        "import os, signal, train\n"
        f"train.run = lambda config: os.kill(os.getpid(), signal.{name}) or print('went on')\n"
        "train.main([])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (exit_code, "")
    assert done.stderr == f"error: stopped by {name} outside training: the same command goes on from there.\n"


def test_ctrl_c_before_training_has_begun_is_no_traceback(here, monkeypatch):
    """Importing torch and reading the data take seconds, in which nothing notes signals."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "load", interrupted)
    try:
        code = here().code
    except KeyboardInterrupt:
        code = "a traceback"
    assert code == 130


@pytest.mark.parametrize("damage", ["flipped", "cut short", "empty", "malicious"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_with_a_warning(here, left, whole, after, tmp_path, damage):
    after(5, cut)
    with pytest.raises(PowerCutError):
        here("machine.checkpoint_seconds=1e-9")
    path = left().checkpoint_path
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes(
        {
            "flipped": content,
            "cut short": content[: len(content) // 2],
            "empty": b"",
            "malicious": pickle.dumps(Trap(tmp_path / "sprung")),
        }[damage]
    )
    done = here()
    assert done.code == 0
    assert "warning" in done.err
    assert str(path) in done.err
    assert "resuming at iteration 3 of 8" in done.out
    assert not (tmp_path / "sprung").exists()
    assert_same_run(left(), whole())


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_checkpoint_with_a_right_checksum_runs_nothing(here, left, after, tmp_path):
    after(1, send("SIGTERM"))
    here()
    path = left().checkpoint_path
    state = left().checkpoint()
    state["model"]["conv.weight"] = Trap(tmp_path / "sprung")
    checkpoint.save(state, path)
    checkpoint.previous(path).unlink(missing_ok=True)
    done = here()
    assert (done.code, done.err.count("warning: "), "Traceback" in done.err) == (0, 1, False)
    assert not (tmp_path / "sprung").exists()
    torch.load(checkpoint.damaged(path), weights_only=False)
    assert (tmp_path / "sprung").exists()


def test_a_damaged_checkpoint_never_becomes_the_generation_before(here, left, after, monkeypatch):
    """A crash between the two renames of the next save leaves that generation alone."""
    after(5, cut)
    with pytest.raises(PowerCutError):
        here("machine.checkpoint_seconds=1e-9")
    path = left().checkpoint_path
    path.write_bytes(path.read_bytes()[:-1])
    after(1, send("SIGTERM"))
    here()
    assert checkpoint.read(path)["iteration"] == 4
    assert checkpoint.read(checkpoint.previous(path))["iteration"] == 3


def test_what_killed_processes_left_of_their_writes_is_removed(here, left):
    run = left()
    run.folder.mkdir(parents=True)
    run.record_path.parent.mkdir(parents=True)
    for path in (run.checkpoint_path, run.folder / "metrics.jsonl", run.record_path):
        path.with_name(f"{path.name}.123.partial").write_bytes(b"half")
    other = run.record_path.with_name("another.json.123.partial")
    other.write_bytes(b"half")
    assert here().code == 0
    assert list(run.results.rglob("*.partial")) == [other]


def test_without_any_whole_checkpoint_the_run_starts_over(here, left, whole, after):
    after(3, send("SIGTERM"))
    here("machine.checkpoint_seconds=1e-9")
    for path in (left().checkpoint_path, checkpoint.previous(left().checkpoint_path)):
        path.write_bytes(b"nonsense")
    done = here()
    assert done.err.count("warning") == 2
    assert "resuming" not in done.out
    assert_same_run(left(), whole())


def test_a_run_that_lacks_only_its_record_is_not_trained_again(here, left, whole, monkeypatch):
    here()
    left().record_path.unlink()
    monkeypatch.setattr(Update, "__call__", lambda *_: cut())
    done = here()
    assert done.code == 0
    assert_same_run(left(), whole())


def test_a_checkpoint_of_another_configuration_is_refused(here, left, after):
    after(3, send("SIGTERM"))
    here()
    other = left("seed=1")
    other.folder.mkdir(parents=True)
    left().checkpoint_path.rename(other.checkpoint_path)
    refused = here("seed=1")
    assert refused.code == 1
    assert str(other.checkpoint_path) in refused.err
    assert "another configuration" in refused.err


def test_a_new_setting_at_its_neutral_default_lets_an_unfinished_run_go_on(here, left, whole, after, monkeypatch):
    after(3, send("SIGTERM"))
    here()
    newer = with_new_fields(config.Config, ("knob", float, dataclasses.field(default=0.25)))
    load_older = running.load_quickly
    for module in ("loading", "run_identity"):
        monkeypatch.setattr(f"mbn.config.{module}.Config", newer)
    monkeypatch.setattr(running, "load_quickly", lambda overrides: newer(**vars(load_older(overrides))))
    done = here()
    assert done.code == 0, done.err
    assert "resuming at iteration 3 of 8" in done.out
    assert_same_bits(left().checkpoint()["model"], whole().checkpoint()["model"])


# What auto chose.


def test_what_auto_chose_is_kept_for_a_resume(here, left, after, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    after(3, send("SIGTERM"))
    here("machine.device=auto")
    assert left().checkpoint()["machine"] == {"device": "cpu", "mode": "eager", "threads": 1}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    done = here("machine.device=auto", "machine.threads=null")
    assert done.err == ""
    result = left().record()
    assert (result["device"][:5], result["mode"], result["threads"]) == ("cpu: ", "eager", 1)


@pytest.mark.parametrize(
    ("state", "devices"),
    [
        (None, ["H100"]),
        ({"devices": ["EPYC", "H100"]}, ["EPYC", "H100"]),
        ({"devices": ["EPYC"]}, ["EPYC", "H100"]),
        ({"machine": {"device": "cpu"}}, ["cpu", "H100"]),  # a checkpoint from before names were kept
        ({"machine": {"device": "cuda"}}, ["H100"]),
    ],
)
def test_a_record_names_every_device_that_its_run_has_used(monkeypatch, state, devices):
    monkeypatch.setattr("mbn.records.provenance.device_name", lambda device: "H100")
    assert devices_so_far(state, torch.device("cuda")) == devices


def test_a_run_that_went_on_elsewhere_names_both_devices(here, left, after, monkeypatch):
    after(3, send("SIGTERM"))
    here()
    monkeypatch.setattr("mbn.records.provenance.device_name", lambda device: "another CPU")
    here()
    first, second = left().record()["device"].split(", then ")
    assert (first[:5], second) == ("cpu: ", "another CPU")


def test_another_number_of_threads_at_a_resume_warns(here, left, after):
    after(3, send("SIGTERM"))
    here()
    done = here("machine.threads=2")
    assert "warning: the run began with 1 threads" in done.err
    assert left().record()["threads"] == 2


def test_a_run_of_two_versions_of_the_code_is_dirty(here, left, after, monkeypatch):
    """No commit alone would give its result."""
    after(3, send("SIGTERM"))
    here()
    monkeypatch.setattr(running, "COMMIT", "d" * 40)
    here()
    result = left().record()
    assert (result["commit"], result["dirty"]) == ("d" * 40, True)


def test_choices_are_made_once():
    assert execution.choose_threads(None, 3) == 3
    assert execution.choose_threads(None, None) == torch.get_num_threads()
    assert execution.choose_device("auto", "cpu") == torch.device("cpu")


def test_a_device_that_is_not_there_is_a_users_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no cuda here"):
        execution.choose_device("cuda", None)
    with pytest.raises(UserError, match="the run began on it"):
        execution.choose_device("auto", "cuda")


# Finished runs.


def test_a_finished_run_says_so_and_trains_nothing(here, left, monkeypatch):
    here()
    before = left().record_path.read_bytes()
    monkeypatch.setattr(trainer, "train", lambda *_: cut())
    done = here()
    assert done.code == 0
    assert "finished" in done.out
    assert "machine.again=true" in done.out
    assert str(left().record_path) in done.out
    assert "tensorboard --logdir" in done.out
    assert f"test error {left().record()['test_error']:.2f} %" in done.out
    assert left().record_path.read_bytes() == before


def test_again_trains_a_finished_run_anew_and_ends_with_the_same_numbers(here, left, whole, monkeypatch):
    here()
    first = left().record()
    passes = []
    original = Update.__call__
    monkeypatch.setattr(Update, "__call__", lambda *a: (passes.append(1), original(*a)))
    again = here("machine.again=true")
    assert again.code == 0
    assert len(passes) == 8
    ignored = TIMES | {"config"}
    assert without(left().record(), ignored) == without(first, ignored)
    assert_same_bits(left().checkpoint()["model"], whole().checkpoint()["model"])
    assert len(left().rows()) == len(whole().rows())


def test_again_after_again_trains_once_more(here, monkeypatch):
    here()
    here("machine.again=true")
    monkeypatch.setattr(Update, "__call__", lambda *_: cut())
    with pytest.raises(PowerCutError):
        here("machine.again=true")


def test_training_anew_that_was_stopped_goes_on(here, left, after):
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


def test_a_second_process_is_told_who_holds_the_run(here, left):
    code = (
        "import sys\nfrom pathlib import Path\nfrom mbn.system.files import lock\n"
        "with lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(left().folder / "lock")],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        refused = here()
        assert refused.code not in (0, 75, 130)
        assert f"process {holder.pid} on {os.uname().nodename}" in refused.err
        holder.kill()
    assert here().code == 0  # the lock died with its holder


@pytest.mark.parametrize("more", [(), ("machine.again=true",)], ids=["first", "again"])
def test_a_run_is_locked_while_it_trains(here, left, after, more):
    """Also one that is trained again, for which the folder is emptied first."""
    if more:
        here()
    refusals = []

    def try_it():
        try:
            with lock(left().folder / "lock"):
                pass
        except UserError as error:
            refusals.append(str(error))

    after(3, try_it)
    here(*more)
    assert len(refusals) == 1
    assert f"process {os.getpid()}" in refusals[0]


# Divergence.


def test_a_loss_that_is_not_finite_stops_the_run_and_names_where(here, left):
    done = here("schedule.lr=[1e30]")
    assert done.code == 1
    for part in ("diverged", "iteration", "epoch 1", "learning rate 1e+30", "schedule.lr"):
        assert part in done.err
    assert not left("schedule.lr=[1e30]").record_path.exists()
    assert not left("schedule.lr=[1e30]").checkpoint_path.exists()


def test_divergence_keeps_the_last_good_checkpoint(here, left, after):
    """The second epoch's learning rate is too large; the end of the first one left a checkpoint."""
    more = ("schedule.lr=[0.1,1e30]", "schedule.milestones=[0.75]", "norm.lam=[0.1]")
    done = here(*more)
    assert done.code == 1
    assert "epoch 2" in done.err
    assert "learning rate 1e+30" in done.err
    run = left(*more)
    assert str(run.checkpoint_path) in done.err
    state = run.checkpoint()
    assert state["iteration"] == 6
    assert all(t.isfinite().all() for t in state["model"].values())


def test_the_iteration_and_the_learning_rate_named_are_those_of_the_first_bad_loss(here, after):
    """The learning rate drops between the first bad loss and the moment at which losses are read."""
    more = ["batch_size=16", "schedule.iterations=20", "schedule.lr=[1e30,0.5]", "schedule.milestones=[0.2]"]
    done = here(*more, "norm.lam=[0.1]")
    assert done.code == 1
    found = [t for t in range(4) if f"at iteration {t} " in done.err]
    assert found, done.err
    assert "learning rate 1e+30" in done.err


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


def test_weights_that_are_not_finite_are_never_saved(here, left, after, monkeypatch):
    """Those of the last step before a checkpoint, whose own loss was finite."""
    models = []
    original = trainer.Run.__init__

    def remember(self, *args):
        original(self, *args)
        models.append(self.model)

    monkeypatch.setattr(trainer.Run, "__init__", remember)

    def spoil():
        with torch.no_grad():
            models[0].fc.weight[0, 0] = float("inf")

    after(4, spoil)
    done = here("machine.checkpoint_seconds=1e-9")
    assert done.code == 1
    assert "fc.weight" in done.err
    state = left().checkpoint()
    assert state["iteration"] == 3
    assert all(t.isfinite().all() for t in state["model"].values())


def test_an_iteration_reads_nothing_from_the_device(here, monkeypatch):
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, _name=name, _original=original, **kwargs):
            reads.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    marks = []
    original_call = Update.__call__

    def call(self, images, labels):
        marks.append(len(reads))
        original_call(self, images, labels)

    monkeypatch.setattr(Update, "__call__", call)
    here("batch_size=8", "schedule.iterations=40")  # rows of the journal every 18
    quiet = [after - before for before, after in itertools.pairwise(marks[1:])]
    assert sum(n == 0 for n in quiet) >= len(quiet) - 2, (quiet, reads)


def test_the_optimiser_is_plain_sgd_over_all_parameters(whole):
    (group,) = whole().checkpoint()["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)
    assert not any(group[key] for key in ("nesterov", "dampening", "maximize"))
    assert len(group["params"]) == 5


# What is reported.


def test_rows_are_the_schedule_and_the_losses_of_their_iterations(here, left, monkeypatch):
    measured = []
    drain = Update.drain

    def noted(self):
        new = drain(self)
        measured.extend(new)
        return new

    monkeypatch.setattr(Update, "drain", noted)
    here()
    sizes = [256, 256, 256, 256, 256, 157, 256, 256]
    assert len(measured) == 8
    rows = left().rows()
    assert [(r["kind"], r["iteration"]) for r in rows] == [
        *[("train", t) for t in range(1, 6)],
        *[("epoch", 6), ("train", 7), ("epoch", 8)],
    ]
    assert [r["images"] for r in rows] == [256, 512, 768, 1024, 1280, 1437, 1693, 1949]
    assert [r["epoch"] for r in rows] == pytest.approx([t / 6 for t in range(1, 9)])
    # 0.4 and 0.6 of 8 are 3.2 and 4.8: the values in force at iterations 0 to 7.
    assert [r["lr"] for r in rows] == [0.1, 0.1, 0.1, 0.1, 0.01, 0.001, 0.001, 0.001]
    assert [r["lambda"] for r in rows] == [0.1, 0.1, 0.1, 0.1, 0.5, 0.9, 0.9, 0.9]

    def mean(first, last):
        images = sum(sizes[first:last])
        losses = sum(loss * n for (loss, _), n in zip(measured[first:last], sizes[first:last], strict=True))
        return losses / images, 100 * sum(errors for _, errors in measured[first:last]) / images

    spans = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (0, 6), (6, 7), (6, 8)]
    for row, (first, last) in zip(rows, spans, strict=True):
        assert (row["train_loss"], row["train_error"]) == pytest.approx(mean(first, last)), row["iteration"]


@pytest.mark.parametrize("more", [(), ("norm=bn",)], ids=["mbn", "bn"])
def test_the_result_is_that_of_the_final_weights_on_the_test_images(whole, more):
    run = whole(*more)
    c = run.config
    model = Tiny(from_config(c), 10)
    model.load_state_dict(run.checkpoint()["model"])
    model.eval()
    data = load(c, torch.device("cpu"))
    ((images, labels),) = data.test_batches(1000)
    with torch.no_grad():
        logits = model(images)
    result = run.record()
    assert result["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    order = logits.argsort(1, descending=True)
    assert result["test_error"] == pytest.approx(100 * (order[:, 0] != labels).double().mean().item())
    top5 = (order[:, :5] == labels[:, None]).any(1)
    assert result["test_error_top5"] == pytest.approx(100 * (~top5).double().mean().item())


def test_the_record_agrees_with_the_rows(whole):
    result, rows = whole().record(), whole().rows()
    epochs = [row for row in rows if row["kind"] == "epoch"]
    for key in ("test_error", "test_error_top5", "test_loss"):
        assert result[key] == epochs[-1][key]
    # An epoch's images before the end there is the end of iteration 2, and rows end with each iteration.
    assert [row["images"] for row in rows[:3]] == [256, 512, 768]
    for key in ("train_error", "train_loss"):
        both = [rows[0][key] * 256 + rows[1][key] * 256, sum(row[key] * row["images"] for row in epochs[:1])]
        whole_run = both[1] + epochs[1][key] * 512
        assert result[key] == pytest.approx((whole_run - both[0]) / 1437, rel=1e-6)
    assert result["test_error_best"] == min(row["test_error"] for row in epochs)
    assert (result["iterations"], result["images"]) == (8, 1437 + 512)
    assert result["parameters"] == 3 * 6 * 16 + 12 + 24 * 10 + 10
    curves = dict(result["curves"])
    within = curves.pop("training")
    assert set(curves) == {
        *("images", "train_error", "train_loss", "test_error", "test_loss", "gap_mean", "gap_std", "weight_norm"),
        *("dead_channels", "dead_layers"),
    }
    for key, values in curves.items():
        assert values == pytest.approx([row[key] for row in epochs], rel=1e-4)
    assert within["images"] == [row["images"] for row in rows]
    assert len(rows) > len(epochs)
    assert result["test_error_precise"] is None


@pytest.mark.parametrize(("channels", "layers"), [(0, 0), (2, 0), (6, 1)])
def test_dead_channels_and_layers_are_counted(here, left, monkeypatch, channels, layers):
    alive = torch.ones(6, 1, 1)
    alive[:channels] = 0
    original = torch.nn.Conv2d.forward
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda self, x: original(self, x) * alive)
    here()
    curves, last = left().record()["curves"], left().rows()[-1]
    assert curves["dead_channels"] == [channels, channels]
    assert curves["dead_layers"] == [layers, layers]
    assert last["layer_dead_channels"] == ({"norm": channels} if channels else {})
    assert sum(value for step, value in left().points()["dead/channels"]) == 2 * channels


def test_the_speed_of_training_leaves_out_evaluation_and_saving(here, left, monkeypatch):
    for owner, name in ((trainer.checkpoint, "save"), (report, "evaluate")):
        original = getattr(owner, name)

        def slow(*args, original=original):
            time.sleep(0.15)
            return original(*args)

        monkeypatch.setattr(owner, name, slow)
    here("machine.checkpoint_seconds=1e-9")  # 8 checkpoints and 2 evaluations: 1.5 s
    state = left().checkpoint()
    assert state["training_seconds"] < 1
    assert left().record()["images_per_second"] > 1949


def test_the_size_of_evaluations_batches_changes_no_result(here, left, whole):
    here("evaluate.batch_size=7")
    ours, theirs = left().record(), whole().record()
    assert ours["name"] == theirs["name"]
    for key in ("test_error", "test_error_best", "test_error_top5", "train_loss"):
        assert ours[key] == theirs[key]
    assert ours["test_loss"] == pytest.approx(theirs["test_loss"], rel=1e-5)


def test_a_second_forward_that_would_do_nothing_is_skipped_with_one_warning(here):
    done = here("norm=gn", "forwards=2")
    assert done.code == 0
    assert done.err.count("warning: norm=gn has no batch statistics") == 1


def test_a_run_leaves_these_files_and_no_others(whole):
    run = whole()
    files = sorted(p.relative_to(run.results).as_posix() for p in run.results.rglob("*") if p.is_file())
    events = next(run.folder.glob("events.*")).name
    expected = [f"records/{run.name}.json"]
    expected += [
        f"runs/{run.name}/{name}"
        for name in (
            "checkpoint.pt",
            "checkpoint.previous.pt",
            "config.yaml",
            events,
            "lock",
            "metrics.jsonl",
        )
    ]
    assert files == sorted(expected)


def test_a_sweep_runs_one_after_another(here, left):
    done = here("-m", "norm=bn,mbn", "seed=0,1")
    assert done.code == 0
    for norm in ("bn", "mbn"):
        for seed in (0, 1):
            assert left(f"norm={norm}", f"seed={seed}").record()["iterations"] == 8
    again = here("-m", "norm=bn,mbn", "seed=0,1")
    assert again.out.count("The run is finished") == 4


def test_a_run_of_a_sweep_that_diverges_does_not_stop_the_others_but_is_no_success(here, left):
    done = here("-m", "schedule.lr=[1e30],[0.1]")
    assert done.code == 1
    assert left("schedule.lr=[1e30]").name in done.err
    assert "diverged" in done.err
    assert left("schedule.lr=[0.1]").record()["iterations"] == 8


def test_a_run_of_a_sweep_that_another_process_is_training_does_not_stop_the_others(here, left):
    with lock(left("seed=0").folder / "lock"):
        done = here("-m", "seed=0,1")
    assert done.code != 0
    assert left("seed=0").name in done.err
    assert left("seed=1").record()["iterations"] == 8


def test_a_signal_stops_a_sweep(here, left, after):
    after(10, send("SIGTERM"))  # in the second run
    assert here("-m", "seed=0,1,2").code == 75
    assert left("seed=0").record_path.exists()
    assert left("seed=1").checkpoint()["iteration"] == 2
    assert not left("seed=2").folder.exists()


def test_the_paths_of_this_machine_are_not_in_the_record(whole):
    assert str(Path(whole().results)) not in whole().record_path.read_text()
