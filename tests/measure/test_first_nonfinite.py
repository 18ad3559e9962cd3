"""A number that is not finite stops a run and is named; and a run whose last batch is a single image."""

import pytest
import torch
from running import TINY, Run, run_here

from mbn.measure.first_nonfinite import Watch
from mbn.training.iteration import Update

# 90 iterations an epoch; a row every 9.
AT = 120
MORE = ("batch_size=16", "schedule.iterations=200", "norm.memory=5")

# Where a NaN is put, by the name that the error gives.
FAULTS = {
    "the images": "",
    # The second forward of this iteration pools it; the next one is normalised by it.
    "norm.running_mean": "norm.memory_mean",
    **{name: name for name in ("conv.weight", "norm.weight", "norm.bias", "fc.weight", "fc.bias")},
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_nan_is_named_by_where_it_was_first_and_stops_the_run(capsys, monkeypatch, tmp_path, name):
    place, calls = FAULTS[name], []

    class Spoiled(Watch):
        """The NaN appears just before the check, as it would from failing memory."""

        def __init__(self, model, rows):
            super().__init__(model, rows)
            self.state = model.state_dict()

        def __call__(self, images):
            calls.append(1)
            if len(calls) == AT + 1:
                tensor = {"": images, **self.state}[place]
                tensor[(1,) * tensor.dim()] = float("nan")
            super().__call__(images)

    monkeypatch.setattr("mbn.training.iteration.Watch", Spoiled)
    stopped = run_here(capsys, monkeypatch, *TINY, *MORE, f"machine.results={tmp_path}")
    run = Run(tmp_path, [*TINY, *MORE])
    assert stopped.code == 1
    at = AT + (place == "norm.memory_mean")
    assert f"at iteration {at} with the norm of {name} not finite before it" in stopped.err
    assert AT < len(calls) <= AT + 51
    state = run.checkpoint()
    assert state["iteration"] == 90
    assert all(value.isfinite().all() for value in state["model"].values())
    assert run.record()["diverged_at"] == at


def test_an_infinite_loss_without_anything_to_blame_is_reported(capsys, monkeypatch, tmp_path):
    original = Update._first
    calls = []

    def first(self, images, labels):
        calls.append(1)
        loss, measured = original(self, images, labels)
        return loss, measured * torch.tensor([float("inf"), 1]) if len(calls) == AT else measured

    monkeypatch.setattr(Update, "_first", first)
    stopped = run_here(capsys, monkeypatch, *TINY, *MORE, f"machine.results={tmp_path}")
    assert stopped.code == 1
    assert f"the loss was inf at iteration {AT - 1} (epoch 2" in stopped.err
    assert len(calls) <= AT + 50
    assert "holds the last good state" in stopped.err


def test_one_image_in_the_last_batch_trains_on(capsys, monkeypatch, tmp_path):
    """1437 = 1436 + 1; the tiny network's layer has 64 values a channel then."""
    more = ("batch_size=1436", "schedule.iterations=6")
    done = run_here(capsys, monkeypatch, *TINY, *more, f"machine.results={tmp_path}")
    assert done.code == 0
    run = Run(tmp_path, [*TINY, *more])
    assert all(value.isfinite().all() for value in run.checkpoint()["model"].values())
    assert run.checkpoint()["model"]["norm.memory_count"][:2].tolist() == [64, 1436 * 64]
