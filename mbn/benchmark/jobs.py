"""Run jobs one after the other, each with its own time limit: a failure is reported, and the rest goes on.

The clock is read between iterations: nothing is interrupted.
"""

import argparse
import contextlib
import datetime
import fnmatch
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mbn import config as configuration
from mbn.benchmark.workload import Setup
from mbn.config.schema import DEVICE
from mbn.records import provenance
from mbn.system.command_line import finite_above_0
from mbn.system.errors import UserError, first_line
from mbn.system.files import write_atomically
from mbn.training.execution import set_arithmetic

NO_TIME = "skipped: no time left"


def left(deadline: float) -> float:
    """Seconds until a deadline of the monotonic clock; below 0 when it is over."""
    return deadline - time.monotonic()


@dataclass(kw_only=True)
class Finding:
    """What a job has found. missing: what it could not find, each with the reason."""

    missing: dict[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """The result in a line."""
        raise NotImplementedError

    def rows(self) -> list[str]:
        """The result as markdown."""
        return [f"{self.line()}."]

    @contextlib.contextmanager
    def noted(self, name: str) -> Iterator[None]:
        """Inside, any error (memory, a compiler, a driver) is noted in `missing` under name, and not raised."""
        try:
            yield
        except Exception as error:
            self.missing[name] = f"failed: {first_line(error)}"


Findings = dict[str, Finding]


class Job(NamedTuple):
    """A short name, a limit in seconds, and a function that works in a setup until a deadline."""

    name: str
    limit: float
    work: Callable[[Setup, float], Finding]


def free(device: torch.device) -> None:
    """Give unused memory back. After an error, call it only when nothing refers to that error any more."""
    gc.collect()
    new_peak(device)


def new_peak(device: torch.device) -> None:
    """Start measuring peak memory again, from what is in use now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def device_option(text: str) -> str:
    """For an option's type: what machine.device may be."""
    if not DEVICE.holds(text):
        raise argparse.ArgumentTypeError(f"must be {DEVICE.wanted}, not {text!r}")
    return text


def add_options(parser: argparse.ArgumentParser, limit: str) -> None:
    """The options that choose among jobs. limit: the default of --limit, in words."""
    parser.add_argument(
        "--limit", type=finite_above_0, metavar="SECONDS", help=f"time for all jobs together; default: {limit}"
    )
    parser.add_argument("--only", default="*", help="jobs to do, by name or pattern, with commas: 'r20-*,loader'")
    parser.add_argument("--skip", default="", help="jobs to leave out, by name or pattern")


def run(
    jobs: list[Job], setup: Setup, limit: float, only: str = "*", skip: str = "", path: Path | None = None
) -> tuple[dict[str, Any], Findings]:
    """Do the jobs within limit seconds. Returns a report, and what each job that was begun has found.

    After each job its result is printed, and the report written to path. only, skip: names or patterns, with commas.
    Errors: UserError where a name fits no job.
    """
    began = time.monotonic()
    end = began + limit
    # As in training: TF32, and convolution algorithms chosen by trial.
    set_arithmetic(setup.device, tf32=True, deterministic=False)
    names = [job.name for job in jobs]
    asked = chosen(names, only) - chosen(names, skip)
    report: dict[str, Any] = {
        "device": provenance.device_name(setup.device),
        "cores": configuration.cores(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": provenance.commit_and_dirty()[0],
        "versions": provenance.versions(),
        "images": setup.opened[1],
        "limit": limit,
        "cases": {},
    }
    print(f"{report['device']}, torch {torch.__version__}", flush=True)
    findings: Findings = {}
    for job in jobs:
        start = time.monotonic()
        status = _one(job, setup, end, findings) if job.name in asked else "skipped: not asked for"
        took = time.monotonic() - start
        found = findings.get(job.name)
        report["cases"][job.name] = {"status": status, "took": took, **(asdict(found) if found else {})}
        report["seconds"] = time.monotonic() - began
        if path is not None:
            write_report(path, report)
        print(f"{job.name} ({took:.1f} s): {found.line() if found else status}", flush=True)
        for name, why in found.missing.items() if found else ():
            print(f"  {name}: {why}", flush=True)
    return report, findings


def _one(job: Job, setup: Setup, end: float, findings: Findings) -> str:
    """Do a job and put what it finds among the findings. Returns its status in words."""
    if left(end) <= 0:
        return NO_TIME
    failed = Finding()
    with failed.noted(job.name):
        findings[job.name] = job.work(setup, min(end, time.monotonic() + job.limit))
    with failed.noted("memory"):  # a GPU that no longer answers must not end the report
        free(setup.device)
    missing = (findings.get(job.name) or failed).missing
    return next((why for why in missing.values() if why.startswith("failed")), "partly" if missing else "done")


def exit_code(report: dict[str, Any]) -> int:
    """1 if a job of a report failed, or none was done, even in part; else 0."""
    found = [case["status"] for case in report["cases"].values()]
    return int(any(status.startswith("failed") for status in found) or not {"done", "partly"}.intersection(found))


def chosen(names: list[str], patterns: str) -> set[str]:
    """The names that fit one of the patterns. Errors: UserError where a pattern fits none."""
    found = {pattern: fnmatch.filter(names, pattern) for pattern in patterns.split(",") if pattern}
    for pattern, fitting in found.items():
        if not fitting:
            raise UserError(f"no job is named {pattern}: there are {', '.join(names)}.", code=2)
    return {name for fitting in found.values() for name in fitting}


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write a report as JSON, with numbers to five digits."""
    rounded = json.loads(json.dumps(report), parse_float=lambda text: float(f"{float(text):.5g}"))
    write_atomically(path, (json.dumps(rounded, indent=1) + "\n").encode())
