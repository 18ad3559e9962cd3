#!/usr/bin/env python
"""Test a checkpoint of ours, or any file of weights, and write its weights for other programs.

python scripts/evaluate.py results/runs/cifar10/resnet20/NAME/checkpoint.pt
python scripts/evaluate.py weights.pth model=resnet50 dataset=imagenet norm=bn machine.data=/data/imagenet
python scripts/evaluate.py checkpoint.pt --train
python scripts/evaluate.py checkpoint.pt --export model.safetensors
"""

import json
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mbn import config as configuration
from mbn.system.command_line import Parser, entry_point
from mbn.system.errors import UserError
from mbn.system.files import write_atomically


@entry_point
def main(arguments: list[str]) -> None:
    parser = Parser(
        description="Loss, top-1 and top-5 error of a checkpoint of ours or a state_dict file on a test set."
    )
    parser.add_argument("weights", type=Path, help="checkpoint.pt of a run, a state_dict file, or .safetensors")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="as for train.py: model=, dataset=, norm=, dataset.mean=, dataset.std=, machine.data= ...; a checkpoint "
        "of ours brings its own",
    )
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the weights as safetensors")
    parser.add_argument(
        "--train",
        action="store_true",
        help="measure on the training images, prepared like test images, instead of the test images: the difference "
        "is the generalisation gap",
    )
    options = parser.parse_intermixed_args(arguments)
    run(options.weights, options.overrides, options.export, options.train)


def run(path: Path, overrides: list[str], export: Path | None, train: bool) -> None:
    import torch

    import models
    from mbn.data.datasets import load_data
    from mbn.measure.test_error import batch_size_for, evaluate
    from mbn.network_layers import from_config
    from mbn.training.execution import choose_device
    from mbn.training.iteration import autocast

    if any(override.lstrip("+").startswith("evaluate.precise=") for override in overrides):
        raise UserError(
            "evaluate.precise is for train.py: give it to the run's own command, also if it is finished.", 2
        )
    if export is not None and "=" in export.name:
        raise UserError(f"{export} looks like a setting: name the file after --export.", code=2)
    state, described = read_weights(path)
    lines = command_line(described, overrides) if described else overrides
    # The batch size is training's, and evaluation may have fewer training images.
    config = configuration.load([*lines, "batch_size=1"])
    device = choose_device(config.machine.device, None)
    model = models.build(layers=from_config(config), **configuration.network(config))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        why = textwrap.shorten(" ".join(str(error).splitlines()[1:2]), 200).rstrip(".")
        raise UserError(
            f"{path} does not fit model={config.model.name} norm={config.norm.name} with {config.dataset.classes} "
            f"classes: {why}."
        ) from None
    model = model.to(device).to(memory_format=torch.channels_last).eval()
    data = load_data(config, device)
    batches = (data.plain_train_batches if train else data.test_batches)(batch_size_for(config, device))
    with autocast(device, config.precision):
        measured = evaluate(model, batches)
    images = f"{config.dataset.name}'s training images" if train else config.dataset.name
    print(
        f"{path} on {images}: loss {measured.loss:.4f}, top-1 error {measured.error:.2f} %, "
        f"top-5 error {measured.error_top5:.2f} %"
    )
    if export is not None:
        from safetensors.torch import save

        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        identity = configuration.identity(config)
        if described:  # the run in which it was trained, with the data set that was tested
            identity = {**described, "dataset": identity["dataset"]}
        write_atomically(export, save(weights, {"config": json.dumps(identity)}))
        print(f"wrote {export}")


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A file's state_dict, and the configuration of its run where it is one of ours. Runs no code from the file."""
    import torch

    from mbn.training import checkpoint_file

    if not path.is_file():
        raise UserError(f"{path} is not a file: name a checkpoint or a file of weights.")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                described = (file.metadata() or {}).get("config")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{path} is not a file of weights ({error}).") from None
        return tensors, json.loads(described) if described else None
    none = UserError(f"{path} holds no state_dict of tensors: torch.save(model.state_dict(), FILE) writes one.")
    try:
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): make it readable.") from None
    except Exception:  # a wrong file can raise anything, and torch's message advises to load it unsafely
        raise none from None
    if isinstance(content, dict) and "model" in content and "config" in content:
        try:
            content = checkpoint_file.read(path)
        except checkpoint_file.DamagedError as error:
            before = checkpoint_file.previous(path)
            use = f"use {before}, or " if before.exists() else ""
            raise UserError(f"{error}: {use}train again.") from None
        return content["model"], configuration.identity(configuration.from_dict(json.loads(content["config"])))
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise none
    return content, None


def command_line(described: dict[str, Any], overrides: list[str]) -> list[str]:
    """The overrides that describe a network; the user's own replace those with the same key."""
    groups = [f"{group}={described[group]['name']}" for group in ("dataset", "model", "norm")]
    leaves = [
        f"{group}.{key}={json.dumps(value)}"
        for group in ("dataset", "model", "norm")
        for key, value in described[group].items()
        if key != "name"
    ]
    top = [f"{key}={described[key]}" for key in ("forwards", "precision", "batch_size", "seed")]
    named = {override.partition("=")[0] for override in overrides}
    ours = [o for o in (*groups, *leaves, *top) if not {o.partition("=")[0], o.split(".")[0].split("=")[0]} & named]
    return [*ours, *overrides]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
