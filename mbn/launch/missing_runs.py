"""Which runs tables are made of, which of them are missing, and how long these would take. Does not import torch."""

import dataclasses
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mbn import grid
from mbn.config import NETWORKS, Config, ConfigError, iterations, load, run_name, to_dict
from mbn.methods import METHODS
from mbn.records import record
from mbn.system.errors import UserError

# `all` is everything for CIFAR.
NOT_IN_ALL = ("table3",)


@dataclass(frozen=True)
class Run:
    """One training: overrides is what `train.py` is told, but for settings of the machine."""

    name: str
    config: Config
    overrides: tuple[str, ...]

    def folder(self, results: Path) -> Path:
        return results / "runs" / self.name

    def finished(self, results: Path) -> bool:
        return record.path_of(results, self.name).exists()


def runs(
    tables: Sequence[str],
    seeds: Iterable[int],
    filters: Sequence[str] = (),
    scale: float = 1.0,
    folder: Path = grid.GRIDS,
) -> list[Run]:
    """All runs of these tables, each once: every cell with the first seed, then every cell with the next.

    filters: `key=value,value`; only runs whose configuration has one of the values, for every filter.
    Errors: UserError, ConfigError.
    """
    cells = _cells(tables, folder)
    configs = [cell.config(seed=0, scale=scale) for cell in cells]
    chosen = _chosen(configs, filters)
    found: dict[str, Run] = {}
    for seed in seeds:
        for cell, config, wanted in zip(cells, configs, chosen, strict=True):
            if wanted:
                seeded = dataclasses.replace(config, seed=seed)
                name = run_name(seeded)
                found.setdefault(name, Run(name, seeded, tuple(cell.command(seed, scale))))
    return list(found.values())


def _cells(tables: Sequence[str], folder: Path) -> list[grid.Cell]:
    names: list[str] = []
    for table in tables:
        names += [n for n in grid.names(folder) if n not in NOT_IN_ALL] if table == "all" else [table]
    cells = [cell for name in dict.fromkeys(names) for cell in grid.read(name, folder).cells]
    return [cell for cell in cells if cell.overrides is not None]


# Filters.


def _chosen(configs: list[Config], filters: Sequence[str]) -> list[bool]:
    """For each configuration whether every filter lets it pass. Errors: UserError where a value fits no run."""
    chosen = [True] * len(configs)
    for text in filters:
        key, wanted = parse_filter(text)
        values = [value_of(config, key) for config in configs]
        for value in wanted:
            if not any(_same(v, value) for v in values):
                there = sorted({str(v) for v in values if v is not ABSENT})
                has = f"they have {', '.join(there)}" if there else "none of them has this setting"
                raise UserError(f"none of these runs has {key}={_shown(value)}: {has}.", code=2)
        chosen = [c and any(_same(v, w) for w in wanted) for c, v in zip(chosen, values, strict=True)]
    if not any(chosen):
        raise UserError(f"no run of these tables has {' and '.join(filters)} at once.", code=2)
    return chosen


ABSENT = object()


def parse_filter(text: str) -> tuple[str, list[Any]]:
    """The key and the values of `norm=bn,mbn` or `norm.lam=[0.1],[0.5]`. Errors: UserError."""
    key, _, values = text.partition("=")
    if key == "seed":
        raise UserError(f"{text}: seeds are chosen by --seeds 5 or --seed 3.", code=2)
    if key.split(".")[0] in ("machine", "evaluate"):
        raise UserError(f"{text} does not tell one run from another: write it behind --, for every train.py.", code=2)
    if key not in _known_keys():
        raise UserError(
            f"there is no setting {key!r} to choose runs by: `python train.py --cfg job` shows all.", code=2
        )
    try:
        wanted = yaml.safe_load(f"[{values}]")
    except yaml.YAMLError:
        wanted = []
    if not wanted:
        raise UserError(f"cannot read {text!r}: runs are chosen by key=value or key=value,value.", code=2)
    return key, wanted


def _known_keys() -> set[str]:
    """Groups that have names, and leaves, of any configuration."""
    keys = set()
    norms = [Config(norm=method.settings()) for method in METHODS.values()]
    for config in [*norms, *(Config(model=network.settings()) for network in NETWORKS.values())]:
        plain = to_dict(config)
        keys |= {k for k, v in plain.items() if not isinstance(v, dict) or "name" in v}
        keys |= {f"{k}.{leaf}" for k, v in plain.items() if isinstance(v, dict) for leaf in v}
    return keys


def value_of(config: Config, key: str) -> Any:
    """A setting's value, a group's name, or ABSENT; `schedule.iterations` is the length however it was asked for."""
    node: Any = to_dict(config)
    node["schedule"]["iterations"] = iterations(config)
    for part in key.split("."):
        if part not in node:
            return ABSENT
        node = node[part]
    return node["name"] if isinstance(node, dict) else node


def _same(value: Any, wanted: Any) -> bool:
    if isinstance(value, list) or wanted is None or value is None or value is ABSENT:
        return value == wanted
    if isinstance(value, float) and isinstance(wanted, str):  # YAML reads 1e-5 as a text
        try:
            return value == float(wanted)
        except ValueError:
            return False
    return value == wanted if not isinstance(value, str) else value == str(wanted)


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)


# Settings for every run.


def check_settings(run: Run, settings: Sequence[str]) -> Config:
    """The run's configuration with settings that may not change which run it is. Errors: UserError, ConfigError."""
    for text in settings:
        key = text.partition("=")[0].lstrip("+")
        if not key.startswith(("machine.", "evaluate.")):
            raise UserError(
                f"{text} behind -- would make it another run: only machine.* and evaluate.* settings can stand there.",
                code=2,
            )
        if key == "machine.results":
            raise UserError("machine.results is set by --results DIR here.", code=2)
        if key == "machine.again":
            raise UserError(
                "machine.again is for a single run: only what has no record is trained here; give the option to "
                "train.py itself.",
                code=2,
            )
    config = load([*run.overrides, *settings])
    if run_name(config) != run.name:
        raise ConfigError(f"{' '.join(settings)} would change which runs are meant: leave it out.")
    return config


# Time.


class Estimate:
    """How long runs take, by the records of earlier ones."""

    def __init__(self, results: Path) -> None:
        self._iteration: dict[Any, list[float]] = defaultdict(list)
        self._image: dict[Any, list[float]] = defaultdict(list)
        for path in (results / "records").rglob("*.json"):
            try:
                content = json.loads(path.read_bytes())
                config = record.config_of(content)
                seconds, images = float(content["seconds"]), int(content["images"])
            except (ValueError, KeyError, TypeError, ConfigError, OSError):
                continue  # it is for tables and imports to refuse it
            self._iteration[_like(config)].append(seconds / iterations(config))
            self._image[_network(config)].append(seconds / max(images, 1))

    def seconds(self, config: Config) -> float | None:
        """Of a whole run: from those of the same kind, else by the images of those of the same network, else None."""
        if _like(config) in self._iteration:
            return statistics.median(self._iteration[_like(config)]) * iterations(config)
        if _network(config) in self._image:
            return statistics.median(self._image[_network(config)]) * iterations(config) * config.batch_size
        return None

    def sentence(self, missing: Sequence[Run], jobs: int) -> str:
        """What the missing runs take together, as far as it is known."""
        known = [s for s in (self.seconds(run.config) for run in missing) if s is not None]
        unknown = len(missing) - len(known)
        text = f"{len(missing)} {'run is' if len(missing) == 1 else 'runs are'} missing"
        if known:
            text += f": about {duration(sum(known))} of training by the records of earlier ones"
            if jobs > 1:
                text += f", {duration(sum(known) / jobs)} with {jobs} side by side"
        if unknown:
            text += f"{',' if known else ':'} unknown for {unknown}, as there is no record of such a network"
        return text + "."


def _network(config: Config) -> Any:
    return config.model.name, config.dataset.image_size


def _like(config: Config) -> Any:
    return _network(config), config.norm.name, config.forwards, config.batch_size


def work(config: Config) -> float:
    """A run's share of the work where no record tells the time: images, a backward pass counted as two forwards."""
    return iterations(config) * config.batch_size * (2 + config.forwards)


def duration(seconds: float) -> str:
    """3 h 20 min, 12 min, 45 s."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
