"""How long runs will take, judged by the records of earlier ones. Does not import torch."""

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mbn.config import Config, ConfigError, iterations
from mbn.launch.missing_runs import PlannedRun
from mbn.records import record


class Estimate:
    """Seconds per iteration for each kind of run, and per image for each network, from the existing records."""

    def __init__(self, results: Path) -> None:
        self._iteration: dict[Any, list[float]] = defaultdict(list)
        self._image: dict[Any, list[float]] = defaultdict(list)
        for path in (results / "records").rglob("*.json"):
            try:
                content = json.loads(path.read_bytes())
                config = record.config_of(content)
                seconds, images = float(content["seconds"]), int(content["images"])
            except (ValueError, KeyError, TypeError, ConfigError, OSError):
                continue  # tables and imports refuse it
            self._iteration[_kind(config)].append(seconds / iterations(config))
            self._image[_network(config)].append(seconds / max(images, 1))

    def seconds(self, config: Config) -> float | None:
        """Seconds of a whole run, judged by runs of its kind, else by its network's time per image, else None."""
        if _kind(config) in self._iteration:
            return statistics.median(self._iteration[_kind(config)]) * iterations(config)
        if _network(config) in self._image:
            return statistics.median(self._image[_network(config)]) * iterations(config) * config.batch_size
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
            text += f"{',' if known else ':'} unknown for {unknown}, because there is no record of such a network"
        return text + "."


def _network(config: Config) -> Any:
    return config.model.name, config.dataset.image_size


def _kind(config: Config) -> Any:
    return _network(config), config.norm.name, config.forwards, config.batch_size


def duration(seconds: float) -> str:
    """3 h 20 min, 12 min, 45 s."""
    if round(seconds) < 120:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
