"""What a benchmark repeats: training or testing one network, with the settings of a run, and a plain PyTorch loop."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from mbn import config as configuration
from mbn.data import datasets, in_memory
from mbn.network_layers import Layers, from_config
from mbn.norm.memorized import set_lambda
from mbn.system.cuda_graph import Captured
from mbn.system.errors import UserError
from mbn.training.iteration import READ_EVERY, Update

Build = Callable[..., nn.Module]
# The plain loop's loader prepares this many batches ahead; they must not count as its speed.
WORKERS, PREFETCHED = min(2, configuration.cores()), 4


@dataclass(frozen=True)
class Case:
    """One network at one batch size and number of threads. dataset: gives the image size and number of classes."""

    model: str
    batch_size: int
    threads: int
    dataset: str = "cifar10"

    @property
    def title(self) -> str:
        return f"{self.model}, batch {self.batch_size}, {self.threads} thread{'s' * (self.threads > 1)}"


@dataclass(frozen=True)
class Arm:
    """One way to train or, with evaluates, to test: a norm with one or two forwards, in a mode and a precision."""

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
# The arms that others are divided by: BN with one forward, not compiled, data on the device; CAPTURED on CUDA.
BASE, CAPTURED = Arm("bn"), Arm("bn", mode="graph-eager")
COMPARED = (("bn", 1), ("mbn", 1), ("mbn", 2), ("gn", 1))
PAIR = (("bn", 1), ("mbn", 2))


def arms(methods: tuple[tuple[str, int], ...], *modes: str, precision: str = "fp32") -> tuple[Arm, ...]:
    """An arm for each method (a norm and its number of forwards) in each mode."""
    return tuple(Arm(norm, forwards, mode, precision=precision) for mode in modes for norm, forwards in methods)


@dataclass(frozen=True)
class Sizes:
    """How much is measured. The defaults take at most five minutes on a GPU with a warm Inductor cache."""

    models: tuple[str, ...] = ("resnet20", "resnet56")
    batches: tuple[int, ...] = (8, 128)
    arms: tuple[Arm, ...] = (*arms(COMPARED, "graph-eager", "eager"), PLAIN)
    images: int = 390 * 128  # whole batches: a smaller last batch would need a graph of its own
    rounds: int = 6
    round_seconds: float = 0.12  # of each arm
    memory: bool = True  # on a CPU: whether it is measured
    lanes: dict[int, tuple[int, ...]] = field(default_factory=lambda: {8: (1, 2, 4, 8, 16, 32), 128: (1, 2, 4, 8)})
    compiled_lanes: dict[int, tuple[int, ...]] = field(default_factory=lambda: {8: (1, 2, 4, 8, 16), 128: (1, 2, 4)})
    lane_seconds: float = 0.8
    processes_seconds: float = 20.0
    profile_seconds: float = 0.05
    profile_lanes: int = 8
    compiling: float = 20.0  # nothing is compiled with less time left than this
    workers: int = 16
    pictures: int = 512
    large_batch: int = 128  # ResNet-50's
    loader_seconds: float = 5.0


@dataclass
class Setup:
    """Where and on what to measure: on CIFAR-10's images, or random ones if asked for or if folder has none."""

    folder: Path
    device: torch.device
    build: Build
    sizes: Sizes
    random: bool = False

    @functools.cached_property
    def opened(self) -> tuple[in_memory.Arrays, str]:
        """The images, and a description of them."""
        n = self.sizes.images
        if not self.random and (self.folder / "cifar-10-batches-py").is_dir():
            with contextlib.suppress(UserError):
                found = datasets.load_cifar("cifar10", self.folder)
                return found._replace(train_images=found[0][:n], train_labels=found[1][:n]), "CIFAR-10"
        why = "as asked for" if self.random else f"no whole CIFAR-10 in the folder {self.folder.name}"
        return random_arrays(n, 32, 10), f"random ({why})"

    @functools.cached_property
    def dataset(self) -> in_memory.DeviceDataset:
        config = settings(Case("resnet20", 128, 1), BASE, self.folder).dataset
        return in_memory.DeviceDataset(self.opened[0], config, 0, self.device)

    def seconds_to_begin(self, arm: Arm) -> float:
        """How much time must be left to begin making an arm ready."""
        return self.sizes.compiling if arm.mode in ("graph", "compile") else 0.0


def random_arrays(n: int, size: int, classes: int) -> in_memory.Arrays:
    """n images of size x size random pixels with random labels, for training and for testing."""
    draws = np.random.default_rng(0)
    images, labels = draws.integers(0, 256, (n, size, size, 3), dtype=np.uint8), draws.integers(0, classes, n)
    return in_memory.Arrays(images, labels, images, labels)


class Workload:
    """Work to repeat on a device: `step()` is one iteration. untimed: steps done before each measurement."""

    def __init__(self, step: Callable[[], object], device: torch.device, untimed: int = 0) -> None:
        self.step, self.device, self.untimed = step, device, untimed

    @property
    def in_mode(self) -> bool:
        """Whether it now runs in the mode that was asked for."""
        return True

    def seconds(self, iterations: int) -> float:
        """Seconds an iteration, the mean over that many."""
        for _ in range(self.untimed):
            self.step()
        self.wait()
        start = time.perf_counter()
        for _ in range(iterations):
            self.step()
        self.wait()
        return (time.perf_counter() - start) / iterations

    def wait(self) -> None:
        if self.device.type == "cuda":  # only this thread's stream: another thread may be capturing on its own
            torch.cuda.current_stream(self.device).synchronize()


def warm_up(work: Workload, before_capture: Callable[[], None] = lambda: None) -> None:
    """Iterate until the iteration is captured, if the mode captures. Errors: RuntimeError where capturing failed."""
    for _ in range(Captured.AS_IT_IS):
        work.step()
    work.wait()
    before_capture()
    work.step()
    work.wait()
    if not work.in_mode:
        raise RuntimeError("iterations cannot be captured")


class Training(Workload):
    """A network, its optimiser and its Update, as in a run. batches: what `step` trains on."""

    def __init__(self, case: Case, arm: Arm, setup: Setup, batches: Iterator[in_memory.Batch]) -> None:
        super().__init__(self._step, setup.device)
        self.model = new_network(case, arm, setup)
        # Not 0.1: at batch 8 training may diverge, and NaNs have a different speed.
        self.lr = torch.tensor(0.01, device=setup.device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-4, fused=True
        )
        self.update = Update(
            self.model, self.optimizer, arm.forwards, arm.mode, arm.precision, setup.device, case.batch_size
        )
        self.mode, self.batches = arm.mode, batches

    def _step(self) -> None:
        self.update(*next(self.batches))
        if self.update.pending == READ_EVERY:
            self.update.drain()

    @property
    def in_mode(self) -> bool:
        """Whether it is still in its mode, and every batch size that was captured is replayed by now."""
        return self.update.mode == self.mode and all(each.replay for each in self.update.captured.values())


def settings(case: Case, arm: Arm, folder: Path) -> configuration.Config:
    """The configuration that an arm has in training."""
    overrides = [f"model={case.model}", f"batch_size={case.batch_size}", f"machine.data={folder}", f"norm={arm.norm}"]
    if arm.gradient == "batch":
        overrides.append("norm.gradient=batch")
    return _composed(*overrides, f"forwards={arm.forwards}", f"dataset={case.dataset}", f"precision={arm.precision}")


@functools.cache
def _composed(*overrides: str) -> configuration.Config:
    """Compose each configuration only once: for many lanes it would take longer than building the networks."""
    return configuration.load(list(overrides))


def new_network(case: Case, arm: Arm, setup: Setup) -> nn.Module:
    """An arm's network on the device, always with the same parameters."""
    config = settings(case, arm, setup.folder)
    torch.manual_seed(0)
    model = setup.build(layers=from_config(config), **configuration.network(config))
    if arm.norm == "mbn":
        set_lambda(model, 0.9)
    return model.to(setup.device).to(memory_format=torch.channels_last)


def prepare(case: Case, arm: Arm, setup: Setup, dataset: in_memory.Data | None = None) -> Workload:
    """Make an arm ready. dataset: where its batches come from, instead of setup's images."""
    if arm == PLAIN:
        return Workload(functools.partial(next, plain_loop(case, setup)), setup.device, PREFETCHED)
    dataset = dataset or setup.dataset
    if not arm.evaluates:
        return Training(case, arm, setup, dataset.train_batches(0, case.batch_size))
    model, (images, _) = new_network(case, arm, setup).eval(), next(dataset.test_batches(case.batch_size))
    return Workload(torch.no_grad()(lambda: model(images)), setup.device)


class Pictures(torch.utils.data.Dataset):
    """Images in memory, returned as torchvision's CIFAR10 does: as PIL images, then transformed."""

    def __init__(self, arrays: in_memory.Arrays, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.labels, self.transform = arrays.train_images, arrays.train_labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def plain_loop(case: Case, setup: Setup) -> Iterator[None]:
    """The loop one would write today: PIL images, torchvision's transforms, DataLoader, nn.BatchNorm2d, SGD, eager."""
    config = settings(case, BASE, setup.folder)
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(config.dataset.mean, config.dataset.std),
        ]
    )
    loader = torch.utils.data.DataLoader(
        Pictures(setup.opened[0], transform),
        case.batch_size,
        shuffle=True,
        num_workers=WORKERS,
        persistent_workers=True,
    )
    layers = Layers(nn.Conv2d, nn.BatchNorm2d, lambda: nn.ReLU(inplace=True))
    model = setup.build(layers=layers, **configuration.network(config)).to(setup.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    while True:
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x.to(setup.device)), y.to(setup.device))
            loss.backward()
            optimizer.step()
            yield
