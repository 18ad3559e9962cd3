"""What a run reports: the rows of its journal, its record, TensorBoard's points."""

import itertools
import types

import pytest
import torch
import torch.nn.functional as F
from running import Tiny

from mbn.data.datasets import load_data
from mbn.network_layers import from_config
from mbn.training import checkpoint_file, report, trained
from mbn.training.iteration import Update


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


@pytest.mark.parametrize("norm", ["mbn", "bn"])
def test_the_result_is_that_of_the_final_weights_on_the_test_images(whole, norm):
    run = whole(f"norm={norm}")
    model = Tiny(from_config(run.config), 10)
    model.load_state_dict(run.checkpoint()["model"])
    ((images, labels),) = load_data(run.config, torch.device("cpu")).test_batches(1000)
    with torch.no_grad():
        logits = model.eval()(images)
    result = run.record()
    assert result["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    right = logits.argsort(1, descending=True) == labels[:, None]
    assert result["test_error"] == pytest.approx(100 * (~right[:, 0]).double().mean().item())
    assert result["test_error_top5"] == pytest.approx(100 * (~right[:, :5].any(1)).double().mean().item())


def test_the_record_agrees_with_the_rows(whole):
    result, rows = whole().record(), whole().rows()
    epochs = [row for row in rows if row["kind"] == "epoch"]
    for key in ("test_error", "test_error_top5", "test_loss"):
        assert result[key] == epochs[-1][key]
    # An epoch's images before the end there is the end of iteration 2, and rows end with each iteration.
    for key in ("train_error", "train_loss"):
        before = rows[0][key] * 256 + rows[1][key] * 256
        whole_run = epochs[0][key] * 1437 + epochs[1][key] * 512
        assert result[key] == pytest.approx((whole_run - before) / 1437, rel=1e-6)
    assert result["test_error_best"] == min(row["test_error"] for row in epochs)
    assert (result["iterations"], result["images"]) == (8, 1437 + 512)
    assert result["parameters"] == 3 * 6 * 16 + 12 + 24 * 10 + 10
    curves = dict(result["curves"])
    within = curves.pop("training")
    assert curves.pop("stage_dead_relus") == {"act": [row["stage_dead_relus"]["act"] for row in epochs]}
    assert set(curves) == {
        *("images", "train_error", "train_loss", "test_error", "test_loss", "gap_mean", "gap_std", "weight_norm"),
        *("dead_channels", "dead_layers", "dead_relus"),
    }
    for key, values in curves.items():
        assert values == pytest.approx([row[key] for row in epochs], rel=1e-4)
    assert within["images"] == [row["images"] for row in rows]
    assert len(rows) > len(epochs)
    assert result["test_error_precise"] is None
    assert str(whole().results) not in whole().record_path.read_text()


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
    assert sum(value for step, value in left().points()["statistics/dead_channels"]) == 2 * channels


def test_channels_behind_relus_that_let_nothing_through_are_counted(here, left, monkeypatch):
    original = Tiny.forward

    def forward(self, x):
        self.norm.bias.data[:2] = -99.0
        return original(self, x)

    monkeypatch.setattr(Tiny, "forward", forward)
    here()
    curves, last, points = left().record()["curves"], left().rows()[-1], left().points()
    assert (curves["dead_relus"], curves["stage_dead_relus"]) == ([2, 2], {"act": [2, 2]})
    assert (last["dead_relus"], last["stage_dead_relus"]) == (2, {"act": 2})
    assert (last["dead_channels"], last["dead_layers"]) == (0, 0)
    for tag in ("statistics/dead_relus", "within_stages/dead_relus/act"):
        assert [value for _, value in points[tag]] == [2, 2]


def test_a_channel_behind_a_relu_is_dead_if_it_is_in_every_process():
    here, there = {"a": [True, False], "b": [True]}, {"a": [True, True], "b": [False]}
    alive_there = torch.tensor([not dead for one in there.values() for dead in one])
    processes = types.SimpleNamespace(total=lambda alive: alive.add_(alive_there))
    own = {name: (torch.tensor(dead),) for name, dead in here.items()}
    found = report._dead_everywhere(types.SimpleNamespace(processes=processes), own)
    assert {name: dead.tolist() for name, (dead,) in found.items()} == {"a": [True, False], "b": [False]}


@pytest.fixture
def takes(monkeypatch):
    """A function that lets the calls of another one take these seconds of the run's clock, which otherwise stands."""
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)

    def takes(owner, name, seconds):
        original = getattr(owner, name)

        def call(*args):
            clock.now += next(seconds)
            return original(*args)

        monkeypatch.setattr(owner, name, call)

    monkeypatch.setattr("mbn.training.state.time", clock)
    return takes


def test_the_speed_of_training_leaves_out_evaluation_and_saving(here, left, takes):
    takes(Update, "__call__", itertools.repeat(1.0))
    takes(checkpoint_file, "save", itertools.repeat(10.0))
    takes(trained, "evaluate", itertools.repeat(100.0))
    here("machine.checkpoint_seconds=1e-9")  # 8 checkpoints and 2 evaluations
    result = left().record()
    assert left().checkpoint()["training_seconds"] == 8
    assert (result["seconds"], result["images_per_second"]) == (8 + 80 + 200, round(1949 / 8, 1))
    assert [row["images_per_second"] for row in left().rows()] == [256.0] * 5 + [157.0] + [256.0] * 2


def test_the_speed_in_a_row_is_that_since_the_row_before(here, left, takes):
    takes(Update, "__call__", itertools.chain(itertools.repeat(2.0, 6), itertools.repeat(1.0)))
    here()
    assert [row["images_per_second"] for row in left().rows()] == [128.0] * 5 + [78.5] + [256.0] * 2


def test_the_size_of_evaluations_batches_changes_no_result(here, left, whole):
    here("evaluate.batch_size=7")
    ours, theirs = left().record(), whole().record()
    for key in ("name", "test_error", "test_error_best", "test_error_top5", "train_loss"):
        assert ours[key] == theirs[key]
    assert ours["test_loss"] == pytest.approx(theirs["test_loss"], rel=1e-5)


def test_a_run_leaves_these_files_and_no_others(whole):
    run = whole()
    files = {p.relative_to(run.results).as_posix() for p in run.results.rglob("*") if p.is_file()}
    events = next(run.folder.glob("events.*")).name
    names = ("checkpoint.pt", "checkpoint.previous.pt", "config.yaml", events, "lock", "metrics.jsonl")
    assert files == {f"other_records/{run.name}.json", *(f"runs/{run.name}/{name}" for name in names)}
