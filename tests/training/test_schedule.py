"""Learning rate, lambda, r_max and d_max over a run, as literal lists."""

import itertools

import pytest
import running

from mbn.config import load
from mbn.norm.base import norm_layers
from mbn.training.iteration import Update
from mbn.training.schedule import renorm_values, scheduled, value_at

LR, LAM, STONES = [0.1, 0.01, 0.001], [0.1, 0.5, 0.9], [0.4, 0.6]


@pytest.mark.parametrize(
    ("iterations", "stages"),
    [
        (1, [0]),
        (2, [0, 1]),  # 0.8 and 1.2
        (3, [0, 0, 2]),  # 1.2 and 1.8
        (5, [0, 0, 1, 2, 2]),  # 2 and 3
        (7, [0, 0, 0, 1, 1, 2, 2]),  # 2.8 and 4.2
        (10, [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]),  # 4 and 6
    ],
)
def test_the_papers_schedule_at_every_iteration(iterations, stages):
    for values in (LR, LAM):
        assert [value_at(values, STONES, t, iterations) for t in range(iterations)] == [values[i] for i in stages]


def test_the_papers_run_changes_at_31280_and_46920_of_78200():
    instants = (0, 31279, 31280, 46919, 46920, 78199)
    assert [value_at(LR, STONES, t, 78200) for t in instants] == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert [value_at(LAM, STONES, t, 78200) for t in instants] == [0.1, 0.1, 0.5, 0.5, 0.9, 0.9]


def test_milestones_are_exact_in_the_decimals_that_were_typed():
    """0.07 * 100 is 7.000000000000001 in binary, which would put the change at iteration 8."""
    for percent in range(1, 100):
        changes = [t for t in range(101) if value_at([1, 2], [percent / 100], t, 100) == 2]
        assert changes[0] == percent


def test_warmup_is_a_tenth_of_the_rate_whatever_the_stage():
    def rates(*overrides):
        config = load(["schedule.iterations=10", *overrides])
        return [scheduled(config, t, 10)["lr"] for t in range(10)]

    assert rates() == [0.1] * 4 + [0.01] * 2 + [0.001] * 4
    assert rates("optimizer.warmup=5") == pytest.approx([0.01] * 4 + [0.001] + [0.01] + [0.001] * 4)


def test_one_value_is_a_constant():
    assert [value_at([0.9], STONES, t, 7) for t in range(7)] == [0.9] * 7
    assert [value_at([0.9], [], t, 3) for t in range(3)] == [0.9] * 3


def test_the_bounds_at_the_points_of_the_original_schedule():
    """5k, 25k and 40k of 160k steps; exactly, for they are fractions. Between them they are linear."""
    bounds = {0: (1, 0), 5: (1, 0), 15: (1 + 4 / 7, 2.5), 22.5: (2, 4.375), 25: (1 + 8 / 7, 5), 40: (3, 5), 159: (3, 5)}
    for thousands, expected in bounds.items():
        assert renorm_values(None, int(1000 * thousands), 160_000) == expected


@pytest.mark.parametrize("iterations", [1, 2, 3, 31, 33, 320, 1001, 78_200])
def test_the_bounds_only_rise_and_never_pass_3_and_5(iterations):
    """A public version's warm-up factor grows past 1, and its bounds with it, to the end of training."""
    step = max(1, iterations // 500)
    bounds = [renorm_values(None, t, iterations) for t in [*range(0, iterations, step), iterations - 1]]
    assert bounds[0] == (1.0, 0.0)
    assert all(1 <= r <= 3 and 0 <= d <= 5 for r, d in bounds)
    assert all(a <= b for pair in itertools.pairwise(bounds) for a, b in zip(*pair, strict=True))
    if iterations > 3:
        assert bounds[-1] == (3.0, 5.0)


@pytest.mark.parametrize(
    ("norm", "names", "expected"),
    [
        ("brn", ("r_max", "d_max"), [renorm_values(None, t, 32) for t in range(32)]),
        ("mbn", ("lam",), [(0.1,)] * 13 + [(0.5,)] * 7 + [(0.9,)] * 12),
    ],
)
def test_all_layers_are_set_before_each_iteration(here, monkeypatch, norm, names, expected):
    """As numbers and, with batch renormalisation, in the tensor that the layer computes with."""
    monkeypatch.setattr("running.build_tiny", running.build_small)
    seen = []
    iterate = Update.__call__

    def spy(update, *batch):
        first, second = norm_layers(update.model)
        values = tuple(getattr(first, name) for name in names)
        assert values == tuple(getattr(second, name) for name in names)
        for layer in (first, second):
            assert norm != "brn" or layer.bounds.tolist() == pytest.approx(values, abs=1e-6)
        seen.append(values)
        iterate(update, *batch)

    monkeypatch.setattr(Update, "__call__", spy)
    assert here(f"norm={norm}", "batch_size=8", "schedule.iterations=32").code == 0
    assert seen == expected
