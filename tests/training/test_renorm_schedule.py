"""How batch renormalisation opens during training: r_max and d_max at each iteration, and which layers get them."""

import itertools

import pytest
from torch import nn

from mbn import config
from mbn.norm.base import norm_layers
from mbn.norm.renorm import BatchRenorm2d
from mbn.system.errors import UserError
from mbn.training.iteration import Update
from mbn.training.run import Run
from mbn.training.schedule import renorm_bounds


class Small(nn.Module):
    """Two layers of batch renormalisation, for the trainer's sake."""

    def __init__(self, layers):
        super().__init__()
        self.body = nn.Sequential(
            layers.conv(3, 4, 3, stride=4, bias=False),
            *(layers.norm(4), layers.act()),
            layers.conv(4, 4, 3, stride=2, bias=False),
            *(layers.norm(4), layers.act()),
        )
        self.fc = nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


class Signal:
    """Stands for a signal handler: `code` is set once as many iterations are done."""

    def __init__(self, run=None, at=None):
        self.run, self.at = run, at

    @property
    def code(self):
        return 75 if self.run is not None and self.run.state.iteration >= self.at else None


@pytest.fixture
def run(tmp_path):
    """A function that opens a run of T iterations on digits, from its start or from where it was stopped."""

    def open_run(iterations, *overrides):
        settings = config.load(
            [
                *("dataset=digits", "norm=brn", "batch_size=8", "machine.threads=1", "machine.device=cpu"),
                *(f"schedule.iterations={iterations}", f"machine.results={tmp_path}", *overrides),
            ]
        )
        return Run(settings, Small, tmp_path / "run")

    return open_run


# Plain batch norm until 1/32 of 320, d_max straight to 5 at 5/32, r_max straight to 3 at 1/4.
AT_320 = {
    0: (1.0, 0.0),
    9: (1.0, 0.0),
    10: (1.0, 0.0),
    11: (1 + 2 / 70, 0.125),
    30: (1 + 2 * 20 / 70, 2.5),
    50: (1 + 2 * 40 / 70, 5.0),
    65: (1 + 2 * 55 / 70, 5.0),
    80: (3.0, 5.0),
    319: (3.0, 5.0),
}


@pytest.mark.parametrize(("iteration", "expected"), AT_320.items())
def test_the_bounds_of_320_iterations(iteration, expected):
    assert renorm_bounds(iteration, 320) == pytest.approx(expected, abs=1e-12)


def test_the_bounds_at_the_instants_of_the_original_schedule():
    """5k, 25k and 40k of 160k steps; exactly, for they are fractions."""
    assert renorm_bounds(5_000, 160_000) == (1.0, 0.0)
    assert renorm_bounds(15_000, 160_000)[1] == 2.5
    assert renorm_bounds(22_500, 160_000)[0] == 2.0
    assert renorm_bounds(25_000, 160_000)[1] == 5.0
    assert renorm_bounds(40_000, 160_000) == (3.0, 5.0)


@pytest.mark.parametrize("iterations", [1, 2, 3, 31, 33, 320, 1001, 78_200])
def test_the_bounds_only_rise_and_never_pass_3_and_5(iterations):
    """A public version's warm-up factor grows past 1, and its bounds with it, to the end of training."""
    step = max(1, iterations // 500)
    bounds = [renorm_bounds(t, iterations) for t in [*range(0, iterations, step), iterations - 1]]
    assert bounds[0] == (1.0, 0.0)
    assert all(1 <= r <= 3 and 0 <= d <= 5 for r, d in bounds)
    assert all(a <= b for pair in itertools.pairwise(bounds) for a, b in zip(*pair, strict=True))
    if iterations > 3:
        assert bounds[-1] == (3.0, 5.0)


def record(monkeypatch):
    """What every layer's bounds are, as numbers and as the tensor that computes, when an iteration begins."""
    seen = []
    iterate = Update.__call__

    def spy(update, images, labels):
        layers = norm_layers(update.model)
        assert len(layers) == 2
        assert all(type(layer) is BatchRenorm2d for layer in layers)
        each = {(layer.r_max, layer.d_max) for layer in layers}
        tensors = {tuple(layer.bounds.tolist()) for layer in layers}
        assert len(each) == len(tensors) == 1
        assert tensors.pop() == pytest.approx(next(iter(each)), abs=1e-6)
        seen.append(each.pop())
        return iterate(update, images, labels)

    monkeypatch.setattr(Update, "__call__", spy)
    return seen


def test_the_trainer_sets_the_bounds_of_all_layers_before_each_iteration(run, monkeypatch):
    seen = record(monkeypatch)
    training = run(32)
    assert {(layer.r_max, layer.d_max) for layer in norm_layers(training.model)} == {(1.0, 0.0)}
    training.train(Signal(), training.open_journal())
    expected = [(1.0, 0.0), (1.0, 0.0)]  # 0 and 1 of 32
    expected += [(1 + 2 * (t - 1) / 7, min(5.0, 5 * (t - 1) / 4)) for t in range(2, 8)]
    expected += [(3.0, 5.0)] * 24
    assert seen == [pytest.approx(pair, abs=1e-12) for pair in expected]


def test_a_resumed_run_has_the_bounds_of_its_iteration(run, monkeypatch):
    """They are no part of the state dict: the schedule puts them back."""
    seen = record(monkeypatch)
    first = run(32)
    with pytest.raises(UserError, match="stopped at iteration 4"):
        first.train(Signal(first, 4), first.open_journal())
    second = run(32)
    assert second.state.iteration == 4
    second.train(Signal(), second.open_journal())
    assert len(seen) == 32
    assert seen[4] == pytest.approx((1 + 2 * 3 / 7, 5 * 3 / 4), abs=1e-12)
    assert seen[5] == pytest.approx((1 + 2 * 4 / 7, 5.0), abs=1e-12)


@pytest.mark.parametrize("forwards", [1, 2])
def test_averages_are_updated_once_an_iteration_from_the_first_on(run, forwards):
    training = run(3, f"forwards={forwards}")
    training.train(Signal(), training.open_journal())
    assert [int(layer.num_batches_tracked) for layer in norm_layers(training.model)] == [3, 3]
