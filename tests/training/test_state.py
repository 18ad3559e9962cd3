"""A run that was stopped goes on: with the same bits, and on the machine and in the mode in which it began."""

import dataclasses
import re

import pytest
import running
import torch
from running import PowerCutError, assert_same_bits, assert_same_run, cut, send, with_new_fields

from mbn import config
from mbn.training import checkpoint_file, run
from mbn.training.state import devices_so_far

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


def test_a_change_of_machine_or_code_is_in_the_record(here, left, after, monkeypatch):
    """Neither commit alone would give this result, so it counts as dirty."""
    after(3, send("SIGTERM"))
    here()
    monkeypatch.setattr("mbn.records.provenance.device_name", lambda device: "another CPU")
    monkeypatch.setattr(running, "COMMIT", "d" * 40)
    assert "warning: the run began with 1 threads" in here("machine.threads=2").err
    result = left().record()
    assert re.fullmatch("cpu: .*, then another CPU", result["device"])
    assert (result["threads"], result["commit"], result["dirty"]) == (2, "d" * 40, True)


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


def test_the_optimiser_is_plain_sgd_over_all_parameters(whole):
    (group,) = whole().checkpoint()["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)
    assert not any(group[key] for key in ("nesterov", "dampening", "maximize"))
    assert len(group["params"]) == 5
