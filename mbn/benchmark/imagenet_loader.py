"""Whether ImageNet's loader keeps up: images a second that it delivers, and images a second that ResNet-50 needs."""

import contextlib
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from mbn import config as configuration
from mbn.benchmark.jobs import NO_TIME, Finding, left
from mbn.benchmark.timing import Timed, timed
from mbn.benchmark.workload import BASE, PAIR, Case, Setup, arms, random_arrays, settings
from mbn.data import in_memory
from mbn.data.image_folder import ImageFolders


def resnet50_speed(setup: Setup, deadline: float) -> Timed:
    """ResNet-50 on random images on the device: the images a second that a loader must deliver."""
    case = Case("resnet50", setup.sizes.large_batch, configuration.cores(), "imagenet")
    config = settings(case, BASE, setup.folder).dataset
    images = random_arrays(2 * case.batch_size, config.image_size, config.classes)
    dataset = in_memory.DeviceDataset(images, config, 0, setup.device)
    return timed(case, arms(PAIR, "graph-eager", precision="bf16"), setup, deadline, dataset)


@dataclass
class Loaded(Finding):
    """Images a second that the loader delivers."""

    workers: int
    rate: float | None = None

    def line(self) -> str:
        shown = "not measured" if self.rate is None else f"{self.rate:.0f}"
        return f"images/s with {self.workers} workers: {shown}"


def loader(setup: Setup, deadline: float) -> Loaded:
    """Decode pictures as in training, and only fetch the batches: nothing else uses the GPU or the CPUs."""
    sizes = setup.sizes
    result = Loaded(sizes.workers)
    with tempfile.TemporaryDirectory() as name:
        make_pictures(Path(name), sizes.pictures)
        case = Case("resnet50", sizes.large_batch, configuration.cores(), "imagenet")
        imagenet = settings(case, BASE, setup.folder).dataset
        dataset = replace(imagenet, classes=2, train_images=sizes.pictures, test_images=2)
        folders = ImageFolders(dataset, Path(name), 0, setup.device, sizes.workers)
        batches = folders.train_batches(0, sizes.large_batch)
        with contextlib.closing(batches):  # type: ignore[type-var]
            for _ in range(2 * sizes.workers):  # batches that workers prepared beforehand must not count
                next(batches)
                if left(deadline) <= 0:
                    result.missing["loader"] = NO_TIME
                    return result
            start, images = time.perf_counter(), 0
            while images == 0 or (time.perf_counter() < start + sizes.loader_seconds and left(deadline) > 0):
                images += len(next(batches)[1])
            result.rate = images / (time.perf_counter() - start)
    return result


def make_pictures(root: Path, n: int) -> None:
    """n JPEGs in ImageNet's folders, of 500 x 375 pixels and about 110 kB as most of ImageNet's; only 64 differ."""
    draws = np.random.default_rng(0)
    encoded = root / "picture.jpg"
    for i in range(min(n, 64)):
        coarse = Image.fromarray(draws.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375))
        noisy = np.asarray(coarse) + draws.normal(0, 24, (375, 500, 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(encoded, quality=90)
        content = encoded.read_bytes()
        for j in range(i, n, 64):
            path = root / "train" / "ab"[j % 2] / f"{j}.jpeg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    for name in "ab":
        (root / "val" / name).mkdir(parents=True)
        (root / "val" / name / "0.jpeg").write_bytes(content)
