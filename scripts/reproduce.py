#!/usr/bin/env python
"""Train the runs that the paper's tables still lack.

python scripts/reproduce.py table4                           every run of Table 4 that has no record yet, 5 seeds
python scripts/reproduce.py table4 norm=bn,mbn batch_size=8  some of them
python scripts/reproduce.py all --seeds 1 --dry-run          only print the commands, and how long they would take
python scripts/reproduce.py --status                         what has run of every table, and how long the rest takes
python scripts/reproduce.py table1 --scale 0.1 --budget 9m   a tenth of the length; stop after 9 minutes, to go on later
python scripts/reproduce.py table6 --jobs 4 machine.data=/data machine.results=/results evaluate.precise=true
python scripts/reproduce.py table4 batch_size=8 --jobs 8     on a GPU: eight at a time, in one process
python scripts/reproduce.py all --launcher slurm --slurm partition=gpu,time=8:00:00,gpus=1
python scripts/reproduce.py --import results.tar.gz          import records that were trained elsewhere

Exit code: 0 done, or stopped by the budget; 1 a run failed, or a record was refused; 2 a mistake in the command; 75
stopped by a signal, 130 stopped by Ctrl-C: the same command then goes on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mbn.system import signals

if __name__ == "__main__":
    signals.answer_while_loading()

import argparse
import contextlib
import os
import shlex
import time
from collections.abc import Sequence
from typing import Any

from mbn import grid
from mbn.config import DATASETS, REPOSITORY, Config, cores, is_given, load
from mbn.config.folders import check_there
from mbn.launch.estimate import Estimate
from mbn.launch.missing_runs import PlannedRun, runs, table_names
from mbn.launch.table_status import status_text, table_status
from mbn.records import provenance, record
from mbn.records.controls import MEASURED
from mbn.records.import_records import gather
from mbn.system.command_line import MOST_SEEDS, Parser, entry_point, whole
from mbn.system.durations import duration, in_seconds
from mbn.system.errors import UserError
from mbn.system.files import visible

# Settings that are not part of a run's identity.
SETTINGS = ("machine.", "evaluate.")
# Side by side, or for one run: more than any machine has cores or GPUs.
MOST_PROCESSES = 10_000


@entry_point
def main(arguments: list[str]) -> int:
    options = parser().parse_intermixed_args(arguments)
    if options.source is not None and options.dry_run:
        raise UserError("--import writes records, and --dry-run writes nothing: give one of the two.", code=2)
    with signals.Exit():  # the pool, while it trains, answers signals itself
        return work(options)


def work(options: argparse.Namespace) -> int:
    if (options.items or options.source is None) and not options.status and not options.dry_run:
        provenance.ask()
    settings = [item for item in options.items if item.lstrip("+").startswith(SETTINGS)]
    items = [item for item in options.items if item not in settings]
    config = common(settings, options.scale)
    code = import_records(options, Path(config.machine.results)) if options.source is not None else 0
    if options.status:
        show_status(items, config, options)
    elif items or options.source is None:
        code = max(code, reproduce(items, settings, config, options))
    return code


# Options.


def parser() -> Parser:
    p = Parser(
        description=__doc__,
        epilog="Settings machine.* (except machine.again and machine.together) and evaluate.* are handed to every "
        "train.py; results are in machine.results. On a CPU evaluate.rules and evaluate.precise are true unless they "
        "are set; on a GPU and with Slurm they are not.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "items",
        nargs="*",
        metavar="TABLE | key=value",
        help=f"{', '.join(grid.names())}, or all (except table3); key=value,value: only runs that have one of these",
    )
    seeds = p.add_mutually_exclusive_group()
    seeds.add_argument("--seeds", type=whole(1, MOST_SEEDS), default=5, metavar="N", help="seeds 0 to N-1 (default 5)")
    seeds.add_argument("--seed", type=whole(0, 2**32 - 1), metavar="S", help="this seed alone")
    p.add_argument("--dry-run", action="store_true", help="print the commands that are missing, and train nothing")
    p.add_argument("--status", action="store_true", help="print what has run of these or all tables, and train nothing")
    p.add_argument("--scale", type=float, default=1.0, metavar="X", help="0.1: at a tenth of the length")
    p.add_argument(
        "--jobs", type=_jobs, metavar="N", help="runs side by side; auto, the default: 1 on CUDA, else one a core"
    )
    p.add_argument(
        "--lanes",
        action=argparse.BooleanOptionalAction,
        help="train side by side in threads of one process instead of processes (default: on CUDA)",
    )
    p.add_argument("--budget", type=_seconds, metavar="9m", help="save and stop in time, to go on later: s, m, h")
    p.add_argument("--launcher", choices=("slurm",), help="submit the runs to a cluster through submitit")
    p.add_argument("--slurm", default="", metavar="OPTIONS", help="for sbatch: partition=gpu,time=8:00:00,gpus=1")
    p.add_argument(
        "--gpus-per-run",
        type=whole(1, MOST_PROCESSES),
        metavar="N",
        help="with Slurm: N processes for each run, by torchrun",
    )
    p.add_argument(
        "--import", type=_source, dest="source", metavar="PATH", help="take records from a folder or archive"
    )
    p.add_argument("--allow-dirty", action="store_true", help="also import records made with uncommitted code")
    p.add_argument("--grids", type=Path, default=grid.GRIDS, help=argparse.SUPPRESS)
    return p


def _jobs(text: str) -> int | None:
    return None if text == "auto" else whole(1, MOST_PROCESSES)(text)


def _source(text: str) -> Path:
    """A path. An empty one, as of a variable that is not set, would be the present folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must be a folder or an archive, not {text!r}")
    return Path(text)


def _seconds(text: str) -> float:
    try:
        return in_seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def chosen_seeds(options: argparse.Namespace) -> Sequence[int]:
    return range(options.seeds) if options.seed is None else [options.seed]


# Runs.


def common(settings: list[str], scale: float) -> Config:
    """The configuration with the machine, evaluation and scale of all runs. Errors: UserError, ConfigError."""
    if is_given("machine.again", settings):
        raise UserError(
            "machine.again is for a single run, and this trains only runs without a record: use train.py for it.",
            code=2,
        )
    if is_given("machine.together", settings):
        raise UserError("machine.together is for train.py -m: here --jobs N trains N runs side by side.", code=2)
    return load([*settings, f"schedule.scale={scale}"])


def reproduce(items: list[str], settings: list[str], config: Config, options: argparse.Namespace) -> int:
    """Train (or with --dry-run print) the missing runs of the named tables. config: made from the settings."""
    tables, filters = [i for i in items if "=" not in i], [i for i in items if "=" in i]
    if not tables:
        raise UserError(f"no table is named: choose among {', '.join(grid.names(options.grids))}, or all.", code=2)
    if options.slurm and options.launcher != "slurm":
        raise UserError("--slurm needs --launcher slurm.", code=2)
    if options.gpus_per_run is not None and options.launcher != "slurm":
        raise UserError("--gpus-per-run needs --launcher slurm: here, torchrun starts the processes of a run.", code=2)
    if options.budget is not None and options.launcher == "slurm":
        raise UserError("--budget is for runs on this machine: with Slurm give time= to --slurm.", code=2)
    if (options.jobs is not None or options.lanes is not None) and options.launcher == "slurm":
        raise UserError("--jobs and --lanes are for runs on this machine: with Slurm leave them out.", code=2)
    if not Path(config.machine.results).is_dir():
        print(f"{config.machine.results} is a new folder: no run has its record there yet.", file=sys.stderr)
    # On a CPU it is faster to train one run on each core than one run after another on all cores. A cluster's job has
    # its processors to itself.
    jobs = 1 if options.launcher == "slurm" else options.jobs or (1 if accelerated(config) else cores())
    meant = runs(tables, chosen_seeds(options), filters, options.scale, options.grids)
    jobs = min(jobs, len(meant))  # not those that are missing: the same command gives its last run the same threads
    if jobs > 1:
        settings = [*share_cores(meant, jobs, config), *settings]
    if not accelerated(config) and options.launcher is None:
        settings = [*ask_for_controls(settings, config), *settings]
    results = Path(config.machine.results)
    missing = [run.on(config) for run in meant if not run.finished(results)]
    expected = Estimate.read(results).sentence(missing, min(jobs, len(missing)))
    if options.dry_run:
        for run in missing:
            print(shlex.join(["python", "train.py", *run.overrides, *settings]))
        print(expected, file=sys.stderr)
        return 0
    print(f"{len(meant) - len(missing)} of {len(meant)} runs have their record.", flush=True)
    if not missing:
        return 0
    print(expected, file=sys.stderr)
    if options.launcher == "slurm":
        return hand_over(missing, results, settings, options.slurm, options.gpus_per_run)
    return train(missing, results, jobs, settings, config, options)


def share_cores(meant: list[PlannedRun], jobs: int, config: Config) -> list[str]:
    """The settings by which runs side by side share the cores, except those that are set; sets them in config too."""
    keys = ["threads"]
    if any(DATASETS[run.config.dataset.name].streamed for run in meant):
        keys.append("workers")
    own = {key: max(1, cores() // jobs) for key in keys if getattr(config.machine, key) is None}
    vars(config.machine).update(own)
    return [f"machine.{key}={number}" for key, number in own.items()]


def ask_for_controls(settings: list[str], config: Config) -> list[str]:
    """The settings that ask for all controls, except those that the user has set; sets them in config too."""
    wanted = [name for name in MEASURED if not is_given(f"evaluate.{name}", settings)]
    for name in wanted:
        setattr(config.evaluate, name, True)
    return [f"evaluate.{name}=true" for name in wanted]


def show_status(items: list[str], config: Config, options: argparse.Namespace) -> None:
    """Print how much of the named tables, or of all, has run."""
    filters = [item for item in items if "=" in item]
    if filters:
        raise UserError(f"--status shows whole tables: leave out {' '.join(filters)}.", code=2)
    results = Path(config.machine.results)
    check_there(results)
    names, estimate = table_names(items or grid.names(options.grids), options.grids), Estimate.read(results)
    tables = (grid.read(name, options.grids) for name in names)
    seeds, has_record = chosen_seeds(options), lambda name: record.path_of(results, name).exists()
    print(status_text([table_status(table, seeds, options.scale, has_record, estimate) for table in tables]))


def hand_over(missing: list[PlannedRun], results: Path, settings: list[str], text: str, gpus: int | None) -> int:
    """Submit the runs to Slurm, and do not wait for them. gpus: processes of each run, each with a GPU."""
    from mbn.launch.slurm import in_processes, slurm_options, submit

    asked = slurm_options(text)
    if gpus is not None and not any(key.startswith(("gpus", "gres")) for key in asked):
        asked["gpus_per_node"] = str(gpus)
    commands = [command(run, settings) for run in missing]
    jobs = submit(
        [(run, in_processes(line, gpus or 1)) for run, line in zip(missing, commands, strict=True)], results, asked
    )
    for run, job in zip(missing, jobs, strict=True):
        print(f"{run.name}: job {job}")
    return 0


def train(
    missing: list[PlannedRun],
    results: Path,
    jobs: int,
    settings: list[str],
    config: Config,
    options: argparse.Namespace,
) -> int:
    """Train the runs side by side on this machine."""
    from mbn.launch.pool import LANE_START_SECONDS, START_SECONDS, Pool, Process

    began = time.monotonic()
    lanes, margin = None, 15.0 if accelerated(config) else 60.0
    with contextlib.ExitStack() as stack:
        if jobs > 1 and (accelerated(config) if options.lanes is None else options.lanes):
            import train as script
            from mbn.launch.lanes import Lanes, fits

            provenance.import_all()
            lanes = stack.enter_context(Lanes(script.run, jobs))

        def start(run: PlannedRun, results: Path) -> Any:
            if lanes is not None and fits(run.config):
                return lanes(run, results)
            return Process(run, command(run, settings), results)

        starting = START_SECONDS if lanes is None else LANE_START_SECONDS
        # Importing torch for the lanes took its time of the budget.
        budget = None if options.budget is None else options.budget - (time.monotonic() - began)
        outcome = Pool(missing, results, jobs, start, budget, margin, starting).work()
    return report(outcome, results, options.budget)


def command(run: PlannedRun, settings: Sequence[str]) -> list[str]:
    """The command line that `--dry-run` shows, with this Python and this checkout's train.py."""
    return [sys.executable, str(REPOSITORY / "train.py"), *run.overrides, *settings]


def accelerated(config: Config) -> bool:
    """Whether runs use a GPU. It looks for the driver's file, because importing torch takes seconds."""
    if config.machine.device == "auto":
        return Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
    return config.machine.device != "cpu"


def report(outcome: Any, results: Path, budget: float | None) -> int:
    """Print what was done, what failed and what is left, and return the exit code."""
    count = len(outcome.done) + len(outcome.failed) + len(outcome.left)
    diverged = f", {len(outcome.diverged)} of which diverged" if outcome.diverged else ""
    print(f"{len(outcome.done)} of {count} runs are done{diverged}.")
    if outcome.left:
        begun = sum(visible(record.run_folder(results, name) / "checkpoint.pt") for name in outcome.left)
        why = f"the budget of {duration(budget or 0)} is spent" if outcome.spent else "stopped"
        print(f"{why}: {len(outcome.left)} are left, {begun} of them begun; the same command goes on with them.")
    if outcome.failed:
        print(f"error: {len(outcome.failed)} of {count} runs failed:", file=sys.stderr)
        for name, reason in outcome.failed.items():
            print(f"  {name}: {reason}", file=sys.stderr)
    return outcome.code if outcome.code is not None else 1 if outcome.failed else 0


# Records from elsewhere.


def import_records(options: argparse.Namespace, results: Path) -> int:
    """Import records, print what was imported and refused, and return the exit code."""
    gathered = gather(options.source, results, options.allow_dirty)
    said = [f"{len(gathered.taken)} records imported"]
    said += [f"{len(gathered.known)} were here already"] if gathered.known else []
    said += [f"{gathered.others} other JSON files passed over"] if gathered.others else []
    print("\n".join([*gathered.taken, ", ".join(said) + "."]), flush=True)
    for sentence in gathered.refused:
        print(f"refused: {sentence}", file=sys.stderr)
    return 1 if gathered.refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
