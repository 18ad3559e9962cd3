"""What the benchmark's tests share: a small network without dropout, and small sizes."""

import time
from pathlib import Path

import torch
from running import Small
from torch import nn

from mbn.benchmark import side_by_side, timing
from mbn.benchmark.workload import PAIR, PLAIN, Arm, Case, Setup, Sizes, arms

CPU = torch.device("cpu")
CASE = Case("resnet20", 8, 1)
MBN2 = Arm("mbn", 2, "graph-eager")
SIZES = Sizes(
    models=("resnet20",),
    batches=(8,),
    arms=(*arms(PAIR, "graph-eager", "eager"), PLAIN),
    images=64,
    rounds=2,
    round_seconds=0.01,
    memory=False,
    lanes={8: (1, 2)},
    compiled_lanes={8: (1, 2)},
    lane_seconds=0.1,
    processes_seconds=0.5,
    profile_lanes=2,
    compiling=0.0,
    workers=1,
    pictures=16,
    large_batch=8,
    loader_seconds=0.1,
)
# A folder without CIFAR-10. The same in all tests, because configurations are composed once for each folder.
EMPTY = Path("nothing-here")


class Little(Small):
    """A few milliseconds an iteration. It has so few pixels that BRN's bounds matter."""

    def forward(self, x):
        return super().forward(x[..., :6, :6])


def build(*, layers, classes, **_):
    network = Little(layers)
    network.fc = nn.Linear(network.fc.in_features, classes)
    return network


def small_place(sizes=SIZES):
    return Setup(EMPTY, CPU, build, sizes)


def fake_workloads(monkeypatch, seconds=lambda arm: 0.5, step=lambda: None, made=lambda: None):
    """Replace workloads by fakes. seconds(arm): how long an iteration seems to take; step: what it does."""

    class Fake:
        in_mode = True

        def __init__(self, case, arm, *_):
            made()
            self.arm, self.step = arm, step

        def wait(self):
            pass

        def seconds(self, iterations):
            return seconds(self.arm)

    for module in (timing, side_by_side):
        monkeypatch.setattr(module, "prepare", Fake)


def soon():
    return time.monotonic() + 1000
