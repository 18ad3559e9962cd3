"""A run that was stopped goes on: with the same bits, and on the machine and in the mode in which it began."""

import dataclasses
import re

import pytest
import running
import torch
from running import PowerCutError, assert_same_bits, assert_same_run, cut, send, with_new_fields

from mbn import config
from mbn.data.in_memory import DeviceDataset
from mbn.records import record
from mbn.system import signals
from mbn.system.errors import UserError
from mbn.training import checkpoint_file, run

EVERY = "machine.checkpoint_seconds=1e-9"


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
@pytest.mark.parametrize(
    ("more", "apart", "saved"),
    [
        ((), 0, lambda iteration: 6 if iteration > 6 else 0),
        ((EVERY,), 3600, lambda iteration: iteration - 1),
        ((), 3600, lambda iteration: 0),
    ],
    ids=["epoch ends", "every iteration", "only the end"],
)
def test_a_power_cut_loses_what_came_after_the_last_checkpoint_and_no_bits(
    here, left, whole, after, monkeypatch, more, apart, saved, iteration
):
    """apart: seconds between checkpoints at the ends of epochs. The first epoch has 6 iterations."""
    monkeypatch.setattr(run, "SAVES_APART", apart)
    after(iteration, cut)
    with pytest.raises(PowerCutError):
        here(*more)
    resumed = re.findall(r"resuming at iteration (\d) of 8", here().out)
    assert resumed == [str(saved(iteration))] * (saved(iteration) > 0)
    assert_same_run(left(), whole())


@pytest.mark.parametrize("norm", ["mbn", "gn"])
@pytest.mark.parametrize(("iteration", "batches"), [(6, 1), (6, 3), (8, 2)])
def test_a_signal_in_a_test_is_answered_between_its_batches_and_the_test_is_taken_again(
    here, left, whole, monkeypatch, norm, iteration, batches
):
    """Six batches of 60 images. At the end of the first epoch (iteration 6), or of the run."""
    more = (f"norm={norm}", "evaluate.batch_size=60")
    monkeypatch.setattr(signals, "FINISH_WITHIN", 0.0)
    seen = []
    plain = DeviceDataset._plain

    def with_a_signal(self, *args):
        for number, batch in enumerate(plain(self, *args), 1):
            seen.append(number)
            if len(seen) == batches + (6 if iteration == 8 else 0):
                send("SIGTERM")()
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(DeviceDataset, "_plain", with_a_signal)
        stopped = here(*more)
    assert stopped.code == 75
    assert f"stopped at iteration {iteration} of 8" in stopped.err
    assert seen[-1] <= batches + 2
    assert not left(*more).record_path.exists()
    done = here(*more)
    assert (done.code, f"resuming at iteration {iteration} of 8" in done.out) == (0, True)
    assert_same_run(left(*more), whole(*more))


def test_a_test_goes_on_for_some_seconds_after_a_signal_so_that_a_short_one_ends(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    stop = signals.StopRequest()
    taken = []

    def items():
        for item in range(20):
            taken.append(item)
            stop.code = 75 if item >= 3 else None
            now[0] += 1
            yield item

    with pytest.raises(signals.StoppedError):
        list(stop.checked(items()))
    assert taken == list(range(7))  # the signal came during item 3 and is seen before item 4, at 4 s


def test_training_again_that_was_stopped_in_its_last_test_goes_on(here, left, whole, monkeypatch):
    """Its old record does not make it a finished run, which would start over."""
    here()
    monkeypatch.setattr(signals, "FINISH_WITHIN", -1.0)
    plain = DeviceDataset._plain
    seen = []

    def with_a_signal(self, *args):
        for batch in plain(self, *args):
            seen.append(1)
            if len(seen) == 8:
                send("SIGTERM")()
            yield batch

    more = ("machine.again=true", "evaluate.batch_size=60")
    with monkeypatch.context() as patch:
        patch.setattr(DeviceDataset, "_plain", with_a_signal)
        assert here(*more).code == 75
    done = here(*more)
    assert "resuming at iteration 8 of 8" in done.out
    assert_same_bits(left().checkpoint()["model"], whole().checkpoint()["model"])


def test_training_again_whose_record_could_not_be_written_is_not_trained_again(here, left, whole, monkeypatch):
    """Its old record is of an earlier training."""
    here()
    before = left().record_path.read_bytes()

    def full(*_):
        raise UserError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(record, "write", full)
        assert here("machine.again=true").code == 1
    assert left().record_path.read_bytes() == before
    done = here("machine.again=true")
    assert "resuming at iteration 8 of 8" in done.out
    assert left().record_path.read_bytes() != before
    assert_same_bits(left().checkpoint()["model"], whole().checkpoint()["model"])


def test_training_again_that_is_not_possible_deletes_nothing(here, left):
    here()
    before = {path: path.read_bytes() for path in left().folder.iterdir() if path.name != "lock"}
    assert len(before) >= 4
    refused = here("machine.again=true", "machine.device=cuda:77")
    assert refused.code == 1
    assert "cuda:77" in refused.err
    assert {path: path.read_bytes() for path in left().folder.iterdir() if path.name != "lock"} == before


@pytest.mark.parametrize(("more", "iteration"), [(EVERY, 4), ("schedule.iterations=14", 12)])
def test_a_signal_right_after_a_save_does_not_write_the_same_state_twice(here, left, after, more, iteration):
    """Otherwise both kept checkpoints would be the same, with no older one left. The 12th iteration ends an epoch."""
    after(iteration, send("SIGTERM"))
    assert here(more).code == 75
    path = left(more).checkpoint_path
    assert checkpoint_file.read(checkpoint_file.previous(path))["iteration"] < checkpoint_file.read(path)["iteration"]


def test_a_run_that_lacks_only_its_record_is_not_trained_again(here, left, whole, after):
    here()
    left().record_path.unlink()
    after(1, cut)
    assert here().code == 0
    assert_same_run(left(), whole())


def test_a_checkpoint_of_another_configuration_is_refused(here, left, after):
    after(3, send("SIGTERM"))
    here()
    other = left("seed=1")
    other.folder.mkdir(parents=True)
    left().checkpoint_path.rename(other.checkpoint_path)
    refused = here("seed=1")
    assert refused.code == 1
    assert f"{other.checkpoint_path} belongs to another configuration" in refused.err


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


def test_what_auto_chose_is_kept_for_a_resume(here, left, after, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    after(3, send("SIGTERM"))
    here("machine.device=auto")
    assert left().checkpoint()["machine"] == {"device": "cpu", "mode": "eager", "threads": 1}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert here("machine.device=auto", "machine.threads=null").err == ""
    result = left().record()
    assert (result["device"][:5], result["mode"], result["threads"]) == ("cpu: ", "eager", 1)


def test_the_result_of_other_code_is_shown_with_a_warning(here, left, monkeypatch):
    here()
    assert here().err == ""
    monkeypatch.setattr("mbn.records.provenance.code", lambda: "f" * 64)
    monkeypatch.setattr(running, "COMMIT", "d" * 40)
    done = here()
    assert re.fullmatch(
        r"warning: the code has changed since this run was trained \(commit c0ffeec, code [0-9a-f]{7}; now commit "
        r"ddddddd, code fffffff\)\.\n",
        done.err,
    )
    assert "machine.again=true trains it again" in done.out
    record.rewrite(left().record_path, code=None, parts=None)  # an older record
    assert here().err == ""


def test_gamma_and_beta_do_not_decay_with_decay_norm_false(here, left, whole, after):
    decay, rest = "optimizer.weight_decay=0.5", ("optimizer.decay_norm=false", "optimizer.warmup=3")
    after(5, send("SIGTERM"))
    here(decay, *rest)
    here(decay, *rest)
    run = left(decay, *rest)
    assert_same_run(run, whole(decay, *rest))
    groups = run.checkpoint()["optimizer"]["param_groups"]
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(3, 0.5), (2, 0.0)]
    gamma = [one.checkpoint()["model"]["norm.weight"].norm() for one in (run, whole(decay, rest[1]))]
    assert gamma[0] > 1.1 * gamma[1]


def test_the_optimiser_is_plain_sgd_over_all_parameters(whole):
    (group,) = whole().checkpoint()["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)
    assert not any(group[key] for key in ("nesterov", "dampening", "maximize"))
    assert len(group["params"]) == 5
    other = whole("optimizer.momentum=0.5").checkpoint()["optimizer"]["param_groups"]
    assert [group["momentum"] for group in other] == [0.5]
