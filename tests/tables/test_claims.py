"""Every outcome of every form of claim, and what is refused when a table is read."""

from fractions import Fraction

import pytest
import yaml
from scipy import stats

from mbn import grid
from mbn.system.errors import UserError
from mbn.tables import claims, measures
from mbn.tables.cells import AllRuns

FIGURE1, FIGURE2 = grid.read("figure1"), grid.read("figure2")
LOWER = {"claim": "MBN wins", "lower": "MBN", "than": "BN", "in": ["one forward"]}
EQUAL = {"claim": "no matter", "equal": ["MBN", "BN"], "within": 0.25, "in": ["one forward"]}
GAIN = {"claim": "it gains", "gain": ["one forward", "two forwards"], "of": "MBN", "above": "BN"}
DROP = {"claim": "it drops", "drop": "test_error", "at": 0.6, "with": "MBN"}
RISE = {"claim": "it rises", "rise": "train_error", "at": 0.6, "with": "MBN"}


def all_runs(g, cells):
    """cells: (row, column) -> records by seed."""
    named = {g.cell(*place).name(seed): one for place, runs in cells.items() for seed, one in runs.items()}
    return AllRuns((g,), named)


def judged(content, numbers):
    """A claim and its verdicts. numbers: (row, column) -> test errors by seed."""
    cells = {key: {s: {"test_error": error} for s, error in enumerate(errors)} for key, errors in numbers.items()}
    claim = grid.read_claim(FIGURE1, content)
    return claim, claims.judge(claim, all_runs(FIGURE1, cells))


@pytest.mark.parametrize(
    ("content", "mbn", "bn", "outcome"),
    [
        (LOWER, [6.0, 6.1, 6.2], [6.9, 7.0, 7.2], claims.HOLDS),
        (LOWER, [6.9, 7.0, 7.2], [6.0, 6.1, 6.2], claims.FAILS),
        (LOWER, [6.0, 7.1, 6.2], [6.5, 6.6], claims.OPEN),
        (LOWER, [], [7.0, 7.1], claims.OPEN),
        (EQUAL, [6.00, 6.10, 6.20], [6.01, 6.09, 6.21], claims.HOLDS),
        (EQUAL, [6.9, 7.0, 7.2], [6.0, 6.1, 6.2], claims.FAILS),
        (EQUAL, [6.0, 6.1, 6.2], [6.9, 7.0, 7.2], claims.FAILS),
        (EQUAL, [6.0, 6.8, 6.3], [6.2, 6.0, 6.2], claims.OPEN),
        (GAIN, [6.9, 7.3, 7.2], [6.0, 6.1, 6.2], claims.HOLDS),
        (GAIN, [6.0, 6.1, 6.2], [6.9, 7.0, 7.2], claims.FAILS),
        (GAIN, [6.0, 7.1, 6.2], [6.5, 6.6, 6.3], claims.OPEN),
    ],
)
def test_outcomes_of_differences_and_gains(content, mbn, bn, outcome):
    numbers = {("one forward", "MBN"): mbn, ("one forward", "BN"): bn}
    after = {("two forwards", "MBN"): [6.1, 6.2, 6.3], ("two forwards", "BN"): [6.0, 6.1, 6.2]}
    _, (verdict,) = judged(content, numbers | (after if content is GAIN else {}))
    assert (verdict.place, verdict.outcome) == ("" if content is GAIN else "one forward", outcome)
    assert verdict.has_run == bool(mbn)
    if mbn:
        means = sum(mbn) / len(mbn) - sum(bn) / len(bn) - (0.1 if content is GAIN else 0)
        assert verdict.number.mean == pytest.approx(means)


def test_an_equality_is_judged_by_two_one_sided_tests():
    """It holds within 0.28 and not within 0.27, as scipy's test of the side that decides says; 95 % is wider."""
    x, y = [6.0, 6.2, 6.1, 6.3], [6.1, 6.3, 6.2, 6.4]
    numbers = {("one forward", "MBN"): x, ("one forward", "BN"): y}
    for margin, outcome in ((0.27, claims.OPEN), (0.28, claims.HOLDS)):
        claim, (verdict,) = judged(EQUAL | {"within": margin}, numbers)
        one_sided = stats.ttest_ind([a + margin for a in x], y, alternative="greater").pvalue
        assert (verdict.outcome, one_sided < 0.05) == (outcome, outcome == claims.HOLDS)
        assert verdict.number.interval()[0] < -0.28
        assert f"n = 4+4, 90 % [-0.28, +0.08], margin {margin}: {outcome}" in claims.listed(claim, [verdict])


def test_an_equality_fails_by_the_interval_of_95_percent():
    """The difference is 0.5, its standard error 0.1 with 4 degrees of freedom: 90 % [0.29, 0.71], 95 % [0.22, 0.78]."""
    x, y = [6.5, 6.5 - 0.1225, 6.5 + 0.1225], [6.0, 6.0 - 0.1225, 6.0 + 0.1225]
    numbers = {("one forward", "MBN"): x, ("one forward", "BN"): y}
    for margin, outcome in ((0.25, claims.OPEN), (0.2, claims.FAILS)):
        _, (verdict,) = judged(EQUAL | {"within": margin}, numbers)
        assert verdict.number.interval(0.9)[0] > margin
        assert (verdict.number.interval()[0] > margin) == (outcome == claims.FAILS)
        assert verdict.outcome == outcome


def test_a_joint_number_has_one_of_the_paper_only_where_all_its_places_have():
    content = {"claim": "the second forward helps", "lower": "two forwards", "than": "one forward"}
    rows, numbers = ("one forward", "two forwards"), {}
    for column in ("BN", "MBN"):
        numbers |= {(row, column): [6.0, 6.2] for row in rows}
    claim, verdicts = judged(content, numbers)
    assert claims.joint(claim, verdicts).paper == pytest.approx((-0.16 - 0.30) / 2)
    claim, verdicts = judged(content, numbers | {(row, "BRN"): [6.0, 6.2] for row in rows})
    assert [v.paper is None for v in verdicts if v.has_run].count(True) == 1
    assert claims.joint(claim, verdicts).paper is None


def test_the_papers_number_is_excluded_where_one_more_pair_of_runs_would_hardly_give_it():
    table4 = grid.read("table4")
    for mbn, excluded in (([15.5, 16.0], True), ([13.0, 13.6], False)):
        cells = {("8", "MBN"): mbn, ("8", "BN"): [15.6, 15.4]}
        runs = all_runs(table4, {k: {s: {"test_error": e} for s, e in enumerate(v)} for k, v in cells.items()})
        verdict = claims.judge(table4.claims[0], runs)[0]
        assert verdict.excluded == excluded
        # The variance of the means' difference is sd² (1/2 + 1/2); that of one more pair's, 2 sd², comes to it.
        alone = stats.ttest_ind([m + 4.27 for m in mbn], cells["8", "BN"])
        assert alone.pvalue < 0.05
        p = 2 * stats.t.sf(abs(alone.statistic) / 3**0.5, 2)
        said = f"the paper's -4.27 is {'' if excluded else 'not '}excluded (p = {p:.3f})"
        assert verdict.against_paper == said


def test_a_claim_at_several_places_has_a_joint_number():
    """One seed a cell is enough where the variance is known from elsewhere; each place has its precision's weight."""
    table4 = grid.read("table4")
    cells = {("8", "MBN"): [15.0, 15.4], ("8", "BN"): [16.0, 16.2]}
    cells |= {("16", "MBN"): [12.0], ("16", "BN"): [12.4], ("32", "BN"): [9.0]}
    runs = all_runs(table4, {k: {s: {"test_error": e} for s, e in enumerate(v)} for k, v in cells.items()})
    (claim,) = table4.claims
    verdicts = claims.judge(claim, runs)
    joint = claims.joint(claim, verdicts)
    # Variances 1/2 + 1/2 and 1 + 1, so that batch 8 has two thirds.
    assert joint.number.mean == pytest.approx(2 / 3 * -0.9 + 1 / 3 * -0.4)
    assert joint.paper == pytest.approx(2 / 3 * -4.27 + 1 / 3 * -1.39)
    assert joint.number.precision**-1 == pytest.approx((0.08 + 0.02) / 2 * (4 / 9 + 2 / 9))
    assert (joint.place, joint.number.ns, joint.excluded) == (claims.TOGETHER, (3, 3), True)
    assert claims.joint(claim, verdicts[1:]) is None  # one place alone
    assert claims.joint(claim, verdicts[1:], several=1).number.mean == pytest.approx(-0.4)


def test_cells_without_weight_decay_on_gamma_and_beta_pool_their_variance_apart():
    """The two cells have the interval of a t test of them alone; across both kinds each has its own kind's variance."""
    no_decay = grid.read("table4-no-decay")
    errors = {"BN": [15.0, 15.2], "MBN": [16.0, 16.1], "BN no decay": [16.0, 19.0], "MBN no decay": [15.5, 15.6]}
    runs = all_runs(no_decay, {("8", k): {s: {"test_error": e} for s, e in enumerate(v)} for k, v in errors.items()})
    found = {claim.number: claims.judge(claim, runs)[0].number for claim in no_decay.claims}
    apart = stats.ttest_ind(errors["MBN no decay"], errors["BN no decay"]).confidence_interval(0.95)
    assert found["MBN no decay - BN no decay"].interval() == pytest.approx(tuple(apart))
    with_decay, without = (0.02 + 0.005) / 2, (4.5 + 0.005) / 2
    assert found["BN - BN no decay"].precision ** -1 == pytest.approx(with_decay / 2 + without / 2)


def test_places_without_a_number_say_why():
    table4 = grid.read("table4")
    lost, sound = {"test_error": None, "diverged_at": 7}, {"test_error": 6.0}
    cells = {("8", "MBN"): {0: sound}, ("8", "BN"): {0: sound}, ("16", "MBN"): {0: sound}, ("32", "BN"): {0: lost}}
    claim = table4.claims[0]
    _, first, *rest = claims.listed(claim, claims.judge(claim, all_runs(table4, cells))).splitlines()
    assert first.startswith("  - 8: MBN - BN = +0.00")
    assert rest == ["  - 16; 64; 128: not measured yet", "  - 32: not compared, because training diverges"]


def test_seeds_that_diverged_have_no_part_in_a_claim():
    lost = {"test_error": None, "train_error": None, "curves": {}, "images": 100, "diverged_at": 7}
    sound = [{"test_error": error} for error in (6.0, 6.2)]
    cells = {("one forward", "MBN"): dict(enumerate([*sound, lost])), ("one forward", "BN"): {0: lost}}
    claim = grid.read_claim(FIGURE1, LOWER)
    verdicts = (verdict,) = claims.judge(claim, all_runs(FIGURE1, cells))
    assert (verdict.has_run, verdict.diverges) == (False, True)
    assert claims.listed(claim, verdicts) == "- MBN wins (exploratory): not compared, because training diverges"
    cells["one forward", "BN"][1] = {"test_error": 7.0}
    (verdict,) = claims.judge(claim, all_runs(FIGURE1, cells))
    assert not verdict.diverges
    assert (verdict.number.n, verdict.number.mean) == ("2 (1 diverged)+1 (1 diverged)", pytest.approx(-0.9))
    (drop, *_) = [claim for claim in FIGURE2.claims if isinstance(claim, grid.Drop)]
    runs = all_runs(FIGURE2, {("VGG", "MBN"): {0: lost}})
    assert not any(v.has_run for v in claims.judge(drop, runs))


def curve(test_errors=(), train_errors=(), points=20):
    images = [100 * (i + 1) for i in range(points)]
    return {
        "images": 100 * points,
        "curves": {"images": images, "test_error": test_errors, "train_error": train_errors},
    }


def test_a_drop_is_the_mean_before_less_the_mean_after():
    # Twenty points: the windows at 60 % hold the point at 60 % and the one at 65 %; forty points have two in each.
    record = curve(test_errors=[9.0] * 11 + [8.0, 6.5] + [1.0] * 7)
    assert measures.drop(record, "test_error", Fraction(6, 10)) == pytest.approx(1.5)
    record = curve(test_errors=[9.0] * 22 + [8.0, 7.0, 5.0, 6.0] + [1.0] * 14, points=40)
    assert measures.drop(record, "test_error", Fraction(6, 10)) == pytest.approx(2.0)
    assert measures.drop(curve(test_errors=[1.0], points=1), "test_error", Fraction(6, 10)) is None


def test_a_rise_is_the_first_point_after_less_the_last_before():
    record = curve(train_errors=[3.0] * 7 + [2.0, 2.75, 1.0] + [0.0] * 10)
    assert measures.rise(record, "train_error", Fraction(4, 10)) == pytest.approx(0.75)
    assert measures.rise(curve(points=0), "train_error", Fraction(4, 10)) is None


@pytest.mark.parametrize("content", [DROP, DROP | {"above": "BN"}, RISE])
@pytest.mark.parametrize(
    ("drops", "outcome"),
    [((1.0, 1.2, 1.1), claims.HOLDS), ((-1.0, -1.2, -1.1), claims.FAILS), ((1.0, -1.2, 0.3), claims.OPEN)],
)
def test_outcomes_of_curves(content, drops, outcome):
    falls = {s: curve([9.0] * 12 + [9.0 - d] * 8, [1.0] * 12 + [1.0 + d] + [0.0] * 7) for s, d in enumerate(drops)}
    falls[3] = curve()
    flat = {s: curve([9.0] * 12 + [9.0 - 0.01 * s] * 8, [1.0] * 20) for s in range(4)}
    runs = all_runs(FIGURE2, {("VGG", "MBN"): falls, ("VGG", "BN"): flat})
    found = claims.judge(grid.read_claim(FIGURE2, content), runs)
    assert [(v.place, v.outcome, v.number.ns[:1]) for v in found] == [
        *(("ResNet-20", claims.OPEN, ()), ("ResNet-56", claims.OPEN, ()), ("VGG", outcome, (3,))),
    ]


def test_a_claim_with_its_verdicts_is_a_list():
    content = {"claim": "the second forward helps", "lower": "two forwards", "than": "one forward"}
    numbers = {("one forward", "BN"): [7.0, 7.1, 7.3], ("two forwards", "BN"): [6.0, 6.2, 6.3]}
    numbers |= {("one forward", "MBN"): [6.0], ("two forwards", "MBN"): [7.0], ("one forward", "BRN"): [6.0]}
    claim, verdicts = judged(content, numbers)
    number = "two forwards - one forward"
    assert claims.listed(claim, verdicts).splitlines() == [
        "- The second forward helps (exploratory)",
        f"  - BN: {number} = -0.97 [-1.31, -0.62], n = 3+3, p = 0.001: holds; the paper's -0.16 is "
        "excluded (p = 0.032)",
        f"  - MBN: {number} = +1.00 [+0.40, +1.60], n = 1+1, p = 0.010: does not hold; the paper's -0.30 is excluded "
        "(p = 0.013)",
        f"  - together: {number} = -0.47 [-0.77, -0.18], n = 4+4, p = 0.012: holds; the paper's -0.20 is not excluded "
        "(p = 0.238)",
        "  - BRN: not measured yet",
    ]
    primary, verdicts = judged(content | {"primary": "two forwards < one (MBN)"}, {})
    said = "- The second forward helps (part of the primary claim two forwards < one (MBN)): not measured yet"
    assert claims.listed(primary, verdicts) == said
    claim, (verdict,) = judged(GAIN, {(row, column): [6.0] for row in FIGURE1.rows for column in FIGURE1.columns})
    assert str(verdict.number) == "+0.00, n = 1 each"
    line = claims.listed(claim, [verdict]).splitlines()[1]
    assert line == "  - gain of MBN - gain of BN = +0.00, n = 1 each: undecided (no interval: too few runs)"


def test_the_papers_difference():
    table4 = grid.read("table4")
    assert claims.printed(table4.claims[0], "8") == pytest.approx(15.37 - 19.64)
    (mbn, brn, gain) = FIGURE1.claims
    assert claims.printed(mbn, "MBN") == pytest.approx(6.23 - 6.53)
    assert claims.printed(brn, "BRN") == -0.47  # the paper prints the difference alone
    assert claims.printed(gain, "") == pytest.approx((6.53 - 6.23) - (6.97 - 6.81))
    assert claims.printed(grid.read("table6").claims[0], "ResNet-20") == pytest.approx(7.87 - 7.80)
    assert all(claims.printed(claim, "VGG") is None for claim in FIGURE2.claims)


@pytest.mark.parametrize(
    "wrong",
    [
        {"claim": "c"},
        "c",
        {"lower": "MBN", "than": "BN"},
        LOWER | {"than": "two forwards"},
        LOWER | {"than": "GN"},
        LOWER | {"in": ["three forwards"]},
        LOWER | {"within": 1},
        LOWER | {"primary": "MBN < GN"},
        LOWER | {"primary": "MBN < BN", "metric": "train_error"},
        EQUAL | {"primary": "MBN < BN"},
        LOWER | {"metric": "errors"},
        EQUAL | {"within": "little"},
        EQUAL | {"equal": ["MBN"]},
        GAIN | {"gain": ["one forward", "three forwards"]},
        DROP | {"at": "late"},
        DROP | {"drop": "errors"},
        RISE | {"above": "BN"},
        LOWER | {"in": ["one forward", "two forwards"], "paper": "-0.47"},  # of which place?
        LOWER | {"in": ["one forward"], "paper": "much"},
        EQUAL | {"in": ["one forward"], "paper": "-0.47"},
    ],
    ids=str,
)
def test_a_claim_that_means_nothing_is_refused_when_its_table_is_read(wrong, tmp_path):
    content = yaml.safe_load((grid.GRIDS / "figure1.yaml").read_text())
    (tmp_path / "mine.yaml").write_text(yaml.dump(content | {"claims": [wrong]}))
    with pytest.raises(UserError, match=r"mine\.yaml: the claim .* means nothing"):
        grid.read("mine", tmp_path)


def test_a_claim_about_quoted_numbers_alone_is_refused():
    table3 = grid.read("table3")
    with pytest.raises(ValueError, match="nothing is run"):
        grid.read_claim(table3, {"claim": "c", "lower": "MBN", "than": "BN", "in": ["GoogLeNet"]})
