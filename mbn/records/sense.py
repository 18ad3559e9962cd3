"""Whether a record can be true: types and ranges of its fields, and how they agree with its configuration."""

import datetime
import itertools
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from mbn.config import Config, images_before, iterations
from mbn.config.schema import MODES
from mbn.methods import METHODS
from mbn.records.curves import AT_EPOCHS, five_digits
from mbn.records.provenance import COMMIT
from mbn.system.setting_fields import Rule, among

# Errors on test images, in percent.
TEST_ERRORS = ("test_error", "test_error_best", "test_error_top5", "test_error_precise")
# What a run that diverged does not have.
RESULTS = (*TEST_ERRORS, "train_error", "test_loss", "train_loss")
# Fields that may be null: not measured, or not known; in most runs, that they diverged.
NULLABLE = ("test_error_precise", "commit", "dirty", "code", "parts", "journal", "diverged_at", "controls")
# No field counts so far, in things or in seconds.
MOST = 1e15
# By so much the sums and differences of floats may miss a limit.
NEARLY = 1e-6


def _is_number(value: Any, least: float = 0, most: float = sys.float_info.max) -> bool:
    """Losses, gaps and norms may be of any size. Python's whole numbers have no largest one, and floats do."""
    return type(value) in (int, float) and least <= value <= most  # a bool is no number, and NaN is in no range


def _is_share(percent: float, of: int) -> bool:
    """Whether a number in percent is a whole number of so many images."""
    wrong = percent * of / 100
    return abs(wrong - round(wrong)) < NEARLY


def _is_whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= MOST


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != "" and value.isprintable()


def _is_date(value: Any) -> bool:
    if not isinstance(value, str) or not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", value, re.ASCII):
        return False
    try:
        return datetime.datetime.fromisoformat(value) is not None
    except ValueError:
        return False


def _hexadecimal(wanted: str, pattern: str) -> Rule:
    return Rule(wanted, lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None)


PERCENT = Rule("a number from 0 to 100", lambda value: _is_number(value, 0, 100))
AT_LEAST_0 = Rule("a number, at least 0", _is_number)
TIME = Rule("a number, at least 0", lambda value: _is_number(value, 0, MOST))
COUNT = Rule("a whole number, at least 1", lambda value: _is_whole(value, 1))
TEXT = Rule("a text without control characters", _is_text)
TEXTS = Rule(
    "texts by their names",
    lambda value: isinstance(value, dict) and value != {} and all(map(_is_text, (*value, *value.values()))),
)
BOOL = Rule("true or false", lambda value: isinstance(value, bool))
MODE = among(*(mode for mode in MODES if mode != "auto"))
HASH = _hexadecimal("64 hexadecimal digits", "[0-9a-f]{64}")
COMMIT_NAME = _hexadecimal("the hexadecimal digits of a commit, 7 to 40 of them, or 64", COMMIT)

FIELD_RULES = {
    "name": TEXT,
    **dict.fromkeys((*TEST_ERRORS, "train_error"), PERCENT),
    **dict.fromkeys(("test_loss", "train_loss"), AT_LEAST_0),
    **dict.fromkeys(("seconds", "images_per_second"), TIME),
    **dict.fromkeys(("iterations", "images", "parameters", "threads"), COUNT),
    "diverged_at": Rule("a whole number, at least 0", lambda value: _is_whole(value, 0)),
    "device": TEXT,
    "mode": MODE,
    "commit": COMMIT_NAME,
    "dirty": BOOL,
    "code": HASH,
    "versions": TEXTS,
    "date": Rule("a date such as 2026-01-31T12:00:00+00:00", _is_date),
    "curves": Rule("curves by their names", lambda value: isinstance(value, dict)),
    "parts": Rule(
        "a list of parts, each by its names",
        lambda value: isinstance(value, list) and value != [] and all(isinstance(part, dict) for part in value),
    ),
    "journal": HASH,
    "controls": Rule("controls by their names", lambda value: isinstance(value, dict)),
}
# What was measured of the final weights: all may be null but `by`.
CONTROLS = {
    **dict.fromkeys(("test_error_precise", "train_error"), PERCENT),
    "population_gap": Rule(
        "a mean and a std, both at least 0",
        lambda value: (
            isinstance(value, dict) and set(value) == {"mean", "std"} and all(map(_is_number, value.values()))
        ),
    ),
    "rules": Rule(
        "test errors from 0 to 100 by the names of rules",
        lambda value: (
            isinstance(value, dict)
            and value != {}
            and all(map(_is_text, value))
            and all(map(PERCENT.holds, value.values()))
        ),
    ),
    "by": Rule("what measured it, by its names", lambda value: isinstance(value, dict)),
}
# Of these, commit, dirty and code may be null.
BY = {key: FIELD_RULES[key] for key in ("device", "threads", "code", "commit", "dirty", "versions", "date")}
# A stretch of a run under the same conditions: all may be null, except where it begins.
PART = {
    "from": Rule("a whole number, at least 0", lambda value: _is_whole(value, 0)),
    **{key: FIELD_RULES[key] for key in ("device", "threads", "mode", "code", "commit", "dirty", "versions")},
    **dict.fromkeys(("tf32", "deterministic"), BOOL),
    **dict.fromkeys(("cpu_capability", "data"), TEXT),
}
# What a part has beside these only where several processes trained it.
SEVERAL = {"processes": Rule("a whole number, at least 2", lambda value: _is_whole(value, 2))}
CURVES = {key: PERCENT if key.endswith("error") else AT_LEAST_0 for key in AT_EPOCHS} | {"images": COUNT}
# Means over images, as differences of sums.
TRAINING = {
    "images": COUNT,
    "loss": Rule("a number, at least 0", lambda value: _is_number(value, -NEARLY)),
    "error": Rule("a number from 0 to 100", lambda value: _is_number(value, -NEARLY, 100 + NEARLY)),
}


def fault(record: dict[str, Any], config: Config) -> str | None:
    """The first thing in a record that cannot be true, or None. Example: test_error must be a number from 0 to 100,
    not 250.

    record: with all fields of today's version, those that it lacks as None. config: what `config_of` makes of it.
    """
    return next(_faults(record, config), None)


def _faults(record: dict[str, Any], config: Config) -> Iterator[str]:
    diverged = record["diverged_at"] is not None
    for key, rule in FIELD_RULES.items():
        nullable = key in NULLABLE or (diverged and key in RESULTS)
        if key in record and (record[key] is not None or not nullable) and not rule.holds(record[key]):
            yield f"{key} must be {rule.wanted}, not {as_json(record[key])}"
        if diverged and key in RESULTS and record[key] is not None:
            yield f"{key} must be null where diverged_at is not, not {as_json(record[key])}"
    for key, ok, wanted in _agreements(record, config):
        if not ok:
            yield f"{key} must be {wanted}, not {as_json(record[key])}"
    if not diverged:
        yield from _wrong_curves(record)
    elif record["curves"] != {}:
        yield "curves must be {} where diverged_at is not null"
    yield from _wrong_parts(record)
    if record["controls"] is not None and diverged:
        yield "controls must be null where diverged_at is not"
    elif record["controls"] is not None:
        yield from _wrong_controls(record["controls"], config)


def _agreements(record: dict[str, Any], config: Config) -> Iterator[tuple[str, bool, str]]:
    """How fields agree with others and with the configuration: field, whether it does, what is wanted."""
    length = iterations(config)
    if record["diverged_at"] is None:
        yield from _test_errors_agree(record, config)
    else:
        yield "diverged_at", record["diverged_at"] < length, f"less than its {length} iterations"
    yield "iterations", record["iterations"] == length, f"{length}, as its configuration gives"
    images = images_before(config, length)
    yield "images", record["images"] == images, f"{images}, as its configuration gives"


def _test_errors_agree(record: dict[str, Any], config: Config) -> Iterator[tuple[str, bool, str]]:
    n = config.dataset.test_images
    for key in TEST_ERRORS:
        if record[key] is not None:
            yield key, _is_share(record[key], n), f"a whole number of the {n} test images, in percent"
    for key in ("test_error_best", "test_error_top5"):
        yield key, record[key] <= record["test_error"], f"at most test_error ({record['test_error']})"
    statistics = METHODS[config.norm.name].statistics
    yield "test_error_precise", record["test_error_precise"] is None or statistics, f"null with {config.norm.name}"


def _wrong_curves(record: dict[str, Any]) -> Iterator[str]:
    curves = record["curves"]
    yield from _wrong_lists(curves, CURVES, "curves", ("images", "test_error"), ("training", "stage_dead_relus"))
    if "training" in curves:
        if not isinstance(curves["training"], dict):
            yield f"curves.training must be curves by their names, not {as_json(curves['training'])}"
        yield from _wrong_lists(curves["training"], TRAINING, "curves.training", TRAINING)
        if curves["training"]["images"][-1] != record["images"]:
            yield f"curves.training.images must end with images ({record['images']})"
    if "stage_dead_relus" in curves:
        yield from _wrong_stages(curves)
    for key in ("images", "test_error", "test_error_top5", "test_loss"):
        if key in curves and record[key] is not None and curves[key][-1] != five_digits(record[key]):
            yield f"curves.{key} must end with {key} ({record[key]})"
    if five_digits(record["test_error_best"]) > min(curves["test_error"]):
        yield f"test_error_best must be at most every value of curves.test_error, not {record['test_error_best']}"


def _wrong_stages(curves: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the dead ReLUs of each stage."""
    stages = curves["stage_dead_relus"]
    if not isinstance(stages, dict) or not all(map(_is_text, stages)) or "dead_relus" not in curves:
        yield f"curves.stage_dead_relus must be curves by stages, beside dead_relus, not {as_json(stages)}"
    known = dict.fromkeys(stages, Rule("whole numbers, at least 0", lambda value: _is_whole(value, 0)))
    for name in stages:
        yield from _wrong_lists(
            {"images": curves["images"], name: stages[name]}, known | CURVES, "curves.stage_dead_relus", ()
        )
    if [sum(counts) for counts in zip(*stages.values(), strict=True)] != curves["dead_relus"]:
        yield "curves.dead_relus must be the sums of stage_dead_relus"


def _wrong_lists(curves: Any, known: Any, prefix: str, needed: Any, others: Any = ()) -> Iterator[str]:
    """What is wrong with curves of one length, each a list."""
    for key in (*needed, *curves):
        name = f"{prefix}.{key}"
        if key not in curves:
            yield f"{name} is missing"
        elif key not in (*known, *others):
            yield f"{name} is not known"
        elif key in known:
            points, count = curves[key], len(curves["images"]) if isinstance(curves["images"], list) else 0
            if not isinstance(points, list) or not points or len(points) != count:
                yield f"{name} must be a list of numbers, as many as {prefix}.images has"
            for point in points:
                if not known[key].holds(point):
                    yield f"{name} must hold {known[key].wanted}, not {as_json(point)}"
    if not all(a < b for a, b in itertools.pairwise(curves["images"])):
        yield f"{prefix}.images must rise"


def wrong_in_parts(parts: list[dict[str, Any]]) -> Iterator[str]:
    """What is wrong within the parts that a record or a checkpoint lists."""
    for i, part in enumerate(parts):
        if set(part) - set(SEVERAL) != set(PART):
            yield f"parts[{i}] must have {', '.join(PART)}, not {as_json(sorted(part))}"
        for key, rule in (PART | SEVERAL).items():
            if key in part and (part[key] is not None or key in ("from", *SEVERAL)) and not rule.holds(part[key]):
                yield f"parts[{i}].{key} must be {rule.wanted}, not {as_json(part[key])}"


def _wrong_parts(record: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the parts of a run, where a record has them."""
    parts = record.get("parts") or []
    yield from wrong_in_parts(parts)
    begins, end = [part["from"] for part in parts], record["iterations"]
    if parts and (begins[0] != 0 or begins[-1] > end or begins != sorted(begins)):
        yield f"parts must begin at iterations in their order, from 0 to {end}, not {as_json(begins)}"
    for key in ("threads", "mode", "code", "commit", "versions"):
        if parts and record[key] not in [part[key] for part in parts]:
            yield f"{key} must be that of one of its parts, not {as_json(record[key])}"
    if any(part["dirty"] for part in parts) and record["dirty"] is not True:
        yield f"dirty must be true, as in one of its parts, not {as_json(record['dirty'])}"


def _wrong_controls(controls: dict[str, Any], config: Config) -> Iterator[str]:
    """What is wrong with what was measured of the final weights, where a record has it."""
    by = controls.get("by")
    if set(controls) != set(CONTROLS) or not isinstance(by, dict) or set(by) != set(BY):
        yield f"controls must have {', '.join(CONTROLS)}, and controls.by {', '.join(BY)}"
        return
    for prefix, values, known, null in (
        ("controls", controls, CONTROLS, [key for key in CONTROLS if key != "by"]),
        ("controls.by", by, BY, NULLABLE),
    ):
        for key, rule in known.items():
            if (values[key] is not None or key not in null) and not rule.holds(values[key]):
                yield f"{prefix}.{key} must be {rule.wanted}, not {as_json(values[key])}"
    dataset = config.dataset
    errors = {"test_error_precise": controls["test_error_precise"], "train_error": controls["train_error"]}
    errors |= {f"rules.{name}": error for name, error in (controls["rules"] or {}).items()}
    for key, error in errors.items():
        images, of = (dataset.train_images, "training") if key == "train_error" else (dataset.test_images, "test")
        if error is not None and not _is_share(error, images):
            yield f"controls.{key} must be a whole number of the {images} {of} images, in percent, not {as_json(error)}"
    if (controls["test_error_precise"] is None) != (controls["population_gap"] is None):
        yield "controls.population_gap must be null if and only if controls.test_error_precise is"
    if controls["test_error_precise"] is None and controls["train_error"] is None:
        yield "controls must be null where nothing was measured"
    has = METHODS[config.norm.name].statistics
    if not has and (controls["test_error_precise"] is not None or controls["rules"] is not None):
        yield f"controls.test_error_precise and controls.rules must be null with {config.norm.name}"
    if has and (controls["train_error"] is None) != (controls["rules"] is None):
        yield "controls.rules must be null if and only if controls.train_error is"


def as_json(value: Any) -> str:
    """A value from a file, as it can stand in a sentence: as JSON, short, and without control characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
