"""The benchmark: how ratios are taken, and what the page says; on a tiny network."""

import itertools

import pytest
import torch
from running import build_tiny, digits, load_script
from torch import nn

from mbn import config
from mbn.benchmark import cpu as benchmark
from mbn.benchmark import workload
from mbn.benchmark.cpu import Result
from mbn.benchmark.workload import BASE, PLAIN, Arm, Case
from mbn.data.in_memory import DeviceDataset

CPU = torch.device("cpu")
CASE = Case("resnet20", 64, 1)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Digits in CIFAR's place, and no loader."""

    def load(settings, device):
        return DeviceDataset(digits(), settings.dataset, settings.seed, device)

    monkeypatch.setattr(benchmark.datasets, "load", load)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def ready(arm, tmp_path, build=build_tiny):
    dataset = benchmark.datasets.load(workload.settings(CASE, BASE, tmp_path), CPU)
    return workload.prepare(CASE, arm, dataset, tmp_path, CPU, build)


def test_ratios_are_taken_round_by_round():
    """A machine that is twice as slow for half the rounds changes no ratio."""
    result = Result(CASE, seconds={BASE.name: [1.0, 2.0, 1.0, 2.0], Arm("mbn").name: [1.1, 2.2, 1.1, 2.2]})
    assert result.ratio(Arm("mbn"), BASE) == pytest.approx([1.1] * 4)
    assert benchmark.quantiles([3.0, 1.0, 2.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)


def test_every_arm_is_timed_in_every_round(tmp_path, monkeypatch):
    """By a clock that moves a second with every look at it: each measurement is one second, over its iterations."""
    clock = itertools.count()
    monkeypatch.setattr(workload.time, "perf_counter", lambda: float(next(clock)))
    chosen = [BASE, Arm("mbn", 2), Arm("gn"), Arm("mbn", evaluates=True)]
    said = []
    result = benchmark.measure(CASE, chosen, tmp_path, CPU, build_tiny, 3, said.append)
    assert result.seconds == {arm.name: [0.25] * 3 for arm in chosen}
    assert said[-1] == "resnet20, batch 64, 1 thread: round 3 of 3"
    text = benchmark.table(result)
    assert "| MBN 2 forwards, eager | 250.0 (250.0 to 250.0) | 256 | 1.00 (1.00 to 1.00) |" in text
    assert "| MBN test, eager |" in text


def test_an_arm_that_tests_changes_nothing(tmp_path):
    made = []
    testing = ready(Arm("mbn", evaluates=True), tmp_path, lambda **given: made.append(build_tiny(**given)) or made[0])
    before = {name: tensor.clone() for name, tensor in made[0].state_dict().items()}
    testing.step()
    torch.testing.assert_close(made[0].state_dict(), before, rtol=0, atol=0)


def test_the_plain_loop_takes_images_in_memory_in_the_place_of_cifar(tmp_path):
    """The folder is empty. Images are handed out as torchvision's CIFAR10 does: PIL images, transformed."""
    workload.prepare(CASE, PLAIN, None, tmp_path, CPU, build_tiny, digits()).step()
    pictures = workload.Pictures(digits(), lambda image: (type(image).__name__, image.size, image.getpixel((9, 9))))
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
    names = [arm.name for arm in benchmark.arms(quick=False)]
    results = {
        key: Result(
            Case("resnet20", size, threads),
            seconds={name: [0.1, 0.1] for name in names},
            starts=dict.fromkeys(names, 1.0),
        )
        for key, size, threads in (("large", 128, 2), ("small", 8, 1), ("one_thread", 128, 1))
    }
    results["large"].seconds[PLAIN.name] = [0.05, 0.05]
    report = {
        **{"device": "cpu: Toy", "cores": 2, "versions": {"torch": "2.0"}, "date": "2026-01-01", "commit": "c" * 40},
        **{"minutes": 1.0, "memory": dict.fromkeys(names, 1000), "many": {128: {"one": 1.0, "two": 2.0}}},
    }
    page = load_script("benchmark").page(report, results)
    assert "| batch 128: MBN, 2 forwards, best mode / the plain loop | 2.000 | 1.00 | **missed** |" in page
    assert "| batch 128, eager: MBN, 2 forwards / BN, 1 forward | 1.000 | 1.65 | met |" in page
    # Batch 8 in the time of batch 128 is a sixteenth of its images a second.
    assert "| 16.000 | 1.67 | **missed** |" in page
    assert "Batch 128, iterations a second: one 1.00, two 2.00." in page


def test_arms_are_configurations_that_exist(tmp_path):
    for arm in benchmark.arms(quick=False):
        if arm != PLAIN:
            settings = workload.settings(CASE, arm, tmp_path)
            assert (settings.norm.name, settings.forwards) == (arm.norm, arm.forwards)
    assert len({arm.name for arm in benchmark.arms(quick=False)}) == len(benchmark.arms(quick=False))
    half = Arm("mbn", 2, "graph", precision="bf16")
    assert half.name == "MBN 2 forwards, graph, bf16"
    assert workload.settings(CASE, half, tmp_path).precision == "bf16"
    large = Case("resnet50", 64, 1, "imagenet")
    assert workload.settings(large, BASE, tmp_path).dataset.image_size == 224
    assert config.network(workload.settings(CASE, BASE, tmp_path))["builder"] == "resnet_cifar.resnet20"
