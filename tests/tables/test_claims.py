"""Every outcome of every form of claim, and what is refused when a table is read."""

from fractions import Fraction

import pytest
import yaml

from mbn import grid
from mbn.system.errors import UserError
from mbn.tables import claims

FIGURE1, FIGURE2 = grid.read("figure1"), grid.read("figure2")
LOWER = {"claim": "MBN wins", "lower": "MBN", "than": "BN", "in": ["one forward"]}
EQUAL = {"claim": "no matter", "equal": ["MBN", "BN"], "within": 0.25, "in": ["one forward"]}
GAIN = {"claim": "it gains", "gain": ["one forward", "two forwards"], "of": "MBN", "above": "BN"}
DROP = {"claim": "it drops", "drop": "test_error", "at": 0.6, "with": "MBN"}
RISE = {"claim": "it rises", "rise": "train_error", "at": 0.6, "with": "MBN"}


def judge(content, numbers):
    """numbers: (row, column) -> test errors by seed."""
    cells = {key: {s: {"test_error": error} for s, error in enumerate(errors)} for key, errors in numbers.items()}
    return claims.judge(grid.read_claim(FIGURE1, content), lambda cell: cells.get((cell.row, cell.column), {}))


@pytest.mark.parametrize(
    ("content", "mbn", "bn", "outcome"),
    [
        (LOWER, [6.0, 6.1, 6.2], [6.9, 7.0, 7.2], claims.HOLDS),
        (LOWER, [6.9, 7.0, 7.2], [6.0, 6.1, 6.2], claims.FAILS),
        (LOWER, [6.0, 7.1, 6.2], [6.5, 6.6, 6.3], claims.OPEN),
        (LOWER, [6.0], [7.0], claims.OPEN),
        (LOWER, [], [7.0, 7.1], claims.OPEN),
        (EQUAL, [6.00, 6.10, 6.20], [6.01, 6.09, 6.21], claims.HOLDS),
        (EQUAL, [6.0, 6.1, 6.2], [6.9, 7.0, 7.2], claims.FAILS),
        (EQUAL, [6.9, 7.0, 7.2], [6.0, 6.1, 6.2], claims.FAILS),
        (EQUAL, [6.0, 6.8, 6.3], [6.2, 6.0, 6.2], claims.OPEN),
        (GAIN, [6.9, 7.3, 7.2], [6.0, 6.1, 6.2], claims.HOLDS),
        (GAIN, [6.0, 6.1, 6.2], [6.9, 7.0, 7.2], claims.FAILS),
        (GAIN, [6.0, 7.1, 6.2], [6.5, 6.6, 6.3], claims.OPEN),
    ],
)
def test_outcomes_of_differences_and_gains(content, mbn, bn, outcome):
    numbers = {("one forward", "MBN"): mbn, ("one forward", "BN"): bn}
    numbers |= {("two forwards", "MBN"): [6.1, 6.4, 6.3, 1.0], ("two forwards", "BN"): [6.0, 6.1, 6.2]}
    (verdict,) = judge(content, numbers)
    assert (verdict.place, verdict.outcome) == ("" if content is GAIN else "one forward", outcome)
    after = (0.1, 0.3, 0.1) if content is GAIN else (0, 0, 0)
    found = [m - b - d for m, b, d in zip(mbn, bn, after, strict=False)]
    mean = pytest.approx(sum(found) / len(found)) if found else None
    assert (verdict.number.n, verdict.number.mean) == (len(found), mean)
    assert content is not EQUAL or verdict.needed is None  # it would be the number of seeds that shows a difference


def curve(test_errors=(), train_errors=(), points=20):
    images = [100 * (i + 1) for i in range(points)]
    return {
        "images": 100 * points,
        "curves": {"images": images, "test_error": test_errors, "train_error": train_errors},
    }


def test_a_drop_is_the_mean_before_less_the_mean_after():
    # Twenty points: the windows at 60 % hold the point at 60 % and the one at 65 %; forty points have two in each.
    record = curve(test_errors=[9.0] * 11 + [8.0, 6.5] + [1.0] * 7)
    assert claims.drop(record, "test_error", Fraction(6, 10)) == pytest.approx(1.5)
    record = curve(test_errors=[9.0] * 22 + [8.0, 7.0, 5.0, 6.0] + [1.0] * 14, points=40)
    assert claims.drop(record, "test_error", Fraction(6, 10)) == pytest.approx(2.0)
    assert claims.drop(curve(test_errors=[1.0], points=1), "test_error", Fraction(6, 10)) is None


def test_a_rise_is_the_first_point_after_less_the_last_before():
    record = curve(train_errors=[3.0] * 7 + [2.0, 2.75, 1.0] + [0.0] * 10)
    assert claims.rise(record, "train_error", Fraction(4, 10)) == pytest.approx(0.75)
    assert claims.rise(curve(points=0), "train_error", Fraction(4, 10)) is None


@pytest.mark.parametrize("content", [DROP, DROP | {"above": "BN"}, RISE])
@pytest.mark.parametrize(
    ("drops", "outcome"),
    [((1.0, 1.2, 1.1), claims.HOLDS), ((-1.0, -1.2, -1.1), claims.FAILS), ((1.0, -1.2, 0.3), claims.OPEN)],
)
def test_outcomes_of_curves(content, drops, outcome):
    falls = {s: curve([9.0] * 12 + [9.0 - d] * 8, [1.0] * 12 + [1.0 + d] + [0.0] * 7) for s, d in enumerate(drops)}
    falls[3] = curve()
    flat = {s: curve([9.0] * 12 + [9.0 - 0.01 * s] * 8, [1.0] * 20) for s in range(4)}
    runs = {"MBN": falls, "BN": flat}
    judged = claims.judge(
        grid.read_claim(FIGURE2, content), lambda cell: runs[cell.column] if cell.row == "VGG" else {}
    )
    assert [(v.place, v.outcome, v.number.n) for v in judged] == [
        *(("ResNet-20", claims.OPEN, 0), ("ResNet-56", claims.OPEN, 0), ("VGG", outcome, 3)),
    ]


def test_a_claim_with_its_verdicts_is_a_list():
    content = {"claim": "the second forward helps", "lower": "two forwards", "than": "one forward"}
    numbers = {("one forward", "BN"): [7.0, 7.1, 7.3], ("two forwards", "BN"): [6.0, 6.2, 6.3]}
    numbers |= {("one forward", "MBN"): [6.0], ("two forwards", "MBN"): [7.0], ("one forward", "BRN"): [6.0]}
    claim = grid.read_claim(FIGURE1, content)
    assert claims.listed(claim, judge(content, numbers)).splitlines() == [
        "- The second forward helps",
        "  - BN: two forwards - one forward = -0.97 [-1.11, -0.82], n = 3: the claim holds",
        "  - MBN: two forwards - one forward = +1.00, n = 1: not decided yet, 7 seeds would",
        "  - BRN: not measured yet",
    ]
    assert claims.listed(claim, judge(content, {})) == "- The second forward helps: not measured yet"
    (verdict,) = judge(GAIN, {(row, column): [6.0] for row in FIGURE1.rows for column in FIGURE1.columns})
    assert str(verdict.number) == "+0.00, n = 1"
    line = claims.listed(grid.read_claim(FIGURE1, GAIN), [verdict]).splitlines()[1]
    assert line == "  - gain of MBN - gain of BN = +0.00, n = 1: not decided yet"


def test_the_papers_difference():
    table4 = grid.read("table4")
    assert claims.printed(table4.claims[0], "8") == pytest.approx(15.37 - 19.64)
    (mbn, brn, gain) = FIGURE1.claims
    assert claims.printed(mbn, "MBN") == pytest.approx(6.23 - 6.53)
    assert claims.printed(brn, "BRN") is None  # the paper prints neither
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
        LOWER | {"metric": "errors"},
        EQUAL | {"within": "little"},
        EQUAL | {"equal": ["MBN"]},
        GAIN | {"gain": ["one forward", "three forwards"]},
        DROP | {"at": "late"},
        DROP | {"drop": "errors"},
        RISE | {"above": "BN"},
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
