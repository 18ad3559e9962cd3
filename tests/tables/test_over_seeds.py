"""Statistics against scipy, by hand and by simulation."""

import math

import pytest
from scipy import stats

from mbn.tables.over_seeds import (
    Contrast,
    Sample,
    Spread,
    contrast,
    detectable,
    holm,
    pooled,
    weighted_mean,
)

A, B, C = [6.1, 6.3, 6.2, 6.6], [6.5, 6.9, 6.4, 7.1], [5.0, 5.3, 5.1]


def seeds(numbers):
    return dict(enumerate(numbers))


def sample(name, numbers, spread, group="g"):
    return Sample(name, sum(numbers) / len(numbers), len(numbers), group, spread)


def samples(*cells):
    spread = pooled(map(seeds, cells))
    return [sample(str(i), numbers, spread) for i, numbers in enumerate(cells)]


@pytest.mark.parametrize("b", [B, C])
def test_two_cells_alone_are_students_test_with_equal_variances(b):
    found, test = contrast(samples(A, b), (1, -1)), stats.ttest_ind(A, b, equal_var=True)
    interval = test.confidence_interval(0.95)
    assert found.mean == pytest.approx(sum(A) / 4 - sum(b) / len(b))
    assert found.interval() == pytest.approx(tuple(interval))
    assert found.p() == pytest.approx(test.pvalue)
    assert found.ns == (4, len(b))


def test_the_variance_is_that_within_cells_of_an_analysis_of_variance():
    """F of two of three cells, by hand: their squares between over the variance within all three."""
    spread = pooled(map(seeds, (A, B, C)))
    within = sum(stats.tvar(some) * (len(some) - 1) for some in (A, B, C))
    assert (spread.squares, spread.freedom) == (pytest.approx(within), 3 + 3 + 2)
    a, b, _ = samples(A, B, C)
    f = (a.mean - b.mean) ** 2 / (1 / 4 + 1 / 4) / (within / 8)
    assert contrast([a, b], (1, -1)).p() == pytest.approx(stats.f.sf(f, 1, 8))
    # All three equal: scipy's F has the same squares within.
    between = sum(len(x) * (sum(x) / len(x) - sum(A + B + C) / 11) ** 2 for x in (A, B, C))
    assert stats.f_oneway(A, B, C).statistic == pytest.approx(between / 2 / spread.sd**2)


def test_one_seed_borrows_the_spread_of_the_others_and_adds_none():
    spread = pooled(map(seeds, (A, [9.0])))
    assert spread == pooled([seeds(A)])
    found = contrast([sample("a", A, spread), sample("b", [9.0], spread)], (1, -1))
    half = stats.t.ppf(0.975, 3) * stats.tstd(A) * math.sqrt(1 / 4 + 1)
    assert found.interval() == pytest.approx((6.3 - 9 - half, 6.3 - 9 + half))


def test_two_groups_have_satterthwaites_degrees_of_freedom():
    """One cell a group is Welch's test."""
    a, b = (sample(name, x, pooled([seeds(x)]), name) for name, x in (("a", A), ("c", C)))
    found, test = contrast([a, b], (1, -1)), stats.ttest_ind(A, C, equal_var=False)
    assert found.p() == pytest.approx(test.pvalue)
    assert found.interval() == pytest.approx(tuple(test.confidence_interval(0.95)))


def test_no_interval_without_spread():
    for spread in (pooled([seeds([1.0]), seeds([2.0])]), pooled([{0: 7.1 - 6.9, 1: 7.2 - 7.0, 2: 0.2}])):
        found = contrast([sample("a", [1.0], spread), sample("b", [2.0], spread)], (1, -1))
        assert (found.mean, found.interval(), found.p(), found.precision) == (-1, None, None, None)
        assert found.one_more(5) is None
        assert str(found) == "-1.00, n = 1+1"
        assert contrast([sample("a", [1.0], spread)], [1]).one_more(9.0) is None
    known = sample("c", A, pooled([seeds(A)]), "h")
    assert contrast([known, sample("a", [1.0], Spread())], (1, -1)).interval() is None  # one group lacks it
    assert (Contrast().mean, Contrast().interval(), Contrast().p()) == (None, None, None)


def test_contrasts_together_are_weighted_by_precision():
    """By hand: d = sum d/v / sum 1/v with variance 1 / sum 1/v, where no cell stands in two."""
    a, b, c, d = samples(A, B, C, [5.5])
    parts = [contrast([a, b], (1, -1)), contrast([c, d], (1, -1))]
    found, weights = weighted_mean(parts)
    variances = [part.precision**-1 for part in parts]
    assert variances == pytest.approx([a.spread.sd**2 * (1 / 4 + 1 / 4), a.spread.sd**2 * (1 / 3 + 1)])
    assert weights == pytest.approx([(1 / v) / (1 / variances[0] + 1 / variances[1]) for v in variances])
    assert found.mean == pytest.approx(sum(w * p.mean for w, p in zip(weights, parts, strict=True)))
    assert found.precision == pytest.approx(sum(1 / v for v in variances))
    assert found.ns == (4 + 3, 4 + 1)
    # A cell that both have counts once: (a - b + a - c) / 2 has variance s² (1 / n_a + 1 / 4 n_b + 1 / 4 n_c).
    shared, halves = weighted_mean(
        [contrast([a, b], (1, -1)), contrast([a, sample("e", [1, 1, 1, 1], a.spread)], (1, -1))]
    )
    assert halves == [0.5, 0.5]
    assert shared.precision**-1 == pytest.approx(a.spread.sd**2 * (1 / 4 + 1 / 16 + 1 / 16))


def test_seeds_that_diverged_are_named_beside_n():
    a, b, _ = samples(A, B, C)
    some = Sample("d", 6.0, 3, "g", a.spread, diverged=2)
    assert (contrast([a, b], (1, -1)).n, contrast([some, b], (1, -1)).n) == ("4+4", "3 (2 diverged)+4")
    every = weighted_mean([contrast([a, some], (1, -1)), contrast([some, b], (1, -1))])[0]
    assert every.n == "7 (2 diverged)+7 (2 diverged)"
    assert contrast([a, a, some], (1, -1, -1)).n == "4+4+3 (2 diverged)"
    assert contrast([some, some, some], (1, -1, -1)).n == "3 (2 diverged) each"


def test_a_printed_number_is_compared_with_the_interval_for_one_more_run():
    """The variance by hand, in sd²: of one cell, of two, and of two places that share a cell, which has one more run
    and not two."""
    a, b, c = samples(A, B, C)
    joint, (first, second) = weighted_mean([contrast([a, b], (1, -1)), contrast([a, c], (1, -1))])
    for number, variance in (
        (contrast([a], (1,)), 1 + 1 / 4),
        (contrast([a, c], (1, -1)), 1 + 1 / 4 + 1 + 1 / 3),
        (contrast([a, c], (0.5, -2)), 0.25 * (1 + 1 / 4) + 4 * (1 + 1 / 3)),
        (joint, (1 + 1 / 4) + first**2 * (1 + 1 / 4) + second**2 * (1 + 1 / 3)),
    ):
        half = stats.t.ppf(0.975, 3 + 3 + 2) * a.spread.sd * math.sqrt(variance)
        found = number.one_more(number.mean + half)
        assert (found.low, found.high) == pytest.approx((number.mean - half, number.mean + half))
        assert found.p == pytest.approx(0.05)
        assert number.one_more(number.mean + half + 1e-6).excluded
        assert not number.one_more(number.mean - half + 1e-6).excluded


@pytest.mark.parametrize(
    ("ps", "corrected"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.04, None, 0.001], [0.08, 1, 0.003]),
        ([0.5, 0.6, 0.9], [1, 1, 1]),
        ([None, None, 0.02], [1, 1, 0.06]),
    ],
)
def test_holms_correction_by_hand(ps, corrected):
    assert holm(ps) == pytest.approx(corrected)


def test_the_difference_that_five_seeds_show():
    """By simulation, and by a table: two samples of 5 need an effect of 2.02 standard deviations for 80 %."""
    assert detectable(1.0) == pytest.approx(2.02, abs=0.005)
    size = detectable(0.5)
    x = stats.norm.rvs(0, 0.5, size=(20000, 5), random_state=0)
    y = stats.norm.rvs(size, 0.5, size=(20000, 5), random_state=1)
    assert (stats.ttest_ind(x, y, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.01)
    assert detectable(0.5, n=20) < size / 2
