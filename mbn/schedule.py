"""What changes during training, as functions of how much of it is done."""

from collections.abc import Sequence
from fractions import Fraction


def value_at(values: Sequence[float], milestones: Sequence[float], iteration: int, iterations: int) -> float:
    """The element of values in force at a 0-based iteration of a run of that many iterations.

    It changes at the first t with t >= milestone * iterations, in exact arithmetic: 0.4 is two fifths. A single value
    is a constant.
    """
    if len(values) == 1:
        return values[0]
    passed = sum(iteration >= Fraction(repr(stone)) * iterations for stone in milestones)
    return values[passed]
