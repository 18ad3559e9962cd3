"""Controls of a record: what was measured of the final weights beside the plain test error, and by what code.

A record's `controls` is None, or has all of FIELDS, None where not measured, and `by`.
"""

import datetime
from pathlib import Path
from typing import Any

from mbn.config import Config
from mbn.methods import METHODS
from mbn.system.errors import UserError

# By the setting evaluate.<name> that asks for them. The first one says whether they have been measured.
MEASURED = {"precise": ("test_error_precise", "population_gap"), "rules": ("train_error", "rules")}
FIELDS = (*MEASURED["precise"], *MEASURED["rules"])
# What `by` keeps of the conditions under which they were measured; and a date.
BY = ("device", "threads", "code", "commit", "dirty", "versions")
# By so much a test error in percent may differ where the device or the libraries are not those of the training.
NEAR = 0.05

Controls = dict[str, Any]


def possible(config: Config) -> tuple[str, ...]:
    """Which of MEASURED a method has: without batch statistics there are no precise ones."""
    return tuple(MEASURED) if METHODS[config.norm.name].statistics else ("rules",)


def asked(config: Config) -> tuple[str, ...]:
    """Which of these a configuration asks for."""
    return tuple(name for name in possible(config) if getattr(config.evaluate, name))


def missing(config: Config, controls: Controls | None) -> tuple[str, ...]:
    """Which of those that a configuration asks for have not been measured."""
    return tuple(name for name in asked(config) if controls is None or controls[MEASURED[name][0]] is None)


def elsewhere(controls: Controls | None, conditions: dict[str, Any]) -> tuple[str, ...]:
    """Which of MEASURED were measured under other conditions: again, where others are, because `by` is of all."""
    if controls is None or all(controls["by"][key] == conditions[key] for key in BY):
        return ()
    return tuple(name for name, fields in MEASURED.items() if controls[fields[0]] is not None)


def completed(controls: Controls | None, new: Controls, conditions: dict[str, Any]) -> Controls:
    """Controls in which what is new replaces what was there. conditions: of the measurement, with the keys of BY."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    by = {key: conditions[key] for key in BY} | {"date": date}
    return dict.fromkeys(FIELDS) | (controls or {}) | new | {"by": by}


def check_near(measured: float, expected: float, weights: Path) -> None:
    """Check that weights have the test error that their record says. Errors: UserError."""
    if abs(measured - expected) > NEAR + 1e-9:
        raise UserError(
            f"{weights} has a test error of {measured:.2f} % here, and its record says {expected:.2f} %: measure where "
            "it was trained, with the same data."
        )


def check_end(record: dict[str, Any], path: Path, weights: Path, ended: bool, journal: str | None) -> None:
    """Check that weights are those at the end of the training that a record is of. Errors: UserError.

    path: the record's. ended: whether they are of the end of a training. journal: SHA-256 of its journal.
    """
    if not ended:
        what = "does not hold the end of the run, from which" if weights.exists() else "is gone, from which"
        raise UserError(
            f"{weights} {what} evaluate.precise and evaluate.rules measure: use the run's last checkpoint; without it "
            "machine.again=true trains it again."
        )
    if record["journal"] is None or record["journal"] != journal:
        raise UserError(
            f"{path} was not made from {weights} (another journal): measure where it was trained, or move it away and "
            "run the training's command again to write the record of its checkpoint."
        )
