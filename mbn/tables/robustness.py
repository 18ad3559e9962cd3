"""The page of the same differences under other assumptions than those of the tables: a pure function of the records."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

from mbn.methods import METHODS
from mbn.tables.cells import Table, network, pooled_with
from mbn.tables.measures import TEST_ERROR, Record
from mbn.tables.over_seeds import (
    CONFIDENCE,
    ROUNDING,
    Contrast,
    Sample,
    Values,
    around,
    contrast,
    holm,
    p_text,
    pooled,
    satterthwaite,
    two_sided,
    weighted_mean,
)
from mbn.tables.page import pipes
from mbn.tables.places import Place, places, primary
from mbn.tables.run_cells import RunCell

ABOUT = (
    "The tables compare means of test errors unpaired, with one variance for all cells of a network and data set. "
    "Here are the same differences under other assumptions: those that claims name, and those to BN with one forward, "
    "wherever both cells have two runs or more. No p is corrected, and none of this decides a claim."
)
OF_DIFFERENCES = (
    "Differences [95 % interval], in percentage points. Pooled: as in the tables. Welch: each cell has a variance of "
    "its own. Permutation: the p of so large a difference of means, over all ways to deal the runs to the two cells. "
    "Paired: Student's test of the differences between runs of equal seeds, which share initial weights, the "
    "order of images and their augmentation. Allowing for GPUs: least squares over the runs whose variance is "
    "pooled, test error = the mean of the cell + b (1 if the run was on a GPU, in part or whole), with one variance. "
    "r: the correlation of equal seeds, from three on. Several networks together: the mean of their differences, "
    "weighted by precision. GN and NormProp are left out."
)
OF_PRIMARY = (
    "The mean over all places of a claim that have runs, except in one column weighted by precision as in the tables; "
    "p after Holm's correction for the three claims is in brackets. Equal weights: every place counts alike, as all "
    "will once each cell has its five seeds. Paired: at each place the mean of the differences between runs of equal "
    "seeds, whose variance is pooled over places as in the tables. One run left out: the corrected p, pooled, without "
    "any one of the claim's runs."
)
OF_CELLS = (
    "That cells differ in their variance is tested where two cells that pool it have three seeds or more: Brown and "
    "Forsythe's test goes by distances from the median, Levene's by those from the mean. A large p does not show that "
    "the variances are equal."
)
LEAST = 3


class Pair(NamedTuple):
    """Two cells, and the difference of their mean test errors as in the tables."""

    first: RunCell
    second: RunCell
    number: Contrast


@dataclass(frozen=True)
class Difference:
    """A difference with the ends of its 95 % interval, and p against zero (two-sided)."""

    mean: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        mean = round(self.mean, 2) + 0.0  # no -0.00
        return f"{mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}], {p_text(self.p)}"


def robustness_page(tables: dict[str, Table], cells: list[RunCell]) -> str:
    """Nothing where no two cells that are compared have two runs each."""
    cells = [cell for cell in cells if cell.planned and METHODS[cell.cell.config(0).norm.name].statistics]
    of_group: dict[str, list[RunCell]] = {}
    for cell in cells:
        of_group.setdefault(pooled_with(cell.cell), []).append(cell)
    effects = {group: GpuEffect.fit(some) for group, some in of_group.items()}
    compared = _compared(tables, cells)
    rows = [_row(pair, effects) for pair in compared]
    if not rows:
        return ""
    rows += _over_networks(compared, effects)
    head = ["", "n", "pooled", "Welch", "permutation", "paired (n)", "allowing for GPUs", "r (n)"]
    parts = ["# Robustness", ABOUT, "## Differences", pipes([head, *rows]), OF_DIFFERENCES]
    if claims := _primary(tables, cells, effects):
        head = ["", "n", "pooled", "equal weights", "paired", "allowing for GPUs", "one run left out"]
        parts += ["## Primary claims", pipes([head, *claims]), OF_PRIMARY]
    parts.append("## Runs on a GPU")
    known = [f"- {name}: {effect.sentence()}" for name, effect in effects.items() if effect]
    parts += ["\n".join(known) or "No cell has runs on a GPU and others.", "## Standard deviations"]
    parts += [pipes(_deviations(cells)), OF_CELLS]
    if tested := _equal_variances(of_group):
        parts.append("\n".join(tested))
    return "\n\n".join(parts) + "\n"


def _compared(tables: dict[str, Table], cells: list[RunCell]) -> list[Pair]:
    """Two cells whose mean test errors a claim compares, and each cell with BN at its place; if both have two runs."""
    all_runs = next(iter(tables.values())).all_runs
    by_name = {cell.cell.name(0): cell for cell in cells}
    named = [
        tuple(cell.name(0) for cell in place.claim.cells[place.verdict.place])
        for place in places(tables)
        if not place.joint and place.claim.metric == TEST_ERROR.key and not place.claim.at
    ]
    named += [(cell.cell.name(0), cell.bn.name(0)) for cell in cells]
    pairs: dict[frozenset[str], Pair] = {}
    for names in named:
        if len({*names}) == 2 and {*names} <= by_name.keys():
            first, second = (by_name[name] for name in names)
            if min(len(_errors(first)), len(_errors(second))) > 1:
                samples = [s for cell in (first, second) if (s := all_runs.sample(cell.cell, TEST_ERROR))]
                pairs.setdefault(frozenset(names), Pair(first, second, contrast(samples, (1, -1))))
    return sorted(pairs.values(), key=lambda pair: cells.index(pair.first))


def _row(pair: Pair, effects: "dict[str, GpuEffect | None]") -> list[str]:
    first, second, number = pair
    a, b = _errors(first), _errors(second)
    equal = sorted(a.keys() & b.keys())
    pairs = [a[seed] for seed in equal], [b[seed] for seed in equal]
    where = first.place if first.place == second.place else f"{first.place} and {second.place}"
    return [
        f"{where}: {first.method} - {second.method}",
        number.n,
        _text(_difference_of(number)),
        _text(welch([*a.values()], [*b.values()])),
        p_text(permutation([*a.values()], [*b.values()])),
        _text(paired(*pairs), len(equal)),
        _text(allowing_for_gpus(number, effects)),
        _correlation(*pairs),
    ]


def _over_networks(compared: list[Pair], effects: "dict[str, GpuEffect | None]") -> list[list[str]]:
    """A row for each difference of two methods that several networks have at one batch size."""
    found: dict[str, dict[str, Contrast]] = {}
    for first, second, number in compared:
        if first.place == second.place and number.precision is not None:
            name = network(first.cell)
            what = f"{first.place.removeprefix(name)}: {first.method} - {second.method}"
            found.setdefault(what, {})[name] = number
    rows = []
    for what, by_network in found.items():
        if len(by_network) > 1:
            number, _ = weighted_mean([*by_network.values()])
            as_in_tables, gpus = map(_text, (_difference_of(number), allowing_for_gpus(number, effects)))
            rows.append([f"{' and '.join(by_network)}{what}", number.n, as_in_tables, "-", "-", "-", gpus, "-"])
    return rows


def _primary(tables: dict[str, Table], cells: list[RunCell], effects: "dict[str, GpuEffect | None]") -> list[list[str]]:
    """A row for each primary claim that has an interval."""
    claims = primary(tables)
    numbers = [claim.verdict.number for claim in claims]
    equal = [weighted_mean([part.verdict.number for part in claim.measured], equally=True)[0] for claim in claims]
    columns = [
        [_difference_of(number) for number in numbers],
        [_difference_of(number) for number in equal],
        [_difference_of(paired_over_places(claim, cells)) for claim in claims],
        [allowing_for_gpus(number, effects) for number in numbers],
    ]
    texts = zip(*map(_corrected, columns), strict=True)
    rows = zip(claims, numbers, texts, strict=True)
    return [
        [claim.name, number.n, *of_claim, _one_left_out(tables, claim)]
        for claim, number, of_claim in rows
        if number.p() is not None
    ]


def _one_left_out(tables: dict[str, Table], claim: Place) -> str:
    """Example: 0.027 to 0.105, above 0.05 in 7 of 14."""
    all_runs = next(iter(tables.values())).all_runs
    cells = [cell for part in claim.measured for cell in part.claim.cells[part.verdict.place]]
    names = dict.fromkeys(one["name"] for cell in cells for one in all_runs.of(cell).values())
    ps = []
    for left_out in names:
        records = {name: one for name, one in all_runs.records.items() if name != left_out}
        fewer = dataclasses.replace(all_runs, records=records, _spreads={})
        again = primary({name: dataclasses.replace(table, all_runs=fewer) for name, table in tables.items()})
        ps += [one.holm for one in again if one.name == claim.name]
    above = sum(p >= 1 - CONFIDENCE for p in ps)
    return f"{min(ps):.3f} to {max(ps):.3f}, above {1 - CONFIDENCE:.2f} in {above} of {len(ps)}"


def _corrected(column: list[Difference | None]) -> list[str]:
    """The texts of a column, with p after Holm's correction for all of it in brackets."""
    after = holm([None if one is None else one.p for one in column])
    return ["-" if one is None else f"{one} ({p:.3f})" for one, p in zip(column, after, strict=True)]


def paired_over_places(claim: Place, cells: list[RunCell]) -> Contrast:
    """A primary claim's mean over its places by the differences between runs of equal seeds.

    At each place their mean, whose variance is pooled over places as in the tables; the weights of places are those of
    the claim's own number. Empty where a measured place has no pair.
    """
    by_name = {cell.cell.name(0): cell for cell in cells}
    differences: dict[str, Values] = {}
    group_of: dict[str, str] = {}
    for part in claim.measured:
        x, y = (by_name[cell.name(0)] for cell in part.claim.cells[part.verdict.place])
        a, b = _errors(x), _errors(y)
        differences[x.cell.name(0)] = {seed: a[seed] - b[seed] for seed in a.keys() & b.keys()}
        group_of[x.cell.name(0)] = pooled_with(x.cell)
    if not differences or not all(differences.values()):
        return Contrast()
    spreads = {
        group: pooled(values for name, values in differences.items() if group_of[name] == group)
        for group in group_of.values()
    }
    samples = [
        Sample(name, statistics.fmean(values.values()), len(values), group_of[name], spreads[group_of[name]])
        for name, values in differences.items()
    ]
    return contrast(samples, weighted_mean([part.verdict.number for part in claim.measured])[1])


def _difference_of(number: Contrast) -> Difference | None:
    """None where it has no interval."""
    interval, p = number.interval(), number.p()
    return None if number.mean is None or interval is None or p is None else Difference(number.mean, *interval, p)


def allowing_for_gpus(number: Contrast, effects: "dict[str, GpuEffect | None]") -> Difference | None:
    """The same weighted sum of cells' means by the fits of their groups; of several, with Satterthwaite's degrees of
    freedom. None where one of them has no fit.
    """
    of_group: dict[str, dict[str, float]] = {}
    for sample, weight in number.parts:
        of_group.setdefault(sample.group, {})[sample.name] = weight
    fits = {group: fit for group in of_group if (fit := effects.get(group))}
    if not fits or len(fits) < len(of_group):
        return None
    sums = [(*fit.sum_of(of_group[group]), fit.freedom) for group, fit in fits.items()]
    return _difference(sum(mean for mean, *_ in sums), satterthwaite([(v, freedom) for _, v, freedom in sums]))


def _difference(mean: float, error: tuple[float, float]) -> Difference:
    return Difference(mean, *around(mean, error), two_sided(mean, error))


def _text(difference: Difference | None, n: int | None = None) -> str:
    return "-" if difference is None else f"{difference}" + (f" ({n})" if n is not None else "")


def welch(a: Sequence[float], b: Sequence[float]) -> Difference | None:
    """The difference of two means, each with a variance of its own; None where neither varies."""
    if len({*a}) == len({*b}) == 1:
        return None
    error = satterthwaite([(statistics.variance(some) / len(some), len(some) - 1) for some in (a, b)])
    return _difference(statistics.fmean(a) - statistics.fmean(b), error)


def permutation(a: Sequence[float], b: Sequence[float]) -> float:
    """p of the difference of two means over all ways to deal their values to two cells of these sizes (two-sided)."""
    both, distance = [*a, *b], abs(statistics.fmean(a) - statistics.fmean(b))
    total = math.fsum(both)
    sums = (math.fsum(some) for some in itertools.combinations(both, len(a)))
    distances = [abs(one / len(a) - (total - one) / len(b)) for one in sums]
    return sum(one >= distance - ROUNDING for one in distances) / len(distances)


def paired(a: Sequence[float], b: Sequence[float]) -> Difference | None:
    """The mean of a_i - b_i; None with fewer than two pairs, or where all differ alike."""
    if len(a) < 2 or math.isclose(np.ptp(np.subtract(a, b)), 0, abs_tol=ROUNDING):
        return None
    test = stats.ttest_rel(a, b)
    interval = test.confidence_interval(CONFIDENCE)
    return Difference(statistics.fmean(a) - statistics.fmean(b), interval.low, interval.high, test.pvalue)


def _correlation(a: Sequence[float], b: Sequence[float]) -> str:
    if len(a) < LEAST or len({*a}) == 1 or len({*b}) == 1:
        return "-"
    return f"{statistics.correlation(a, b):+.2f} ({len(a)})"


@dataclass(frozen=True)
class GpuEffect:
    """Test error = the cell's mean + b (1 if the run was on a GPU, in part or whole), by least squares over all runs.

    names: the cells, in the order of the coefficients, of which b is the last. covariance: of the coefficients.
    """

    names: tuple[str, ...]
    coefficients: np.ndarray
    covariance: np.ndarray
    freedom: int
    runs: int
    on_gpu: int

    @classmethod
    def fit(cls, cells: list[RunCell]) -> "GpuEffect | None":
        """None where no cell has runs of both kinds, or nothing is left to tell how much runs differ."""
        runs = [
            (cell.cell.name(0), _ran_on_gpu(cell.runs[seed]), error)
            for cell in cells
            for seed, error in _errors(cell).items()
        ]
        names = tuple(dict.fromkeys(name for name, *_ in runs))
        x = np.array([[*(float(name == one) for one in names), float(gpu)] for name, gpu, _ in runs])
        y = np.array([error for *_, error in runs])
        freedom = len(runs) - len(names) - 1
        if freedom < 1 or np.linalg.matrix_rank(x) <= len(names):
            return None
        b, *_ = np.linalg.lstsq(x, y)
        squares = float(((y - x @ b) ** 2).sum())
        if squares < ROUNDING**2:
            return None
        covariance = squares / freedom * np.linalg.inv(x.T @ x)
        return cls(names, b, covariance, freedom, len(runs), sum(gpu for _, gpu, _ in runs))

    def sum_of(self, weights: dict[str, float]) -> tuple[float, float]:
        """A weighted sum of cells' means, by their names, and its variance."""
        x = np.zeros(len(self.coefficients))
        for name, weight in weights.items():
            x[self.names.index(name)] = weight
        return float(x @ self.coefficients), float(x @ self.covariance @ x)

    def sentence(self) -> str:
        effect = _difference(float(self.coefficients[-1]), (math.sqrt(self.covariance[-1, -1]), self.freedom))
        return (
            f"of {self.runs} runs {self.on_gpu} were on a GPU, in part or whole. Within cells their test error differs "
            f"from that of the others by {effect}."
        )


def _ran_on_gpu(record: Record) -> bool:
    return "cuda" in record["device"]


def _errors(cell: RunCell) -> Values:
    return {seed: error for seed, one in cell.runs.items() if (error := TEST_ERROR(one)) is not None}


def _deviations(cells: list[RunCell]) -> list[list[str]]:
    rows = [["", "seeds", "mean", "standard deviation", "range"]]
    for cell in cells:
        if len(errors := [*_errors(cell).values()]) > 1:
            spread = f"{min(errors):.2f} to {max(errors):.2f}"
            mean, sd = statistics.fmean(errors), statistics.stdev(errors)
            rows.append([cell.label, str(len(errors)), f"{mean:.2f}", f"{sd:.2f}", spread])
    return rows


def _equal_variances(of_group: dict[str, list[RunCell]]) -> list[str]:
    """A line for each group that pools its variance, with two cells of three seeds or more, of which one varies."""
    lines = []
    for name, cells in of_group.items():
        errors = [[*_errors(cell).values()] for cell in cells if len(_errors(cell)) >= LEAST]
        if len(errors) > 1 and any(len({*some}) > 1 for some in errors):
            tests = f"Brown and Forsythe's {_levene(errors, 'median')}, Levene's {_levene(errors, 'mean')}"
            lines.append(f"- {name}, {len(errors)} cells: {tests}")
    return lines


def _levene(some: list[list[float]], center: str) -> str:
    return p_text(float(stats.levene(*some, center=center).pvalue))
