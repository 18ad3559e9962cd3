"""The page of the same differences under other assumptions than those of the tables: a pure function of the records."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mbn.grid import Cell
from mbn.tables.cells import Table, network
from mbn.tables.measures import Measure, Record
from mbn.tables.over_seeds import CONFIDENCE, Values, p_text
from mbn.tables.page import pipes
from mbn.tables.places import Place, places
from mbn.tables.run_cells import RunCell

TEST_ERROR = Measure("test_error")
ABOUT = (
    "The tables compare means of test errors unpaired, with one variance for all cells of a network and data set. "
    "Here are the same differences under other assumptions, wherever both cells have two runs or more. No p is "
    "corrected, and none of this decides a claim."
)
OF_DIFFERENCES = (
    "Differences [95 % interval], in percentage points. Pooled: as in the tables. Welch: each cell has a variance of "
    "its own. Paired: Student's test of the differences between runs of equal seeds, which share initial weights, the "
    "order of images and their augmentation. Allowing for GPUs: least squares over the runs of all cells, test error = "
    "the cell's mean + b (1 if the run was on a GPU, in part or whole), with one variance for all. r: the correlation "
    "of equal seeds, from three on."
)
OF_CELLS = (
    "That cells differ in their variance is tested where a network has two cells with three seeds or more: Brown and "
    "Forsythe's test goes by distances from the median, Levene's by those from the mean. A large p does not show that "
    "the variances are equal."
)
LEAST = 3


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
    compared = list(_compared(tables))
    if not compared:
        return ""
    planned = [cell for cell in cells if not cell.other]
    gpu = GpuEffect.fit(planned)
    rows = [["", "n", "pooled", "Welch", "paired (n)", "allowing for GPUs", "r (n)"]]
    rows += [_row(place, gpu) for place in compared]
    parts = ["# Robustness", ABOUT, "## Differences", pipes(rows), OF_DIFFERENCES, "## Runs on a GPU"]
    parts += [gpu.sentence() if gpu else "No cell has runs on a GPU and others.", "## Standard deviations"]
    parts += [pipes(_deviations(planned)), OF_CELLS]
    if tested := _equal_variances(planned):
        parts.append("\n".join(tested))
    return "\n\n".join(parts) + "\n"


def _compared(tables: dict[str, Table]) -> Iterator[Place]:
    """Places where the mean test errors of two cells are compared that both have two runs or more; each pair once."""
    seen = set()
    for place in places(tables):
        if place.joint or place.claim.metric != TEST_ERROR.key or place.claim.at:
            continue
        pair = place.claim.cells[place.verdict.place]
        names = tuple(cell.name(0) for cell in pair)
        if len(pair) == 2 and names not in seen and min(len(_values(place, cell)) for cell in pair) > 1:
            seen.add(names)
            yield place


def _values(place: Place, cell: Cell) -> Values:
    return place.table.all_runs.values(cell, TEST_ERROR)


def _row(place: Place, gpu: "GpuEffect | None") -> list[str]:
    first, second = place.claim.cells[place.verdict.place]
    a, b = _values(place, first), _values(place, second)
    equal = sorted(a.keys() & b.keys())
    pairs = [a[seed] for seed in equal], [b[seed] for seed in equal]
    number = place.verdict.number
    p = number.p()
    return [
        place.alone(place.number),
        number.n,
        number.without_n + (f", {p_text(p)}" if p is not None else ""),
        _text(welch([*a.values()], [*b.values()])),
        _text(paired(*pairs), len(equal)),
        _text(gpu.difference(first.name(0), second.name(0)) if gpu else None),
        _correlation(*pairs),
    ]


def _text(difference: Difference | None, n: int | None = None) -> str:
    return "-" if difference is None else f"{difference}" + (f" ({n})" if n is not None else "")


def welch(a: Sequence[float], b: Sequence[float]) -> Difference | None:
    """The difference of two means, each with a variance of its own; None where neither varies."""
    if len({*a}) == len({*b}) == 1:
        return None
    test = stats.ttest_ind(a, b, equal_var=False)
    interval = test.confidence_interval(CONFIDENCE)
    return Difference(statistics.fmean(a) - statistics.fmean(b), interval.low, interval.high, test.pvalue)


def paired(a: Sequence[float], b: Sequence[float]) -> Difference | None:
    """The mean of a_i - b_i; None with fewer than two pairs, or where all differ alike."""
    if len(a) < 2 or math.isclose(np.ptp(np.subtract(a, b)), 0, abs_tol=1e-9):
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
            (cell.cell.name(0), _ran_on_gpu(one), error)
            for cell in cells
            for one in cell.runs.values()
            if (error := TEST_ERROR(one)) is not None
        ]
        names = tuple(dict.fromkeys(name for name, *_ in runs))
        x = np.array([[*(float(name == one) for one in names), float(gpu)] for name, gpu, _ in runs])
        y = np.array([error for *_, error in runs])
        freedom = len(runs) - len(names) - 1
        if freedom < 1 or np.linalg.matrix_rank(x) <= len(names):
            return None
        b, *_ = np.linalg.lstsq(x, y)
        covariance = ((y - x @ b) ** 2).sum() / freedom * np.linalg.inv(x.T @ x)
        return cls(names, b, covariance, freedom, len(runs), sum(gpu for _, gpu, _ in runs))

    def difference(self, first: str, second: str) -> Difference | None:
        """The difference of two cells' means, by their names."""
        return self._contrast([float(name == first) - float(name == second) for name in self.names] + [0.0])

    def _contrast(self, weights: list[float]) -> Difference:
        mean = float(weights @ self.coefficients)
        error = math.sqrt(weights @ self.covariance @ weights)
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, self.freedom)) * error
        return Difference(mean, mean - half, mean + half, 2 * float(stats.t.sf(abs(mean) / error, self.freedom)))

    def sentence(self) -> str:
        effect = self._contrast([0.0] * len(self.names) + [1.0])
        return (
            f"Of {self.runs} runs {self.on_gpu} were on a GPU, in part or whole. Within cells their test error differs "
            f"from that of the others by {effect}."
        )


def _ran_on_gpu(record: Record) -> bool:
    return "cuda" in record["device"]


def _deviations(cells: list[RunCell]) -> list[list[str]]:
    rows = [["", "seeds", "mean", "standard deviation", "range"]]
    for cell in cells:
        if len(errors := _errors(cell)) > 1:
            spread = f"{min(errors):.2f} to {max(errors):.2f}"
            mean, sd = statistics.fmean(errors), statistics.stdev(errors)
            rows.append([cell.label, str(len(errors)), f"{mean:.2f}", f"{sd:.2f}", spread])
    return rows


def _errors(cell: RunCell) -> list[float]:
    return [error for error in map(TEST_ERROR, cell.runs.values()) if error is not None]


def _equal_variances(cells: list[RunCell]) -> list[str]:
    """A line for each network and data set with two cells of three seeds or more."""
    of: dict[str, list[list[float]]] = {}
    for cell in cells:
        if len(errors := _errors(cell)) >= LEAST:
            of.setdefault(network(cell.cell), []).append(errors)
    return [
        f"- {name}, {len(some)} cells: Brown and Forsythe's {_levene(some, 'median')}, Levene's {_levene(some, 'mean')}"
        for name, some in of.items()
        if len(some) > 1
    ]


def _levene(some: list[list[float]], center: str) -> str:
    return p_text(float(stats.levene(*some, center=center).pvalue))
