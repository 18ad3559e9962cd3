#!/usr/bin/env python
"""Train what the paper's tables still lack.

python scripts/reproduce.py table4                           every run of Table 4 that has no record yet, 5 seeds
python scripts/reproduce.py table4 norm=bn,mbn batch_size=8  some of them
python scripts/reproduce.py all --seeds 1 --dry-run          only print the commands, and how long they would take
python scripts/reproduce.py table1 --scale 0.1 --budget 9m   a tenth of the length; stop after 9 minutes, to go on later
python scripts/reproduce.py table6 --jobs 4 -- machine.data=/data evaluate.precise=true
python scripts/reproduce.py table4 batch_size=8 --jobs 8     on a GPU: eight at a time, in one process
python scripts/reproduce.py all --launcher slurm --slurm partition=gpu,time=8:00:00,gpus=1
python scripts/reproduce.py --import results.tar.gz          take in records that were trained elsewhere

Exit code: 0 done, or stopped by the budget; 1 a run failed, or a record was refused; 2 a mistake in the command; 75
stopped by a signal, and 130 by Ctrl-C, after which the same command goes on.
"""

import argparse
import contextlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mbn import grid
from mbn.config import REPOSITORY, Config, cores, load
from mbn.launch.missing_runs import Estimate, Run, check_settings, duration, runs, work
from mbn.records.import_records import gather
from mbn.system.command_line import Parser, entry_point
from mbn.system.errors import UserError

RESULTS = REPOSITORY / "results"


@entry_point
def main(arguments: list[str]) -> int:
    own, settings = _split(arguments)
    options = parser().parse_intermixed_args(own)
    code = _gather(options) if options.source is not None else 0
    if options.items or options.source is None:
        code = max(code, reproduce(options, settings))
    return code


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before and behind `--`."""
    position = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:position], arguments[position + 1 :]


# Options.


def parser() -> Parser:
    p = Parser(
        description=__doc__.partition("Exit code")[0] if __doc__ else "",
        epilog="What follows -- is handed to every train.py: machine.* and evaluate.* settings.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "items",
        nargs="*",
        metavar="TABLE | key=value,value",
        help=f"{', '.join(grid.names())}, or all (but table3); only runs that have one of the values",
    )
    seeds = p.add_mutually_exclusive_group()
    seeds.add_argument("--seeds", type=_count, default=5, metavar="N", help="seeds 0 to N-1 (default 5)")
    seeds.add_argument("--seed", type=_seed, metavar="S", help="this seed alone")
    p.add_argument("--dry-run", action="store_true", help="print the commands that are missing, and train nothing")
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="records and runs (default results)")
    p.add_argument("--scale", type=_scale, default=1.0, metavar="X", help="0.1: at a tenth of the length")
    p.add_argument(
        "--jobs", type=_jobs, default="auto", metavar="N", help="side by side; auto: 1 on CUDA, else one a core"
    )
    p.add_argument(
        "--lanes",
        action=argparse.BooleanOptionalAction,
        help="train side by side in threads of one process instead of processes (default: on CUDA)",
    )
    p.add_argument("--budget", type=_seconds, metavar="9m", help="stop in time, saved, to go on later: s, m, h")
    p.add_argument("--launcher", choices=("slurm", "local"), help="hand the runs to a cluster by way of submitit")
    p.add_argument("--slurm", default="", metavar="OPTIONS", help="for sbatch: partition=gpu,time=8:00:00,gpus=1")
    p.add_argument("--import", type=Path, dest="source", metavar="PATH", help="take records from a folder or archive")
    p.add_argument("--allow-dirty", action="store_true", help="import also what code outside any commit made")
    p.add_argument("--grids", type=Path, default=grid.GRIDS, help=argparse.SUPPRESS)
    return p


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on is wanted, not {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"a whole number from 0 to 4294967295 is wanted, not {text!r}")
    return int(text)


def _jobs(text: str) -> int | str:
    return text if text == "auto" else _count(text)


def _scale(text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0 < scale < float("inf"):
        raise argparse.ArgumentTypeError(f"a number above 0 is wanted, not {text!r}")
    return scale


def _seconds(text: str) -> float:
    """90s, 9m, 1.5h or 1h30m in seconds."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", text)
    if not parts or "".join(n + unit for n, unit in parts) != text:
        raise argparse.ArgumentTypeError(f"a time such as 90s, 9m or 1h30m is wanted, not {text!r}")
    return sum(float(n) * {"s": 1, "m": 60, "h": 3600}[unit] for n, unit in parts)


# Runs.


def reproduce(options: argparse.Namespace, settings: list[str]) -> int:
    """Train, or with --dry-run print, what is missing of the tables named."""
    results = options.results.resolve()
    tables = [item for item in options.items if "=" not in item]
    if not tables:
        raise UserError(f"no table is named: choose among {', '.join(grid.names(options.grids))}, or all.", code=2)
    filters = [item for item in options.items if "=" in item]
    seeds = range(options.seeds) if options.seed is None else [options.seed]
    meant = runs(tables, seeds, filters, options.scale, options.grids)
    config = check_settings(meant[0], settings)
    missing = [run for run in meant if not run.finished(results)]
    if options.slurm and options.launcher != "slurm":
        raise UserError("--slurm needs --launcher slurm.", code=2)
    if options.budget is not None and options.launcher == "slurm":
        raise UserError("--budget is for runs that wait here: with Slurm give time= to --slurm.", code=2)
    # A job of a cluster has its processors to itself.
    jobs, extra = share(1 if options.launcher == "slurm" else options.jobs, config)
    settings = [*_results_setting(results), *extra, *settings]
    estimate = Estimate(results)
    if options.dry_run:
        for run in missing:
            print(shlex.join(["python", "train.py", *run.overrides, *settings]))
        print(estimate.sentence(missing, min(jobs, len(missing))), file=sys.stderr)
        return 0
    print(f"{len(meant) - len(missing)} of {len(meant)} runs have their record.", flush=True)
    if not missing:
        return 0
    print(estimate.sentence(missing, min(jobs, len(missing))), file=sys.stderr)
    if options.launcher == "slurm":
        return hand_over(missing, results, settings, options.slurm)
    return train(missing, results, jobs, settings, _accelerated(config), estimate, options)


def hand_over(missing: list[Run], results: Path, settings: list[str], text: str) -> int:
    """Give the runs to Slurm, and leave them to it."""
    from mbn.launch.slurm import slurm_options, submit

    jobs = submit([(run, command(run, settings)) for run in missing], results, slurm_options(text))
    for run, job in zip(missing, jobs, strict=True):
        print(f"{run.name}: job {job}")
    return 0


def train(
    missing: list[Run],
    results: Path,
    jobs: int,
    settings: list[str],
    accelerated: bool,
    estimate: Estimate,
    options: argparse.Namespace,
) -> int:
    """Train the runs side by side on this machine."""
    from mbn.launch.pool import Pool

    seconds = [estimate.seconds(run.config) for run in missing]
    known = [s for s in seconds if s is not None]
    weights = known if len(known) == len(missing) else [work(run.config) for run in missing]
    margin = 15.0 if accelerated else 60.0
    with starter(settings, results, jobs, accelerated, options) as start:
        outcome = Pool(missing, results, jobs, start, weights, options.budget, margin).work()
    return report(outcome, results, options.budget)


@contextlib.contextmanager
def starter(
    settings: list[str], results: Path, jobs: int, accelerated: bool, options: argparse.Namespace
) -> Iterator[Callable[[Run, Path], Any]]:
    """What starts a run: as a process, a job of submitit's, or a thread of this process."""
    from mbn.launch.pool import start_process

    def process(run: Run, results: Path) -> Any:
        return start_process(run, command(run, settings), results)

    in_lanes = options.lanes if options.lanes is not None else accelerated
    if options.launcher == "local":
        from mbn.launch.slurm import Local

        yield Local(results, lambda run: command(run, settings))
    elif in_lanes and jobs > 1:
        import train as script
        from mbn.launch.lanes import Lanes, fits

        with Lanes(script.run, lambda run: load([*run.overrides, *settings]), jobs) as lanes:
            yield lambda run, results: lanes(run, results) if fits(run.config) else process(run, results)
    else:
        yield process


def command(run: Run, settings: list[str]) -> list[str]:
    """The command line that `--dry-run` shows, with this Python and this checkout's train.py."""
    return [sys.executable, str(REPOSITORY / "train.py"), *run.overrides, *settings]


def share(jobs: int | str, config: Config) -> tuple[int, list[str]]:
    """How many runs side by side, and the setting that divides the processor's threads among them."""
    if isinstance(jobs, str):
        # A run with one thread on each core is faster than one run after another with all of them.
        jobs = 1 if _accelerated(config) else cores()
    if jobs == 1 or config.machine.threads is not None:
        return jobs, []
    return jobs, [f"machine.threads={max(1, cores() // jobs)}"]


def _accelerated(config: Config) -> bool:
    """Whether runs use a GPU; asked of the driver's files, since importing torch takes seconds."""
    if config.machine.device == "auto":
        return Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
    return config.machine.device != "cpu"


def _results_setting(results: Path) -> list[str]:
    return [] if results == RESULTS.resolve() else [f"machine.results={_quoted(str(results))}"]


def _quoted(text: str) -> str:
    """A text as Hydra reads it, whatever signs it has."""
    return text if re.fullmatch(r"[\w./+-]+", text) else "'" + text.replace("'", r"\'") + "'"


def report(outcome: Any, results: Path, budget: float | None) -> int:
    """Say what was done, what failed and what is left; the exit code."""
    count = len(outcome.done) + len(outcome.failed) + len(outcome.left)
    print(f"{len(outcome.done)} of {count} runs are done.")
    if outcome.left:
        begun = sum((results / "runs" / name / "checkpoint.pt").exists() for name in outcome.left)
        why = f"the budget of {duration(budget or 0)} is spent" if outcome.spent else "stopped"
        print(f"{why}: {len(outcome.left)} are left, {begun} of them begun; the same command goes on with them.")
    if outcome.failed:
        print(f"error: {len(outcome.failed)} of {count} runs failed:", file=sys.stderr)
        for name, reason in outcome.failed.items():
            print(f"  {name}: {reason}", file=sys.stderr)
    return outcome.code if outcome.code is not None else 1 if outcome.failed else 0


# Records from elsewhere.


def _gather(options: argparse.Namespace) -> int:
    gathered = gather(options.source, options.results.resolve(), options.allow_dirty)
    said = [f"{len(gathered.taken)} records imported"]
    said += [f"{len(gathered.known)} were here already"] if gathered.known else []
    said += [f"{gathered.others} other JSON files passed over"] if gathered.others else []
    print(", ".join(said) + ".", flush=True)
    for sentence in gathered.refused:
        print(f"refused: {sentence}", file=sys.stderr)
    return 1 if gathered.refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
