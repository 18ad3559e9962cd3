"""PreciseBN: the statistics of all training images with the final weights, and the error measured with them."""

import copy
import itertools
import re
import threading

import pytest
import reference
import running
import torch
from layer_kinds import snapshot, unchanged
from running import Tiny, cut, follow, send, without
from test_gap import every_norm, images, trained
from torch import nn

import mbn.training.trained
from mbn.data.datasets import load_data
from mbn.measure.precise_bn import take_precise_statistics
from mbn.network_layers import from_config
from mbn.norm.base import norm_layers
from mbn.norm.renorm import set_renorm
from mbn.records import controls, provenance, record
from mbn.system import cuda_graph
from mbn.system.signals import StoppedError
from mbn.training import checkpoint_file, conditions
from mbn.training.trained import Trained

PRECISE, RULES = "evaluate.precise=true", "evaluate.rules=true"


def precise_error(run):
    return run.record()["controls"]["test_error_precise"]


def remembering(norm):
    """A network and its references with bounds that clip some of r and d and not others; 11 images, one far away."""
    model, references = trained(norm)
    if norm == "brn":
        set_renorm(model, 1.5, 0.5)
    for layer in references:
        layer.r_max, layer.d_max = 1.5, 0.5
    (x,) = images(11)
    x[10] += 100
    return model, references, x


def split(x, size):
    return [(part, torch.zeros(len(part), dtype=torch.int64)) for part in x.split(size)]


# The statistics.


@every_norm
def test_what_is_not_captured_is_done_in_the_thread_of_all_lanes(norm, graphs):
    """Other lanes may be captured meanwhile, which a new convolution in this thread would spoil."""
    model, _, x = remembering(norm)
    threads = []
    model.register_forward_hook(lambda *_: threads.append(threading.current_thread().name))
    with cuda_graph.shared_thread():
        take_precise_statistics(model, split(x, 4))
    assert threads == ["uncaptured_0"] * 3


@every_norm
@pytest.mark.parametrize("size", [1, 4, 10, 11])
def test_each_layer_gets_the_moments_of_what_training_forwards_give_it(norm, size):
    """The batches are taken as they come, each normalised as in training, with what is remembered of those before.
    Every image counts the same, in a smaller last batch too."""
    model, references, x = remembering(norm)
    given = [follow(model, references, part) for part, _ in split(x, size)]
    take_precise_statistics(model, split(x, size))
    for layer, inputs in zip(norm_layers(model), zip(*given, strict=True), strict=True):
        expected = reference.moments(reference.vectors(torch.cat(inputs)))
        torch.testing.assert_close(list(layer.test_statistics()), list(expected), atol=1e-9, rtol=1e-9)


def test_what_cannot_be_captured_is_measured_without_and_said(graphs, monkeypatch, capsys):
    def fails(_):
        raise RuntimeError("not here")

    model, _, x = remembering("mbn")
    captured = take_precise_statistics(copy.deepcopy(model), split(x, 2), True)
    monkeypatch.setattr(cuda_graph, "capture", fails)
    assert take_precise_statistics(model, split(x, 2), True) == captured
    said = "warning: forwards cannot be captured here (RuntimeError: not here): precise statistics are taken without.\n"
    assert capsys.readouterr().err.startswith(said)


@every_norm
def test_a_captured_measurement_has_the_same_bits(norm, graphs):
    """Six whole batches, four of which are replayed, and a smaller last one."""
    statistics = []
    for captured in (False, True):
        torch.manual_seed(0)
        model, _ = trained(norm)
        take_precise_statistics(model, split(*images(27), 4), captured)
        statistics.append([layer.test_statistics() for layer in norm_layers(model)])
    assert len(graphs) == 1
    torch.testing.assert_close(*statistics, rtol=0, atol=0)


@every_norm
@pytest.mark.parametrize("forwards", [1, 2])
def test_nothing_else_changes_and_evaluation_uses_the_new_statistics(norm, forwards):
    model, _, x = remembering(norm)
    for layer in norm_layers(model):
        layer.forwards = forwards
    before = snapshot(model)
    take_precise_statistics(model, split(x, 4))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    names = ("running_mean", "running_std" if norm == "brn" else "running_var")
    assert changed == {f"norm{i}.{name}" for i in (1, 2) for name in names}
    assert not any(module.training for module in model.modules())
    assert all(layer.phase == "first" for layer in norm_layers(model))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert not any(t.requires_grad for t in model.norm1.test_statistics())
    with torch.no_grad():
        z = model.conv1(x)
        y = (model.norm1(z) - model.norm1.bias.view(-1, 1, 1)) / model.norm1.weight.view(-1, 1, 1)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(4).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(y.var((0, 2, 3), correction=0), torch.ones(4).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d])
def test_dropout_is_off_and_draws_nothing(kind):
    statistics = []
    for rate in (0.0, 0.5):
        torch.manual_seed(1)
        model, _, x = remembering("bn")
        model.dropout = kind(rate)
        generator = torch.get_rng_state()
        take_precise_statistics(model, split(x, 4))
        assert torch.equal(torch.get_rng_state(), generator)
        statistics.append(model.norm2.test_statistics())
    torch.testing.assert_close(*statistics, atol=1e-9, rtol=1e-9)


# In a run.


@pytest.fixture
def seen(monkeypatch):
    """For each call of `take_precise_statistics`: the model, its state then, its settings and its batch sizes."""
    calls = []

    def spy(model, batches, captured):
        sizes = []
        noted = ((sizes.append(len(batch[1])), batch)[1] for batch in batches)
        gap = take_precise_statistics(model, noted, captured)
        (layer,) = norm_layers(model)
        settings = {name: getattr(layer, name, None) for name in ("lam", "r_max", "d_max")}
        calls.append({"model": model, "state": snapshot(model), "sizes": sizes, "settings": settings})
        return gap

    monkeypatch.setattr("mbn.training.trained.take_precise_statistics", spy)
    return calls


@pytest.mark.parametrize("norm", ["norm=bn", "norm=brn", "norm=mbn"])
def test_the_precise_error_is_the_same_if_asked_for_later_and_nothing_else_changes(norm, here, left, whole, seen):
    early = whole(norm, PRECISE).record()
    seen.clear()
    assert "with precise statistics" not in here(norm).out
    run = left(norm)
    before, files = run.record(), {p: p.read_bytes() for p in run.folder.iterdir()}
    assert before["controls"] is None
    assert before["test_error"] == early["test_error"]
    done = here(norm, PRECISE)
    after = run.record()  # which checks the new checksum
    assert done.out.startswith(f"{after['name']}: measuring what evaluate.precise asks for.\n")
    assert f"with precise statistics {precise_error(run):.2f} %" in done.out
    assert done.err == ""
    assert {key for key in after if after[key] != before[key]} == {"controls", "checksum"}
    for key in controls.FIELDS:
        assert after["controls"][key] == early["controls"][key]
    assert after["controls"]["train_error"] is after["controls"]["rules"] is after["test_error_precise"] is None
    assert {p: p.read_bytes() for p in run.folder.iterdir()} == files
    # The third time there is nothing left to do.
    assert "measuring" not in here(norm, PRECISE).out
    assert len(seen) == 1
    # The memory and the averages were put back.
    saved = run.checkpoint()["model"]
    assert unchanged(saved, seen[0]["model"])
    assert not torch.equal(seen[0]["state"]["norm.running_mean"], saved["norm.running_mean"])


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ("norm=brn", {"lam": None, "r_max": 3.0, "d_max": 5.0}),
        ("norm=mbn", {"lam": 0.9, "r_max": None, "d_max": None}),
    ],
)
def test_a_later_measurement_normalises_as_at_the_end_of_training(norm, expected, here, seen):
    """lambda, r_max and d_max are not in a checkpoint, but the statistics depend on them."""
    here(norm, PRECISE, "seed=1")
    here(norm)
    here(norm, PRECISE)
    assert [call["settings"] for call in seen] == [expected] * 2
    assert [call["sizes"] for call in seen] == [[256] * 5 + [157]] * 2  # the run's own batch size, all its images


def test_a_resumed_run_that_lacks_only_its_record_can_measure_the_precise_error(here, left, whole, after):
    """Killed between its last checkpoint and its record: the same command writes it, with the same errors."""
    expected = whole(PRECISE).record()
    here()
    left().record_path.unlink()
    after(1, cut)
    assert here(PRECISE).code == 0
    assert left().record()["test_error"] == expected["test_error"]
    assert without(left().record()["controls"], ["by"]) == without(expected["controls"], ["by"])


@pytest.mark.parametrize("finished_before", [False, True])
@pytest.mark.parametrize(("asked", "first"), [(PRECISE, "take_precise_statistics"), (RULES, "rules")])
def test_a_signal_stops_a_measurement_and_the_same_command_goes_on(
    asked, first, finished_before, here, left, whole, monkeypatch
):
    """At batch 8 the measurement takes as long as an epoch, so the budget's end or Ctrl-C must stop it."""
    if finished_before:
        here()
    function = getattr(mbn.training.trained, first)

    def signalled(*args):
        send("SIGTERM")()
        return function(*args)

    with monkeypatch.context() as patch:
        patch.setattr(f"mbn.training.trained.{first}", signalled)
        patch.setattr("mbn.system.signals.FINISH_WITHIN", -1.0)
        stopped = here(asked)
    assert stopped.code == 75
    assert "stopped at iteration 8" in stopped.err
    assert left().record_path.exists() == finished_before
    if finished_before:
        assert left().record()["controls"] is None
    here(asked)
    assert without(left().record()["controls"], ["by"]) == without(whole(asked).record()["controls"], ["by"])


@pytest.mark.parametrize("changed", [None, "code", "data"])
def test_a_run_stopped_in_its_measurements_keeps_those_that_are_done(changed, here, left, whole, monkeypatch):
    """Else it would never end by budgets that are shorter than all measurements together."""
    expected = whole(PRECISE, RULES).record()
    steps = []

    def stopped(_):
        send("SIGTERM")()
        raise StoppedError

    def noted(name):
        function = getattr(Trained, name)
        monkeypatch.setattr(Trained, name, lambda trained: (steps.append(name), function(trained))[1])

    noted("_precise")
    noted("_train_error")
    with monkeypatch.context() as patch:
        patch.setattr(Trained, "_train_error", stopped)
        assert here(PRECISE, RULES).code == 75
    assert not left().record_path.exists()
    if changed:
        now = conditions.conditions
        monkeypatch.setattr("mbn.training.run.conditions", lambda *given: now(*given) | {changed: "f" * 64})
    assert here(PRECISE, RULES).code == 0
    again = ["_precise"] if changed else []
    assert steps == ["_precise", *again, "_train_error"]
    assert without(left().record()["controls"], ["by"]) == without(expected["controls"], ["by"])


@pytest.mark.parametrize("older", [False, True])
def test_other_code_than_trained_measures_and_the_record_says_which(older, here, left, monkeypatch):
    here()
    if older:
        record.rewrite(left().record_path, code=None, parts=None)
    before = left().record()
    versions = {**provenance.versions(), "torch": "1.0"}
    monkeypatch.setattr("mbn.records.provenance.code", lambda: "f" * 64)
    monkeypatch.setattr("mbn.records.provenance.versions", lambda: versions)
    monkeypatch.setattr(running, "COMMIT", "e" * 40)
    monkeypatch.setattr(running, "DIRTY", True)
    done = here(PRECISE)
    assert done.code == 0
    assert "conditions change" not in done.err  # nothing is trained
    assert "resuming" not in done.out
    after = left().record()
    assert {key for key in after if after[key] != before[key]} == {"controls", "checksum"}
    by = without(after["controls"]["by"], ["date", "device"])
    assert by == {"threads": 1, "code": "f" * 64, "commit": "e" * 40, "dirty": True, "versions": versions}


def test_weights_with_another_test_error_than_the_record_are_not_measured(here, left):
    here()
    before, state = left().record_path.read_bytes(), left().checkpoint()
    state["model"]["fc.weight"].neg_()
    checkpoint_file.save(state, left().checkpoint_path)
    refused = here(PRECISE)
    assert refused.code == 1
    assert re.search(r"^error: .*checkpoint\.pt has a test error of .* here, and its record says", refused.err, re.M)
    assert left().record_path.read_bytes() == before


def test_a_record_from_elsewhere_gets_no_number_of_this_checkpoint(here, left, whole):
    here()
    left().record_path.write_bytes(whole().record_path.read_bytes())
    refused = here(PRECISE)
    assert refused.code == 1
    assert f"{left().record_path} was not made from {left().checkpoint_path} (another journal)" in refused.err
    assert left().record_path.read_bytes() == whole().record_path.read_bytes()


def test_the_precise_error_is_that_of_the_pooled_statistics(whole):
    """By hand: a model with the moments of the first epoch's batches, augmented as in training."""
    run = whole("norm=bn", PRECISE)
    data = load_data(run.config, torch.device("cpu"))
    model = Tiny(from_config(run.config), 10)
    saved = run.checkpoint()["model"]
    model.load_state_dict(saved)
    with torch.no_grad():
        h = torch.cat([model.conv(x) for x, _ in itertools.islice(data.train_batches(0, 256), 6)])
        assert len(h) == 1437
        model.norm.running_mean.copy_(h.mean((0, 2, 3)))
        model.norm.running_var.copy_(h.var((0, 2, 3), correction=0))
        mean, std = (saved["norm.running_mean"] - h.mean((0, 2, 3))).abs(), (saved["norm.running_var"] + 1e-5).sqrt()
        sigma = (h.var((0, 2, 3), correction=0) + 1e-5).sqrt()
        gap = {"mean": (mean / sigma).mean().item(), "std": (std / sigma).log().abs().mean().item()}
        ((x, y),) = data.test_batches(1000)
        wrong = (model.eval()(x).argmax(1) != y).double().mean().item()
    assert len(y) == 360
    assert precise_error(run) == pytest.approx(100 * wrong, abs=100.01 / 360)
    assert run.record()["controls"]["population_gap"] == pytest.approx(gap, rel=1e-4)


def without_checkpoints(folder):
    for checkpoint in folder.glob("checkpoint*.pt"):
        checkpoint.unlink()


def with_the_one_before(folder):
    (folder / "checkpoint.previous.pt").replace(folder / "checkpoint.pt")


@pytest.mark.parametrize(
    ("damage", "says"),
    [(without_checkpoints, "is gone, from which"), (with_the_one_before, "does not hold the end of the run")],
)
def test_without_the_final_checkpoint_it_is_one_sentence_and_nothing_is_lost(damage, says, here, left):
    """Checkpoints are large, and some people delete them; the journal beside them is what curves are made of."""
    here()
    before, rows = left().record(), left().rows()
    damage(left().folder)
    refused = here(PRECISE)
    assert refused.code == 1
    assert refused.err.startswith(f"error: {left().checkpoint_path} {says}")
    assert refused.err.endswith("machine.again=true trains it again.\n")
    assert left().record() == before
    assert left().rows() == rows


def test_without_statistics_it_is_null_with_a_warning(here, left):
    for _ in ("at the end of training", "asked for again"):
        done = here("norm=gn", PRECISE)
        assert left("norm=gn").record()["controls"] is None
        assert done.err.count("warning: norm=gn has no statistics to measure") == done.err.count("warning") == 1
