"""Statistics against scipy, by hand and by simulation."""

import pytest
from scipy import stats

from mbn.tables.over_seeds import Summary, difference, seeds_to_decide, summary, welch


def test_a_difference_is_paired_over_common_seeds_and_welchs_test_takes_all():
    a, b = {0: 6.1, 1: 6.3, 3: 6.2, 4: 6.6, 5: 9.0}, {0: 6.5, 1: 6.9, 2: 9.0, 3: 6.4, 4: 7.1}
    found, test = difference(a, b), stats.ttest_rel([6.1, 6.3, 6.2, 6.6], [6.5, 6.9, 6.4, 7.1])
    low, high = test.confidence_interval(0.95)
    assert (found.n, found.mean) == (4, pytest.approx(-0.425))
    assert (found.low, found.high, found.p) == (pytest.approx(low), pytest.approx(high), pytest.approx(test.pvalue))
    all_seeds = stats.ttest_ind(list(a.values()), list(b.values()), equal_var=False)
    assert welch(a, b) == pytest.approx(all_seeds.pvalue)


def test_interval_by_hand():
    # Mean 2, sd 1, n 3; t(0.975, 2) is 4.302653 in any table.
    s = summary([1.0, 2.0, 3.0])
    assert (s.mean, s.sd) == (2, 1)
    assert (s.low, s.high) == (pytest.approx(2 - 4.302653 / 3**0.5), pytest.approx(2 + 4.302653 / 3**0.5))


@pytest.mark.parametrize("numbers", [[], [1.0], [7.1 - 6.9, 7.2 - 7.0, 0.2]])
def test_no_interval_without_spread(numbers):
    s = summary(numbers)
    assert (s.n, s.low, s.high, s.p) == (len(numbers), None, None, None)
    assert (
        welch(dict(enumerate(numbers)), {0: 1.0, 1: 2.0}) is welch({0: 1.0, 1: 2.0}, dict(enumerate(numbers))) is None
    )


def test_seeds_to_decide():
    """By simulation: with that number of seeds, four in five intervals exclude zero; with one fewer, not so many."""
    five = [-1.2, -0.1, -0.7, 0.3, -0.6]
    n = seeds_to_decide(summary(five))
    # Five seeds have 4 degrees of freedom; a difference of two of the six reruns has 5 and a variance of 2 * 0.54^2.
    sd = ((4 * stats.tstd(five) ** 2 + 5 * 2 * 0.54**2) / 9) ** 0.5
    samples = stats.norm.rvs(sum(five) / 5, sd, size=(20000, n), random_state=0)
    assert (stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.05)
    assert (stats.ttest_1samp(samples[:, :-1], 0, axis=1).pvalue < 0.05).mean() < 0.8
    # One seed: with the assumed deviation a difference of 0.48 needs 21 an arm unpaired, and one more paired.
    assert seeds_to_decide(Summary(1, -0.48)) == 22
    # Two seeds that happen to agree say little about the spread; of many seeds, their own spread decides.
    assert 15 <= seeds_to_decide(summary([-0.48, -0.481])) <= 22
    assert seeds_to_decide(summary([-0.48, -0.48])) == 22
    assert seeds_to_decide(summary([-0.48 + 0.2 * (-1) ** k for k in range(400)])) == 4
    assert seeds_to_decide(Summary(1, 1e-3)) is seeds_to_decide(Summary(0)) is None
