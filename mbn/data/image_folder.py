"""ImageNet, or any folder of the same form: decoded in worker processes, normalised on the device.

train/<class>/*.JPEG
val/<class>/*.JPEG, or a flat val/*.JPEG beside the devkit's archive, which holds its labels
"""

import io
import math
import os
import pickle
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from mbn.config import Dataset as DatasetConfig
from mbn.config import cores
from mbn.data import random_streams
from mbn.data.in_memory import Batch, check_numbers, normalize
from mbn.system.errors import UserError
from mbn.system.files import let_go_of_inherited_locks
from mbn.system.signals import CODES

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
# Test images are resized to this many pixels per pixel of the crop: 256 for 224.
RESIZE = 256 / 224


class Files:
    """Paths and labels in three arrays.

    Not a list of strings: every worker process would write to the reference counts of its million objects, and so copy
    their memory, page by page.
    """

    def __init__(self, root: Path, paths: Sequence[str], labels: Sequence[int]) -> None:
        self.root = str(root)
        encoded = [os.fsencode(path) for path in paths]
        self.text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return os.path.join(self.root, os.fsdecode(self.text[start : int(self.ends[index])].tobytes()))  # noqa: PTH118


def list_images(folder: Path) -> list[str]:
    """Names of the images in a folder, sorted."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.name.lower().endswith(EXTENSIONS))


def open_folders(dataset: DatasetConfig, root: Path) -> tuple[Files, Files]:
    """The training and the test images under root, labelled by the sorted names of train/'s folders.

    Errors: UserError where a folder is missing, a class has no test images, or the numbers are not as configured.
    """
    for name in ("train", "val"):
        if not (root / name).is_dir():
            raise UserError(
                f"{root / name} is missing: machine.data must name a folder with train/<class>/*.JPEG and "
                "val/<class>/*.JPEG (`python train.py experiment=quickstart` needs no data)."
            )
    classes = _folders(root / "train")
    train = _from_folders(root / "train", classes)
    present = _folders(root / "val")
    if present:
        missing = sorted(set(classes) - set(present))
        unknown = sorted(set(present) - set(classes))
        if missing:
            raise UserError(
                f"{root / 'val'} has no folder {missing[0]} ({len(missing)} missing): every class needs one."
            )
        if unknown:
            raise UserError(f"{root / 'val'} has a folder {unknown[0]} that train/ lacks: remove it, or add it there.")
        test = _from_folders(root / "val", classes)
    else:
        test = _flat_val(root, classes)
    check_numbers(dataset, classes=len(classes), train_images=len(train), test_images=len(test))
    return train, test


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir())


def _from_folders(folder: Path, classes: list[str]) -> Files:
    paths, labels = [], []
    for label, name in enumerate(classes):
        images = list_images(folder / name)
        if not images:
            raise UserError(f"{folder / name} has no image: put images into it, or remove the folder.")
        paths += [f"{name}/{image}" for image in images]
        labels += [label] * len(images)
    return Files(folder, paths, labels)


def _flat_val(root: Path, classes: list[str]) -> Files:
    """Test images as the official archive has them: the devkit's i-th line is the label of the i-th in sorted order."""
    from torchvision.datasets.imagenet import ARCHIVE_META, META_FILE, load_meta_file, parse_devkit_archive

    try:
        if (root / META_FILE).is_file():
            _, wnids = load_meta_file(str(root))
        else:
            # torchvision writes what it has read into a file; a folder of data may be read-only.
            with tempfile.TemporaryDirectory() as scratch:
                parse_devkit_archive(scratch, str((root / ARCHIVE_META["devkit"][0]).absolute()))
                _, wnids = load_meta_file(scratch)
    except (RuntimeError, OSError, ImportError, ValueError, EOFError, pickle.UnpicklingError) as error:
        why = str(error).partition("\n")[0][:100]
        if isinstance(error, pickle.UnpicklingError):  # its own text advises to read the file in an unsafe way
            why = "it is damaged"
        raise UserError(
            f"{root / 'val'} has no class folders, and the devkit that labels a flat val/ cannot be read "
            f"({why}): put ILSVRC2012_devkit_t12.tar.gz into {root}, or the images into "
            "val/<class>/."
        ) from None
    images = list_images(root / "val")
    if len(images) != len(wnids):
        raise UserError(f"{root / 'val'} has {len(images)} images, but the devkit labels {len(wnids)}: complete it.")
    index = {name: label for label, name in enumerate(classes)}
    lacking = sorted(set(wnids) - set(index))
    if lacking:
        raise UserError(f"{root / 'train'} has no folder {lacking[0]}, a class of the devkit: every class needs one.")
    return Files(root / "val", images, [index[name] for name in wnids])


class Damaged(NamedTuple):
    """A damaged image. A worker sends this instead of a batch: an exception would arrive with a traceback around it."""

    message: str


class Decoder:
    """The data set of the workers: from (epoch, index) to a uint8 image of the right size and its label.

    epoch is None for the plain images of evaluation: Resize(256) and CenterCrop(224) at 224 pixels.
    """

    def __init__(self, files: Files, size: int, flip: bool, seed: int) -> None:
        self.files, self.size, self.flip, self.seed = files, size, flip, seed

    def __getitem__(self, key: tuple[int | None, int]) -> tuple[np.ndarray, int] | Damaged:
        epoch, index = key
        path = self.files.path(index)
        try:
            with open(path, "rb") as file:  # noqa: PTH123
                image: Any = Image.open(io.BytesIO(file.read())).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return Damaged(f"{path} cannot be decoded ({error}): restore it, or remove it and adapt dataset.*_images.")
        if epoch is None:
            image = TF.center_crop(TF.resize(image, [round(self.size * RESIZE)], antialias=True), [self.size])
        else:
            width, height = image.size
            top, left, h, w, flip = random_streams.resized_crop(self.seed, epoch, index, height, width)
            image = TF.resized_crop(
                image, top, left, h, w, [self.size, self.size], InterpolationMode.BILINEAR, antialias=True
            )
            if flip and self.flip:
                image = TF.horizontal_flip(image)
        return np.asarray(image), int(self.files.labels[index])


def collate(items: list[tuple[np.ndarray, int] | Damaged]) -> tuple[Tensor, Tensor] | Damaged:
    for item in items:
        if isinstance(item, Damaged):
            return item
    images, labels = zip(*items, strict=True)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def from_iteration(iteration: int, seed: int, n: int, size: int) -> Iterator[list[tuple[int, int]]]:
    """The training run's batches of (epoch, index) from an iteration on, epoch after epoch."""
    epoch, position = divmod(iteration, math.ceil(n / size))
    while True:
        order = random_streams.order(seed, epoch, n)
        for start in range(position * size, n, size):
            yield [(epoch, int(i)) for i in order[start : start + size]]
        epoch, position = epoch + 1, 0


class ImageFolders:
    """Batches of an ImageNet-like folder; the same for any number of workers, as every draw is a function of
    (seed, epoch, index)."""

    def __init__(
        self, dataset: DatasetConfig, root: Path, seed: int, device: torch.device, workers: int | None
    ) -> None:
        self.train, self.test = open_folders(dataset, root)
        self.fingerprint = "x"
        self.dataset, self.seed, self.device = dataset, seed, device
        self.workers = cores() if workers is None else workers
        self.mean = torch.tensor(dataset.mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(dataset.std, device=device).view(3, 1, 1)

    def train_batches(self, iteration: int, size: int) -> Iterator[Batch]:
        return self._batches(self.train, from_iteration(iteration, self.seed, len(self.train), size))

    def test_batches(self, size: int) -> Iterator[Batch]:
        return self._plain(self.test, size)

    def plain_train_batches(self, size: int) -> Iterator[Batch]:
        return self._plain(self.train, size)

    def _plain(self, files: Files, size: int) -> Iterator[Batch]:
        n = len(files)
        return self._batches(files, ([(None, i) for i in range(s, min(s + size, n))] for s in range(0, n, size)))

    def _batches(self, files: Files, batches: Any) -> Iterator[Batch]:
        decoder: Any = Decoder(files, self.dataset.image_size, self.dataset.flip, self.seed)
        loader: DataLoader = DataLoader(
            decoder,
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_start_worker,
            # A generator of its own: the loader draws a number, which must not change what dropout draws.
            generator=torch.Generator(),
        )
        for batch in loader:
            if isinstance(batch, Damaged):
                raise UserError(batch.message)
            images, labels = (t.to(self.device, non_blocking=True) for t in batch)
            yield normalize(images, self.mean, self.std), labels


def _start_worker(_: int) -> None:
    let_go_of_inherited_locks()
    torch.set_num_threads(1)
    # A signal to the whole process group is for the trainer alone, which still needs the next batches.
    for name in CODES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
