"""Networks that train at the same time, each in a thread with a stream and a recording of its own."""

import contextlib
import gc
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from mbn.benchmark.workload import Workload
from mbn.launch.lanes import SWITCH
from mbn.system.cuda_graph import Recorded, one_at_a_time, own_stream


def warm_up(work: Workload, before_recording: Callable[[], None] = lambda: None) -> None:
    """Iterate until the iteration is recorded, if the mode is to record."""
    for _ in range(Recorded.AS_IT_IS):
        work.step()
    work.wait()
    before_recording()
    work.step()
    work.wait()


class Lane:
    """A thread that makes a network, iterates until it is recorded, and waits. Errors: whatever it meets."""

    def __init__(self, make: Callable[[], Workload], device: torch.device) -> None:
        self.device, self.thread, self.inside = device, ThreadPoolExecutor(1), contextlib.ExitStack()
        try:
            self.work = self.thread.submit(self._start, make).result()
        except BaseException:
            self.close()
            raise

    def _start(self, make: Callable[[], Workload]) -> Workload:
        self.inside.enter_context(own_stream(self.device))
        with one_at_a_time:  # seeds and Hydra are the process's
            work = make()
        warm_up(work)
        return work

    def iterate(self, barrier: threading.Barrier, seconds: float) -> tuple[int, float]:
        """In the lane's thread, once all lanes are there: the number of iterations, and the instant they were done."""
        barrier.wait()
        end, count = time.perf_counter() + seconds, 0
        while time.perf_counter() < end:
            self.work.step()
            count += 1
        self.work.wait()
        return count, time.perf_counter()

    def close(self) -> None:
        """End the thread."""
        self.thread.submit(self.inside.close)
        self.thread.shutdown()


class Lanes:
    """Independent networks, each in a thread; a context, at whose end they go. make: the i-th network."""

    def __init__(self, make: Callable[[int], Workload], device: torch.device) -> None:
        self.make, self.device = make, device
        self.lanes: list[Lane] = []
        self.interval = sys.getswitchinterval()

    def __enter__(self) -> "Lanes":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the images are there, whichever stream brought them
        sys.setswitchinterval(SWITCH)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setswitchinterval(self.interval)
        while self.lanes:
            self.lanes.pop().close()
        gc.collect()  # what a recording holds lies in reference cycles

    def add(self) -> Workload:
        """One more network, up to its recording. Errors: whatever it meets."""
        i = len(self.lanes)
        self.lanes.append(Lane(lambda: self.make(i), self.device))
        return self.lanes[-1].work

    def rate(self, seconds: float) -> float:
        """Iterations a second of all lanes together, counted over seconds and until the last one is done."""
        count, took = self._iterate(seconds)
        return count / took

    def count(self, seconds: float) -> int:
        """Iterate for so long; the number of iterations of all lanes together."""
        return self._iterate(seconds)[0]

    def _iterate(self, seconds: float) -> tuple[int, float]:
        starts: list[float] = []
        barrier = threading.Barrier(len(self.lanes), action=lambda: starts.append(time.perf_counter()))
        futures = [lane.thread.submit(lane.iterate, barrier, seconds) for lane in self.lanes]
        results = [future.result() for future in futures]
        return sum(count for count, _ in results), max(end for _, end in results) - starts[0]
