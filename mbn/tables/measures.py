"""The numbers that tables take from a record. Each is None for a run that diverged, and where the record has none."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mbn.records.record import diverged

# Share of training over which a curve is averaged before and after an instant: ten epochs of the paper's 200.
AVERAGED = Fraction(1, 20)

Record = dict[str, Any]
# How a number is taken from a record.
Taken = Callable[[Record], float | None]


@dataclass(frozen=True)
class Measure:
    """A field of a record; or how far the curve of that name drops or rises (form) at a share of training."""

    key: str
    form: str = ""
    at: Fraction = Fraction(0)

    def __call__(self, record: Record) -> float | None:
        if diverged(record):
            return None
        if self.form:
            return (drop if self.form == "drop" else rise)(record, self.key, self.at)
        return record.get(self.key)


TEST_ERROR = Measure("test_error")


def control(record: Record, name: str) -> Any:
    """What was measured beside the test error, by its name; None where it was not."""
    return (record.get("controls") or {}).get(name)


def precise(record: Record) -> float | None:
    """The test error with precise statistics, taken with a rolling memory.

    BN has no memory: what was measured under the old name is the same number.
    """
    found: float | None = control(record, "test_error_precise")
    return record.get("test_error_precise") if found is None and _is_bn(record) else found


def precise_held(record: Record) -> float | None:
    """The same with the memory or the averages held, as it was measured at first (BRN and MBN)."""
    return None if _is_bn(record) else record.get("test_error_precise")


def train_error_in_evaluation(record: Record) -> float | None:
    """On augmented training images, with the final weights and as at test time."""
    found: float | None = control(record, "train_error")
    return found


def _is_bn(record: Record) -> bool:
    return record.get("config", {}).get("norm", {}).get("name") == "bn"


# The numbers that help to explain a test error, by the names that pages give them.
BESIDE: dict[str, Taken] = {
    "test error": TEST_ERROR,
    "with precise statistics": precise,
    "with precise statistics, memory held (old)": precise_held,
    "best epoch": Measure("test_error_best"),
    "training error": Measure("train_error"),
    "training error in evaluation": train_error_in_evaluation,
}


def drop(record: Record, key: str, at: Fraction) -> float | None:
    """How far a curve falls at a share of training: its mean over AVERAGED before, minus that over AVERAGED after.

    None where one of the two has no points.
    """
    before, after = _around(record, key, at, AVERAGED)
    return statistics.fmean(before) - statistics.fmean(after) if before and after else None


def rise(record: Record, key: str, at: Fraction) -> float | None:
    """How far a curve rises at once at a share of training: the first point after it minus the last one before.

    The training error of a point is the mean over its epoch, so a shorter rise is averaged over the epoch.
    """
    before, after = _around(record, key, at, Fraction(1))
    return after[0] - before[-1] if before and after else None


def _around(record: Record, key: str, at: Fraction, width: Fraction) -> tuple[list[float], list[float]]:
    """The points of a curve before `at` and those after it, each at most `width` away (shares of training).

    A point stands for the epoch that ends there: an epoch that ends exactly at `at` is before it.
    """
    curves = record["curves"]
    pairs = zip(curves.get("images", []), curves.get(key, []), strict=False)
    points = [(Fraction(images, record["images"]), y) for images, y in pairs]
    return [y for x, y in points if at - width < x <= at], [y for x, y in points if at < x <= at + width]
