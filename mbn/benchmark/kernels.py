"""What a GPU does while networks train: its kernels, and how much of the time none runs."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from mbn.benchmark.jobs import NO_TIME, Finding
from mbn.benchmark.side_by_side import SideBySide
from mbn.benchmark.workload import Arm, Case, Setup

T = TypeVar("T")
# Start and end in nanoseconds, and name.
Kernel = tuple[int, int, str]


@dataclass
class Profiled(Finding):
    """The kernels of a case's iterations, of all lanes together.

    span: seconds from the start of the first kernel to the end of the last. busy: seconds in which at least one runs.
    total: the seconds of all kernels added up, more than busy where kernels overlap. by_name: number and seconds.
    """

    case: Case
    arm: Arm
    lanes: int
    iterations: int = 0
    span: float = 0.0
    busy: float = 0.0
    total: float = 0.0
    by_name: dict[str, tuple[int, float]] = field(default_factory=dict)

    def add_up(self, kernels: list[Kernel]) -> None:
        """Sum up all kernels, in the order of their starts."""
        numbers: Counter[str] = Counter()
        times: Counter[str] = Counter()
        busy, until = 0, kernels[0][0]
        for start, end, name in kernels:
            numbers[name] += 1
            times[name] += end - start
            busy += max(0, end - max(start, until))
            until = max(until, end)
        self.span, self.busy, self.total = (until - kernels[0][0]) / 1e9, busy / 1e9, times.total() / 1e9
        self.by_name = {name: (numbers[name], times[name] / 1e9) for name in numbers}

    def line(self) -> str:
        n, number = max(1, self.iterations), sum(count for count, _ in self.by_name.values())
        return (
            f"{self.arm.name}, lanes {self.lanes}: {1e3 * self.span / n:.3f} ms an iteration, of which "
            f"{1e3 * self.busy / n:.3f} ms with a kernel running; {number / n:.0f} kernels, "
            f"{1e3 * self.total / n:.3f} ms added up"
        )

    def rows(self, most: int = 15) -> list[str]:
        """The result with a table of the kernels that take most time."""
        n = max(1, self.iterations)
        lines = [*super().rows(), "", "| kernel | an iteration | us each | us an iteration |", "|---|---|---|---|"]
        for name, (number, seconds) in sorted(self.by_name.items(), key=lambda item: -item[1][1])[:most]:
            short = name.replace("|", "/")[:100]
            lines.append(f"| {short} | {number / n:.1f} | {1e6 * seconds / number:.1f} | {1e6 * seconds / n:.0f} |")
        return lines


def profiled(case: Case, arm: Arm, n: int, setup: Setup, deadline: float) -> Profiled:
    """Profile n lanes for a short time, once they are captured."""
    result = Profiled(case, arm, n)
    with result.noted("profile"), SideBySide(case, arm, setup) as running:
        if not running.grow(n, deadline):
            result.missing["profile"] = NO_TIME
            return result
        (result.iterations, _), found = kernels(lambda: running.iterate(setup.sizes.profile_seconds), setup.device)
        result.add_up(found)
    return result


def kernels(work: Callable[[], T], device: torch.device) -> tuple[T, list[Kernel]]:
    """Do the work under torch's profiler, and return its result and its kernels; on a CPU, its operations.

    Errors: RuntimeError where the profiler sees nothing.
    """
    cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as profile:
        result = work()
        if cuda:
            torch.cuda.synchronize(device)
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    found = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        for event in profile.profiler.kineto_results.events()
        if event.device_type() == kind
    )
    if not found:
        raise RuntimeError("the profiler saw no kernel")
    return result, found
