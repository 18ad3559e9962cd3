"""Time and memory that an iteration of each arm of a case takes, measured in one process, round by round."""

import statistics
import sys
import time
from dataclasses import dataclass, field

import torch

from mbn.benchmark.jobs import NO_TIME, Finding, free, left, new_peak
from mbn.benchmark.workload import BASE, CAPTURED, PLAIN, Arm, Case, Setup, Workload, prepare, warm_up
from mbn.data import in_memory
from mbn.system.cuda_graph import own_stream


@dataclass
class Timed(Finding):
    """Each arm's seconds an iteration in every round, its seconds to start, and its peak memory in bytes."""

    case: Case
    seconds: dict[str, list[float]] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    def ratios(self, arm: str, to: str) -> list[float]:
        """The ratio in each round: noise that lasts longer than a round cancels."""
        return [a / b for a, b in zip(self.seconds[arm], self.seconds[to], strict=True)]

    def line(self) -> str:
        """Milliseconds an iteration: medians over rounds."""
        return "ms: " + "; ".join(f"{name} {1e3 * statistics.median(s):.2f}" for name, s in self.seconds.items())

    def rows(self) -> list[str]:
        base = CAPTURED.name if CAPTURED.name in self.seconds else BASE.name
        lines = [
            *(f"{self.case.title}.", ""),
            f"| arm | ms an iteration (quartiles) | images/s | / {base} (quartiles) | start, s | peak MB |",
            "|---|---|---|---|---|---|",
        ]
        for name, seconds in self.seconds.items():
            ms = [1e3 * s for s in seconds]
            ratio = spread(self.ratios(name, base), ".2f") if base in self.seconds else "-"
            speed = f"{1e3 * self.case.batch_size / statistics.median(ms):.0f}"
            peak = f"{self.memory[name] / 1e6:.1f}" if name in self.memory else "-"
            lines.append(f"| {name} | {spread(ms, '.4g')} | {speed} | {ratio} | {self.starts[name]:.1f} | {peak} |")
        return lines


def spread(values: list[float], digits: str) -> str:
    """Median, and first and third quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return f"{middle:{digits}} ({low:{digits}} to {high:{digits}})"


def timed(
    case: Case, chosen: tuple[Arm, ...], setup: Setup, deadline: float, dataset: in_memory.Data | None = None
) -> Timed:
    """Time every arm in every round, one after the other, until the time is over.

    A round that is not finished in time does not count. dataset: used instead of CIFAR-10.
    """
    result, dataset = Timed(case), dataset or setup.dataset  # on the device before any memory is measured
    torch.set_num_threads(case.threads)
    with own_stream(setup.device):  # only here: 32 lanes need all the streams that torch has
        ready: dict[Arm, tuple[Workload, int]] = {}
        for arm in chosen:
            if left(deadline) <= setup.seconds_to_begin(arm):
                result.missing[arm.name] = NO_TIME
                continue
            with result.noted(arm.name):
                ready[arm] = _start(result, arm, setup, dataset)
                print(f"{case.title}: {arm.name} started in {result.starts[arm.name]:.1f} s", file=sys.stderr)
            if arm.name in result.missing:
                free(setup.device)
        for done in range(setup.sizes.rounds if ready else 0):
            if not _round(result, ready, setup, deadline):
                result.missing[f"rounds from {done + 1} to {setup.sizes.rounds}"] = NO_TIME
                break
    return result


def _round(result: Timed, ready: dict[Arm, tuple[Workload, int]], setup: Setup, deadline: float) -> bool:
    """Time each ready arm once; False where time is over. An arm that fails is left out, and its times are deleted."""
    took: dict[str, float] = {}
    for arm, (work, iterations) in list(ready.items()):
        if left(deadline) <= 0:
            return False
        with result.noted(arm.name):
            took[arm.name] = work.seconds(iterations)
            if arm == PLAIN:
                # Its workers fill their queues now, not while another arm is timed.
                time.sleep(setup.sizes.round_seconds)
        if arm.name in result.missing:
            del ready[arm], work
            result.seconds.pop(arm.name, None)
            free(setup.device)
    for name, seconds in took.items():
        result.seconds.setdefault(name, []).append(seconds)
    return True


def _start(result: Timed, arm: Arm, setup: Setup, dataset: in_memory.Data) -> tuple[Workload, int]:
    """Make an arm ready, and count its iterations a round. Its seconds to start and its memory go into result."""
    began = time.perf_counter()
    device, cuda = setup.device, setup.device.type == "cuda"
    new_peak(device)
    before = torch.cuda.memory_reserved(device) if cuda else 0
    work = prepare(result.case, arm, setup, dataset)
    # Peak memory is the fourth iteration's: the first ones try out convolution algorithms, which takes more.
    warm_up(work, lambda: new_peak(device))
    result.starts[arm.name] = time.perf_counter() - began
    if cuda:
        result.memory[arm.name] = torch.cuda.max_memory_reserved(device) - before
    elif setup.sizes.memory and arm != PLAIN:
        result.memory[arm.name] = peak_memory(work)
    return work, min(200, max(2, round(setup.sizes.round_seconds / work.seconds(1))))


def peak_memory(work: Workload) -> int:
    """Peak memory of an iteration on a CPU in bytes, by torch's profiler."""
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        work.step()
    now = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak
