"""Statistics over seeds, and what they say of the paper's claims: it holds, it does not, or it is not decided."""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mbn.grid import Cell, Grid
from mbn.system.errors import UserError

# A number for each seed, and the record of each seed's run.
Values = dict[int, float]
Runs = dict[int, dict[str, Any]]

HOLDS, FAILS, OPEN = "holds", "does not hold", "is not decided at this n"
CONFIDENCE = 0.95
# Share of training over which the test error is averaged before and after an instant: ten epochs of the paper's 200.
WINDOW = Fraction(1, 20)
# Standard deviation of a test error (percent) over seeds, where few have run: that of six published reruns of one
# ResNet-56 script on CIFAR-10, 6.89 to 8.42 %.
ASSUMED_SD = 0.54
ASSUMED_RUNS = 6
POWER = 0.8
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Interval:
    """Mean of n values and its confidence interval by Student's t; low and high are None where there is none."""

    n: int
    mean: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        """Example: -0.48 [-0.71, -0.25], n = 5."""
        if self.mean is None:
            return f"n = {self.n}"
        around = f" [{self.low:+.2f}, {self.high:+.2f}]" if self.low is not None else ""
        return f"{self.mean:+.2f}{around}, n = {self.n}"


@dataclass(frozen=True)
class Difference:
    """a - b paired over the seeds that both have, and p by the paired test and by Welch's over all seeds of each."""

    interval: Interval
    p: float | None
    welch: float | None


def interval(values: Iterable[float]) -> Interval:
    """mean ± t(0.975, n - 1) sd / sqrt(n).

    There is none for fewer than two values, nor for values that are all equal: errors are counts of images, so that
    two seeds may agree by chance, which says nothing about the next one.
    """
    numbers = list(values)
    n = len(numbers)
    if n == 0:
        return Interval(0, None, None, None)
    mean = statistics.fmean(numbers)
    if n < 2 or _same(numbers):
        return Interval(n, mean, None, None)
    from scipy import stats

    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * statistics.stdev(numbers) / math.sqrt(n)
    return Interval(n, mean, mean - half, mean + half)


def seeds_to_decide(i: Interval) -> int | None:
    """Seeds with which the paired t test (two-sided, 5 %) sees a difference as large as the mean with 80 % power.

    The differences' variance is pooled by degrees of freedom from these seeds, s² with n - 1, and from the published
    reruns, 2 ASSUMED_SD² with ASSUMED_RUNS - 1: two seeds alone that happen to agree would promise far too few. None
    without a mean, for a mean of 0, and above MOST_SEEDS.
    """
    from scipy import stats

    if not i.mean:
        return None
    squares, freedom = 2 * ASSUMED_SD**2 * (ASSUMED_RUNS - 1), ASSUMED_RUNS - 1
    if i.low is not None and i.high is not None:
        s = (i.high - i.low) / 2 * math.sqrt(i.n) / float(stats.t.ppf((1 + CONFIDENCE) / 2, i.n - 1))
        squares, freedom = squares + (i.n - 1) * s**2, freedom + i.n - 1
    sd = math.sqrt(squares / freedom)
    for n in range(2, MOST_SEEDS + 1):
        threshold = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
        if stats.nct.sf(threshold, n - 1, abs(i.mean) / sd * math.sqrt(n)) >= POWER:
            return n
    return None


def difference(a: Values, b: Values) -> Difference:
    """a - b. Positive: a is larger."""
    from scipy import stats

    common = sorted(a.keys() & b.keys())
    deltas = [a[s] - b[s] for s in common]
    p = welch = None
    if len(common) >= 2 and not _same(deltas):
        p = float(stats.ttest_rel([a[s] for s in common], [b[s] for s in common]).pvalue)
    if len(a) >= 2 and len(b) >= 2 and not (_same(list(a.values())) or _same(list(b.values()))):
        welch = float(stats.ttest_ind(list(a.values()), list(b.values()), equal_var=False).pvalue)
    return Difference(interval(deltas), p, welch)


def _same(numbers: list[float]) -> bool:
    # Differences of decimals such as 7.1 - 6.9 and 7.2 - 7.0 are equal but for rounding.
    return max(numbers) - min(numbers) < 1e-9


@dataclass(frozen=True)
class Verdict:
    """What the numbers say in one row or column (place; empty where there is only one)."""

    place: str
    outcome: str
    interval: Interval


Measure = Callable[[Cell], Runs]


def judge(claim: dict[str, Any], grid: Grid, measure: Measure) -> list[Verdict]:
    """Decide a claim of a grid in each row or column that it spans.

    claim: one of
      lower: X, than: Y [, in: places] [, metric: field]    X - Y < 0
      equal: [X, Y], within: margin                          |X - Y| < margin
      gain: [from, to], of: A, above: B                      (A at from - A at to) - (B at from - B at to) > 0
      drop: curve, at: share, with: X [, above: Y]           the fall of the curve there, less that of Y, > 0
      rise: curve, at: share, with: X                        the rise of the curve there > 0
    X and Y are both rows or both columns; for a gain, from and to are of the one kind and A and B of the other.
    measure: the runs of a cell. Errors: UserError for a claim that is none of these.
    """
    kind = next((k for k in ("lower", "equal", "gain", "drop", "rise") if k in claim), None)
    if kind is None:
        raise UserError(f"{grid.name}: the claim {claim.get('claim')!r} is of no known form.")
    field = claim.get("metric", grid.metrics[0])
    wanted = {"lower": ("lower", "than"), "equal": (), "gain": ("of", "above")}.get(kind, ("with", "above"))
    labels = [claim[key] for key in wanted if key in claim] if kind != "equal" else list(claim["equal"])

    if kind == "gain":
        start, end = claim["gain"]
        corners = [[_at(grid, label, place) for place in (start, end)] for label in labels]
        a, b = ([values(measure(cell), field) for cell in pair] for pair in corners)
        common = sorted(a[0].keys() & a[1].keys() & b[0].keys() & b[1].keys())
        gains = interval((a[0][s] - a[1][s]) - (b[0][s] - b[1][s]) for s in common)
        return [Verdict("", _above_zero(gains), gains)]

    places = _places(grid, labels)
    verdicts = []
    for place in claim.get("in", places):
        cells = [_at(grid, label, place) for label in labels]
        if any(cell.overrides is None for cell in cells):
            continue
        runs = [measure(cell) for cell in cells]
        if kind in ("drop", "rise"):
            at = Fraction(repr(claim["at"]))
            change = drop if kind == "drop" else rise
            numbers = [_known({s: change(r, claim[kind], at) for s, r in one.items()}) for one in runs]
        else:
            numbers = [values(one, field) for one in runs]
        found = difference(*numbers).interval if len(numbers) == 2 else interval(numbers[0].values())
        if kind == "lower":
            outcome = _above_zero(_negative(found))
        elif kind == "equal":
            outcome = _within(found, float(claim["within"]))
        else:
            outcome = _above_zero(found)
        verdicts.append(Verdict(place if len(places) > 1 else "", outcome, found))
    return verdicts


def printed(claim: dict[str, Any], grid: Grid, place: str) -> float | None:
    """The paper's own difference for a claim of the form X lower than Y at a place; None where it prints none."""
    if "lower" not in claim:
        return None
    field = claim.get("metric", grid.metrics[0])
    labels = [claim["lower"], claim["than"]]
    if not place:
        place = claim.get("in", _places(grid, labels))[0]
    x, y = (_at(grid, label, place).paper.get(field) for label in labels)
    return None if x is None or y is None else float(x) - float(y)


def sentence(claim: dict[str, Any], verdicts: list[Verdict]) -> str:
    """Example: MBN has a lower test error than BN: holds for VGG (-0.48 [-0.71, -0.25], n = 5)."""
    parts = []
    for outcome in (HOLDS, FAILS, OPEN):
        those = [v for v in verdicts if v.outcome == outcome]
        if those and len({v.interval.n for v in those}) == 1 and those[0].interval.n == 0 and len(those) > 1:
            named = "" if len(those) == len(verdicts) else f" for {_list([v.place for v in those])}"
            parts.append(f"{outcome}{named} (n = 0)")
        elif those:
            shown = [f"{v.place} ({v.interval})" if v.place else f"({v.interval})" for v in those]
            parts.append(f"{outcome}{' for' if those[0].place else ''} {_list(shown)}")
    return f"{claim['claim'][0].upper()}{claim['claim'][1:]}: {'; '.join(parts)}."


def values(runs: Runs, field: str) -> Values:
    """One field of the records, by seed, but for those that have none."""
    return _known({seed: record[field] for seed, record in runs.items()})


def drop(record: dict[str, Any], key: str, at: Fraction) -> float | None:
    """How far a curve falls at a share of training: its mean over the WINDOW before less that over the WINDOW after.

    A point stands for the epoch that ends there: one that ends at the very instant is before it. None without points
    in either window.
    """
    before = [y for x, y in _points(record, key) if at - WINDOW < x <= at]
    after = [y for x, y in _points(record, key) if at < x <= at + WINDOW]
    if not before or not after:
        return None
    return statistics.fmean(before) - statistics.fmean(after)


def rise(record: dict[str, Any], key: str, at: Fraction) -> float | None:
    """How far a curve rises at once at a share of training: the first point after it less the last one before.

    The training error of a point is the mean over its epoch: a moment shorter than an epoch is seen as its mean.
    """
    before = [y for x, y in _points(record, key) if x <= at]
    after = [y for x, y in _points(record, key) if x > at]
    if not before or not after:
        return None
    return after[0] - before[-1]


def _points(record: dict[str, Any], key: str) -> list[tuple[Fraction, float]]:
    curves = record["curves"]
    total = record["images"]
    return [(Fraction(i, total), y) for i, y in zip(curves.get("images", []), curves.get(key, []), strict=False)]


def _known(numbers: dict[int, Any]) -> Values:
    return {seed: number for seed, number in numbers.items() if number is not None}


def _places(grid: Grid, labels: list[str]) -> list[str]:
    """The columns where the labels are rows, the rows where they are columns."""
    if all(label in grid.rows for label in labels):
        return list(grid.columns)
    if all(label in grid.columns for label in labels):
        return list(grid.rows)
    raise UserError(f"{grid.name}: {' and '.join(labels)} of a claim are neither all rows nor all columns.")


def _at(grid: Grid, label: str, place: str) -> Cell:
    for row, column in ((label, place), (place, label)):
        if row in grid.rows and column in grid.columns:
            return grid.cell(row, column)
    raise UserError(f"{grid.name}: a claim names {label} and {place}, which are no row and column.")


def _negative(i: Interval) -> Interval:
    if i.mean is None or i.low is None or i.high is None:
        return i
    return Interval(i.n, -i.mean, -i.high, -i.low)


def _above_zero(i: Interval) -> str:
    if i.low is None or i.high is None:
        return OPEN
    return HOLDS if i.low > 0 else FAILS if i.high < 0 else OPEN


def _within(i: Interval, margin: float) -> str:
    if i.low is None or i.high is None:
        return OPEN
    if -margin < i.low and i.high < margin:
        return HOLDS
    return FAILS if i.low > margin or i.high < -margin else OPEN


def _list(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
