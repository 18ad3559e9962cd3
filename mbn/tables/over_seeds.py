"""Statistics over seeds: means, intervals, tests. The variance is pooled over the cells of a network and data set."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from scipy import optimize, stats

# A number for each seed.
Values = dict[int, float]

CONFIDENCE = 0.95
# Two one-sided tests at 5 % each hold where this interval lies inside the margin.
EQUIVALENCE = 0.9
POWER = 0.8
# So many seeds of each cell are run, whatever they show.
SEEDS = 5
# Errors are counts of images: smaller differences are only rounding.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Spread:
    """How much seeds differ, from several cells.

    squares: the sum over all cells of (value - the cell's mean)². freedom: the sum over all cells of (seeds - 1).
    """

    squares: float = 0.0
    freedom: int = 0

    @property
    def sd(self) -> float | None:
        """The standard deviation sqrt(squares / freedom). None without two seeds of any cell, or if all agree."""
        return math.sqrt(self.squares / self.freedom) if self.freedom and self.squares > ROUNDING**2 else None


def pooled(cells: Iterable[Values]) -> Spread:
    """The Spread of some cells, each of which has a mean of its own."""
    numbers = [list(values.values()) for values in cells if len(values) > 1]
    squares = sum((x - statistics.fmean(some)) ** 2 for some in numbers for x in some)
    return Spread(squares, sum(len(some) - 1 for some in numbers))


@dataclass(frozen=True)
class Sample:
    """The mean of a cell over its n seeds, and the Spread of its group.

    name: the cell's. diverged: how many more seeds have no number, because their runs diverged.
    """

    name: str
    mean: float
    n: int
    group: str
    spread: Spread
    diverged: int = 0


@dataclass(frozen=True)
class Contrast:
    """A sum of means with weights, d = sum c_j mean_j, and what the seeds say about it. Unpaired: seeds may differ.

    se² = sum over groups of V_g with V_g = sd_g² sum c_j² / n_j; d is compared by Student's t, with the group's degrees
    of freedom, or (Satterthwaite) (sum V_g)² / sum (V_g² / freedom_g) of them where there are several groups. There is
    no interval (None) where a group has no sd.

    ns: the seeds of each mean, as they are printed; diverged: those beside them that diverged.
    """

    parts: tuple[tuple[Sample, float], ...] = ()
    ns: tuple[int, ...] = ()
    diverged: tuple[int, ...] = ()

    @property
    def mean(self) -> float | None:
        return math.fsum(weight * sample.mean for sample, weight in self.parts) if self.parts else None

    @cached_property
    def _error(self) -> tuple[float, float] | None:
        """The standard error and its degrees of freedom."""
        return self._errors(one_more=False)

    def _errors(self, one_more: bool) -> tuple[float, float] | None:
        """The same; with one_more, of the difference between d and the same sum over one more run of each cell."""
        spreads = {sample.group: sample.spread for sample, _ in self.parts}
        variances: dict[str, float] = dict.fromkeys(spreads, 0.0)
        for sample, weight in self.parts:
            variances[sample.group] += (sample.spread.sd or 0) ** 2 * weight**2 * (1 / sample.n + one_more)
        if not self.parts or any(spread.sd is None for spread in spreads.values()):
            return None
        return satterthwaite([(v, spreads[group].freedom) for group, v in variances.items()])

    @property
    def precision(self) -> float | None:
        """1 / se²."""
        return self._error and self._error[0] ** -2

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
        if self.mean is None or self._error is None:
            return None
        return around(self.mean, self._error, confidence)

    def p(self) -> float | None:
        """The probability of a difference so far from 0 if 0 is the true one (two-sided)."""
        return None if self.mean is None or self._error is None else two_sided(self.mean, self._error)

    def one_more(self, number: float | None) -> "OneMore | None":
        """A number, such as the paper's, taken for that of one more run of each cell; None where either is missing."""
        error = self._errors(one_more=True)
        if number is None or self.mean is None or error is None:
            return None
        return OneMore(*around(self.mean, error), two_sided(number - self.mean, error))

    def __str__(self) -> str:
        """Example: -0.48 [-0.71, -0.25], n = 5+5."""
        return f"{self.without_n}, n = {self.n}"

    @property
    def without_n(self) -> str:
        """Example: -0.48 [-0.71, -0.25]."""
        return f"{self.mean:+.2f} {self.brackets()}".rstrip()

    def brackets(self, confidence: float = CONFIDENCE) -> str:
        """Example: [-0.71, -0.25]; nothing where there is no interval."""
        interval = self.interval(confidence)
        return f"[{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else ""

    @property
    def n(self) -> str:
        """Examples: 5+5; 4 (1 diverged)+5; 5 each, of more than two."""
        counts = [f"{n} ({lost} diverged)" if lost else f"{n}" for n, lost in zip(self.ns, self.diverged, strict=True)]
        same = len(counts) > 2 and len({*counts}) == 1
        return f"{counts[0]} each" if same else "+".join(counts)


def contrast(samples: Sequence[Sample], weights: Sequence[float]) -> Contrast:
    return Contrast(
        tuple(zip(samples, weights, strict=True)), tuple(s.n for s in samples), tuple(s.diverged for s in samples)
    )


def weighted_mean(contrasts: Sequence[Contrast], equally: bool = False) -> tuple[Contrast, list[float]]:
    """The mean of several contrasts, weighted by precision or equally, and the weights.

    Every contrast must have a precision. A sample may be in several of them. The first ns of all are added up, then the
    second, and diverged in the same way.
    """
    precisions = [1.0 if equally else contrast.precision or 0.0 for contrast in contrasts]
    weights = [precision / sum(precisions) for precision in precisions]
    found: dict[str, tuple[Sample, float]] = {}
    for one, weight in zip(contrasts, weights, strict=True):
        for sample, own in one.parts:
            found[sample.name] = (sample, found.get(sample.name, (sample, 0.0))[1] + weight * own)
    ns, lost = (
        tuple(map(sum, zip(*counts, strict=True)))
        for counts in ([one.ns for one in contrasts], [one.diverged for one in contrasts])
    )
    return Contrast(tuple(found.values()), ns, lost), weights


@dataclass(frozen=True)
class OneMore:
    """What one more run of each cell would give for the same number d.

    low and high are the ends of its 95 % interval, d ± t sqrt(sum over groups of sd_g² sum c_j² (1 + 1/n_j)); of one
    cell this is mean ± t sd sqrt(1 + 1/n). p is the probability that it lies as far from d as the number in question.
    """

    low: float
    high: float
    p: float

    @property
    def excluded(self) -> bool:
        """Whether the number in question lies outside the interval."""
        return self.p < 1 - CONFIDENCE


def satterthwaite(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The standard error of a sum of independent numbers, and its degrees of freedom.

    parts: the variance of each number, and the degrees of freedom that this has.
    """
    variance = sum(v for v, _ in parts)
    return math.sqrt(variance), variance**2 / sum(v**2 / freedom for v, freedom in parts)


def around(mean: float, error: tuple[float, float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The ends of Student's interval. error: the standard error and its degrees of freedom."""
    half = float(stats.t.ppf((1 + confidence) / 2, error[1])) * error[0]
    return mean - half, mean + half


def two_sided(distance: float, error: tuple[float, float]) -> float:
    """The probability of a distance so large, by Student's t; error as for `around`."""
    return 2 * float(stats.t.sf(abs(distance) / error[0], error[1]))


def p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def holm(ps: Sequence[float | None]) -> list[float]:
    """Holm's corrected p of each: from the smallest up, p times how many are not smaller, never falling, at most 1.

    One that is not measured (None) counts as 1.
    """
    known = [1.0 if p is None else p for p in ps]
    corrected, least = list(known), 0.0
    for rank, i in enumerate(sorted(range(len(known)), key=lambda i: known[i])):
        corrected[i] = least = min(1.0, max(least, (len(known) - rank) * known[i]))
    return corrected


def detectable(sd: float, n: int = SEEDS) -> float:
    """The difference of two means of n seeds each that the t test (two-sided, 5 %) would show with 80 % power."""
    freedom, scale = 2 * (n - 1), sd * math.sqrt(2 / n)
    threshold = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)

    def lacking(size: float) -> float:
        return POWER - float(stats.nct.sf(threshold, freedom, size))

    return scale * float(optimize.brentq(lacking, 0.1, 10))
