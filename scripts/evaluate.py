#!/usr/bin/env python
"""Test a checkpoint of ours, or any file of weights, and write its weights for other programs.

python scripts/evaluate.py results/runs/cifar10/resnet20/NAME/checkpoint.pt
python scripts/evaluate.py weights.pth model=resnet50 dataset=imagenet norm=bn machine.data=/data/imagenet
python scripts/evaluate.py checkpoint.pt --train
python scripts/evaluate.py checkpoint.pt --export model.safetensors
python scripts/evaluate.py checkpoint.pt --rules --record
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mbn.system import signals

if __name__ == "__main__":
    signals.answer_while_loading()

from mbn import config as configuration
from mbn.system.command_line import Parser, entry_point
from mbn.system.errors import UserError
from mbn.system.files import lock

if TYPE_CHECKING:
    from mbn.training.weights_file import Weights

# Beginnings of the names of settings that change nothing here.
FOR_TRAINING = (
    *("batch_size", "seed", "schedule", "optimizer", "norm.group"),
    *(f"machine.{name}" for name in ("again", "together", "mode", "checkpoint_seconds")),
)


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
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="write the weights as safetensors, to a new file or an earlier export",
    )
    parser.add_argument(
        "--train",
        action="store_true",
        help="measure on the training images, prepared like test images, instead of the test images: the difference "
        "is the generalisation gap",
    )
    parser.add_argument(
        "--rules",
        action="store_true",
        help="of a file of ours also the test error under other rules (statistics of the test batch, ...) and with "
        "precise statistics, and the training error in evaluation mode; takes minutes",
    )
    parser.add_argument(
        "--record", action="store_true", help="with --rules: write them into the run's record in machine.results too"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.record and not options.rules:
        raise UserError("--record writes what --rules measures: add --rules.", code=2)
    if options.rules and (options.train or options.export):
        raise UserError("--rules is a command of its own: leave out --train and --export.", code=2)
    if any(configuration.is_given(f"evaluate.{name}", options.overrides) for name in ("precise", "rules")):
        raise UserError(
            "evaluate.precise and evaluate.rules are for train.py, also if a run is finished: here --rules measures "
            "both.",
            code=2,
        )
    if options.rules:
        rules(options.weights, options.overrides, options.record)
    else:
        run(options.weights, options.overrides, options.export, options.train)


def rules(path: Path, overrides: list[str], write: bool) -> None:
    """Print the controls of a file of ours; write: also put them into the record of its run."""
    from mbn.records import provenance, record

    if write:
        provenance.ask()
    weights, trained = of_its_run(path, overrides)
    if not write:
        measured(path, trained)
        return
    results, name = Path(trained.config.machine.results), configuration.run_name(trained.config)
    home = record.path_of(results, name)
    if not home.exists():
        raise UserError(f"there is no {home}: finish this run, or name the folder of its record, machine.results=DIR.")
    record.read(home)  # before its folder gets a lock
    with lock(record.run_folder(results, name) / "lock") as held:
        add_to_record(home, path, weights, trained, held.check)
    print(f"wrote {home}")


def add_to_record(home: Path, path: Path, weights: "Weights", trained: Any, check_lock: Callable[[], None]) -> None:
    """Measure a file's controls and put them into the record of its run. Errors: UserError unless it is its record."""
    import torch

    from mbn.records import controls, record
    from mbn.training.conditions import conditions

    result = record.read(home)
    if record.diverged(result):
        raise UserError(f"{home} says that this run diverged, so that it has no final weights to measure.")
    if weights.journal is not None:
        controls.check_end(result, home, path, weights.ended, weights.journal)
    new = measured(path, trained, result["test_error"])
    machine = trained.config.machine
    by = conditions(machine, trained.device, torch.get_num_threads(), "eager", trained.data.fingerprint)
    check_lock()
    record.rewrite(home, controls=controls.completed(result["controls"], new, by))


def measured(path: Path, trained: Any, expected: float | None = None) -> dict[str, Any]:
    """The controls of a file of ours, printed. expected: the test error that it must have. Errors: UserError."""
    from mbn.records import controls

    error = trained.evaluation().error
    if expected is not None:
        controls.check_near(error, expected, path)
    found = trained.controls(controls.possible(trained.config))
    print(f"{path}\n  {error:6.2f} % test error")
    print("\n".join(f"  {line}" for line in in_lines(found)))
    return found


def of_its_run(path: Path, overrides: list[str]) -> tuple["Weights", Any]:
    """A file of ours, and its network with the configuration of its run. Errors: UserError."""
    from mbn.data.datasets import load_data
    from mbn.system.signals import StopRequest
    from mbn.training import weights_file
    from mbn.training.trained import Trained

    if others := without_groups(overrides, "machine", "evaluate"):
        raise UserError(f"--rules measures the run that {path} describes: leave out {' '.join(others)}.", code=2)
    weights = weights_file.read(path)
    if weights.described is None:
        raise UserError(f"{path} names no run: --rules is for files that train.py or --export wrote.")
    config = with_overrides(weights.described, overrides)
    device = prepared(config)
    model = network(config, weights.state, path, device)
    return weights, Trained(config, model, load_data(config, device), device, StopRequest())


def without_groups(overrides: list[str], *groups: str) -> list[str]:
    """The overrides of other groups of settings than these."""
    return [o for o in overrides if key_of(o).partition(".")[0] not in groups]


def key_of(override: str) -> str:
    """The name of the setting or group in an override as it is typed."""
    return override.lstrip("+").partition("=")[0]


def prepared(config: configuration.Config) -> Any:
    """The device, with torch's threads and arithmetic set as training sets them. Errors: UserError."""
    import torch

    from mbn.training import execution

    device = execution.choose_device(config.machine.device, None)
    torch.set_num_threads(execution.choose_threads(config.machine.threads, None))
    execution.set_arithmetic(device, config.machine.tf32, config.machine.deterministic)
    return device


def in_lines(measured: dict[str, Any]) -> list[str]:
    """What was measured, a line each."""
    lines = [f"{error:6.2f} % {name}" for name, error in (measured["rules"] or {}).items()]
    if "test_error_precise" in measured:
        lines.append(f"{measured['test_error_precise']:6.2f} % precise statistics")
    lines.append(f"{measured['train_error']:6.2f} % training error in evaluation mode")
    if gap := measured.get("population_gap"):
        lines.append(f"from the population's statistics: means {gap['mean']:.4f} sigma, log sigma {gap['std']:.4f}")
    return lines


def run(path: Path, overrides: list[str], export: Path | None, train: bool) -> None:
    from mbn.data.datasets import load_data
    from mbn.measure.evaluation import batch_size_for, evaluate
    from mbn.training import weights_file
    from mbn.training.iteration import autocast

    for key in map(key_of, overrides):
        if key.startswith(FOR_TRAINING):
            raise UserError(f"{key} is for training: leave it out.", code=2)
    if export is not None and "=" in export.name:
        raise UserError(f"{export} looks like a setting: name the file after --export.", code=2)
    if export is not None:
        weights_file.check_target(export, path)
    weights = weights_file.read(path)
    # No training batch is needed, and there may be fewer training images here.
    if weights.described is None:
        config = configuration.load([*overrides, "batch_size=1"])
    else:
        others = without_groups(overrides, "machine", "evaluate")
        if export is not None and others:
            raise UserError(f"--export names the run that {path} describes: leave out {' '.join(others)}.", code=2)
        few = weights.described["norm"].get("group") or 1
        config = with_overrides(weights.described | {"batch_size": few}, overrides)
    device = prepared(config)
    model = network(config, weights.state, path, device)
    data = load_data(config, device, to_test=not train)
    batches = (data.plain_train_batches if train else data.test_batches)(batch_size_for(config, device))
    with autocast(device, config.precision):
        measured = evaluate(model, batches)
    if not math.isfinite(measured.loss):
        raise UserError(
            f"the network of {path} gives outputs that are not finite, so it has no test error: train it with a lower "
            "learning rate, or use earlier weights."
        )
    images = f"{config.dataset.name}'s training images" if train else config.dataset.name
    print(
        f"{path} on {images}: loss {measured.loss:.4f}, top-1 error {measured.error:.2f} %, "
        f"top-5 error {measured.error_top5:.2f} %"
    )
    if export is not None:
        again = " over the export before it" if export.exists() else ""
        weights_file.write(export, model, weights.described or configuration.identity(config), weights.journal)
        print(f"wrote {export}{again}")


def network(config: configuration.Config, state: dict[str, Any], path: Path, device: Any) -> Any:
    """The network that config describes, with the weights of a file, in eval mode. Errors: UserError."""
    import torch

    import models
    from mbn.network_layers import from_config
    from mbn.training.weights_file import fill

    model = models.build(layers=from_config(config), **configuration.network(config))
    fill(
        model,
        state,
        f"{path} does not fit model={config.model.name} norm={config.norm.name} with {config.dataset.classes} classes",
        path,
    )
    return model.to(device).to(memory_format=torch.channels_last).eval()


def with_overrides(described: dict[str, Any], overrides: list[str]) -> configuration.Config:
    """The configuration of the run that a file describes, with the user's own settings in place of its. Errors:
    ConfigError."""
    keys = [override.key_or_group for override in configuration.parse(overrides)]
    groups = [f"{group}={described[group]['name']}" for group in ("dataset", "model", "norm") if group not in keys]
    own = configuration.resolved(configuration.compose([*groups, *overrides]))
    plain = described | {"machine": own["machine"], "evaluate": own["evaluate"]}
    for key in keys:
        group, _, name = key.partition(".")
        if group not in own:
            raise UserError(f"{key}= is for training: leave it out.", code=2)
        plain[group] = plain[group] | {name: own[group][name]} if name else own[group]
    return configuration.from_dict(plain)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
