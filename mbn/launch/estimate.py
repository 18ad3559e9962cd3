"""How long runs will take, judged by the records of earlier ones. Does not import torch."""

import contextlib
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mbn.config import Config, iterations, to_dict
from mbn.launch.missing_runs import PlannedRun
from mbn.records.record import diverged
from mbn.records.sense import FIELD_RULES
from mbn.system.durations import duration

# Runs of fewer iterations tell nothing: testing, and perhaps compiling, took most of their time.
SHORTEST = 100
# Runs of less than this share of a run's length tell little of it: they were perhaps not compiled.
LONG = 0.1


class Estimate:
    """Seconds of runs, judged by the records of earlier ones."""

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        # Of each kind of run and of each network: iterations, images and seconds of each earlier run.
        self._known: dict[Any, list[tuple[int, int, float]]] = defaultdict(list)
        for one in records:
            # Tables and imports refuse a record that lacks one of these, or in which one cannot be true.
            with contextlib.suppress(AttributeError, KeyError, TypeError):
                # Diverged: after a part of these iterations. On two kinds of device: at two speeds.
                if diverged(one) or all(kind in one.get("device", "") for kind in ("cuda", "cpu")):
                    continue
                numbers = ("iterations", "images", "seconds")
                if not all(FIELD_RULES[key].holds(one[key]) for key in numbers) or one["iterations"] < SHORTEST:
                    continue
                for group in (_kind(one["config"]), _network(one["config"])):
                    self._known[group].append((one["iterations"], one["images"], one["seconds"]))

    @classmethod
    def read(cls, results: Path) -> "Estimate":
        """From all records in a folder of results that can be read."""
        records = []
        for path in (results / "records").rglob("*.json"):
            with contextlib.suppress(ValueError, OSError, RecursionError):
                records.append(json.loads(path.read_bytes()))
        return cls(records)

    def seconds(self, config: Config) -> float | None:
        """Seconds of a whole run, judged by long runs of its kind, else by its network's time per image in long runs,
        else by short runs in the same way, else None.
        """
        plain, length = to_dict(config), iterations(config)
        for least in (LONG * length, 0):
            if alike := [seconds / n for n, _, seconds in self._known.get(_kind(plain), ()) if n >= least]:
                return statistics.median(alike) * length
            of_network = self._known.get(_network(plain), ())
            if per_image := [seconds / images for n, images, seconds in of_network if n >= least]:
                return statistics.median(per_image) * length * config.batch_size
        return None

    def sentence(self, missing: Sequence[PlannedRun], jobs: int) -> str:
        """How long the missing runs take together, as far as it is known."""
        known = [s for s in (self.seconds(run.config) for run in missing) if s is not None]
        unknown = len(missing) - len(known)
        text = f"{len(missing)} {'run is' if len(missing) == 1 else 'runs are'} missing"
        if known:
            text += f": about {duration(sum(known))} of training, judged by earlier records"
            if jobs > 1:
                text += f", {duration(sum(known) / jobs)} with {jobs} side by side"
        if unknown:
            text += f"{',' if known else ':'} unknown for {unknown}, because no finished run has such a network"
        return text + "."


# config: as nested dictionaries, which records hold. They are read in a moment, where a Config takes 30 ms to check.


def _network(config: dict[str, Any]) -> Any:
    return config["model"]["name"], config["dataset"]["image_size"]


def _kind(config: dict[str, Any]) -> Any:
    return _network(config), config["norm"]["name"], config["forwards"], config["batch_size"]
