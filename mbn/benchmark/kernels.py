"""What a GPU does during a piece of work: its kernels, and how much of the time there is none."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity


@dataclass
class Kernels:
    """Kernels of one piece of work. Seconds: span, from the first one's start to the last one's end; busy, in which at
    least one runs; total, of all added up, above busy where they run side by side. by_name: number and seconds.
    """

    span: float
    busy: float
    total: float
    by_name: dict[str, tuple[int, float]]

    @property
    def number(self) -> int:
        return sum(n for n, _ in self.by_name.values())

    def longest(self, n: int) -> list[str]:
        """The names of the n kernels that take most time."""
        return sorted(self.by_name, key=lambda name: -self.by_name[name][1])[:n]


def kernels(work: Callable[[], object], device: torch.device) -> Kernels:
    """Do the work under torch's profiler. On a CPU its operations take the kernels' place.

    Errors: RuntimeError where the profiler sees nothing.
    """
    cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as profile:
        work()
        if cuda:
            torch.cuda.synchronize(device)
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    found = [
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        for event in profile.profiler.kineto_results.events()
        if event.device_type() == kind
    ]
    if not found:
        raise RuntimeError("the profiler saw no kernel")
    return _summed(sorted(found))


def _summed(found: list[tuple[int, int, str]]) -> Kernels:
    """found: start, end and name of each kernel in nanoseconds, in the order of their starts."""
    numbers: Counter[str] = Counter()
    times: Counter[str] = Counter()
    busy, until = 0, found[0][0]
    for start, end, name in found:
        numbers[name] += 1
        times[name] += end - start
        busy += max(0, end - max(start, until))
        until = max(until, end)
    return Kernels(
        span=(until - found[0][0]) / 1e9,
        busy=busy / 1e9,
        total=times.total() / 1e9,
        by_name={name: (numbers[name], times[name] / 1e9) for name in numbers},
    )
