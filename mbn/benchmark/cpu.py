"""Measure what an iteration costs: arms side by side in one process, their counts of work, and the machine's rates."""

import functools
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

from mbn import config as configuration
from mbn.data import datasets, in_memory
from mbn.layers import Layers, from_config
from mbn.methods import METHODS
from mbn.norm.memorized import set_lambda
from mbn.training.iteration import WINDOW, Update, autocast

Build = Callable[..., nn.Module]
# The plain loop's loader has this many batches ready before it is needed; they must not count as its speed.
WORKERS, PREFETCHED = 2, 4


@dataclass(frozen=True)
class Case:
    """One network at one batch size, on so many threads; dataset: for the images' size and the number of classes."""

    model: str
    batch_size: int
    threads: int
    dataset: str = "cifar10"

    @property
    def title(self) -> str:
        return f"{self.model}, batch {self.batch_size}, {self.threads} thread{'s' * (self.threads > 1)}"


@dataclass(frozen=True)
class Arm:
    """One way to train (or, with evaluates, to test): norm with one or two forwards, in a mode and a precision."""

    norm: str
    forwards: int = 1
    mode: str = "eager"
    gradient: str = "paper"
    evaluates: bool = False
    precision: str = "fp32"

    @property
    def name(self) -> str:
        if self == PLAIN:
            return "plain loop"
        what = "test" if self.evaluates else f"{self.forwards} forward{'s' * (self.forwards > 1)}"
        gradient = ", gradient batch" if self.gradient == "batch" else ""
        return f"{self.norm.upper()} {what}, {self.mode}{gradient}{', bf16' * (self.precision == 'bf16')}"


PLAIN = Arm("plain", mode="plain")
# What all ratios are to: BN with one forward and no compiler, on data already in memory.
BASE = Arm("bn")


def arms(quick: bool) -> list[Arm]:
    """Every arm of a case; quick ones need no compiler."""
    eager = [Arm(n, f) for n, method in METHODS.items() if method.statistics for f in (1, 2)] + [Arm("gn")]
    if quick:
        return [*eager, PLAIN]
    more = [Arm("mbn", 2, gradient="batch"), Arm("bn", evaluates=True), Arm("mbn", evaluates=True)]
    compiled = [Arm(n, f, "compile") for n in ("bn", "mbn") for f in (1, 2)]
    return [*eager, *more, *compiled, Arm("mbn", 2, "compile", "batch"), PLAIN]


def settings(case: Case, arm: Arm, folder: Path) -> configuration.Config:
    """The configuration that an arm has in training."""
    overrides = [f"model={case.model}", f"batch_size={case.batch_size}", f"machine.data={folder}", f"norm={arm.norm}"]
    if arm.gradient == "batch":
        overrides.append("norm.gradient=batch")
    return _composed(*overrides, f"forwards={arm.forwards}", f"dataset={case.dataset}", f"precision={arm.precision}")


@functools.cache
def _composed(*overrides: str) -> configuration.Config:
    """Composed once: that takes longer than building a network, of which lanes are many."""
    return configuration.load(list(overrides))


class Measured:
    """An arm made ready: `step()` is one iteration.

    arrays: what the plain loop reads where folder holds no CIFAR-10; the other arms take their batches from dataset.
    """

    def __init__(
        self,
        case: Case,
        arm: Arm,
        dataset: in_memory.Data,
        folder: Path,
        device: torch.device,
        build: Build,
        arrays: in_memory.Arrays | None = None,
    ):
        self.arm, self.device = arm, device
        torch.manual_seed(0)
        if arm == PLAIN:
            self.loop = plain_loop(settings(case, BASE, folder), device, build, arrays)
            return
        config = settings(case, arm, folder)
        network = build(layers=from_config(config), **configuration.network(config))
        self.model = network.to(device).to(memory_format=torch.channels_last)
        set_lambda(self.model, 0.9)
        if arm.evaluates:
            self.batches: Iterator[in_memory.Batch] = _repeated(lambda: dataset.test_batches(case.batch_size))
            self.model.eval()
            return
        self.batches = dataset.train_batches(0, case.batch_size)
        # A learning rate of 0.01: at 0.1 a batch of 8 may diverge, and NaNs have a speed of their own.
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=torch.tensor(0.01, device=device), momentum=0.9, weight_decay=1e-4, fused=True
        )
        self.update = Update(self.model, self.optimizer, arm.forwards, arm.mode, arm.precision, device, case.batch_size)

    def step(self) -> None:
        if self.arm == PLAIN:
            next(self.loop)
        elif self.arm.evaluates:
            with torch.no_grad(), autocast(self.device, self.arm.precision):
                self.model(next(self.batches)[0])
        else:
            self.update(*next(self.batches))
            if self.update.pending == WINDOW:
                self.update.drain()

    def seconds(self, iterations: int) -> float:
        """Seconds an iteration, over so many of them."""
        if self.arm == PLAIN:
            for _ in range(PREFETCHED):
                self.step()
        self.wait()
        start = time.perf_counter()
        for _ in range(iterations):
            self.step()
        self.wait()
        return (time.perf_counter() - start) / iterations

    def wait(self) -> None:
        if self.device.type == "cuda":  # this thread's stream alone: another thread may be recording on its own
            torch.cuda.current_stream(self.device).synchronize()


def _repeated(make: Callable[[], Iterator[in_memory.Batch]]) -> Iterator[in_memory.Batch]:
    while True:
        yield from make()


class Pictures(torch.utils.data.Dataset):
    """Images in memory, handed out as torchvision's CIFAR10 does: as PIL images, then transformed."""

    def __init__(self, arrays: in_memory.Arrays, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.labels, self.transform = arrays.train_images, arrays.train_labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def plain_loop(
    config: configuration.Config, device: torch.device, build: Build, arrays: in_memory.Arrays | None = None
) -> Iterator[None]:
    """What one would write today: torchvision's data set and transforms, a DataLoader, nn.BatchNorm2d, SGD, eager.

    arrays: images in the place of CIFAR-10's.
    """
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(config.dataset.mean, config.dataset.std),
        ]
    )
    images: Any = (
        Pictures(arrays, transform)
        if arrays is not None
        else torchvision.datasets.CIFAR10(config.machine.data, train=True, transform=transform)
    )
    loader = torch.utils.data.DataLoader(
        images, config.batch_size, shuffle=True, num_workers=WORKERS, persistent_workers=True
    )
    layers = Layers(nn.Conv2d, nn.BatchNorm2d, lambda: nn.ReLU(inplace=True))
    model = build(layers=layers, **configuration.network(config)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    while True:
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
            yield


# Counts.


class Counter(TorchDispatchMode):
    """Bytes that operations read and write, and how many operations there are, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.launches = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        if not function.is_view and name not in ("empty", "empty_like", "empty_strided"):
            self.launches += 1
            if name in ("index", "index_select", "gather"):  # of their source they read what they return
                args = (result, *args[1:])
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return result


def count(measured: Measured) -> dict[str, int]:
    """Operations (a multiplication with its addition is two), bytes and launches of one iteration in eager mode."""
    measured.step()
    counter, flops = Counter(), FlopCounterMode(display=False)
    with flops, counter:
        measured.step()
    return {"operations": flops.get_total_flops(), "bytes": counter.bytes, "launches": counter.launches}


def rates(threads: int, device: torch.device) -> dict[str, float]:
    """What the machine can do: bytes copied (read and written), operations in a matrix product and in a convolution of
    ResNet-20's (each a second), and seconds to launch one small operation."""
    torch.set_num_threads(threads)
    a, b = (torch.randn(1536, 1536, device=device) for _ in range(2))
    source = torch.randn(2**25, device=device)  # 128 MiB: more than the caches hold
    target = torch.empty_like(source)
    x = torch.randn(128, 32, 16, 16, device=device).to(memory_format=torch.channels_last)
    w = torch.randn(32, 32, 3, 3, device=device).to(memory_format=torch.channels_last)
    one = torch.ones((), device=device)

    def best(function: Callable[[], Any], times: int) -> float:
        function()
        found = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(times):
                function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found.append((time.perf_counter() - start) / times)
        return min(found)

    return {
        "copy": 2 * source.numel() * 4 / best(lambda: target.copy_(source), 2),
        "matmul": 2 * 1536**3 / best(lambda: a @ b, 2),
        "convolution": 2 * x.numel() * 32 * 9 / best(lambda: F.conv2d(x, w, padding=1), 4),
        "launch": best(lambda: one.add_(1), 200),
    }


def bound(counts: dict[str, int], rate: dict[str, float]) -> dict[str, float]:
    """The seconds that each count alone would take at the measured rates."""
    return {
        "operations": counts["operations"] / max(rate["matmul"], rate["convolution"]),
        "bytes": counts["bytes"] / rate["copy"],
        "launches": counts["launches"] * rate["launch"],
    }


# Measurements.


@dataclass
class Result:
    """Seconds an iteration of each arm, round by round, and what else was found out about a case."""

    case: Case
    seconds: dict[str, list[float]] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)

    def ratio(self, arm: Arm, to: Arm) -> list[float]:
        """Round by round: noise that lasts longer than a round cancels."""
        return [a / b for a, b in zip(self.seconds[arm.name], self.seconds[to.name], strict=True)]


def measure(
    case: Case, chosen: list[Arm], folder: Path, device: torch.device, build: Build, rounds: int, say: Callable
) -> Result:
    """Time every arm in every round, one after the other. Errors: UserError where the data set is missing."""
    torch.set_num_threads(case.threads)
    result = Result(case)
    dataset = datasets.load(settings(case, BASE, folder), device)
    result.rates = rates(case.threads, device)
    ready = []
    for arm in chosen:
        measured = Measured(case, arm, dataset, folder, device, build)
        start = time.perf_counter()
        measured.seconds(2)
        result.starts[arm.name] = time.perf_counter() - start
        say(f"{case.title}: {arm.name} started in {result.starts[arm.name]:.1f} s")
        result.seconds[arm.name] = []
        ready.append(measured)
    for measured in ready:
        if measured.arm.mode == "eager":
            result.counts[measured.arm.name] = count(measured)
    # About a second's work, so that a round is short beside the drifts of a shared machine.
    iterations = max(2, round(256 / case.batch_size)) if device.type == "cpu" else 50
    for i in range(rounds):
        for measured in ready:
            result.seconds[measured.arm.name].append(measured.seconds(iterations))
            if measured.arm == PLAIN:
                time.sleep(0.5)  # its workers fill their queues, at nobody else's cost
        say(f"{case.title}: round {i + 1} of {rounds}")
    return result


def peak_memory(case: Case, arm: Arm, folder: Path, device: torch.device, build: Build) -> int:
    """Bytes that iterations of an arm take at most above what stands there before them; in a process of its own."""
    torch.set_num_threads(case.threads)
    measured = Measured(case, arm, datasets.load(settings(case, BASE, folder), device), folder, device, build)
    for _ in range(3):
        measured.step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        measured.seconds(3)
        return torch.cuda.max_memory_allocated(device) - before
    return _allocated(measured)


def _allocated(measured: Measured) -> int:
    """Peak of the CPU allocator's bytes during one iteration, from the profiler's events."""
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        measured.step()
    now = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def throughput(case: Case, arm: Arm, folder: Path, device: torch.device, build: Build, start: float, seconds: float):
    """Iterations a second between two instants, for processes side by side that were given the same ones."""
    torch.set_num_threads(case.threads)
    measured = Measured(case, arm, datasets.load(settings(case, BASE, folder), device), folder, device, build)
    measured.seconds(2)
    while time.time() < start:
        measured.step()
    begin, n = time.perf_counter(), 0
    while time.time() < start + seconds:
        measured.step()
        n += 1
    measured.wait()
    return n / (time.perf_counter() - begin)


# Results as text.


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Median, first and third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def table(result: Result, chosen: list[Arm] | None = None, base: Arm = BASE, digits: int = 1) -> str:
    """A case as markdown: milliseconds, images a second, and ratios to eager BN with one forward.

    chosen: the arms to show, where they are not those of a CPU; base: what the ratios are to; digits: of milliseconds.
    """
    to = "eager BN, 1 forward" if base == BASE else base.name
    lines = [
        f"| arm | ms an iteration (quartiles) | images/s | / {to} (quartiles) | start, s |",
        "|---|---|---|---|---|",
    ]
    for arm in chosen or _known():
        if arm.name not in result.seconds:
            continue
        middle, low, high = (1e3 * s for s in quantiles(result.seconds[arm.name]))
        shown = "-"
        if base.name in result.seconds:
            ratio = quantiles(result.ratio(arm, base))
            shown = f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"
        lines.append(
            f"| {arm.name} | {middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f}) "
            f"| {result.case.batch_size / middle * 1e3:.0f} | {shown} | {result.starts[arm.name]:.1f} |"
        )
    return "\n".join(lines)


def rounded(value: Any) -> Any:
    """Numbers to five digits, and keys as text, at any depth: what is written as JSON."""
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def count_table(result: Result) -> str:
    """What each eager arm does in an iteration, and what it would take at the machine's measured rates."""
    rate = result.rates
    lines = [
        f"Measured rates: {rate['copy'] / 1e9:.1f} GB/s copied, {rate['matmul'] / 1e9:.0f} Gop/s in a matrix product, "
        f"{rate['convolution'] / 1e9:.0f} Gop/s in a convolution, {rate['launch'] * 1e6:.1f} us a small operation.",
        "",
        "| arm | Gop | GB | launches | ms by operations | ms by bytes | ms by launches | ms measured | bound by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in _known():
        if arm.name in result.counts:
            counts = result.counts[arm.name]
            seconds = bound(counts, rate)
            largest = max(seconds, key=lambda key: seconds[key])
            lines.append(
                f"| {arm.name} | {counts['operations'] / 1e9:.2f} | {counts['bytes'] / 1e9:.2f} "
                f"| {counts['launches']} | "
                + " | ".join(f"{1e3 * seconds[key]:.1f}" for key in ("operations", "bytes", "launches"))
                + f" | {1e3 * statistics.median(result.seconds[arm.name]):.1f} | {largest} |"
            )
    return "\n".join(lines)


def _known() -> list[Arm]:
    return arms(quick=False)


def file_stem(device: torch.device) -> str:
    """cpu-amd-epyc-2-cores and the like: what results/benchmarks/ calls this machine."""
    from mbn.records.provenance import device_name

    cores = f" {configuration.cores()} cores" if device.type == "cpu" else ""
    return re.sub(r"[^a-z0-9]+", "-", (device_name(device) + cores).lower()).strip("-")
