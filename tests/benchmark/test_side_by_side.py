"""Networks that train at the same time, and a profile's sums."""

import contextlib
import sys
import threading
import time
import types

import pytest
import torch
from little_work import CASE, CPU, MBN2, SIZES, fake_workloads, soon

from mbn.benchmark import kernels, side_by_side, suites, timing, workload
from mbn.benchmark.jobs import NO_TIME, run
from mbn.benchmark.kernels import Profiled
from mbn.benchmark.side_by_side import SideBySide, lanes
from mbn.benchmark.workload import Arm, Sizes

profiler = kernels.kernels  # before conftest replaces it


def rate(setup, n, seconds):
    with SideBySide(CASE, MBN2, setup) as running:
        assert running.grow(n, soon())
        count, took = running.iterate(seconds)
        return count / took


@pytest.mark.parametrize(("n", "step", "window"), [(1, 1 / 64, 3 / 8), (3, 1 / 64, 3 / 8), (1, 1 / 4, 1 / 16)], ids=str)
def test_the_rate_of_lanes_counts_all_their_iterations_and_time(n, step, window, monkeypatch, setup):
    """The four iterations up to the capture do not count. An iteration longer than the window counts in full."""

    class Clock(threading.local):  # each thread's own: lanes take no time from each other
        now, steps = 0.0, 0

    clock, together = Clock(), threading.Barrier(n, timeout=100)

    def one():
        clock.now += step
        clock.steps += 1
        if clock.steps == 5:  # the first that counts: all lanes are in theirs at the same time
            together.wait()

    fake_workloads(monkeypatch, step=one)
    monkeypatch.setattr(side_by_side, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    assert rate(setup, n, window) == n / step


def test_lanes_are_networks_of_their_own_and_take_turns_often(monkeypatch, setup, graphs):
    made, switch = [], set()

    def prepare(case, arm, setup, dataset):
        made.append((workload.prepare(case, arm, setup, dataset), dataset))
        switch.add(sys.getswitchinterval())
        return made[-1][0]

    monkeypatch.setattr(side_by_side, "prepare", prepare)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.004)
    try:
        assert rate(setup, 2, 0.1) > 0
        assert switch == {0.0005}
        assert sys.getswitchinterval() == 0.004
    finally:
        sys.setswitchinterval(interval)
    assert len(graphs) == 2
    (one, images), (other, other_images) = made
    assert one.model is not other.model
    assert (images.seed, other_images.seed) == (0, 1)
    assert images.train_images.data_ptr() == other_images.train_images.data_ptr()


def test_only_lanes_hold_streams(monkeypatch, setup, graphs):
    """torch has 32 streams, and there are jobs of 32 lanes."""
    inside, most = [], []

    @contextlib.contextmanager
    def own_stream(device):
        inside.append(device)
        most.append(len(inside))
        yield
        inside.pop()

    for module in (timing, side_by_side):
        monkeypatch.setattr(module, "own_stream", own_stream)
    run(suites.on_cuda(SIZES), setup, 100, only="lanes-r20-b8-mbn,compiled-r20-b8")
    assert (most, inside) == ([1, 2, 1], [])


def test_a_lane_that_fails_ends_the_job_with_what_was_measured(monkeypatch, setup):
    made = []

    def full():
        made.append(1)
        if len(made) == 3:
            raise torch.OutOfMemoryError("it is full")

    fake_workloads(monkeypatch, step=lambda: time.sleep(0.001), made=full)
    found = lanes(CASE, MBN2, (1, 2, 4), setup, soon())
    assert list(found.rates) == [1, 2]
    assert found.missing == {"more lanes": "failed: OutOfMemoryError: it is full"}


@pytest.mark.parametrize("work", [lanes, lambda *given: kernels.profiled(*given)], ids=["lanes", "profile"])
def test_nothing_is_compiled_where_there_is_little_time(work, setup):
    setup.sizes = Sizes()
    numbers, what = ((1, 2), "1 lanes and more") if work is lanes else (1, "profile")
    assert work(CASE, Arm("bn", mode="graph"), numbers, setup, time.monotonic() + 10).missing == {what: NO_TIME}


# Profiles.


def test_a_profile_is_of_one_iteration():
    """Kernels in microseconds: a 0-100, b 50-150, c 200-300, a again 220-230; from 150 to 200 nothing runs."""
    found = Profiled(CASE, MBN2, 2, iterations=2)
    found.add_up(
        [(1000 * s, 1000 * e, n) for s, e, n in [(0, 100, "a"), (50, 150, "b"), (200, 300, "c"), (220, 230, "a")]]
    )
    assert (found.span, found.busy, found.total) == pytest.approx((300e-6, 250e-6, 310e-6))
    assert found.line() == (
        "MBN 2 forwards, graph-eager, lanes 2: 0.150 ms an iteration, of which 0.125 ms with a kernel running; "
        "2 kernels, 0.155 ms added up"
    )
    assert found.rows(most=1)[-2:] == ["|---|---|---|---|", "| a | 1.0 | 55.0 | 55 |"]


def test_operations_stand_for_kernels_on_a_cpu():
    x = torch.ones(100, 100)
    _, found = profiler(lambda: [x.mm(x) for _ in range(3)], CPU)
    assert [name for _, _, name in found].count("aten::mm") == 3
    assert all(start <= end for start, end, _ in found)
    with pytest.raises(RuntimeError, match="saw no kernel"):
        profiler(lambda: None, CPU)
