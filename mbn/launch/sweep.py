"""A sweep: `train.py -m` with several values of settings. Does not import torch."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mbn import config as configuration
from mbn.launch.missing_runs import PlannedRun
from mbn.launch.sweep_table import sweep_table
from mbn.records import provenance
from mbn.system import signals
from mbn.system.command_line import failure
from mbn.system.errors import DivergedError, UserError

# Trains a run, or shows its result if it is finished.
Train = Callable[..., None]


def sweep(overrides: list[str], train: Train) -> int:
    """Train the runs of a sweep, and print a table of them at the end; all are checked before the first begins.

    Returns the exit code. Errors: UserError, ConfigError.
    """
    runs = []
    for line in configuration.sweep_lines(overrides):
        config = configuration.load(line)
        runs.append(PlannedRun(configuration.run_name(config), config, tuple(line)))
    machine = runs[0].config.machine
    if machine.together > 1:
        _check_together([run.config for run in runs])
    _check_apart(runs)
    if not all(one.finished(Path(machine.results)) and not one.config.machine.again for one in runs):
        provenance.import_all()
    instead: dict[str, str] = {}  # by a run's name, what the table says in place of a result
    try:
        return (_together if machine.together > 1 else _one_after_another)(runs, train, instead)
    finally:
        print(f"\n{sweep_table(runs, Path(machine.results), instead)}", flush=True)


def _one_after_another(
    runs: Sequence[PlannedRun], train: Train, instead: dict[str, str], *, others: bool = False
) -> int:
    """Train run after run; one that fails does not stop the rest, a signal does. instead: gets the reason of each that
    failed. others: whether more runs follow these.
    """
    code = 0
    instead |= {one.name: "not trained again" for one in runs if one.config.machine.again}
    with signals.Stop() as stop:
        for one in runs:
            stop.nothing_to_save = True  # until it trains
            try:
                train(one.config, stop)
                instead.pop(one.name, None)
            except Exception as error:
                if isinstance(error, UserError) and error.code in signals.CODES.values():
                    _say_what_is_trained_again(runs, instead)
                    raise
                if type(error).__name__ == "AcceleratorError":  # the device no longer answers this process
                    raise
                reason = failure(error)
                print(f"error: {one.name}: {reason}", file=sys.stderr)
                instead[one.name] = f"failed: {reason}"
                if isinstance(error, DivergedError):  # its record says it
                    del instead[one.name]
                code = 1
            if stop.code is not None and (others or one is not runs[-1]):  # it came when this run was about to end
                _say_what_is_trained_again(runs, instead)
                raise UserError("stopped: the same command goes on with the other runs.", code=stop.code)
    return code


def _say_what_is_trained_again(runs: Sequence[PlannedRun], instead: dict[str, str]) -> None:
    """One line, where a sweep with machine.again has stopped, on the runs that it has finished."""
    if done := sum(one.config.machine.again and one.name not in instead for one in runs):
        finished = f"{done} runs again that are" if done > 1 else "1 run again that is"
        print(
            f"note: with machine.again=true the same command trains {finished} finished now: leave what is finished "
            "out of it.",
            file=sys.stderr,
        )


def _check_apart(runs: Sequence[PlannedRun]) -> None:
    """Check that what a sweep varies makes several runs. Errors: UserError."""
    first: dict[str, PlannedRun] = {}
    for one in runs:
        other = first.setdefault(one.name, one)
        if differ := [text for text in one.overrides if text not in other.overrides]:
            raise UserError(
                f"with {' '.join(differ)} this is the run {one.name} again: sweep what makes another run of it, and "
                "set the rest for each command.",
                code=2,
            )


def _check_together(configs: list[configuration.Config]) -> None:
    """Check that runs can be trained at a time in this process. Errors: UserError."""
    from mbn.launch.lanes import check_alike

    if any(config.machine.again for config in configs):
        raise UserError("machine.again=true trains one run after another: leave machine.together out.", code=2)
    check_alike(configs)


def _together(runs: Sequence[PlannedRun], train: Train, instead: dict[str, str]) -> int:
    """Train several runs of a sweep at a time in this process; before them, one after another, those that cannot be.

    instead: gets the reason of each run that failed.
    """
    from mbn.launch.lanes import Lanes, fits
    from mbn.launch.pool import Pool

    results, together = Path(runs[0].config.machine.results), runs[0].config.machine.together
    lanes = Lanes(train, together)  # first: it lets many streams reach a GPU, which is too late once CUDA is used
    alone = [one for one in runs if one.finished(results) or not fits(one.config)]
    others = [one for one in runs if one not in alone]
    code = _one_after_another(alone, train, instead, others=bool(others))
    with lanes:
        outcome = Pool(others, results, together, lanes).work()
    for name, reason in (outcome.failed | outcome.diverged).items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    instead |= {name: f"failed: {reason}" for name, reason in outcome.failed.items()}
    if outcome.left:
        left = len(outcome.left)
        print(f"stopped: {left} runs are left, and the same command goes on with them.", file=sys.stderr)
    return outcome.code if outcome.code is not None else 1 if outcome.failed or outcome.diverged else code
