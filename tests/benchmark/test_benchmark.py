"""The benchmark: what is counted, how ratios are taken, and what the page says; on a tiny network."""

import importlib.util
import itertools

import pytest
import torch
from running import build_tiny, digits
from torch import nn

from mbn import config
from mbn.benchmark import cpu as benchmark
from mbn.benchmark.cpu import BASE, PLAIN, Arm, Case, Result
from mbn.config import REPOSITORY
from mbn.data.in_memory import DeviceDataset

CPU = torch.device("cpu")
CASE = Case("resnet20", 64, 1)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Digits in CIFAR's place, and no loader."""

    def load(settings, device):
        return DeviceDataset(digits(), settings.dataset, settings.seed, device)

    monkeypatch.setattr(benchmark.data, "load", load)
    monkeypatch.setattr(benchmark, "rates", lambda threads, device: RATES)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


RATES = {"copy": 1e9, "matmul": 2e9, "convolution": 4e9, "launch": 1e-6}


def ready(arm, tmp_path):
    dataset = benchmark.data.load(benchmark.settings(CASE, BASE, tmp_path), CPU)
    return benchmark.Measured(CASE, arm, dataset, tmp_path, CPU, build_tiny)


def test_operations_of_an_iteration_are_three_forward_passes_and_one_more_with_two_forwards(tmp_path):
    """The first layer needs no gradient of its input; a linear map of 24 x 10 and a convolution of 48 x 6 at 8 x 8."""
    conv, linear = 2 * 64 * 48 * 6 * 64, 2 * 64 * 24 * 10
    counts = [benchmark.count(ready(Arm("mbn", forwards), tmp_path)) for forwards in (1, 2)]
    assert counts[0]["operations"] == 2 * conv + 3 * linear
    assert counts[1]["operations"] == 3 * conv + 4 * linear
    assert counts[1]["bytes"] > counts[0]["bytes"] > 0
    assert counts[1]["launches"] > counts[0]["launches"] > 0


def test_bytes_and_launches_leave_views_out():
    x = torch.ones(1000)
    with benchmark.Counter() as counter:
        x.view(10, 100).t()
        assert (counter.launches, counter.bytes) == (0, 0)
        x + x
    assert (counter.launches, counter.bytes) == (1, 3 * 4000)
    with benchmark.Counter() as counter:
        x[torch.tensor([5, 7, 9])]  # reads and writes 3 values, and reads 3 indices of 8 bytes
    assert counter.bytes == 2 * 12 + 24


def test_a_bound_is_a_count_at_the_measured_rate():
    counts = {"operations": 8_000_000, "bytes": 3_000_000, "launches": 500}
    assert benchmark.bound(counts, RATES) == pytest.approx({"operations": 2e-3, "bytes": 3e-3, "launches": 5e-4})


def test_ratios_are_taken_round_by_round():
    """A machine that is twice as slow for half the rounds changes no ratio."""
    result = Result(CASE, seconds={BASE.name: [1.0, 2.0, 1.0, 2.0], Arm("mbn").name: [1.1, 2.2, 1.1, 2.2]})
    assert result.ratio(Arm("mbn"), BASE) == pytest.approx([1.1] * 4)
    assert benchmark.quantiles([3.0, 1.0, 2.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)


def test_every_arm_is_timed_in_every_round(tmp_path, monkeypatch):
    """By a clock that moves a second with every look at it: each measurement is one second, over its iterations."""
    clock = itertools.count()
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: float(next(clock)))
    chosen = [BASE, Arm("mbn", 2), Arm("gn"), Arm("mbn", evaluates=True)]
    said = []
    result = benchmark.measure(CASE, chosen, tmp_path, CPU, build_tiny, 3, said.append)
    assert result.seconds == {arm.name: [0.25] * 3 for arm in chosen}
    assert set(result.counts) == {arm.name for arm in chosen}
    assert said[-1] == "resnet20, batch 64, 1 thread: round 3 of 3"
    text = benchmark.table(result)
    assert "| MBN 2 forwards, eager | 250.0 (250.0 to 250.0) | 256 | 1.00 (1.00 to 1.00) |" in text
    assert "| MBN test, eager |" in text


def test_an_arm_that_tests_changes_nothing(tmp_path):
    measured = ready(Arm("mbn", evaluates=True), tmp_path)
    before = {name: tensor.clone() for name, tensor in measured.model.state_dict().items()}
    measured.step()
    torch.testing.assert_close(measured.model.state_dict(), before, rtol=0, atol=0)


def test_the_plain_loop_takes_images_in_memory_in_the_place_of_cifar(tmp_path):
    """The folder is empty. Images are handed out as torchvision's CIFAR10 does: PIL images, transformed."""
    measured = benchmark.Measured(CASE, PLAIN, None, tmp_path, CPU, build_tiny, digits())
    measured.step()
    pictures = benchmark.Pictures(digits(), lambda image: (type(image).__name__, image.size, image.getpixel((9, 9))))
    assert pictures[3] == (("Image", (32, 32), tuple(digits().train_images[3, 9, 9])), digits().train_labels[3])
    assert len(pictures) == len(digits().train_labels)


def test_peak_memory_is_the_allocators(tmp_path):
    """A layer that keeps a large tensor for its backward pass shows, byte for byte."""

    class Greedy(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.n, self.fc = n, nn.Linear(3, 10)

        def forward(self, x):
            kept = x.new_zeros(self.n)
            return self.fc(x.mean((2, 3))) + 0 * kept.sum()

    sizes = [
        benchmark.peak_memory(CASE, BASE, tmp_path, CPU, lambda *, layers, n=n, **_: Greedy(n)) for n in (10**6, 10**7)
    ]
    assert sizes[1] - sizes[0] == pytest.approx(4 * 9 * 10**6, rel=0.01)


def test_the_page_says_which_bars_are_met():
    specification = importlib.util.spec_from_file_location("script", REPOSITORY / "scripts" / "benchmark.py")
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    names = [arm.name for arm in benchmark.arms(quick=False)]
    counts = {"operations": 10**9, "bytes": 10**8, "launches": 100}
    results = {
        key: Result(
            Case("resnet20", size, threads),
            seconds={name: [0.1, 0.1] for name in names},
            starts=dict.fromkeys(names, 1.0),
            counts={BASE.name: counts},
            rates=RATES,
        )
        for key, size, threads in (("large", 128, 2), ("small", 8, 1), ("one_thread", 128, 1))
    }
    results["large"].seconds[PLAIN.name] = [0.05, 0.05]
    report = {
        **{"device": "cpu: Toy", "cores": 2, "versions": {"torch": "2.0"}, "date": "2026-01-01", "commit": "c" * 40},
        **{"minutes": 1.0, "memory": dict.fromkeys(names, 1000), "many": {128: {"one": 1.0, "two": 2.0}}},
    }
    page = script.page(report, results)
    assert "| batch 128: MBN, 2 forwards, best mode / the plain loop | 2.000 | 1.00 | **missed** |" in page
    assert "| batch 128, eager: MBN, 2 forwards / BN, 1 forward | 1.000 | 1.65 | met |" in page
    # Batch 8 in the time of batch 128 is a sixteenth of its images a second.
    assert "| 16.000 | 1.67 | **missed** |" in page
    assert f"| {BASE.name} | 1.00 | 0.10 | 100 | 250.0 | 100.0 | 0.1 | 100.0 | operations |" in page
    assert "Batch 128, iterations a second: one 1.00, two 2.00." in page


def test_arms_are_configurations_that_exist(tmp_path):
    for arm in benchmark.arms(quick=False):
        if arm != PLAIN:
            settings = benchmark.settings(CASE, arm, tmp_path)
            assert (settings.norm.name, settings.forwards) == (arm.norm, arm.forwards)
    assert len({arm.name for arm in benchmark.arms(quick=False)}) == len(benchmark.arms(quick=False))
    half = Arm("mbn", 2, "graph", precision="bf16")
    assert half.name == "MBN 2 forwards, graph, bf16"
    assert benchmark.settings(CASE, half, tmp_path).precision == "bf16"
    large = Case("resnet50", 64, 1, "imagenet")
    assert benchmark.settings(large, BASE, tmp_path).dataset.image_size == 224
    assert config.network(benchmark.settings(CASE, BASE, tmp_path))["name"] == "resnet20"
