"""What a benchmark repeats: training or testing one network, with the settings of a run, and a plain PyTorch loop."""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from mbn import config as configuration
from mbn.data import in_memory
from mbn.layers import Layers, from_config
from mbn.norm.memorized import set_lambda
from mbn.training.iteration import READ_EVERY, Update, autocast

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


class Workload:
    """Something to repeat on a device: `step()` is one iteration. untimed: steps before each measurement."""

    def __init__(self, step: Callable[[], object], device: torch.device, untimed: int = 0) -> None:
        self.step, self.device, self.untimed = step, device, untimed

    @property
    def in_mode(self) -> bool:
        """Whether it is by now done in the mode that was asked for."""
        return True

    def seconds(self, iterations: int) -> float:
        """Seconds an iteration, over so many of them."""
        for _ in range(self.untimed):
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


class Training(Workload):
    """A network, its optimiser and its Update, as a run has them. make: the network; batches: what `step` takes."""

    def __init__(
        self,
        make: Callable[[], nn.Module],
        forwards: int,
        mode: str,
        device: torch.device,
        batch_size: int,
        batches: Iterator[in_memory.Batch],
        precision: str = "fp32",
    ) -> None:
        super().__init__(self._step, device)
        torch.manual_seed(0)
        self.model = make().to(device).to(memory_format=torch.channels_last)
        # At 0.1 a batch of 8 may diverge, and NaNs have a speed of their own.
        self.lr = torch.tensor(0.01, device=device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-4, fused=True
        )
        self.update = Update(self.model, self.optimizer, forwards, mode, precision, device, batch_size)
        self.mode, self.batches = mode, batches

    def _step(self) -> None:
        self.update(*next(self.batches))
        if self.update.pending == READ_EVERY:
            self.update.drain()

    @property
    def in_mode(self) -> bool:
        """Whether recording, if that is its mode, has not failed, and every size of batch is played back by now."""
        return self.update.mode == self.mode and all(each.play for each in self.update.recorded.values())


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


def prepare(
    case: Case,
    arm: Arm,
    dataset: in_memory.Data,
    folder: Path,
    device: torch.device,
    build: Build,
    arrays: in_memory.Arrays | None = None,
) -> Workload:
    """An arm made ready.

    arrays: what the plain loop reads where folder holds no CIFAR-10; the other arms take their batches from dataset.
    """
    torch.manual_seed(0)
    if arm == PLAIN:
        loop = plain_loop(settings(case, BASE, folder), device, build, arrays)
        return Workload(functools.partial(next, loop), device, PREFETCHED)
    config = settings(case, arm, folder)

    def make() -> nn.Module:
        model = build(layers=from_config(config), **configuration.network(config))
        set_lambda(model, 0.9)
        return model

    if arm.evaluates:
        model = make().to(device).to(memory_format=torch.channels_last).eval()
        return testing(model, lambda: dataset.test_batches(case.batch_size), device, arm.precision)
    batches = dataset.train_batches(0, case.batch_size)
    return Training(make, arm.forwards, arm.mode, device, case.batch_size, batches, arm.precision)


def testing(
    model: nn.Module, batches: Callable[[], Iterator[in_memory.Batch]], device: torch.device, precision: str
) -> Workload:
    def step() -> None:
        with torch.no_grad(), autocast(device, precision):
            model(next(images)[0])

    images = _repeated(batches)
    return Workload(step, device)


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
