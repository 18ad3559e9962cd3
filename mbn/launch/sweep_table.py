"""The table that ends a sweep: what differs between its runs, and what became of each. Does not import torch."""

import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mbn.launch.missing_runs import PlannedRun
from mbn.records import record
from mbn.system.durations import duration
from mbn.system.errors import UserError
from mbn.system.files import visible

# Fields of a record, in percent, and what the table calls them.
ERRORS = {"test_error": "test error", "test_error_best": "best epoch", "train_error": "training error"}
REASON_LENGTH = 60


def sweep_table(runs: Sequence[PlannedRun], results: Path, instead: Mapping[str, str]) -> str:
    """A line for each run: its values of the swept settings, its errors and time, or why it has none. Where seeds are
    swept, a line for each of the other settings follows, with means and standard deviations over its runs.

    instead: by a run's name, what is said of it in place of a result.
    """
    settings = [_settings(run) for run in runs]
    swept = [key for key in settings[0] if len({values[key] for values in settings}) > 1]
    found = [_result(run, results, instead) for run in runs]
    lines = [[*(values[key] for key in swept), *_cells(result)] for values, result in zip(settings, found, strict=True)]
    text = _aligned([[*swept, *ERRORS.values(), "time", ""], *lines], len(swept))
    if "seed" not in swept:
        return text
    swept.remove("seed")
    places: dict[tuple[str, ...], dict[str, Any]] = {}  # by name, so that a run that stands twice counts once
    for run, values, result in zip(runs, settings, found, strict=True):
        finished = {run.name: result} if isinstance(result, dict) and not record.diverged(result) else {}
        places.setdefault(tuple(values[key] for key in swept), {}).update(finished)
    means = [
        [*place, *(_mean([r[field] for r in known.values()]) for field in ERRORS)] for place, known in places.items()
    ]
    head = "mean ± standard deviation in percent (seeds):"
    return f"{text}\n\n{head}\n{_aligned([[*swept, *ERRORS.values()], *means], len(swept))}"


def _settings(run: PlannedRun) -> dict[str, str]:
    pairs = (override.partition("=") for override in run.overrides)
    return {key.lstrip("+"): value for key, _, value in pairs}


def _result(run: PlannedRun, results: Path, instead: Mapping[str, str]) -> dict[str, Any] | str:
    """The record, or in words why there is none."""
    if run.name in instead:
        return textwrap.shorten(instead[run.name], REASON_LENGTH, placeholder=" ...")
    if run.finished(results):
        try:
            return record.read(record.path_of(results, run.name))
        except (UserError, OSError):  # the run itself says why
            return "its record cannot be read"
    return "unfinished" if visible(run.folder(results) / "checkpoint.pt") else "not begun"


def _cells(result: dict[str, Any] | str) -> list[str]:
    if isinstance(result, str):
        return [*("-" for _ in ERRORS), "-", result]
    if record.diverged(result):
        return [*("-" for _ in ERRORS), duration(result["seconds"]), record.divergence(result)]
    return [*(f"{result[field]:.2f} %" for field in ERRORS), duration(result["seconds"]), ""]


def _mean(values: Iterable[float]) -> str:
    known = list(values)
    if not known:
        return "-"
    spread = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.2f}{spread} ({len(known)})"


def _aligned(rows: Sequence[Sequence[str]], labels: int) -> str:
    """Lines of equally wide columns: so many with labels, to the left; then numbers, to the right; then words."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = range(labels, labels + len(ERRORS) + 1)
    return "\n".join(
        "  ".join(row[i].rjust(w) if i in numbers else row[i].ljust(w) for i, w in enumerate(widths)).rstrip()
        for row in rows
    )
