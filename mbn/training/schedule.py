"""What changes during training, as functions of the share of it that is done."""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from mbn.config import Config
from mbn.methods import MBN, METHODS


def scheduled(config: Config, iteration: int, length: int) -> dict[str, Any]:
    """The values to set at a 0-based iteration of `length`: "lr" and, as "method", the method's own."""
    schedule, change = config.schedule, METHODS[config.norm.name].change
    lr = value_at(schedule.lr, schedule.milestones, iteration, length)
    values: dict[str, Any] = {"lr": lr / 10 if iteration < config.optimizer.warmup else lr}
    if change:
        values["method"] = change.values(config, iteration, length)
    return values


def value_at(values: Sequence[float], milestones: Sequence[float], iteration: int, iterations: int) -> float:
    """The element of values in force at a 0-based iteration of a run of that many iterations.

    It changes at the first t with t >= milestone * iterations, in exact arithmetic: 0.4 is two fifths. A single value
    is a constant.
    """
    if len(values) == 1:
        return values[0]
    return values[sum(iteration >= change for change in _changes(tuple(milestones), iterations))]


@functools.cache
def _changes(milestones: tuple[float, ...], iterations: int) -> list[int]:
    """The iterations at which milestones are reached. Cached: each iteration asks, and exact arithmetic is slow."""
    return [math.ceil(Fraction(repr(stone)) * iterations) for stone in milestones]


def lambda_values(config: Config, iteration: int, iterations: int) -> tuple[float]:
    """Lambda of memorized batch normalisation."""
    assert isinstance(config.norm, MBN)
    return (value_at(config.norm.lam, config.schedule.milestones, iteration, iterations),)


def renorm_values(_: Config | None, iteration: int, iterations: int) -> tuple[float, float]:
    """r_max and d_max of batch renormalisation at a 0-based iteration of a run of that many.

    Plain batch norm (1 and 0) until 1/32 of training. Then both rise linearly: d_max to 5 at 5/32, r_max to 3 at 1/4.
    These are the points of Ioffe 2017 (5k, 25k and 40k of about 160k steps) as fractions.
    """
    done = Fraction(iteration, iterations)

    def rise(end: Fraction) -> Fraction:
        return min(max((done - RENORM_START) / (end - RENORM_START), Fraction(0)), Fraction(1))

    return float(1 + 2 * rise(R_MAX_END)), float(5 * rise(D_MAX_END))


RENORM_START, D_MAX_END, R_MAX_END = Fraction(1, 32), Fraction(5, 32), Fraction(1, 4)
