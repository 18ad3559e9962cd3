"""Measure what an iteration costs: arms side by side in one process, round by round, and the memory they take."""

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mbn import config as configuration
from mbn.benchmark.workload import BASE, PLAIN, Arm, Build, Case, Workload, prepare, settings
from mbn.data import datasets
from mbn.methods import METHODS


def arms(quick: bool) -> list[Arm]:
    """Every arm of a case; quick ones need no compiler."""
    eager = [Arm(n, f) for n, method in METHODS.items() if method.statistics for f in (1, 2)] + [Arm("gn")]
    if quick:
        return [*eager, PLAIN]
    more = [Arm("mbn", 2, gradient="batch"), Arm("bn", evaluates=True), Arm("mbn", evaluates=True)]
    compiled = [Arm(n, f, "compile") for n in ("bn", "mbn") for f in (1, 2)]
    return [*eager, *more, *compiled, Arm("mbn", 2, "compile", "batch"), PLAIN]


@dataclass
class Result:
    """Seconds an iteration of each arm of a case, round by round, and its seconds to start."""

    case: Case
    seconds: dict[str, list[float]] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)

    def ratio(self, arm: Arm, to: Arm) -> list[float]:
        """Round by round: noise that lasts longer than a round cancels."""
        return [a / b for a, b in zip(self.seconds[arm.name], self.seconds[to.name], strict=True)]


def measure(
    case: Case, chosen: list[Arm], folder: Path, device: torch.device, build: Build, rounds: int, say: Callable
) -> Result:
    """Time every arm in every round, one after the other. Errors: UserError where the data set is missing."""
    torch.set_num_threads(case.threads)
    result = Result(case)
    dataset = datasets.load(settings(case, BASE, folder), device)
    ready: list[tuple[Arm, Workload]] = []
    for arm in chosen:
        work = prepare(case, arm, dataset, folder, device, build)
        start = time.perf_counter()
        work.seconds(2)
        result.starts[arm.name] = time.perf_counter() - start
        say(f"{case.title}: {arm.name} started in {result.starts[arm.name]:.1f} s")
        result.seconds[arm.name] = []
        ready.append((arm, work))
    # About a second's work, so that a round is short beside the drifts of a shared machine.
    iterations = max(2, round(256 / case.batch_size)) if device.type == "cpu" else 50
    for i in range(rounds):
        for arm, work in ready:
            result.seconds[arm.name].append(work.seconds(iterations))
            if arm == PLAIN:
                time.sleep(0.5)  # its workers fill their queues, at nobody else's cost
        say(f"{case.title}: round {i + 1} of {rounds}")
    return result


def peak_memory(case: Case, arm: Arm, folder: Path, device: torch.device, build: Build) -> int:
    """Bytes that an iteration of an arm takes on a CPU at its peak: the profiler's; in a process of its own."""
    torch.set_num_threads(case.threads)
    work = prepare(case, arm, datasets.load(settings(case, BASE, folder), device), folder, device, build)
    for _ in range(3):
        work.step()
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        work.step()
    now = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def throughput(case: Case, arm: Arm, folder: Path, device: torch.device, build: Build, start: float, seconds: float):
    """Iterations a second between two instants, for processes side by side that were given the same ones."""
    torch.set_num_threads(case.threads)
    work = prepare(case, arm, datasets.load(settings(case, BASE, folder), device), folder, device, build)
    work.seconds(2)
    while time.time() < start:
        work.step()
    begin, n = time.perf_counter(), 0
    while time.time() < start + seconds:
        work.step()
        n += 1
    work.wait()
    return n / (time.perf_counter() - begin)


# Results as text.


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Median, first and third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def table(result: Result, chosen: list[Arm] | None = None, base: Arm = BASE, digits: int = 1) -> str:
    """A case as markdown: milliseconds, images a second, and ratios to eager BN with one forward.

    chosen: the arms to show, where they are not those of a CPU; base: what the ratios are to; digits: of milliseconds.
    """
    to = "eager BN, 1 forward" if base == BASE else base.name
    lines = [
        f"| arm | ms an iteration (quartiles) | images/s | / {to} (quartiles) | start, s |",
        "|---|---|---|---|---|",
    ]
    for arm in chosen or _known():
        if arm.name not in result.seconds:
            continue
        middle, low, high = (1e3 * s for s in quantiles(result.seconds[arm.name]))
        shown = "-"
        if base.name in result.seconds:
            ratio = quantiles(result.ratio(arm, base))
            shown = f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"
        lines.append(
            f"| {arm.name} | {middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f}) "
            f"| {result.case.batch_size / middle * 1e3:.0f} | {shown} | {result.starts[arm.name]:.1f} |"
        )
    return "\n".join(lines)


def rounded(value: Any) -> Any:
    """Numbers to five digits, and keys as text, at any depth: what is written as JSON."""
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _known() -> list[Arm]:
    return arms(quick=False)


def file_stem(device: torch.device) -> str:
    """cpu-amd-epyc-2-cores and the like: what results/benchmarks/ calls this machine."""
    from mbn.records.provenance import device_name

    cores = f" {configuration.cores()} cores" if device.type == "cpu" else ""
    return re.sub(r"[^a-z0-9]+", "-", (device_name(device) + cores).lower()).strip("-")
