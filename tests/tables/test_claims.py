"""Statistics against scipy and by hand; every outcome of every form of claim."""

import pytest
import yaml
from scipy import stats

from mbn import grid
from mbn.system.errors import UserError
from mbn.tables import claims

A, B = [6.1, 6.3, 6.2, 6.6], [6.5, 6.9, 6.4, 7.1]
GRID = grid.read("figure1")


def by_seed(numbers):
    return dict(enumerate(numbers))


def runs(numbers, field="test_error"):
    return {seed: {field: number} for seed, number in enumerate(numbers)}


def measure(table):
    """table: (row, column) -> numbers by seed."""
    return lambda cell: runs(table.get((cell.row, cell.column), []))


def test_paired_difference_is_scipys():
    found = claims.difference(by_seed(A), by_seed(B))
    test = stats.ttest_rel(A, B)
    low, high = test.confidence_interval(0.95)
    i = found.interval
    assert (i.n, i.mean) == (4, pytest.approx(-0.425))
    assert (i.low, i.high) == (pytest.approx(low), pytest.approx(high))
    assert found.p == pytest.approx(test.pvalue)
    assert found.welch == pytest.approx(stats.ttest_ind(A, B, equal_var=False).pvalue)


def test_interval_by_hand():
    # Mean 2, sd 1, n 3; t(0.975, 2) is 4.302653 in any table.
    i = claims.interval([1.0, 2.0, 3.0])
    assert (i.low, i.high) == (pytest.approx(2 - 4.302653 / 3**0.5), pytest.approx(2 + 4.302653 / 3**0.5))


def test_only_common_seeds_are_paired_but_all_count_for_welch():
    a, b = {0: 6.1, 2: 6.4, 3: 6.0}, {0: 6.5, 1: 9.0, 3: 6.6}
    found = claims.difference(a, b)
    assert (found.interval.n, found.interval.mean) == (2, pytest.approx(-0.5))
    welch = stats.ttest_ind(list(a.values()), list(b.values()), equal_var=False).pvalue
    assert found.welch == pytest.approx(welch)


@pytest.mark.parametrize("numbers", [[], [1.0], [0.5, 0.5, 0.5]])
def test_no_interval_without_spread(numbers):
    i = claims.interval(numbers)
    assert (i.n, i.low, i.high) == (len(numbers), None, None)
    found = claims.difference(by_seed(numbers), by_seed([n + 0.1 for n in numbers]))
    assert (found.p, found.welch) == (None, None)


def test_seeds_to_decide():
    """Against simulation: at that number four in five samples have an interval off zero, and one fewer is too few."""
    i = claims.interval([-1.2, -0.1, -0.7, 0.3, -0.6])
    n = claims.seeds_to_decide(i)
    # Five seeds have 4 degrees of freedom; a difference of two of the six reruns has 5 and a variance of 2 * 0.54^2.
    sd = ((4 * stats.tstd([-1.2, -0.1, -0.7, 0.3, -0.6]) ** 2 + 5 * 2 * 0.54**2) / 9) ** 0.5
    samples = stats.norm.rvs(i.mean, sd, size=(20000, n), random_state=0)
    assert (stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.05)
    fewer = stats.ttest_1samp(samples[:, :-1], 0, axis=1).pvalue < 0.05
    assert fewer.mean() < 0.8
    # One seed: at the assumed deviation, 21 an arm unpaired for a difference of 0.48, and one more paired.
    assert claims.seeds_to_decide(claims.Interval(1, -0.48, None, None)) == 22
    # Two seeds that happen to agree say hardly more of the spread than one.
    assert 15 <= claims.seeds_to_decide(claims.interval([-0.48, -0.481])) <= 22
    # Many count for nearly all.
    many = claims.interval([-0.48 + 0.2 * (-1) ** k for k in range(400)])
    assert claims.seeds_to_decide(many) == 4
    assert claims.seeds_to_decide(claims.Interval(1, 1e-3, None, None)) is None
    assert claims.seeds_to_decide(claims.interval([])) is None


def test_the_papers_difference():
    table4, figure1 = grid.read("table4"), grid.read("figure1")
    assert claims.printed(table4.claims[0], table4, "8") == pytest.approx(15.37 - 19.64)
    assert claims.printed(figure1.claims[0], figure1, "") == pytest.approx(6.23 - 6.53)
    assert claims.printed(figure1.claims[1], figure1, "") is None  # BRN: the paper prints neither
    assert claims.printed(figure1.claims[2], figure1, "") is None  # a gain


LOWER = {"claim": "c", "lower": "MBN", "than": "BN", "in": ["one forward"]}
EQUAL = {"claim": "c", "equal": ["MBN", "BN"], "within": 0.25, "in": ["one forward"]}
BN, MBN = ("one forward", "BN"), ("one forward", "MBN")


@pytest.mark.parametrize(
    ("claim", "mbn", "bn", "outcome"),
    [
        (LOWER, [6.0, 6.1, 6.2], [6.9, 7.0, 7.2], claims.HOLDS),
        (LOWER, [6.9, 7.0, 7.2], [6.0, 6.1, 6.2], claims.FAILS),
        (LOWER, [6.0, 7.1, 6.2], [6.5, 6.6, 6.3], claims.OPEN),
        (LOWER, [6.0], [7.0], claims.OPEN),
        (LOWER, [], [7.0, 7.1], claims.OPEN),
        (EQUAL, [6.00, 6.10, 6.20], [6.01, 6.09, 6.21], claims.HOLDS),
        (EQUAL, [6.0, 6.1, 6.2], [6.9, 7.0, 7.2], claims.FAILS),
        (EQUAL, [6.9, 7.0, 7.2], [6.0, 6.1, 6.2], claims.FAILS),
        (EQUAL, [6.0, 6.4, 6.2], [6.2, 6.0, 6.3], claims.OPEN),
    ],
)
def test_outcomes_of_differences(claim, mbn, bn, outcome):
    (verdict,) = claims.judge(claim, GRID, measure({MBN: mbn, BN: bn}))
    assert verdict.outcome == outcome
    assert verdict.place == "one forward"


@pytest.mark.parametrize(
    ("mbn_two", "outcome"),
    [([5.0, 5.2, 5.1], claims.HOLDS), ([7.5, 7.8, 7.6], claims.FAILS), ([6.0, 6.2, 6.0], claims.OPEN)],
)
def test_outcomes_of_gains(mbn_two, outcome):
    table = {BN: [7.0, 7.1, 7.2], ("two forwards", "BN"): [6.9, 7.05, 7.0], MBN: [6.1, 6.2, 6.3]}
    table["two forwards", "MBN"] = mbn_two
    claim = {"claim": "c", "gain": ["one forward", "two forwards"], "of": "MBN", "above": "BN"}
    (verdict,) = claims.judge(claim, GRID, measure(table))
    assert verdict.outcome == outcome
    pairs = zip(table[MBN], mbn_two, table[BN], table["two forwards", "BN"], strict=True)
    gains = [(a - b) - (c - d) for a, b, c, d in pairs]
    low, high = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    assert (verdict.interval.low, verdict.interval.high) == (pytest.approx(low), pytest.approx(high))


def curve(test_errors=(), train_errors=(), points=20):
    images = [100 * (i + 1) for i in range(points)]
    return {
        "images": 100 * points,
        "curves": {"images": images, "test_error": test_errors, "train_error": train_errors},
    }


def test_a_drop_is_the_mean_before_less_the_mean_after():
    # Twenty points: the windows at 60 % hold the point at 60 % and the one at 65 %; forty points have two in each.
    record = curve(test_errors=[9.0] * 11 + [8.0, 6.5] + [1.0] * 7)
    assert claims.drop(record, "test_error", claims.Fraction(6, 10)) == pytest.approx(1.5)
    record = curve(test_errors=[9.0] * 22 + [8.0, 7.0, 5.0, 6.0] + [1.0] * 14, points=40)
    assert claims.drop(record, "test_error", claims.Fraction(6, 10)) == pytest.approx(2.0)
    assert claims.drop(curve(test_errors=[1.0], points=1), "test_error", claims.Fraction(6, 10)) is None


def test_a_rise_is_the_first_point_after_less_the_last_before():
    record = curve(train_errors=[3.0] * 7 + [2.0, 2.75, 1.0] + [0.0] * 10)
    assert claims.rise(record, "train_error", claims.Fraction(4, 10)) == pytest.approx(0.75)
    assert claims.rise(curve(points=0), "train_error", claims.Fraction(4, 10)) is None


@pytest.mark.parametrize(
    ("drops", "outcome"),
    [((1.0, 1.2, 1.1), claims.HOLDS), ((-1.0, -1.2, -1.1), claims.FAILS), ((1.0, -1.2, 0.3), claims.OPEN)],
)
def test_outcomes_of_curves(drops, outcome):
    g = grid.read("figure2")
    falls = {s: curve([9.0] * 12 + [9.0 - d] * 8, [1.0] * 12 + [1.0 + d] + [0.0] * 7) for s, d in enumerate(drops)}
    flat = {s: curve([9.0] * 12 + [9.0 - 0.01 * s] * 8, [1.0] * 20) for s in range(3)}

    def of(cell):
        return {"MBN": falls, "BN": flat}[cell.column] if cell.row == "VGG" else {}

    claimed = {
        "drop": {"claim": "c", "drop": "test_error", "at": 0.6, "with": "MBN"},
        "above": {"claim": "c", "drop": "test_error", "at": 0.6, "with": "MBN", "above": "BN"},
        "rise": {"claim": "c", "rise": "train_error", "at": 0.6, "with": "MBN"},
    }
    for claim in claimed.values():
        verdicts = {v.place: v for v in claims.judge(claim, g, of)}
        assert verdicts["VGG"].outcome == outcome
        assert verdicts["ResNet-20"].outcome == claims.OPEN
        assert verdicts["ResNet-20"].interval.n == 0


def test_sentences():
    table = {BN: [7.0, 7.1, 7.3], MBN: [6.0, 6.2, 6.3], ("two forwards", "BN"): [6.0], ("two forwards", "MBN"): [7.0]}
    claim = {"claim": "MBN wins", "lower": "MBN", "than": "BN"}
    text = claims.sentence(claim, claims.judge(claim, GRID, measure(table)))
    assert text == (
        "MBN wins: holds for one forward (-0.97 [-1.11, -0.82], n = 3); is not decided at this n for two forwards "
        "(+1.00, n = 1)."
    )
    text = claims.sentence(claim, claims.judge(claim, GRID, measure({})))
    assert text == "MBN wins: is not decided at this n (n = 0)."


def test_claims_that_mean_nothing_are_refused():
    for claim in ({"claim": "c"}, {"claim": "c", "lower": "MBN", "than": "two forwards"}):
        with pytest.raises(UserError):
            claims.judge(claim, GRID, measure({}))


@pytest.mark.parametrize("name", grid.names())
def test_every_claim_of_a_grid_can_be_judged(name):
    g = grid.read(name)
    assert g.claims
    for claim in g.claims:
        verdicts = claims.judge(claim, g, lambda cell: {})
        assert verdicts, yaml.dump(claim)
        assert {v.outcome for v in verdicts} == {claims.OPEN}
