"""Networks that train at the same time: in processes, or in threads with their own streams and graphs."""

import contextlib
import gc
import multiprocessing
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch

from mbn.benchmark.jobs import NO_TIME, Finding, left
from mbn.benchmark.workload import Arm, Case, Setup, Workload, prepare, warm_up
from mbn.launch.lanes import switching_often
from mbn.system.cuda_graph import one_at_a_time, own_stream, shared_thread


class SideBySide:
    """Independent networks of an arm, each in a thread. Context manager: at its end they are freed."""

    def __init__(self, case: Case, arm: Arm, setup: Setup) -> None:
        self.case, self.arm, self.setup = case, arm, setup
        self.lanes: list[tuple[ThreadPoolExecutor, Workload]] = []
        self.inside = contextlib.ExitStack()

    def __enter__(self) -> "SideBySide":
        images = self.setup.dataset.train_images
        if images.is_cuda:
            torch.cuda.synchronize(images.device)  # wait until the images are there, whichever stream copied them
        self.inside.enter_context(switching_often())
        self.inside.enter_context(shared_thread())
        return self

    def __exit__(self, *_: object) -> None:
        self.inside.close()
        self.lanes.clear()
        gc.collect()  # reference cycles hold what was captured

    def grow(self, n: int, deadline: float) -> bool:
        """Add networks until there are n, and capture each; False where time is over. Errors: any that they raise."""
        while len(self.lanes) < n:
            # The first one compiles for all of them.
            if left(deadline) <= (0 if self.lanes else self.setup.seconds_to_begin(self.arm)):
                return False
            thread, own = ThreadPoolExecutor(1), contextlib.ExitStack()
            self.inside.callback(thread.shutdown)
            self.inside.callback(thread.submit, own.close)
            self.lanes.append((thread, thread.submit(self._start, own, len(self.lanes)).result()))
        return left(deadline) > 0

    def _start(self, own: contextlib.ExitStack, i: int) -> Workload:
        own.enter_context(own_stream(self.setup.device))
        with one_at_a_time:  # seeds and Hydra belong to the process
            work = prepare(self.case, self.arm, self.setup, self.setup.dataset.with_seed(i))
        warm_up(work)
        return work

    def iterate(self, seconds: float) -> tuple[int, float]:
        """Iterate for that long: all lanes' iterations together, and the seconds until the last one was done."""
        starts: list[float] = []
        barrier = threading.Barrier(len(self.lanes), action=lambda: starts.append(time.perf_counter()))

        def one(work: Workload) -> tuple[int, float]:
            barrier.wait()
            count = repeat_until(work, time.perf_counter() + seconds)
            return count, time.perf_counter()

        results = [future.result() for future in [thread.submit(one, work) for thread, work in self.lanes]]
        return sum(count for count, _ in results), max(end for _, end in results) - starts[0]


def repeat_until(work: Workload, end: float) -> int:
    """Iterate until perf_counter reaches `end`, and return the number of iterations."""
    count = 0
    while time.perf_counter() < end:
        work.step()
        count += 1
    work.wait()
    return count


@dataclass
class Rates(Finding):
    """Iterations a second of all runs together, by the number of runs."""

    case: Case
    arm: Arm
    rates: dict[int, float] = field(default_factory=dict)

    def line(self) -> str:
        return f"{self.arm.name}, iterations/s: " + "; ".join(f"{n} at once {r:.4g}" for n, r in self.rates.items())

    def rows(self) -> list[str]:
        one = self.rates.get(1)
        return [
            *(f"{self.case.model}, batch {self.case.batch_size}, {self.arm.name}.", ""),
            *("| at once | iterations/s | / one |", "|---|---|---|"),
            *(f"| {n} | {rate:.1f} | {f'{rate / one:.2f}' if one else '-'} |" for n, rate in self.rates.items()),
        ]


def lanes(case: Case, arm: Arm, numbers: tuple[int, ...], setup: Setup, deadline: float) -> Rates:
    """Measure with more and more lanes (numbers ascend), until the time is over."""
    result = Rates(case, arm)
    with result.noted("more lanes"), SideBySide(case, arm, setup) as running:
        for n in numbers:
            if not running.grow(n, deadline):
                result.missing[f"{n} lanes and more"] = NO_TIME
                break
            count, seconds = running.iterate(setup.sizes.lane_seconds)
            result.rates[n] = count / seconds
    return result


def processes(model: str, size: int, arm: Arm, n: int, setup: Setup, deadline: float) -> Rates:
    """Measure one run with n threads, then n runs with one thread each, each a process that opens the images itself."""
    result, context = Rates(Case(model, size, 1), arm), multiprocessing.get_context("spawn")
    for runs in (1, n):
        if left(deadline) <= setup.sizes.processes_seconds:
            result.missing[f"{runs} at once"] = NO_TIME
            continue
        with result.noted(f"{runs} at once"):
            together = context.Barrier(runs, timeout=left(deadline))
            with ProcessPoolExecutor(runs, context, initializer=_enter, initargs=(together,)) as pool:
                # A copy of setup has not opened the images, which would be sent to every process.
                given = Case(model, size, n // runs), arm, replace(setup)
                futures = [pool.submit(throughput, *given) for _ in range(runs)]
                result.rates[runs] = sum(future.result() for future in futures)
    return result


# Where a process waits until all are ready.
_together = threading.Barrier(1)


def _enter(together: threading.Barrier) -> None:
    global _together
    _together = together


def throughput(case: Case, arm: Arm, setup: Setup) -> float:
    """Iterations a second, measured once all processes are ready."""
    torch.set_num_threads(case.threads)
    work = prepare(case, arm, setup)
    warm_up(work)
    _together.wait()
    began = time.perf_counter()
    count = repeat_until(work, began + setup.sizes.processes_seconds)
    return count / (time.perf_counter() - began)
