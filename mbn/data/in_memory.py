"""Data sets on the device as uint8, and their augmentation, a batch at a time."""

import copy
import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mbn.config import Dataset as DatasetConfig
from mbn.data import random_streams
from mbn.system.errors import UserError
from mbn.system.processes import ALONE
from mbn.system.signals import StopRequest


class Arrays(NamedTuple):
    """A data set in memory: images uint8 (N, H, W, 3), labels int64 (N,)."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def check_numbers(dataset: DatasetConfig, **found: int) -> None:
    """Raise UserError if the data set's numbers of images or classes are not the configured ones."""
    for key, number in found.items():
        if number != getattr(dataset, key):
            wrong = " ".join(f"dataset.{k}={v}" for k, v in found.items() if v != getattr(dataset, k))
            raise UserError(
                f"{dataset.name} has {number} {key.replace('_', ' ')} here, not {getattr(dataset, key)}: complete the "
                f"folder, or add {wrong} to the command if this number is right."
            )


def check_arrays(found: Any, source: str) -> Arrays:
    """What source, the path of a data set's function, gave: contiguous, and with a label for each image.

    Errors: UserError where it is no Arrays of such arrays.
    """
    if not isinstance(found, Arrays):
        raise UserError(f"{source} gives {type(found).__name__}, not Arrays of mbn/data/in_memory.py: correct it.")
    for name, array in found._asdict().items():
        kind, dimensions, wanted = (
            (np.uint8, 4, "uint8, N x H x W x 3") if name.endswith("images") else (np.int64, 1, "int64, N")
        )
        is_array = isinstance(array, np.ndarray)
        right = is_array and array.dtype == kind and array.ndim == dimensions and array.shape[3:] in ((), (3,))
        if not right:
            what = f"{array.dtype} of {' x '.join(map(str, array.shape))}" if is_array else type(array).__name__
            raise UserError(f"{source} gives {name} as {what}, not as a NumPy array of {wanted}: convert it there.")
    for part in ("train", "test"):
        images, labels = (len(getattr(found, f"{part}_{kind}")) for kind in ("images", "labels"))
        if images != labels:
            raise UserError(f"{source} gives {images} {part}_images, but {labels} {part}_labels: each image needs one.")
    return Arrays(*map(np.ascontiguousarray, found))


def check_labels(dataset: DatasetConfig, arrays: Arrays) -> None:
    """Raise UserError if a label is none of the configured classes."""
    for name, labels in (("train_labels", arrays.train_labels), ("test_labels", arrays.test_labels)):
        wrong = labels[(labels < 0) | (labels >= dataset.classes)]
        if len(wrong):
            raise UserError(
                f"{dataset.name} has {wrong[0]} among its {name}: number its classes from 0 to {dataset.classes - 1}."
            )


def check_image_size(dataset: DatasetConfig, images: np.ndarray) -> None:
    """Raise UserError if images (N, H, W, 3) are not of the configured size: runs are named and recorded by it."""
    height, width = images.shape[1:3]
    if (height, width) != (dataset.image_size, dataset.image_size):
        what_to_do = f"add dataset.image_size={height} to the command" if height == width else "make them square"
        raise UserError(
            f"{dataset.name} has images of {height} x {width} pixels here, not {dataset.image_size} x "
            f"{dataset.image_size}: {what_to_do}."
        )


def fingerprint(arrays: Arrays) -> str:
    """SHA-256 of the arrays' types, shapes and values."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).data)
    return digest.hexdigest()


def crop_and_flip(images: Tensor, draws: Tensor, padding: int) -> Tensor:
    """Pad each image with zeros (black), crop it to its old size, and mirror it, each by its own draws.

    images: uint8 (B, H, W, 3). draws: int64 (B, 3), top and left of the crop in the padded image, 1 for a flip.
    Equal to torchvision's RandomCrop(H, padding) and horizontal flip with the same draws.
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


def own_batches(n: int, size: int, share: Callable[[int], slice], each: bool) -> Iterator[range]:
    """Which of n images in their order a process tests, in batches.

    each: its share of every batch; otherwise batches of its share of all n.
    """
    if each:
        batches = (range(start, min(start + size, n)) for start in range(0, n, size))
        yield from (batch[share(len(batch))] for batch in batches)
    else:
        own = range(n)[share(n)]
        yield from (own[start : start + size] for start in range(0, len(own), size))


# Images augmented at once, by kind of device: many save a GPU kernel launches, fewer fit into a CPU's caches.
BLOCK = {"cuda": 8192}
BLOCK_ELSEWHERE = 512


class Data(Protocol):
    """Where a run's batches come from: images float32 (B, 3, H, W) and labels int64 (B,), on the device.

    fingerprint: a SHA-256 in hex digits that is another one for other images or labels. stop: a request that ends a
    wait for a batch with StoppedError; whoever trains puts its own here. share(n): which of n images this process
    gets; whoever trains in several processes puts its own here.
    """

    fingerprint: str
    stop: StopRequest
    share: Callable[[int], slice]

    def train_batches(self, iteration: int, size: int) -> Iterator[Batch]:
        """The augmented training batches from an iteration on (the first is 0), epoch after epoch, without end; of each
        batch this process's share."""
        ...

    def test_batches(self, size: int, each: bool = False) -> Iterator[Batch]:
        """The test images in batches, the last one smaller. each: of each batch this process gets its share, as in
        training, and not its share of all images."""
        ...

    def plain_train_batches(self, size: int) -> Iterator[Batch]:
        """The training images in batches, in their order and not augmented, the last one smaller."""
        ...


class DeviceDataset:
    """A small data set on the device, where its batches are made: no worker processes, no copies in training.

    The order and the draws of a whole epoch are copied to the device at the epoch's start.
    """

    def __init__(self, arrays: Arrays, config: DatasetConfig, seed: int, device: torch.device) -> None:
        self.fingerprint = fingerprint(arrays)
        self.stop = StopRequest()  # never waits
        self.share: Callable[[int], slice] = ALONE.share
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

    def train_batches(self, iteration: int, size: int) -> Iterator[Batch]:
        n, padding = len(self.train_labels), self.config.padding
        epoch, position = divmod(iteration, -(-n // size))
        block = max(1, BLOCK.get(self.device.type, BLOCK_ELSEWHERE) // size)
        while True:
            shares = list(own_batches(n, size, self.share, each=True))[position:]
            own = random_streams.order(self.seed, epoch, n)[list(itertools.chain(*shares))]
            order = torch.from_numpy(own).to(self.device)
            draws = torch.from_numpy(random_streams.crops_and_flips(self.seed, epoch, n, padding)).to(self.device)
            if not self.config.flip:
                draws[:, 2] = 0
            sizes = [len(share) for share in shares]
            blocks = [sizes[i : i + block] for i in range(0, len(sizes), block)]
            for index, each in zip(order.split([sum(each) for each in blocks]), blocks, strict=True):
                images = crop_and_flip(self.train_images[index], draws[index], padding)
                images, labels = normalize(images, self.mean, self.std), self.train_labels[index]
                yield from zip(images.split(each), labels.split(each), strict=True)
            epoch, position = epoch + 1, 0

    def test_batches(self, size: int, each: bool = False) -> Iterator[Batch]:
        return self._plain(self.test_images, self.test_labels, size, each)

    def plain_train_batches(self, size: int) -> Iterator[Batch]:
        return self._plain(self.train_images, self.train_labels, size, False)

    def _plain(self, images: Tensor, labels: Tensor, size: int, each: bool) -> Iterator[Batch]:
        for own in own_batches(len(images), size, self.share, each):
            here = slice(own.start, own.stop)
            yield normalize(images[here], self.mean, self.std), labels[here]
