"""ImageNet, or any folder of the same form: decoded in worker processes, normalised on the device.

train/<class>/*.JPEG
val/<class>/*.JPEG, or a flat val/*.JPEG beside the devkit's archive, which holds its labels
"""

import contextlib
import errno
import hashlib
import io
import math
import os
import pickle
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from mbn.config import Dataset as DatasetConfig
from mbn.data import random_streams
from mbn.data.in_memory import Batch, check_numbers, normalize, own_batches
from mbn.data.workers import Workers
from mbn.system.errors import UserError, printable
from mbn.system.files import cannot_use
from mbn.system.processes import ALONE
from mbn.system.signals import StopRequest

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
# Test images are resized to this many pixels per pixel of the crop: 256 for 224.
RESIZE = 256 / 224
# Only these formats are opened, whatever a file's name: Pillow runs another program for EPS, and most of its security
# faults were in rare formats.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
# Of an image that is longer than so many times its width, or wider, only the middle is resized for evaluation.
LONGEST = 100
# A file that cannot be read is tried again after so many seconds: a disk in a network may be away for a moment, and a
# run reads images a hundred million times. Not after errors that last.
PAUSES = (1.0, 5.0, 20.0)
LASTING = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENOMEM)
# Folders listed at a time: a disk in a network answers many questions in the time of one.
LISTED_AT_A_TIME = 16


class Files:
    """Paths, labels and sizes in bytes, in four arrays.

    Not a list of strings: every worker process would write to the reference counts of its million objects, and so copy
    their memory, page by page.
    """

    def __init__(self, root: Path, paths: Sequence[str], labels: Sequence[int], sizes: Sequence[int]) -> None:
        self.root = str(root)
        encoded = [os.fsencode(path) for path in paths]
        self.text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
        self.labels = np.array(labels, dtype=np.int64)
        self.sizes = np.array(sizes, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return os.path.join(self.root, os.fsdecode(self.text[start : int(self.ends[index])].tobytes()))  # noqa: PTH118


def fingerprint(*parts: Files) -> str:
    """SHA-256 of paths below the root, sizes and labels, in their order: the same on any machine, in any folder."""
    digest = hashlib.sha256()
    for files in parts:
        for array in (np.array([len(files)]), files.ends, files.labels, files.sizes):
            digest.update(array.astype("<i8").data)
        digest.update(files.text.data)
    return digest.hexdigest()


class Listing(NamedTuple):
    """The images of a folder, sorted: their names and sizes in bytes. hidden: what was left out, see `is_hidden`."""

    names: list[str]
    sizes: list[int]
    hidden: list[str]


def is_hidden(name: str) -> bool:
    """Whether a name begins with a dot, as `._x.JPEG` does, which macOS puts beside x.JPEG on other systems' disks."""
    return name.startswith(".")


def list_images(folder: Path | str) -> Listing:
    """What of a folder is an image by its extension: regular files alone, or links to such."""
    found, hidden = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith(EXTENSIONS):
                if is_hidden(entry.name):
                    hidden.append(entry.path)
                elif stat.S_ISREG((status := entry.stat()).st_mode):
                    found.append((entry.name, status.st_size))
    found.sort()
    return Listing([name for name, _ in found], [size for _, size in found], hidden)


def open_folders(dataset: DatasetConfig, root: Path, to_test: bool = False) -> tuple[Files, Files]:
    """The training and the test images under root, labelled by the sorted names of train/'s folders.

    to_test: training images are not needed, and not looked for: train/ may be missing if val/ has class folders.
    Errors: UserError where a folder is missing or unreadable, a class has no test images, or the numbers are not as
    configured.
    """
    try:
        return _open_folders(dataset, root, to_test)
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename or root} ({error.strerror}): restore it or make it readable, and run the "
            "command again."
        ) from None


def _open_folders(dataset: DatasetConfig, root: Path, to_test: bool) -> tuple[Files, Files]:
    hidden: list[str] = []
    val_alone = to_test and not (root / "train").is_dir() and (root / "val").is_dir() and _folders(root / "val", [])
    for name in ("val",) if val_alone else ("train", "val"):
        if not (root / name).is_dir():
            raise UserError(
                f"{root / name} is missing: machine.data must name a folder with train/<class>/*.JPEG and "
                "val/<class>/*.JPEG (`python train.py experiment=quickstart` needs no data)."
            )
    classes = _folders(root / ("val" if val_alone else "train"), hidden)
    train = Files(root / "train", [], [], []) if to_test else _from_folders(root / "train", classes, hidden)
    present = classes if val_alone else _folders(root / "val", hidden)
    if present:
        missing = sorted(set(classes) - set(present))
        unknown = sorted(set(present) - set(classes))
        if missing:
            raise UserError(
                f"{root / 'val'} has no folder {missing[0]} ({len(missing)} missing): every class needs one."
            )
        if unknown:
            raise UserError(f"{root / 'val'} has a folder {unknown[0]} that train/ lacks: remove it, or add it there.")
        test = _from_folders(root / "val", classes, hidden)
    else:
        test = _flat_val(root, classes, hidden)
    if hidden:
        print(f"warning: {len(hidden)} hidden files are left out, such as {printable(hidden[0])}.", file=sys.stderr)
    numbers = {} if to_test else {"train_images": len(train)}
    check_numbers(dataset, classes=len(classes), **numbers, test_images=len(test))
    return train, test


def _folders(folder: Path, hidden: list[str]) -> list[str]:
    with os.scandir(folder) as entries:
        folders = [entry for entry in entries if entry.is_dir()]
    hidden += [entry.path for entry in folders if is_hidden(entry.name)]
    return sorted(entry.name for entry in folders if not is_hidden(entry.name))


def _from_folders(folder: Path, classes: list[str], hidden: list[str]) -> Files:
    paths, labels, sizes = [], [], []
    with ThreadPoolExecutor(LISTED_AT_A_TIME) as pool:
        listings = list(pool.map(list_images, [folder / name for name in classes]))
    for label, (name, images) in enumerate(zip(classes, listings, strict=True)):
        if not images.names:
            raise UserError(f"{folder / name} has no image: put images into it, or remove the folder.")
        paths += [f"{name}/{image}" for image in images.names]
        labels += [label] * len(images.names)
        sizes += images.sizes
        hidden += images.hidden
    return Files(folder, paths, labels, sizes)


def _flat_val(root: Path, classes: list[str], hidden: list[str]) -> Files:
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
        wnids = [str(name) for name in wnids]
    except Exception as error:  # a damaged file can raise anything
        why = str(error).partition("\n")[0][:100]
        if isinstance(error, pickle.UnpicklingError):  # its own text advises to read the file in an unsafe way
            why = "it is damaged"
        raise UserError(
            f"{root / 'val'} has no class folders, and the devkit that labels a flat val/ cannot be read "
            f"({why}): put ILSVRC2012_devkit_t12.tar.gz into {root}, or the images into "
            "val/<class>/."
        ) from None
    images = list_images(root / "val")
    hidden += images.hidden
    found = len(images.names)
    if found != len(wnids):
        raise UserError(f"{root / 'val'} has {found} images, but the devkit labels {len(wnids)}: complete it.")
    index = {name: label for label, name in enumerate(classes)}
    lacking = sorted(set(wnids) - set(index))
    if lacking:
        raise UserError(f"{root / 'train'} has no folder {lacking[0]}, a class of the devkit: every class needs one.")
    return Files(root / "val", images.names, [index[name] for name in wnids], images.sizes)


def decode(content: bytes) -> Image.Image:
    """The image in an encoded file, as RGB; of 16 bits a value the upper 8, as Pillow itself does with colours.

    Errors: what Pillow raises, of any kind; DecompressionBombWarning for more than Image.MAX_IMAGE_PIXELS.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of strange metadata, and that transparency is lost
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.mode.startswith("I"):  # grey; Pillow would make all values above 255 white
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


def middle(image: Image.Image, size: int) -> Image.Image:
    """The image as it is tested: Resize(256) and CenterCrop(224) for a size of 224 pixels."""
    width, height = image.size
    if max(width, height) > LONGEST * min(width, height):
        # Resized whole, an image of 1 x 20000 pixels would take 5 GB.
        image = TF.center_crop(image, [min(height, LONGEST * width), min(width, LONGEST * height)])
    return TF.center_crop(TF.resize(image, [round(size * RESIZE)], antialias=True), [size])


# The epoch, None for plain images, and the index.
Key = tuple[int | None, int]


class Decoder:
    """From (epoch, index) to a uint8 image of the right size and its label.

    epoch is None for the plain images of evaluation. Errors: UserError where a file cannot be read or decoded.
    """

    def __init__(self, files: Files, size: int, flip: bool, seed: int) -> None:
        self.files, self.size, self.flip, self.seed = files, size, flip, seed

    def __getitem__(self, key: Key) -> tuple[np.ndarray, int]:
        epoch, index = key
        path = self.files.path(index)
        content = _read(path)
        try:
            image: Any = decode(content)
        except MemoryError:
            raise
        except Exception as error:  # a damaged file can make Pillow raise anything
            raise UserError(
                f"{path} cannot be decoded ({_reason(error)}): restore it, or put another image in its place; without "
                "it (adapt dataset.*_images) this is another run, which starts over."
            ) from None
        if epoch is None:
            image = middle(image, self.size)
        else:
            width, height = image.size
            top, left, h, w, flip = random_streams.resized_crop(self.seed, epoch, index, height, width)
            image = TF.resized_crop(
                image, top, left, h, w, [self.size, self.size], InterpolationMode.BILINEAR, antialias=True
            )
            if flip and self.flip:
                image = TF.horizontal_flip(image)
        return np.asarray(image), int(self.files.labels[index])

    def batch(self, keys: Iterable[Key]) -> tuple[np.ndarray, np.ndarray]:
        """Images (B, H, W, 3) and labels (B,)."""
        decoded = [self[key] for key in keys]
        images = np.empty((len(decoded), self.size, self.size, 3), np.uint8)
        for place, (image, _) in zip(images, decoded, strict=True):
            place[:] = image
        return images, np.array([label for _, label in decoded], dtype=np.int64)


def _read(path: str) -> bytes:
    """The content of a file. Errors: UserError where it cannot be read, also after a while."""
    for pause in (*PAUSES, None):
        try:
            with open(path, "rb") as file:  # noqa: PTH123
                return file.read()
        except OSError as error:
            if pause is None or error.errno in LASTING:
                raise cannot_use(path, error) from None
            time.sleep(pause)
    raise AssertionError


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is not a JPEG, PNG, WebP or BMP"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    return str(error).strip(".") or type(error).__name__


def from_iteration(iteration: int, seed: int, n: int, size: int) -> Iterator[list[Key]]:
    """The training run's batches of (epoch, index) from an iteration on, epoch after epoch."""
    epoch, position = divmod(iteration, math.ceil(n / size))
    while True:
        order = random_streams.order(seed, epoch, n)
        for start in range(position * size, n, size):
            yield [(epoch, int(i)) for i in order[start : start + size]]
        epoch, position = epoch + 1, 0


class ImageFolders:
    """Batches of an ImageNet-like folder; the same for any number of workers, as every draw is a function of
    (seed, epoch, index).

    to_test: the training images are not needed."""

    def __init__(
        self,
        dataset: DatasetConfig,
        root: Path,
        seed: int,
        device: torch.device,
        workers: int,
        to_test: bool = False,
    ) -> None:
        self.train, self.test = open_folders(dataset, root, to_test)
        self.fingerprint = fingerprint(self.train, self.test)
        self.stop = StopRequest()
        self.share: Callable[[int], slice] = ALONE.share
        self.dataset, self.seed, self.device, self.workers = dataset, seed, device, workers
        self.mean = torch.tensor(dataset.mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(dataset.std, device=device).view(3, 1, 1)

    def train_batches(self, iteration: int, size: int) -> Iterator[Batch]:
        batches = from_iteration(iteration, self.seed, len(self.train), size)
        return self._batches(self.train, (batch[self.share(len(batch))] for batch in batches))

    def test_batches(self, size: int, each: bool = False) -> Iterator[Batch]:
        return self._plain(self.test, size, each)

    def plain_train_batches(self, size: int) -> Iterator[Batch]:
        return self._plain(self.train, size, False)

    def _plain(self, files: Files, size: int, each: bool) -> Iterator[Batch]:
        own = own_batches(len(files), size, self.share, each)
        return self._batches(files, ([(None, index) for index in batch] for batch in own))

    def _batches(self, files: Files, tasks: Iterable[list[Key]]) -> Iterator[Batch]:
        decoder = Decoder(files, self.dataset.image_size, self.dataset.flip, self.seed)
        for images, labels in self._decoded(decoder, tasks):
            images, labels = (t.to(self.device, non_blocking=True) for t in (images, labels))
            yield normalize(images, self.mean, self.std), labels

    def _decoded(self, decoder: Decoder, tasks: Iterable[list[Key]]) -> Iterator[Batch]:
        """Images uint8 (B, H, W, 3) and labels, on the CPU."""
        if self.workers == 0:
            for task in tasks:
                images, labels = decoder.batch(self.stop.checked(task))
                yield torch.from_numpy(images), torch.from_numpy(labels)
            return
        pin = self.device if self.device.type == "cuda" else None
        with contextlib.closing(Workers(decoder.batch, self.workers, pin)) as workers:
            yield from workers.batches(tasks, self.stop, decoder.files.root)
