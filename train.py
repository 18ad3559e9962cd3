#!/usr/bin/env python
"""Train one network: `python train.py dataset=cifar10 model=resnet56 norm=mbn` is the paper's run."""

import sys
from pathlib import Path

# Use this checkout's own code, even if another version is installed.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from mbn.system import signals

if __name__ == "__main__":  # first, because what follows takes a second
    signals.answer_while_loading()

import argparse
import os
import shlex
import time
from contextlib import redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

from mbn import config as configuration
from mbn.system.command_line import Parser, entry_point
from mbn.system.errors import DivergedError, UserError, printable
from mbn.system.processes import Processes, another_may_end, end, from_environment, join, leave
from mbn.system.setting_fields import by_full_names

if TYPE_CHECKING:
    from mbn.system.signals import StopRequest
    from mbn.training.run import OpenData

DESCRIPTION = """Train one network and write its record.

  python train.py experiment=quickstart                     2 minutes on a CPU, no download
  python train.py dataset=cifar10 model=resnet56 norm=mbn   the paper's run
  python train.py norm=bn batch_size=8 schedule.epochs=20   any settings of those below
  python train.py norm=brn --help                           this page, with the settings of brn
  python train.py -m norm=bn,mbn seed=0,1,2                 a sweep: a run after the other
  python train.py -m seed=0,1,2,3 machine.together=4        on a GPU: four at a time

The same command again goes on with an unfinished run, and shows the result of a finished one."""

RESULTS = """results, in machine.results:
  records/NAME.json     the result of a run: what tables and figures are made from
                        (in other_records/ for data sets that no table has)
  runs/NAME/            its checkpoints, metrics.jsonl, and TensorBoard's file:
                        tensorboard --logdir {runs}

exit codes:
  0    done
  1    a run failed or diverged; the others of a sweep are trained all the same
  2    a mistake in the command; nothing was trained
  75   stopped by a signal, 130 by Ctrl-C: the same command goes on
  76   another process trains this run"""

# Another process waits so many seconds before it ends, so that the main one can print the error first.
WAIT_FOR_MAIN = 1


@entry_point
def main(arguments: list[str]) -> int:
    """Returns the exit code, see RESULTS."""
    processes = from_environment()
    with another_may_end(processes):
        code = command(arguments, processes) if processes.main else beside_the_main_process(arguments, processes)
    leave(processes)
    return code


def command(arguments: list[str], processes: Processes) -> int:
    p = Parser(
        prog="train.py",
        description=DESCRIPTION,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("overrides", nargs="*", metavar="key=value", help="settings, listed below with their values")
    p.add_argument(
        "-h", "--help", action="store_true", help="show this, with the values that the rest of the command sets"
    )
    p.add_argument("-c", "--cfg", action="store_true", help="--cfg job: print the values alone, as YAML")
    p.add_argument("-m", "--multirun", action="store_true", help="a sweep over a,b,c or range(0,3)")
    options = p.parse_intermixed_args(arguments)
    overrides = [o for o in options.overrides if not (options.cfg and o in ("job", "all", "hydra"))]
    if options.multirun and (options.help or options.cfg) and len(configuration.sweep_lines(overrides)) > 1:
        raise UserError("--help and --cfg show the settings of one run: leave -m out, with one value each.", code=2)
    if options.help:
        config = configuration.load(overrides)
        choices = "".join(f"  {group}={'|'.join(configuration.options(group))}\n" for group in configuration.groups())
        results = RESULTS.format(runs=shlex.quote(f"{config.machine.results}/runs"))
        p.epilog = f"choices:\n{choices}\nsettings:\n{configuration.settings_page(config)}\n\n{results}"
        p.print_help()
    elif options.cfg:
        composed = configuration.compose(overrides)
        print(configuration.to_yaml(configuration.resolved(composed)))
    else:
        with signals.Exit(silent=not processes.main):
            from mbn.records import provenance

            provenance.ask()
            if options.multirun and processes.several:
                raise UserError("a sweep (-m) is for one process: start torchrun for each run.", code=2)
            if options.multirun:
                from mbn.launch.sweep import sweep

                return sweep(overrides, run)
            run(configuration.load(overrides))
    return 0


def beside_the_main_process(arguments: list[str], processes: Processes) -> int:
    """The command in another process than the main one: it prints nothing but an error that is its own."""
    try:
        with (
            Path(os.devnull).open("w", encoding="utf-8") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
        ):
            return command(arguments, processes)
    except UserError as error:
        if error.everywhere:
            return error.code
        if error.code == 2 and not processes.first_of_another_machine:  # the main process has made the mistake, too
            time.sleep(WAIT_FOR_MAIN)  # torchrun ends all once one has ended
            return error.code
        raise


def run(config: configuration.Config, stop: "StopRequest | None" = None, open_data: "OpenData | None" = None) -> None:
    """Train, or show the result of a finished run. stop, open_data: for runs in threads, see `mbn.training.run`."""
    from mbn.records import controls, record

    results = Path(config.machine.results)
    path = record.path_of(results, configuration.run_name(config))

    def build(layers):
        import models
        from mbn.system.registered import registered

        network = configuration.network(config)
        registered(f"models.{network['builder']}", "mbn/config/registry.py")
        return models.build(layers=layers, **network)

    if config.evaluate.precise and "precise" not in controls.asked(config):
        print(f"warning: norm={config.norm.name} has no statistics to measure again.", file=sys.stderr)
    # Importing torch takes seconds: done only once the configuration is known to be right, and not for a finished run.
    processes = from_environment()
    join(processes, config.machine.device)
    check_same_settings(config, processes)
    if processes.from_main(path.exists) and not config.machine.again:
        result = processes.from_main(lambda: record.read(path))
        if processes.main:
            warn_of_other_code(result)
            warn_of_other_data(config, record.run_folder(results, configuration.run_name(config)))
        if record.diverged(result):
            raise DivergedError(
                f"{record.in_a_sentence(result)}, as {path} says; machine.again=true trains it again.",
                result["diverged_at"],
            )
        if not processes.main:
            return
        if wanted := controls.missing(config, result["controls"]):
            from mbn.training.run import add_controls

            result = add_controls(config, build, wanted, stop)
        print(f"{record.in_a_sentence(result)}\nThe run is finished; machine.again=true trains it again.")
    else:
        from mbn.training.run import train

        if not results.exists():
            print(f"{results} is a new folder: the results go there.", flush=True)
        trained = train(config, build, stop, open_data)
        if trained is None:  # another process has finished it since
            run(config, stop, open_data)
            return
        result = trained
        print(record.in_a_sentence(result))
    print(f"record: {path}\ncurves: tensorboard --logdir {shlex.quote(str(results / 'runs'))}")


def check_same_settings(config: configuration.Config, processes: Processes) -> None:
    """Check that all processes were given the same settings, except those of a machine: with others they would train
    other weights, or wait for each other. Errors: UserError.
    """
    own = by_full_names(configuration.to_dict(config))
    for name in ("data", "results", "threads", "workers"):
        del own[f"machine.{name}"]
    processes.check_alike(own, "give all machines the same command and the same checkout.", code=2)


def warn_of_other_code(result: dict[str, Any]) -> None:
    """One line if other code made a record than would train the run now. Older records do not say."""
    from mbn.records import provenance

    if result["code"] is not None and result["code"] != provenance.code():
        commit, dirty = provenance.commit_and_dirty()
        now = provenance.with_code({"commit": commit, "dirty": dirty, "code": provenance.code()})
        print(
            f"warning: the code has changed since this run was trained ({provenance.with_code(result)}; now {now}).",
            file=sys.stderr,
        )


def warn_of_other_data(config: configuration.Config, folder: Path) -> None:
    """One line if a run was trained on another folder of images than would be used now. folder: the run's, if it is
    there; it alone says, unless it is old and names the images by a relative path. Data sets whose files have checksums
    are the same anywhere.
    """
    from mbn.system.yaml_file import read_yaml

    if not configuration.DATASETS[config.dataset.name].streamed:
        return
    try:
        then = read_yaml(folder / "config.yaml")["machine"]["data"]
    except (OSError, UserError, KeyError, TypeError, ValueError):
        return
    now = config.machine.data
    if isinstance(then, str) and Path(then).is_absolute() and Path(then).resolve() != Path(now).resolve():
        print(
            f"warning: this run was trained on the images in {printable(then)}, not on those in {printable(now)}: "
            "machine.again=true trains it again, on these.",
            file=sys.stderr,
        )


if __name__ == "__main__":
    end(main(sys.argv[1:]))
