"""How arms are timed, and what they are."""

import itertools
import time
import types
from dataclasses import replace

import pytest
import torch
from little_work import CASE, CPU, EMPTY, MBN2, SIZES, build, fake_workloads, soon
from torch import nn

from mbn import config
from mbn.benchmark import imagenet_loader, jobs, suites, timing, workload
from mbn.benchmark.jobs import NO_TIME
from mbn.benchmark.side_by_side import repeat_until
from mbn.benchmark.timing import Timed, timed
from mbn.benchmark.workload import BASE, CAPTURED, PLAIN, Arm, Setup, Sizes
from mbn.system import cuda_graph


def test_ratios_are_taken_round_by_round():
    """A machine that is twice as slow for half the rounds changes no ratio."""
    result = Timed(CASE, {BASE.name: [1.0, 2.0, 1.0, 2.0], "other": [1.1, 2.2, 1.1, 2.2]}, {BASE.name: 1, "other": 1})
    assert result.ratios("other", BASE.name) == pytest.approx([1.1] * 4)
    assert result.rows()[-1] == "| other | 1650 (1100 to 2200) | 5 | 1.10 (1.10 to 1.10) | 1.0 | - |"


def test_a_time_ends_when_the_device_has_done_all(monkeypatch):
    """The steps that are not timed, wait, the timed ones, wait: work that is only queued is no speed."""
    done = []
    monkeypatch.setattr(workload.Workload, "wait", lambda self: done.append("wait"))
    work = workload.Workload(lambda: done.append("step"), CPU, untimed=2)
    work.seconds(3)
    assert done == ["step"] * 2 + ["wait"] + ["step"] * 3 + ["wait"]
    done.clear()
    count = repeat_until(work, time.perf_counter() + 0.01)
    assert done == ["step"] * count + ["wait"]


def test_every_arm_is_timed_in_every_round(monkeypatch, setup):
    """The clock advances a second each time it is read, so each measurement is one second over its iterations."""
    clock = itertools.count()
    monkeypatch.setattr(workload.time, "perf_counter", lambda: float(next(clock)))
    setup.sizes = Sizes(images=64, rounds=3, round_seconds=4.0)
    chosen = (BASE, Arm("mbn", 2), Arm("gn"), Arm("mbn", evaluates=True))
    result = timed(CASE, chosen, setup, soon())
    assert result.seconds == {arm.name: [0.25] * 3 for arm in chosen}
    assert result.missing == {}
    assert min(result.memory.values()) > 0


@pytest.fixture
def clock(monkeypatch, setup):
    """Time that passes only in measurements, a second in each."""
    now = [0.0]
    fake = types.SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0], sleep=lambda _: None)
    for module in (timing, jobs):
        monkeypatch.setattr(module, "time", fake)

    def second(_):
        now[0] += 1
        return now[0]

    fake_workloads(monkeypatch, second)
    setup.sizes = Sizes(memory=False)
    return now


def test_a_round_that_the_limit_breaks_off_does_not_count(clock, setup):
    """With 6.5 s, two arms take 2 s to start and 2 s a round: the third round stops after its first arm."""
    result = timed(CASE, (CAPTURED, MBN2), setup, 6.5)
    assert result.seconds == {CAPTURED.name: [3, 5], MBN2.name: [4, 6]}
    assert result.missing == {"rounds from 3 to 6": NO_TIME}


def test_arms_that_the_limit_leaves_no_time_for_are_named(clock, setup):
    """Each takes a second to start; compiling begins only with 20 s left."""
    setup.sizes = Sizes(rounds=1, memory=False)
    result = timed(CASE, (CAPTURED, Arm("bn", mode="graph"), MBN2), setup, 10)
    assert result.missing == {"BN 1 forward, graph": NO_TIME}
    assert list(result.seconds) == [CAPTURED.name, MBN2.name]
    result = timed(CASE, (CAPTURED, BASE), setup, clock[0] + 1)
    assert result.missing == {BASE.name: NO_TIME, "rounds from 1 to 1": NO_TIME}


def test_an_arm_that_fails_in_a_round_has_no_times(monkeypatch, setup):
    calls = []

    def seconds(arm):
        calls.append(arm)
        if arm == MBN2 and calls.count(MBN2) == 3:
            raise RuntimeError("once")
        return 0.5

    fake_workloads(monkeypatch, seconds)
    setup.sizes = Sizes(rounds=3, memory=False)
    result = timed(CASE, (CAPTURED, MBN2), setup, soon())
    assert result.seconds == {CAPTURED.name: [0.5] * 3}
    assert result.missing == {MBN2.name: "failed: RuntimeError: once"}


def test_uncaptured_iterations_do_not_pass_for_captured_ones(monkeypatch, setup, capsys):
    def capture(function):
        raise RuntimeError("not here")

    monkeypatch.setattr(cuda_graph, "capture", capture)
    result = timed(CASE, (BASE, CAPTURED), setup, soon())
    assert list(result.seconds) == [BASE.name]
    assert result.missing == {CAPTURED.name: "failed: RuntimeError: iterations cannot be captured"}
    assert "warning: iterations cannot be captured here" in capsys.readouterr().err


def test_peak_memory_is_the_allocators(setup):
    """A layer keeps a large tensor for its backward pass: the peak grows by exactly its bytes."""

    class Greedy(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.n, self.fc = n, nn.Linear(3, 10)

        def forward(self, x):
            kept = x.new_zeros(self.n)
            return self.fc(x.mean((2, 3))) + 0 * kept.sum()

    def peak(n):
        return timing.peak_memory(workload.prepare(CASE, BASE, replace(setup, build=lambda **_: Greedy(n))))

    assert peak(10**7) - peak(10**6) == pytest.approx(4 * 9 * 10**6, rel=0.01)


# Arms and images.


def test_an_arm_that_evaluates_changes_nothing(setup):
    made = []
    setup.build = lambda **given: made.append(build(**given)) or made[0]
    testing = workload.prepare(CASE, Arm("mbn", evaluates=True), setup)
    before = {name: tensor.clone() for name, tensor in made[0].state_dict().items()}
    testing.step()
    torch.testing.assert_close(made[0].state_dict(), before, rtol=0, atol=0)


def test_the_plain_loop_gets_images_as_torchvision_gives_them(setup):
    """As PIL images, transformed; the folder is empty."""
    workload.prepare(CASE, PLAIN, setup).step()
    arrays = setup.opened[0]
    pictures = workload.Pictures(arrays, lambda image: (type(image).__name__, image.size, image.getpixel((9, 7))))
    assert pictures[3] == (("Image", (32, 32), tuple(arrays.train_images[3, 7, 9])), arrays.train_labels[3])
    assert len(pictures) == 64


def test_an_arm_has_the_configuration_that_its_name_says():
    for arm in (*suites.ON_CPU[:-1], Arm("mbn", 2, "graph", precision="bf16")):
        found = workload.settings(CASE, arm, EMPTY)
        assert (found.norm.name, found.forwards, found.precision) == (arm.norm, arm.forwards, arm.precision)
        assert getattr(found.norm, "gradient", "paper") == arm.gradient
    assert len({arm.name for arm in suites.ON_CPU}) == len(suites.ON_CPU)
    assert config.network(workload.settings(CASE, BASE, EMPTY))["builder"] == "resnet_cifar.resnet20"


def test_images_are_random_where_there_is_no_cifar(tmp_path, monkeypatch):
    def images(random):
        setup = Setup(tmp_path, CPU, build, SIZES, random)
        assert setup.dataset.train_images.shape == setup.opened[0].train_images.shape == (64, 32, 32, 3)
        return setup.opened[1]

    assert images(False) == f"random (no whole CIFAR-10 in the folder {tmp_path.name})"
    (tmp_path / "cifar-10-batches-py").mkdir()
    monkeypatch.setattr(workload.datasets, "load_cifar", lambda *_: workload.random_arrays(100, 32, 10))
    assert images(False) == "CIFAR-10"
    assert images(True) == "random (as asked for)"


def test_pictures_are_like_imagenets(tmp_path):
    imagenet_loader.make_pictures(tmp_path, 66)
    files = sorted((tmp_path / "train").rglob("*.jpeg"))
    assert len(files) == 66
    assert 100e3 < sum(file.stat().st_size for file in files) / 66 < 120e3
    assert len({file.read_bytes() for file in files}) == 64


def test_a_loader_without_time_is_reported(setup):
    assert imagenet_loader.loader(setup, time.monotonic()).missing == {"loader": NO_TIME}
