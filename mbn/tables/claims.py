"""What the runs say about the claims of a table: each holds, does not hold, or is not decided yet."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mbn.grid import Cell, Claim, Drop, Gain, Rise
from mbn.tables.over_seeds import Summary, seeds_to_decide, summary

# The records of a cell, by seed.
Runs = dict[int, dict[str, Any]]

HOLDS, FAILS, OPEN = "the claim holds", "the claim does not hold", "not decided yet"
# Share of training over which a curve is averaged before and after an instant: ten epochs of the paper's 200.
AVERAGED = Fraction(1, 20)


@dataclass(frozen=True)
class Verdict:
    """What the numbers say at one place of a claim.

    needed: how many seeds would decide it, if it is not decided and asks whether a number is above or below zero.
    """

    place: str
    outcome: str
    number: Summary
    needed: int | None


def judge(claim: Claim, runs_of: Callable[[Cell], Runs]) -> list[Verdict]:
    """Decide a claim at each place, over the seeds that all cells there have."""
    verdicts = []
    for place, cells in claim.cells.items():
        runs = [runs_of(cell) for cell in cells]
        common = sorted(set.intersection(*map(set, runs)))
        numbers = [_number(claim, [of_cell[seed] for of_cell in runs]) for seed in common]
        found = summary(number for number in numbers if number is not None)
        outcome = _outcome(claim, found)
        needed = seeds_to_decide(found) if outcome == OPEN and 0 in claim.bounds else None
        verdicts.append(Verdict(place, outcome, found, needed))
    return verdicts


def _number(claim: Claim, records: list[dict[str, Any]]) -> float | None:
    """The number that a claim is about, from one seed's record of each of its cells; None if one lacks it."""
    curve = {Drop: drop, Rise: rise}.get(type(claim))
    values: list[Any] = [curve(record, claim.metric, claim.at) if curve else record[claim.metric] for record in records]
    return None if any(value is None for value in values) else _combined(claim, values)


def _combined(claim: Claim, values: list[float]) -> float:
    """A claim's number from the value of each of its cells."""
    if isinstance(claim, Gain):
        x_start, y_start, x_end, y_end = values
        return (x_start - x_end) - (y_start - y_end)
    return values[0] - values[1] if len(values) == 2 else values[0]


def _outcome(claim: Claim, number: Summary) -> str:
    """By the interval: the claim holds where all of it is within the bounds, and not where all of it is outside."""
    if number.low is None or number.high is None:
        return OPEN
    least, most = claim.bounds
    if least < number.low and number.high < most:
        return HOLDS
    return FAILS if number.low > most or number.high < least else OPEN


def printed(claim: Claim, place: str) -> float | None:
    """A claim's number from what the paper prints, at a place; None where it prints too little, and for curves."""
    texts = [cell.paper.get(claim.metric) for cell in claim.cells[place]]
    if isinstance(claim, Drop | Rise) or None in texts:
        return None
    return _combined(claim, [float(text) for text in texts if text is not None])


def listed(claim: Claim, verdicts: list[Verdict]) -> str:
    """A claim and its verdicts as a list in markdown; places without a number share a line.

    Example of a line: - 8: MBN - BN = -0.48 [-0.71, -0.25], n = 5: the claim holds
    """
    text = f"- {claim.text[0].upper()}{claim.text[1:]}"
    missing = [v.place for v in verdicts if not v.number.n]
    if len(missing) == len(verdicts):
        return f"{text}: not measured yet"
    lines = [text]
    for v in verdicts:
        if v.number.n:
            needed = f", {v.needed} seeds would" if v.needed else ""
            lines.append(f"  - {v.place + ': ' * bool(v.place)}{claim.number} = {v.number}: {v.outcome}{needed}")
    return "\n".join([*lines, *([f"  - {'; '.join(missing)}: not measured yet"] if missing else [])])


def drop(record: dict[str, Any], key: str, at: Fraction) -> float | None:
    """How far a curve falls at a share of training: its mean over AVERAGED before, minus that over AVERAGED after.

    None where one of the two has no points.
    """
    before, after = _around(record, key, at, AVERAGED)
    return statistics.fmean(before) - statistics.fmean(after) if before and after else None


def rise(record: dict[str, Any], key: str, at: Fraction) -> float | None:
    """How far a curve rises at once at a share of training: the first point after it minus the last one before.

    The training error of a point is the mean over its epoch, so a shorter rise is averaged over the epoch.
    """
    before, after = _around(record, key, at, Fraction(1))
    return after[0] - before[-1] if before and after else None


def _around(record: dict[str, Any], key: str, at: Fraction, width: Fraction) -> tuple[list[float], list[float]]:
    """The points of a curve before `at` and those after it, each at most `width` away (shares of training).

    A point stands for the epoch that ends there: an epoch that ends exactly at `at` is before it.
    """
    curves = record["curves"]
    pairs = zip(curves.get("images", []), curves.get(key, []), strict=False)
    points = [(Fraction(images, record["images"]), y) for images, y in pairs]
    return [y for x, y in points if at - width < x <= at], [y for x, y in points if at < x <= at + width]
