"""A run's length, identity and name. Does not import torch."""

import dataclasses
import hashlib
import json
from fractions import Fraction
from typing import Any

import yaml

from mbn.config.registry import NETWORKS
from mbn.config.schema import Config


def iterations_per_epoch(config: Config) -> int:
    """Batches an epoch; the last one is smaller where the batch size does not divide the images."""
    return -(-config.dataset.train_images // config.batch_size)


def images_before(config: Config, iteration: int) -> int:
    """Training images seen before a 0-based iteration."""
    epochs, batches = divmod(iteration, iterations_per_epoch(config))
    return epochs * config.dataset.train_images + batches * config.batch_size


def iterations(config: Config) -> int:
    """The run's length in iterations, however it is set. At least 1."""
    schedule = config.schedule
    if schedule.iterations is not None:
        length = schedule.iterations
    else:
        epochs = schedule.default_epochs if schedule.epochs is None else schedule.epochs
        length = epochs * iterations_per_epoch(config)
    return max(1, round(length * Fraction(repr(schedule.scale))))


def cores() -> int:
    """The processors this process may use: what machine.workers=null, machine.threads=null and --jobs auto go by.

    A limit of its container (`docker --cpus=2`) counts.
    """
    from joblib import cpu_count

    return cpu_count()


def network(config: Config) -> dict[str, Any]:
    """What `models.build` needs beside the layers."""
    settings = dataclasses.asdict(config.model)
    builder = NETWORKS[settings.pop("name")].builder(config.dataset.image_size)
    return settings | {"builder": builder, "classes": config.dataset.classes}


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def to_yaml(plain: Any) -> str:
    """Nested dictionaries as YAML, one line a setting."""

    class OneLine(yaml.SafeDumper):
        pass

    OneLine.add_representer(list, lambda dumper, v: dumper.represent_sequence("tag:yaml.org,2002:seq", v, True))
    return yaml.dump(plain, Dumper=OneLine, sort_keys=False, width=1000)


def identity(config: Config) -> dict[str, Any]:
    """What makes two runs the same: all settings except `machine` and `evaluate`, with the length in iterations."""
    plain = to_dict(config)
    del plain["machine"], plain["evaluate"]
    for key in ("default_epochs", "epochs", "scale"):
        del plain["schedule"][key]
    plain["schedule"]["iterations"] = iterations(config)
    return plain


def run_name(config: Config) -> str:
    """A readable name and a hash of everything in the identity that differs from the schema's defaults.

    Example: cifar10/resnet56/mbn-f2-b8-s0-8623f493.
    """
    digest = hashlib.sha256(distinction(config).encode()).hexdigest()[:8]
    short = f"{config.norm.name}-f{config.forwards}-b{config.batch_size}-s{config.seed}"
    return f"{config.dataset.name}/{config.model.name}/{short}-{digest}"


def distinction(config: Config) -> str:
    """What differs from the schema's defaults in the identity, as JSON: equal for equal runs, in all versions."""
    default = Config(model=type(config.model)(), norm=type(config.norm)())
    return json.dumps(_difference(identity(config), to_dict(default)), sort_keys=True)


def _difference(value: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    # Groups at their defaults are left out, so that a new group changes no name.
    different = {key: v for key, v in value.items() if v != default.get(key)}
    return {key: _difference(v, default[key]) if isinstance(v, dict) else v for key, v in different.items()}
