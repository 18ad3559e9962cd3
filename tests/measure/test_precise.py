"""PreciseBN: the statistics of all training images with the final weights, and the error measured with them."""

import itertools
import os
import shutil
import signal

import pytest
import torch
from torch import nn

import train
from mbn import config
from mbn.layers import bn, brn, mbn
from mbn.measure.precise_bn import set_precise_statistics
from mbn.norm.base import norm_layers
from mbn.norm.memorized import set_lambda
from mbn.norm.renorm import set_renorm
from mbn.records import record
from mbn.system.signals import Told
from mbn.training.run import Run

EPS = 1e-5
LAYERS = {"bn": bn(2), "brn": brn(2), "mbn-paper": mbn(2, 0.5), "mbn-batch": mbn(2, 0.5, gradient="batch")}
every_norm = pytest.mark.parametrize("norm", LAYERS)


def pooled(tensors):
    """Mean and biased variance of each channel over all values of all tensors (N, C, H, W)."""
    values = torch.cat([t.movedim(1, 0).flatten(1) for t in tensors], dim=1)
    mu = values.sum(1) / values.shape[1]
    return mu, (values - mu[:, None]).square().sum(1) / values.shape[1]


def image_batches(n=11, size=4, channels=3):
    """n images, no two of a kind, in batches of size, the last one smaller."""
    images = torch.randn(n, channels, 5, 5, dtype=torch.float64) * torch.linspace(0.5, 3, n).view(-1, 1, 1, 1)
    images += torch.linspace(-2, 2, n).view(-1, 1, 1, 1)
    return split(images, size)


def split(images, size):
    return [(part, torch.zeros(len(part), dtype=torch.int64)) for part in images.split(size)]


def remembering(model, *sizes):
    """The model in double precision, after training forwards that filled its memories or moved its averages."""
    model = model.double().train()
    for layer in norm_layers(model):
        layer.phase = "second"
    with torch.no_grad():
        for size in sizes:
            model(torch.randn(size, 3, 5, 5, dtype=torch.float64) * 2 + 1)
    for layer in norm_layers(model):
        layer.phase = "first"
    set_renorm(model, 1.5, 0.5)  # so that some of r and d are clipped and some are not
    return model


class TwoLayers(nn.Module):
    def __init__(self, layers, dropout=0.0):
        super().__init__()
        self.conv1, self.norm1, self.act = layers.conv(3, 4, 3, bias=False), layers.norm(4), layers.act()
        self.dropout = nn.Dropout(dropout)
        self.conv2, self.norm2 = layers.conv(4, 5, 2, bias=False), layers.norm(5)

    def forward(self, x):
        x = self.dropout(self.act(self.norm1(self.conv1(x))))
        return self.norm2(self.conv2(x))


def as_training_does(norm, layer, x):
    """What a training forward makes of x, its statistics frozen: from the equations."""
    mu_B, s2_B = pooled([x])
    n = x.numel() // x.shape[1]
    shape = (1, -1, 1, 1)
    if norm == "bn":
        mu, sigma = mu_B, (s2_B + EPS).sqrt()
    elif norm == "brn":
        sigma_B = (s2_B + EPS).sqrt()
        r = (sigma_B / layer.running_std).clamp(1 / 1.5, 1.5)
        d = ((mu_B - layer.running_mean) / layer.running_std).clamp(-0.5, 0.5)
        mu, sigma = mu_B - d * sigma_B / r, sigma_B / r
    else:
        entries = [(1.0, mu_B, s2_B, n)] + [
            (0.5 * 0.9**age, layer.memory_mean[age], layer.memory_var[age], layer.memory_count[age])
            for age in range(int(layer.memory_count.count_nonzero()))
        ]
        total = sum(alpha * n for alpha, _, _, n in entries)
        mu = sum(alpha * n * m for alpha, m, _, n in entries) / total
        s2 = sum(alpha * n * ((m - mu) ** 2 + v) for alpha, m, v, n in entries) / total
        sigma = (s2 + EPS).sqrt()
    y = (x - mu.view(shape)) / sigma.view(shape)
    return layer.weight.view(shape) * y + layer.bias.view(shape)


def close(got, expected):
    torch.testing.assert_close(list(got), list(expected), atol=1e-10, rtol=1e-10)


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# The statistics.


@every_norm
def test_one_layer_gets_the_moments_of_all_images_however_they_are_split(norm):
    batches = image_batches()
    images = torch.cat([x for x, _ in batches])
    for size in (1, 3, 4, 11):
        model = remembering(nn.Sequential(LAYERS[norm].norm(3)), 6, 4)
        set_precise_statistics(model, split(images, size))
        close(model[0].test_statistics(), pooled([images]))


@every_norm
def test_a_second_layer_gets_the_moments_of_what_training_forwards_give_it(norm):
    """Of the batches as they come, each normalised by itself and what was remembered in training, which stays so."""
    model = remembering(TwoLayers(LAYERS[norm]), 6, 4)
    with torch.no_grad():
        for layer in norm_layers(model):
            layer.weight.uniform_(0.5, 2)
            layer.bias.normal_()
    batches = image_batches()
    with torch.no_grad():
        first = [model.conv1(x) for x, _ in batches]
        second = [model.conv2(as_training_does(norm, model.norm1, x).relu()) for x in first]
    set_precise_statistics(model, batches)
    close(model.norm1.test_statistics(), pooled(first))
    close(model.norm2.test_statistics(), pooled(second))


def test_the_batch_size_matters_to_the_second_layer_and_not_to_the_first():
    images = torch.cat([x for x, _ in image_batches()])
    statistics = []
    for size in (2, 11):
        torch.manual_seed(1)
        model = remembering(TwoLayers(bn(1)), 4)
        set_precise_statistics(model, split(images, size))
        statistics.append([layer.test_statistics() for layer in norm_layers(model)])
    close(statistics[0][0], statistics[1][0])
    assert (statistics[0][1][1] - statistics[1][1][1]).abs().max() > 1e-3


@every_norm
def test_played_back_from_a_recording_it_has_the_same_bits(norm, recording):
    """Six whole batches, four of which are played, and a smaller last one."""
    batches = image_batches(n=27)
    statistics = []
    for recorded in (False, True):
        torch.manual_seed(0)
        model = remembering(TwoLayers(LAYERS[norm]), 6, 4)
        set_precise_statistics(model, batches, recorded)
        statistics.append([layer.test_statistics() for layer in norm_layers(model)])
    assert len(recording) == 1
    torch.testing.assert_close(*statistics, rtol=0, atol=0)


@every_norm
def test_every_image_counts_the_same_in_a_smaller_last_batch_too(norm):
    """The eleventh image comes alone and is far from the others: a batch is not what is averaged."""
    images = torch.cat([x for x, _ in image_batches()])
    images[10] += 100
    model = remembering(nn.Sequential(LAYERS[norm].norm(3)), 6)
    set_precise_statistics(model, split(images, 10))
    mean, variance = model[0].test_statistics()
    close((mean, variance), pooled([images]))
    assert 5 < mean.max() < 15


@every_norm
@pytest.mark.parametrize("forwards", [1, 2])
def test_memory_and_counters_stay_as_they_were_and_evaluation_uses_the_new_statistics(norm, forwards):
    model = remembering(TwoLayers(LAYERS[norm]), 6, 4)
    for layer in norm_layers(model):
        layer.forwards = forwards  # with 1 every training forward would remember, were it not held
    before = snapshot(model)
    batches = image_batches()
    set_precise_statistics(model, batches)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    kinds = {"bn": ("running_mean", "running_var"), "brn": ("running_mean", "running_std")}
    names = kinds.get(norm, ("running_mean", "running_var"))
    assert changed == {f"norm{i}.{name}" for i in (1, 2) for name in names}
    assert not any(module.training for module in model.modules())
    assert all(layer.phase == "first" for layer in norm_layers(model))
    assert not any(module._forward_pre_hooks for module in model.modules())
    x = batches[0][0]
    with torch.no_grad():
        mu, s2 = pooled([model.conv1(x) for x, _ in batches])
        z = model.conv1(x)
        expected = (z - mu.view(1, -1, 1, 1)) / (s2.view(1, -1, 1, 1) + EPS).sqrt()
        torch.testing.assert_close(model.norm1(z), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d])
def test_dropout_is_off_and_draws_nothing(kind):
    statistics = []
    for rate in (0.0, 0.5):
        torch.manual_seed(1)
        model = remembering(TwoLayers(bn(1)), 4)
        model.dropout = kind(rate)
        generator = torch.get_rng_state()
        set_precise_statistics(model, image_batches_of_ones_kind())
        assert torch.equal(torch.get_rng_state(), generator)
        statistics.append(model.norm2.test_statistics())
    close(*statistics)


def image_batches_of_ones_kind():
    values = torch.arange(8 * 3 * 25, dtype=torch.float64).view(8, 3, 5, 5)
    return split((values * 0.37).sin(), 4)


def test_no_gradients_are_left_behind():
    model = remembering(TwoLayers(bn(1)), 4)
    set_precise_statistics(model, image_batches())
    assert all(p.grad is None for p in model.parameters())
    assert not any(t.requires_grad for t in model.norm1.test_statistics())


# In a run.


class Small(nn.Module):
    """Two normalised convolutions with dropout between, at a size that trains in a moment."""

    def __init__(self, layers):
        super().__init__()
        self.conv1, self.norm1, self.act1 = layers.conv(3, 6, 3, stride=2, bias=False), layers.norm(6), layers.act()
        self.dropout = nn.Dropout(0.2)
        self.conv2, self.norm2, self.act2 = layers.conv(6, 8, 3, stride=2, bias=False), layers.norm(8), layers.act()
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = self.dropout(self.act1(self.norm1(self.conv1(x))))
        return self.fc(self.act2(self.norm2(self.conv2(x))).mean((2, 3)))


def command(results, norm, *overrides):
    """Long enough that lambda, r_max and d_max are other ones at the end than at the start."""
    return [
        *("dataset=digits", f"norm={norm}", "batch_size=40", "schedule.iterations=30", "schedule.lr=[0.3]"),
        *("machine.threads=1", "machine.device=cpu", f"machine.results={results}", *overrides),
    ]


@pytest.fixture(autouse=True)
def _small_networks(monkeypatch):
    monkeypatch.setattr("models.build", lambda layers, **_: Small(layers))


def main(capsys, *arguments):
    """train.py's exit code, standard output and standard error."""
    code = train.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def read_record(results):
    (path,) = (results / "records").rglob("*.json")
    return record.read(path)


def finished(tmp_path, capsys, norm, *overrides):
    code, out, err = main(capsys, *command(tmp_path, norm, *overrides))
    assert code == 0, err
    return out, err, read_record(tmp_path)


@pytest.mark.parametrize("norm", ["bn", "brn", "mbn"])
def test_asked_for_at_the_start_or_later_it_is_the_same_error_and_nothing_else_changes(norm, tmp_path, capsys):
    out, _, early = finished(tmp_path / "early", capsys, norm, "evaluate.precise=true")
    assert early["test_error_precise"] is not None
    assert f"with precise statistics {early['test_error_precise']:.2f} %" in out

    out, _, before = finished(tmp_path / "late", capsys, norm)
    assert before["test_error_precise"] is None
    assert "precise" not in out
    assert before["test_error"] == early["test_error"]
    checkpoint = next((tmp_path / "late" / "runs").rglob("checkpoint.pt"))
    bytes_before = checkpoint.read_bytes()
    journal = checkpoint.with_name("metrics.jsonl").read_text()
    out, err, after = finished(tmp_path / "late", capsys, norm, "evaluate.precise=true")
    assert f"with precise statistics {after['test_error_precise']:.2f} %" in out
    assert "warning" not in err
    # `record.read` has checked the new checksum.
    assert {key for key in after if after[key] != before[key]} == {"test_error_precise", "checksum"}
    assert checkpoint.read_bytes() == bytes_before
    assert checkpoint.with_name("metrics.jsonl").read_text() == journal

    assert after["test_error_precise"] == early["test_error_precise"]
    # The third time there is nothing left to do.
    shutil.rmtree(tmp_path / "late" / "runs")
    assert finished(tmp_path / "late", capsys, norm, "evaluate.precise=true")[2] == after


@pytest.mark.parametrize("norm", ["brn", "mbn"])
def test_measured_later_layers_normalise_as_at_the_end_of_training(norm, tmp_path, capsys, monkeypatch):
    """lambda, r_max and d_max are no part of a checkpoint, and the statistics depend on them."""
    seen = []

    def spy(model, batches, recorded):
        batches = list(batches)
        settings = {(layer.lam,) if norm == "mbn" else (layer.r_max, layer.d_max) for layer in norm_layers(model)}
        seen.append((settings, [len(labels) for _, labels in batches]))
        set_precise_statistics(model, batches)

    monkeypatch.setattr("mbn.training.run.set_precise_statistics", spy)
    finished(tmp_path / "early", capsys, norm, "evaluate.precise=true")
    finished(tmp_path / "late", capsys, norm)
    finished(tmp_path / "late", capsys, norm, "evaluate.precise=true")
    expected = {(0.9,)} if norm == "mbn" else {(3.0, 5.0)}
    # The run's own batch size: 35 batches of 40 and one of 37 of the 1437 images.
    assert seen[0] == (expected, [40] * 35 + [37])
    assert seen[1] == seen[0]


def test_asked_for_when_a_run_that_ended_without_its_record_is_taken_up(tmp_path, capsys):
    """Killed between its last checkpoint and its record: the same command writes it, with the same errors."""
    _, _, whole = finished(tmp_path, capsys, "mbn", "evaluate.precise=true")
    record.path_of(tmp_path, whole["name"]).unlink()
    _, _, again = finished(tmp_path, capsys, "mbn", "evaluate.precise=true")
    assert again["test_error_precise"] == whole["test_error_precise"]
    assert again["test_error"] == whole["test_error"]


@pytest.mark.parametrize("finished_before", [False, True])
def test_a_signal_stops_it_and_the_same_command_goes_on(finished_before, tmp_path, capsys, monkeypatch):
    """A budget's end, or Ctrl-C: at batch 8 it takes as long as an epoch."""
    _, _, whole = finished(tmp_path / "whole", capsys, "mbn", "evaluate.precise=true")
    results = tmp_path / "stopped"
    if finished_before:
        finished(results, capsys, "mbn")

    def signalled(model, batches, recorded):
        os.kill(os.getpid(), signal.SIGTERM)
        set_precise_statistics(model, batches, recorded)

    with monkeypatch.context() as patch:
        patch.setattr("mbn.training.run.set_precise_statistics", signalled)
        assert train.main(command(results, "mbn", "evaluate.precise=true")) == 75
    assert "stopped at iteration" in capsys.readouterr().err
    assert record.path_of(results, whole["name"]).exists() == finished_before
    again = finished(results, capsys, "mbn", "evaluate.precise=true")[2]
    assert again["test_error_precise"] == whole["test_error_precise"]


@pytest.mark.parametrize("norm", ["bn", "brn", "mbn"])
def test_the_trainer_puts_memory_and_averages_back(norm, tmp_path, monkeypatch):
    settings = config.load(command(tmp_path, norm, "schedule.iterations=3"))
    run = Run(settings, Small, tmp_path / "run")
    batches = run.data.train_batches(0, 40)
    run.model.train()
    for iteration in range(3):
        run.set_schedule(iteration)
        run.update(*next(batches))
    before = snapshot(run.model)
    inside = []

    def spy(model, batches, recorded):
        set_precise_statistics(model, batches)
        inside.append(snapshot(model))

    monkeypatch.setattr("mbn.training.run.set_precise_statistics", spy)
    error = run.precise_error(Told())
    assert 0 <= error <= 100
    assert not torch.equal(inside[0]["norm1.running_mean"], before["norm1.running_mean"])
    after = run.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_precise_error_is_that_of_the_pooled_statistics(tmp_path, capsys, monkeypatch):
    """By hand: a model with these statistics, evaluated with functions alone."""
    _, _, result = finished(tmp_path, capsys, "bn", "evaluate.precise=true")
    state = torch.load(next((tmp_path / "runs").rglob("checkpoint.pt")), weights_only=True)["model"]
    run = Run(config.load(command(tmp_path / "other", "bn")), Small, tmp_path / "other")
    model = run.model
    model.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        # The first epoch's batches, augmented as in training.
        parts = list(itertools.islice(run.data.train_batches(0, 40), 36))
        assert sum(len(labels) for _, labels in parts) == 1437
        first = [model.conv1(x) for x, _ in parts]
        inputs = []
        for x in first:
            mu, s2 = pooled([x])
            y = (x - mu.view(1, -1, 1, 1)) / (s2.view(1, -1, 1, 1) + EPS).sqrt()
            y = y * model.norm1.weight.view(1, -1, 1, 1) + model.norm1.bias.view(1, -1, 1, 1)
            inputs.append(model.conv2(y.relu()))
        for layer, values in ((model.norm1, first), (model.norm2, inputs)):
            mu, s2 = pooled(values)
            layer.running_mean.copy_(mu)
            layer.running_var.copy_(s2)
        wrong = total = 0
        for x, y in run.data.test_batches(1000):
            wrong += (model(x).argmax(1) != y).sum().item()
            total += len(y)
    assert result["test_error_precise"] == pytest.approx(100 * wrong / total, abs=100.01 / total)
    assert total == 360


def test_without_the_final_checkpoint_it_is_one_sentence_and_nothing_is_lost(tmp_path, capsys):
    """Checkpoints are large, and some people delete them; the journal beside them is what curves are made of."""
    _, _, before = finished(tmp_path, capsys, "mbn")
    folder = next((tmp_path / "runs").rglob("checkpoint.pt")).parent
    for checkpoint in folder.glob("checkpoint*.pt"):
        checkpoint.unlink()
    journal = (folder / "metrics.jsonl").read_text()
    assert len(journal.splitlines()) >= 1
    code, _, err = main(capsys, *command(tmp_path, "mbn", "evaluate.precise=true"))
    assert code == 1
    lines = err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert "checkpoint.pt" in lines[0]
    assert "machine.again=true" in lines[0]
    assert read_record(tmp_path) == before
    assert (folder / "metrics.jsonl").read_text() == journal


def test_a_checkpoint_of_the_middle_of_the_run_does_not_do(tmp_path, capsys):
    _, _, before = finished(tmp_path, capsys, "mbn", "machine.checkpoint_seconds=0.000001")
    folder = next((tmp_path / "runs").rglob("checkpoint.pt")).parent
    journal = (folder / "metrics.jsonl").read_text()
    (folder / "checkpoint.previous.pt").replace(folder / "checkpoint.pt")
    code, _, err = main(capsys, *command(tmp_path, "mbn", "evaluate.precise=true"))
    assert code == 1
    assert err.startswith("error: ")
    assert read_record(tmp_path) == before
    assert (folder / "metrics.jsonl").read_text() == journal


def test_without_statistics_it_is_null_with_a_warning(tmp_path, capsys):
    for _ in ("at the end of training", "asked for again"):
        _, err, result = finished(tmp_path, capsys, "gn", "evaluate.precise=true")
        assert result["test_error_precise"] is None
        assert err.count("warning: norm=gn has no statistics to take") == err.count("warning") == 1


def test_it_is_no_part_of_the_runs_name(tmp_path):
    names = {
        config.run_name(config.load(command(tmp_path, "mbn", f"evaluate.precise={value}")))
        for value in ("true", "false")
    }
    assert len(names) == 1


def test_lambda_changes_what_the_second_layer_gets():
    """So that the tests above can tell one lambda from another."""
    statistics = []
    for lam in (0.1, 0.9):
        torch.manual_seed(1)
        model = remembering(TwoLayers(mbn(2, 0.1)), 4, 4)
        set_lambda(model, lam)
        set_precise_statistics(model, image_batches_of_ones_kind())
        statistics.append(model.norm2.test_statistics())
    assert (statistics[0][1] - statistics[1][1]).abs().max() > 1e-3
