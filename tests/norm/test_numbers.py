"""Numbers at the edge: faults that stop a run and are named, and layers that stay finite and right."""

import contextlib
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kinds import follow, make
from running import TINY, Run, run_here

from mbn.measure.first_nonfinite import Watch
from mbn.norm.base import norm_layers
from mbn.training.iteration import Update

# Faults in a run. 90 iterations an epoch; a row every 9.

AT = 120
MORE = ("batch_size=16", "schedule.iterations=200", "norm.memory=5")


def spoil_parameter(name):
    def spoil(update, images):
        p = dict(update.model.named_parameters())[name].data
        p[(0,) * p.dim()] = float("nan")
        return images

    return spoil


def spoil_memory(update, images):
    norm_layers(update.model)[0].memory_mean[1, 2] = float("nan")
    return images


def spoil_image(update, images):
    images = images.clone()
    images[3, 1, 5, 7] = float("nan")
    return images


PARAMETERS = ("conv.weight", "norm.weight", "norm.bias", "fc.weight", "fc.bias")
FAULTS = {
    "the images": (spoil_image, 0),
    # The second forward of this iteration pools it; the next one is normalised by it.
    "norm.running_mean": (spoil_memory, 1),
    **{name: (spoil_parameter(name), 0) for name in PARAMETERS},
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_nan_is_named_by_where_it_was_first_and_stops_the_run(capsys, monkeypatch, tmp_path, name):
    spoil, later = FAULTS[name]
    calls = []
    original = Update.__call__
    watch = Watch.__call__

    def call(self, images, labels):
        calls.append(1)
        original(self, images, labels)

    def look(self, images):
        """Spoiled just before it is looked at, as memory that fails would be."""
        if len(calls) == AT + 1:
            images.copy_(spoil(updates[0], images))
        watch(self, images)

    updates = []
    initialise = Update.__init__

    def remembered(self, *args):
        initialise(self, *args)
        updates.append(self)

    monkeypatch.setattr(Update, "__init__", remembered)
    monkeypatch.setattr(Update, "__call__", call)
    monkeypatch.setattr(Watch, "__call__", look)
    stopped = run_here(capsys, monkeypatch, *TINY, *MORE, f"machine.results={tmp_path}")
    run = Run(tmp_path, [*TINY, *MORE])
    assert stopped.code == 1
    assert f"at iteration {AT + later} with the norm of {name} not finite before it" in stopped.err
    assert AT < len(calls) <= AT + 51
    state = run.checkpoint()
    assert state["iteration"] == 90
    assert all(value.isfinite().all() for value in state["model"].values())
    assert not run.record_path.exists()


def test_an_infinite_loss_without_anything_to_blame_is_told_as_such(capsys, monkeypatch, tmp_path):
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


# Layers against the reference.


@st.composite
def cases(draw):
    """A layer's kind and settings, and the batches that it sees."""
    norm = draw(st.sampled_from(["mbn", "mbn", "brn", "bn"]))
    dims = draw(st.integers(2, 5))
    channels = draw(st.integers(1, 3))
    spatial = draw(st.lists(st.integers(1, 3), min_size=dims - 2, max_size=dims - 2))
    least = 2 if norm == "bn" else 1  # torch's batch norm refuses a single value
    sizes = draw(st.lists(st.integers(least, 4), min_size=1, max_size=4))
    options = {"forwards": draw(st.integers(1, 2))}
    if norm == "mbn":
        options["lam"] = draw(st.floats(0, 1))
        options["decay"] = draw(st.floats(0.1, 1))
        options["memory"] = draw(st.integers(1, 4))
        options["gradient"] = draw(st.sampled_from(["paper", "batch"]))
    else:
        options["momentum"] = draw(st.floats(0.01, 1))
    if norm == "brn":
        options["r_max"], options["d_max"] = draw(st.floats(1, 4)), draw(st.floats(0, 5))
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    scale, offset = draw(st.floats(0.1, 10)), draw(st.floats(-3, 3))
    layout = draw(st.sampled_from(["contiguous", "channels last", "sliced", "transposed"]))
    native, seed = draw(st.booleans()), draw(st.integers(0, 1 << 20))
    return norm, dims, channels, spatial, sizes, options, dtype, scale, offset, layout, native, seed


def laid_out(x, layout):
    """The same values with other strides."""
    if layout == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        wide = x.new_full((2 * x.shape[0], *x.shape[1:]), float("nan"))
        wide[::2] = x
        return wide[::2]
    return x.transpose(0, 1).contiguous().transpose(0, 1) if layout == "transposed" else x


def holds(case):
    """Every layer equals its reference, whatever its settings and inputs."""
    norm, dims, channels, spatial, sizes, options, dtype, scale, offset, layout, native, seed = case
    torch.manual_seed(seed)
    layer = make(norm, channels, dims, torch.promote_types(dtype, torch.float32), **options)
    drawn = [scale * (torch.randn(n, channels, *spatial) + offset) for n in sizes]
    formula = mock.patch("mbn.norm.functional.has_native_kernels", return_value=False)
    with contextlib.nullcontext() if native else formula:
        follow(layer, [laid_out(x.to(dtype), layout) for x in drawn])


RULES = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=60, **RULES)
@given(cases())
def test_any_layer_equals_its_reference(case):
    holds(case)


@pytest.mark.long("8", "Layers of MBN, BRN and BN drawn by Hypothesis that equal their reference")
def test_many_layers(count, figure):
    total = count(5000)
    seen = []

    @settings(max_examples=total, **RULES)
    @given(cases())
    def check(case):
        holds(case)
        seen.append(1)

    try:
        check()
        wrong = ""
    except Exception as error:
        wrong = str(error)[:300]
    figure(min(len(seen), total) if not wrong else len(seen) - 1, total, wrong)
