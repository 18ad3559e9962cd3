"""Statistics over seeds: mean, standard deviation, interval, tests, and how many seeds would decide a difference."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from scipy import stats

# A number for each seed.
Values = dict[int, float]

CONFIDENCE = 0.95
# Standard deviation of a test error (percent) over seeds, used where few have run. It is that of six published reruns
# of one ResNet-56 script on CIFAR-10, 6.89 to 8.42 %.
ASSUMED_SD = 0.54
ASSUMED_RUNS = 6
POWER = 0.8
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Summary:
    """What n values say about their mean. None: there is no such number.

    sd: for two values or more. low, high: the ends of Student's interval for the mean. p: the probability of a mean so
    far from zero if the true one is zero (two-sided). low, high and p are None if all values are equal: errors are
    counts of images, so two seeds may agree by chance, which says nothing about the next one.
    """

    n: int
    mean: float | None = None
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None

    def __str__(self) -> str:
        """Example: -0.48 [-0.71, -0.25], n = 5."""
        around = f" [{self.low:+.2f}, {self.high:+.2f}]" if self.low is not None else ""
        return f"{self.mean:+.2f}{around}, n = {self.n}"


def summary(values: Iterable[float]) -> Summary:
    """The Summary of some values. No other function makes intervals."""
    numbers = list(values)
    if not numbers:
        return Summary(0)
    mean = statistics.fmean(numbers)
    sd = statistics.stdev(numbers) if len(numbers) > 1 else None
    if _same(numbers):
        return Summary(len(numbers), mean, sd)
    test = stats.ttest_1samp(numbers, 0)
    low, high = map(float, test.confidence_interval(CONFIDENCE))
    return Summary(len(numbers), mean, sd, low, high, float(test.pvalue))


def difference(a: Values, b: Values) -> Summary:
    """a - b, paired over the seeds that both have. Positive: a is larger."""
    return summary(a[seed] - b[seed] for seed in sorted(a.keys() & b.keys()))


def welch(a: Values, b: Values) -> float | None:
    """p of Welch's test, which compares all seeds of each without pairs."""
    if _same([*a.values()]) or _same([*b.values()]):
        return None
    return float(stats.ttest_ind(list(a.values()), list(b.values()), equal_var=False).pvalue)


def seeds_to_decide(s: Summary) -> int | None:
    """How many seeds the paired t test (two-sided, 5 %) needs to see a difference as large as the mean with 80 % power.

    The differences' variance is pooled by degrees of freedom from these seeds, s² with n - 1, and from the published
    reruns, 2 ASSUMED_SD² with ASSUMED_RUNS - 1. Without the reruns, two seeds that happen to agree would make the
    number far too small. None without a mean, for a mean of 0, and above MOST_SEEDS.
    """
    if not s.mean:
        return None
    squares, freedom = 2 * ASSUMED_SD**2 * (ASSUMED_RUNS - 1), ASSUMED_RUNS - 1
    if s.sd is not None and s.low is not None:
        squares, freedom = squares + (s.n - 1) * s.sd**2, freedom + s.n - 1
    sd = math.sqrt(squares / freedom)
    for n in range(2, MOST_SEEDS + 1):
        threshold = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
        if stats.nct.sf(threshold, n - 1, abs(s.mean) / sd * math.sqrt(n)) >= POWER:
            return n
    return None


def _same(numbers: list[float]) -> bool:
    # Differences of decimals such as 7.1 - 6.9 and 7.2 - 7.0 are equal except for rounding.
    return len(numbers) < 2 or max(numbers) - min(numbers) < 1e-9
