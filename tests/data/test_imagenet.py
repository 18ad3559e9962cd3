"""Folders of images: what is read, how it is cut, what is refused, and whole runs on a tree of real photographs."""

import hashlib
import io
import itertools
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import jpegs
import numpy as np
import pytest
import scipy.io
import torch
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.datasets import imagenet

import train
from mbn import config
from mbn.config import REPOSITORY
from mbn.config import Dataset as DatasetConfig
from mbn.data import random_streams
from mbn.data.datasets import load
from mbn.data.image_folder import Decoder, Files, ImageFolders, list_images, open_folders
from mbn.records import record
from mbn.system.errors import UserError
from mbn.system.files import lock

CPU = torch.device("cpu")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# torch warns of more workers than cores: two cores are enough for what four workers must not change.
many_workers = pytest.mark.filterwarnings("ignore:This DataLoader will create")
# Python 3.12 and later warn of a fork in a process with threads, which torch's are.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return jpegs.make_tree(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture
def copied(tree, tmp_path):
    """The tree, to be spoilt."""
    return shutil.copytree(tree, tmp_path / "imagenet")


def described(image_size=64, classes=3, train_images=24, test_images=9, flip=True):
    return DatasetConfig("imagenet", classes, image_size, train_images, test_images, MEAN, STD, 0, flip)


def opened(root, workers=0, seed=0, **settings):
    return ImageFolders(described(**settings), root, seed, CPU, workers)


def batches_of(data, iteration, size, n):
    return list(itertools.islice(data.train_batches(iteration, size), n))


def assert_equal(some, others):
    for (a, b), (c, d) in zip(some, others, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def original(root, part, path):
    return Image.open(root / part / path).convert("RGB")


def images_of(root, part):
    """(label, path) of every image, in the order of the folders' and the files' names."""
    return [
        (label, f"{name}/{path.name}")
        for label, name in enumerate(jpegs.CLASSES)
        for path in sorted((root / part / name).iterdir())
    ]


# The tree itself: real photographs of many kinds, as ImageNet has them.


def test_the_tree_holds_what_imagenet_holds(tree):
    modes, formats, sizes = set(), set(), set()
    for _, path in images_of(tree, "train"):
        with Image.open(tree / "train" / path) as image:
            modes.add(image.mode)
            formats.add((image.format, image.filename.rpartition(".")[2]))
            sizes.add(image.size)
    assert modes == {"RGB", "L", "CMYK"}
    assert formats == {("JPEG", "JPEG"), ("PNG", "JPEG"), ("PNG", "png")}
    assert len(sizes) > 20


# Order and augmentation.


@many_workers
@pytest.mark.parametrize("workers", [1, 4])
def test_batches_are_the_same_for_any_number_of_workers(tree, workers):
    """Over an epoch's end, its last batch smaller."""
    alone, helped = opened(tree), opened(tree, workers)
    expected = batches_of(alone, 0, 5, 8)
    assert [len(labels) for _, labels in expected] == [5, 5, 5, 5, 4, 5, 5, 5]
    assert_equal(batches_of(helped, 0, 5, 8), expected)
    assert_equal(helped.test_batches(4), alone.test_batches(4))
    assert_equal(helped.plain_train_batches(7), alone.plain_train_batches(7))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_on_from_the_middle_of_an_epoch(tree, workers):
    every = batches_of(opened(tree), 0, 7, 10)
    for iteration in (1, 3, 4, 6) if workers == 0 else (2,):
        assert_equal(batches_of(opened(tree, workers), iteration, 7, 10 - iteration), every[iteration:])


def test_batches_do_not_depend_on_or_change_torchs_and_numpys_random_numbers(tree):
    expected = batches_of(opened(tree), 0, 8, 2)
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert_equal(batches_of(opened(tree, 1), 0, 8, 2), expected)
    assert_equal(batches_of(opened(tree, 0), 0, 8, 2), expected)
    list(opened(tree, 1).test_batches(4))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_an_epoch_holds_each_image_once_in_an_order_of_its_own(tree):
    data = opened(tree)
    data.train.labels = np.arange(24)  # so that a label says which image it is
    epochs = [[label for _, labels in batches_of(data, 5 * e, 5, 5) for label in labels.tolist()] for e in (0, 1)]
    assert epochs[0] != epochs[1]
    for epoch, labels in enumerate(epochs):
        assert sorted(labels) == list(range(24))
        assert labels == random_streams.order(0, epoch, 24).tolist()


def test_each_training_image_is_cut_as_torchvision_cuts_it_with_its_own_draw(tree):
    data = opened(tree, seed=3)
    files = images_of(tree, "train")
    (images, labels), *_ = batches_of(data, 24, 1, 1) + batches_of(data, 1, 24, 1)
    images, labels = batches_of(data, 1, 24, 1)[0]
    flips = 0
    for image, label, index in zip(images, labels.tolist(), random_streams.order(3, 1, 24).tolist(), strict=True):
        assert label == files[index][0]
        source = original(tree, "train", files[index][1])
        top, left, height, width, flip = random_streams.resized_crop(3, 1, index, source.height, source.width)
        expected = TF.resized_crop(source, top, left, height, width, [64, 64], antialias=True)
        flips += flip
        expected = TF.hflip(expected) if flip else expected
        assert torch.equal(image, TF.normalize(TF.to_tensor(expected), MEAN, STD))
    assert 5 < flips < 19


def test_without_flip_images_are_only_cropped(tree):
    flipped, straight = opened(tree), opened(tree, flip=False)
    drawn = [random_streams.resized_crop(0, 0, i, 100, 100)[4] for i in random_streams.order(0, 0, 24).tolist()]
    differ = [
        not torch.equal(a, b)
        for a, b in zip(batches_of(flipped, 0, 24, 1)[0][0], batches_of(straight, 0, 24, 1)[0][0], strict=True)
    ]
    assert differ == drawn
    # The crops are the same: flip is drawn from the stream in any case.


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_float32_channels_last_and_shaped_as_asked(tree, workers):
    images, labels = next(opened(tree, workers, image_size=224).train_batches(0, 3))
    assert images.shape == (3, 3, 224, 224)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64


# RandomResizedCrop.


class Item:
    """A tensor of one number, as far as torchvision's get_params goes."""

    def __init__(self, value):
        self.item = lambda: value


class Stream:
    """What get_params wants of torch, out of the numpy stream of one image."""

    def __init__(self, *key):
        self.stream = random_streams._stream(*key)
        self.flip = bool(self.stream.randint(0, 2))

    def as_torch(self):
        uniform = types.SimpleNamespace(uniform_=lambda low, high: Item(self.stream.uniform(low, high)))
        return types.SimpleNamespace(
            empty=lambda _: uniform,
            randint=lambda low, high, size: Item(self.stream.randint(low, high)),
            exp=lambda x: Item(math.exp(x.item())),
            tensor=list,
            log=lambda values: [math.log(v) for v in values],
        )


@pytest.mark.parametrize(
    ("height", "width"),
    [(300, 400), (400, 300), (64, 64), (1, 1), (2, 3), (10, 500), (500, 10), (40, 100), (100, 40), (1, 300)],
)
def test_crops_are_torchvisions_when_it_is_given_the_same_draws(height, width, monkeypatch):
    image = torch.empty(3, height, width, device="meta")
    ours = [random_streams.resized_crop(7, 2, i, height, width) for i in range(200)]
    theirs = []
    for i in range(200):
        stream = Stream(7, 2, random_streams.AUGMENTATION, i)
        with monkeypatch.context() as patch:
            patch.setattr("torchvision.transforms.transforms.torch", stream.as_torch())
            crop = torchvision.transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
        theirs.append((*(int(v) for v in crop), stream.flip))
    assert ours == theirs


def test_crops_have_the_distribution_of_torchvisions():
    """Corners, sizes and flips of 4000 crops of each, by their means and deviations."""
    height, width, n = 240, 320, 4000
    image = torch.empty(3, height, width, device="meta")
    random_crop = torchvision.transforms.RandomResizedCrop
    theirs = np.array([random_crop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)], float)
    ours = np.array([random_streams.resized_crop(0, 0, i, height, width) for i in range(n)], float)
    for column in range(4):
        a, b = ours[:, column], theirs[:, column]
        assert abs(a.mean() - b.mean()) < 5 * b.std() * (2 / n) ** 0.5
        assert abs(a.std() / b.std() - 1) < 0.08
    area = ours[:, 2] * ours[:, 3] / (height * width)
    ratio = ours[:, 3] / ours[:, 2]
    assert 0.078 < area.min() < 0.1
    assert 0.9 < area.max() <= 1
    assert 0.73 < ratio.min() < 0.77
    assert 1.30 < ratio.max() < 1.36
    assert abs(ours[:, 4].mean() - 0.5) < 5 * 0.5 / n**0.5
    assert abs(np.corrcoef(ours[:, 4], ours[:, 0])[0, 1]) < 5 / n**0.5


def test_a_crop_lies_inside_the_image():
    for i in range(500):
        height, width = 1 + i % 37, 1 + (i * 7) % 53
        top, left, h, w, _ = random_streams.resized_crop(0, 0, i, height, width)
        assert top >= 0
        assert left >= 0
        assert 1 <= h <= height - top
        assert 1 <= w <= width - left


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(1000, 4, (497, 0, 5, 4)), (4, 1000, (0, 497, 4, 5)), (90, 1, (44, 0, 1, 1))],
)
def test_an_extreme_image_gives_the_largest_central_crop_of_a_possible_shape(height, width, expected):
    crops = {random_streams.resized_crop(0, 0, i, height, width)[:4] for i in range(300)}
    assert expected in crops
    flips = {random_streams.resized_crop(0, 0, i, height, width)[4] for i in range(300)}
    assert flips == {True, False}


def test_after_ten_misses_an_image_of_a_possible_shape_is_taken_whole(monkeypatch):
    asked = []

    class Largest(np.random.RandomState):
        def uniform(self, low, high):
            asked.append((low, high))
            return high  # the whole area at 4/3, which is too wide for all images but one of 4/3

    monkeypatch.setattr(random_streams, "_stream", lambda *key: Largest(0))
    assert random_streams.resized_crop(0, 0, 0, 100, 100)[:4] == (0, 0, 100, 100)
    assert asked == [(0.08, 1.0), (math.log(3 / 4), math.log(4 / 3))] * 10
    assert random_streams.resized_crop(0, 0, 0, 100, 80)[:4] == (0, 0, 100, 80)
    assert random_streams.resized_crop(0, 0, 0, 100, 60)[:4] == (10, 0, 80, 60)
    assert random_streams.resized_crop(0, 0, 0, 60, 100)[:4] == (0, 10, 60, 80)


def test_a_draw_is_a_function_of_seed_epoch_and_index_only():
    first = random_streams.resized_crop(1, 2, 3, 300, 400)
    np.random.seed(1)
    random_streams.resized_crop(1, 2, 4, 300, 400)
    assert random_streams.resized_crop(1, 2, 3, 300, 400) == first
    others = [
        random_streams.resized_crop(*key, 300, 400) for key in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (2, 1, 3), (1, 3, 2))
    ]
    assert len({first, *others}) == 6


def test_draws_are_these_for_ever():
    """Literal values: a run of last year must be repeatable."""
    assert [random_streams.resized_crop(0, 0, i, 300, 400) for i in range(3)] == [
        (11, 29, 274, 337, True),
        (136, 54, 147, 180, False),
        (6, 7, 252, 207, False),
    ]
    assert random_streams.resized_crop(12, 3, 1_281_166, 500, 375) == (220, 111, 168, 200, False)


# Evaluation.


def test_test_images_are_resized_and_cropped_as_in_torchvision(tree):
    transform = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(256),
            torchvision.transforms.CenterCrop(224),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize(MEAN, STD),
        ]
    )
    for part, batches in (("val", "test_batches"), ("train", "plain_train_batches")):
        parts = list(getattr(opened(tree, image_size=224), batches)(5))
        files = images_of(tree, part)
        assert [label for _, labels in parts for label in labels.tolist()] == [label for label, _ in files]
        images = torch.cat([images for images, _ in parts])
        for image, (_, path) in zip(images, files, strict=True):
            assert torch.equal(image, transform(original(tree, part, path)))


@pytest.mark.parametrize(("size", "resized"), [(64, 73), (96, 110), (128, 146), (224, 256), (448, 512)])
def test_other_sizes_keep_the_proportion_of_256_to_224(tree, size, resized):
    images, _ = next(opened(tree, image_size=size).test_batches(1))
    source = original(tree, "val", images_of(tree, "val")[0][1])
    expected = TF.center_crop(TF.resize(source, resized), size)
    assert torch.equal(images[0], TF.normalize(TF.to_tensor(expected), MEAN, STD))


# Files.


def test_files_hold_arrays_and_no_object_for_each_path():
    paths = [f"n{i % 7:08d}/image_{i}.JPEG" for i in range(5000)]
    files = Files(REPOSITORY, paths, [i % 7 for i in range(5000)])
    held = vars(files)
    arrays = {name: value for name, value in held.items() if isinstance(value, np.ndarray)}
    assert [name for name in held if name not in arrays] == ["root"]
    assert isinstance(held["root"], str)
    assert all(array.dtype in (np.uint8, np.int64) for array in arrays.values())
    assert sum(array.nbytes for array in arrays.values()) < 5000 * (25 + 16)
    assert len(files) == 5000
    assert [files.path(i) for i in range(5000)] == [str(REPOSITORY / path) for path in paths]


def test_what_workers_are_given_can_be_pickled(tree):
    """As where processes are spawned, not forked: macOS, and Linux from Python 3.14 on."""
    data = opened(tree)
    decoder = Decoder(data.train, 64, True, 0)
    other = pickle.loads(pickle.dumps(decoder))
    image, label = decoder[1, 9]
    assert np.array_equal(other[1, 9][0], image)
    assert other[1, 9][1] == label == 1


def test_names_of_any_kind_come_back(tmp_path):
    paths = [
        "a/ß é.JPEG",
        "日本/写真.jpeg",
        "a/x.JPEG",
        "c/" + os.fsdecode(b"\xff\xfe.jpg"),
        "d/😀 e\u0301.png",
        "e/" + "z" * 200,
    ]
    files = Files(tmp_path, paths, range(6))
    assert [files.path(i) for i in range(6)] == [os.path.join(tmp_path, p) for p in paths]  # noqa: PTH118
    assert files.labels.tolist() == list(range(6))


def test_a_tree_with_names_of_any_kind_is_read(copied):
    (copied / "train" / jpegs.CLASSES[1]).rename(copied / "train" / "n02 ß写真")
    (copied / "val" / jpegs.CLASSES[1]).rename(copied / "val" / "n02 ß写真")
    folder = copied / "train" / jpegs.CLASSES[0]
    (folder / f"{jpegs.CLASSES[0]}_0.JPEG").rename(folder / "é 😀.jpg")
    data = opened(copied)
    assert {len(labels) for _, labels in data.plain_train_batches(24)} == {24}


def test_images_are_told_by_their_extension_in_any_case_and_sorted(tmp_path):
    for name in ("b.JPEG", "a.jpg", "c.Png", "d.webp", "notes.txt", ".DS_Store", "e.JPEG.md5"):
        (tmp_path / name).touch()
    assert list_images(tmp_path) == ["a.jpg", "b.JPEG", "c.Png", "d.webp"]


def test_labels_are_the_places_of_the_folders_in_alphabetical_order(tree):
    trained, tested = open_folders(described(), tree)
    assert trained.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert tested.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    for files, part in ((trained, "train"), (tested, "val")):
        for i in range(len(files)):
            assert files.path(i).startswith(str(tree / part / jpegs.CLASSES[files.labels[i]]))


# What is refused, before training.


def refusal(root, **settings):
    with pytest.raises(UserError) as caught:
        open_folders(described(**settings), root)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", ".)"))
    assert len(message) < 600
    return message


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_missing_folder_is_named_with_the_layout_that_is_wanted(copied, part):
    shutil.rmtree(copied / part)
    message = refusal(copied)
    assert str(copied / part) in message
    assert "machine.data" in message
    assert "train/<class>" in message


def test_a_class_that_val_lacks_is_named(copied):
    shutil.rmtree(copied / "val" / jpegs.CLASSES[1])
    message = refusal(copied, test_images=6)
    assert jpegs.CLASSES[1] in message
    assert str(copied / "val") in message


def test_a_class_that_only_val_has_is_named(copied):
    shutil.rmtree(copied / "train" / jpegs.CLASSES[2])
    message = refusal(copied, classes=2, train_images=16)
    assert jpegs.CLASSES[2] in message


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_class_without_an_image_is_named(copied, part):
    for path in (copied / part / jpegs.CLASSES[2]).iterdir():
        path.unlink()
    assert str(copied / part / jpegs.CLASSES[2]) in refusal(copied)


@pytest.mark.parametrize(
    "wrong",
    [
        {"train_images": 23},
        {"train_images": 1281167},
        {"test_images": 8},
        {"classes": 1000},
        {"classes": 2, "train_images": 25, "test_images": 10},
    ],
)
def test_wrong_numbers_are_an_error_whose_advice_works(tree, wrong):
    message = refusal(tree, **wrong)
    advised = {key: int(value) for key, value in re.findall(r"dataset\.(\w+)=(\d+)", message)}
    assert advised == {key: {"train_images": 24, "test_images": 9, "classes": 3}[key] for key in wrong}
    open_folders(described(**{**wrong, **advised}), tree)


def test_the_numbers_are_checked_when_a_run_opens_its_data(tree):
    settings = config.load(
        ["dataset=imagenet", "model=resnet18", "norm=bn", "batch_size=8", f"machine.data={tree}", *jpegs.NUMBERS]
    )
    assert len(load(settings, CPU).train) == 24
    settings.dataset.train_images = 25
    with pytest.raises(UserError, match=r"24 train images here, not 25.*dataset\.train_images=24"):
        load(settings, CPU)


# A flat val/.


def flatten(root, seed=0):
    """val/ as the official archive has it, with the devkit's ground truth as torchvision keeps it: the true labels."""
    images = [(name, path) for name in jpegs.CLASSES for path in sorted((root / "val" / name).iterdir())]
    order = np.random.RandomState(seed).permutation(len(images))
    wnids = []
    for place, i in enumerate(order, 1):
        name, path = images[i]
        path.rename(root / "val" / f"ILSVRC2012_val_{place:08d}.JPEG")
        wnids.append(name)
    for name in jpegs.CLASSES:
        (root / "val" / name).rmdir()
    # The devkit lists its classes in another order than the alphabet's.
    torch.save(({name: (name, "a class") for name in reversed(jpegs.CLASSES)}, wnids), root / "meta.bin")
    return wnids


def test_a_flat_val_is_labelled_by_the_devkit(copied, tree):
    wnids = flatten(copied)
    _, tested = open_folders(described(), copied)
    assert [jpegs.CLASSES[label] for label in tested.labels] == wnids
    assert sorted(wnids) != wnids
    assert [os.path.basename(tested.path(i)) for i in (0, 8)] == [  # noqa: PTH119
        "ILSVRC2012_val_00000001.JPEG",
        "ILSVRC2012_val_00000009.JPEG",
    ]
    # The same images with the same labels as in folders, in another order.
    by_folders = [(images[0].sum().item(), labels.item()) for images, labels in opened(tree).test_batches(1)]
    flat = [(images[0].sum().item(), labels.item()) for images, labels in opened(copied).test_batches(1)]
    assert flat != by_folders
    assert sorted(flat) == sorted(by_folders)


def test_the_devkits_archive_is_read_and_nothing_is_written_beside_it(copied, tmp_path, monkeypatch):
    """Its files are made here as the official archive has them: synsets numbered from 1, inner nodes with children."""
    wnids = flatten(copied)
    (copied / "meta.bin").unlink()
    files = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    files.mkdir(parents=True)
    columns = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    synsets = [(i, name, "a class", "", 0) for i, name in enumerate(reversed(jpegs.CLASSES), 1)]
    synsets.append((4, "n00000001", "a class of classes", "", 3))
    scipy.io.savemat(files / "meta.mat", {"synsets": np.array(synsets, dtype=columns)})
    number = {name: i for i, name, *_ in synsets}
    (files / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{number[name]}\n" for name in wnids))
    archive = shutil.make_archive(copied / "ILSVRC2012_devkit_t12", "gztar", tmp_path, "ILSVRC2012_devkit_t12")
    with open(archive, "rb") as file:  # noqa: PTH123
        digest = hashlib.md5(file.read()).hexdigest()
    monkeypatch.setitem(imagenet.ARCHIVE_META, "devkit", ("ILSVRC2012_devkit_t12.tar.gz", digest))
    before = sorted(copied.iterdir())
    _, tested = open_folders(described(), copied)
    assert [jpegs.CLASSES[label] for label in tested.labels] == wnids
    assert sorted(copied.iterdir()) == before


def test_a_flat_val_without_the_devkit_is_an_error_that_names_it(copied):
    flatten(copied)
    (copied / "meta.bin").unlink()
    message = refusal(copied)
    assert "ILSVRC2012_devkit_t12.tar.gz" in message
    assert "val/<class>/" in message


def test_a_devkit_that_is_damaged_is_an_error_that_names_it(copied):
    flatten(copied)
    (copied / "meta.bin").write_bytes(b"no such thing")
    message = refusal(copied)
    assert "ILSVRC2012_devkit_t12.tar.gz" in message
    assert "weights_only" not in message  # torch's advice to read it without care


def test_a_flat_val_with_an_image_too_few_is_an_error(copied):
    flatten(copied)
    (copied / "val" / "ILSVRC2012_val_00000004.JPEG").unlink()
    message = refusal(copied, test_images=8)
    assert "8" in message
    assert "9" in message


def test_a_class_of_the_devkit_that_train_lacks_is_named(copied):
    flatten(copied)
    shutil.rmtree(copied / "train" / jpegs.CLASSES[0])
    assert jpegs.CLASSES[0] in refusal(copied, classes=2, train_images=16)


# Images that cannot be decoded.


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-400])


def emptied(path):
    path.write_bytes(b"")


def text_instead(path):
    path.write_text("<html>404</html>")


def zeros_inside(path):
    content = path.read_bytes()
    path.write_bytes(b"\0" * 200 + content[200:])


def truncated_png(path):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(path.read_bytes())).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])


def broken_png_chunk(path):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(path.read_bytes())).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[60] ^= 0xFF
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [cut_short, emptied, text_instead, zeros_inside, truncated_png, broken_png_chunk])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_an_error_that_names_its_file(copied, damage, workers):
    path = copied / "train" / jpegs.CLASSES[1] / f"{jpegs.CLASSES[1]}_5.JPEG"
    damage(path)
    data = opened(copied, workers)
    with pytest.raises(UserError) as caught:
        batches_of(data, 0, 8, 3)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


# Whole runs.


def command(root, results, *overrides):
    return [
        *("dataset=imagenet", "model=resnet18", "dataset.image_size=65", *jpegs.NUMBERS, "batch_size=8"),
        *("schedule.epochs=1", "machine.threads=1", "machine.device=cpu", "machine.workers=0"),
        *(f"machine.data={root}", f"machine.results={results}", *overrides),
    ]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr("models.build", jpegs.build_tiny)


def read_record(results):
    (path,) = (results / "records").rglob("*.json")
    return record.read(path)


def checkpoint_of(results):
    (path,) = (results / "runs").rglob("checkpoint.pt")
    return torch.load(path, weights_only=True)


def test_a_run_ends_with_a_record_with_top_1_and_top_5(tree, tmp_path, capsys):
    assert train.main(command(tree, tmp_path, "norm=mbn")) == 0
    result = read_record(tmp_path)
    # Of 9 images of 3 classes: five guesses hold the right one.
    assert result["test_error"] in [pytest.approx(100 * k / 9) for k in range(10)]
    assert result["test_error_top5"] == 0
    assert 0 < result["test_loss"] < 100
    assert result["iterations"] == 3
    assert result["images"] == 24
    assert result["parameters"] == 11_176_512 + 3 * 513
    assert result["config"]["dataset"]["image_size"] == 65
    assert f"test error {result['test_error']:.2f} %" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "runs")  # 180 MB


def test_a_corrupt_image_ends_a_run_with_one_sentence_that_names_it(copied, tmp_path):
    path = copied / "train" / jpegs.CLASSES[2] / f"{jpegs.CLASSES[2]}_6.JPEG"
    cut_short(path)
    done = subprocess.run(
        [sys.executable, "train.py", *command(copied, tmp_path / "results", "machine.workers=2")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {path} cannot be decoded")
    assert not (tmp_path / "results" / "records").exists()


def test_a_class_missing_from_val_ends_a_run_before_its_first_iteration(copied, tmp_path, capsys, tiny):
    shutil.rmtree(copied / "val" / jpegs.CLASSES[0])
    assert train.main(command(copied, tmp_path, "dataset.test_images=6")) == 1
    assert jpegs.CLASSES[0] in capsys.readouterr().err
    assert not list(tmp_path.rglob("checkpoint.pt"))
    assert not list(tmp_path.rglob("*.json"))


def test_evaluate_precise_works_on_folders(tree, tmp_path, tiny):
    assert train.main(command(tree, tmp_path, "norm=bn", "evaluate.precise=true")) == 0
    assert read_record(tmp_path)["test_error_precise"] in [pytest.approx(100 * k / 9) for k in range(10)]


# Interrupted runs: 5 iterations an epoch, the last one smaller.

TWO_EPOCHS = ("norm=mbn", "batch_size=5", "schedule.epochs=2")
# After so many iterations in this process it says so in a file and waits for what comes.
WAITING = """
import pathlib, sys, time
sys.path[:0] = [".", "tests", "tests/data"]
import jpegs, mbn.training.iteration, models, train
models.build = jpegs.build_tiny
call = mbn.training.iteration.Update.__call__
when = int(sys.argv[1])
def counted(self, images, labels):
    global when
    call(self, images, labels)
    when -= 1
    if when == 0:
        pathlib.Path(sys.argv[2]).touch()
        time.sleep(3)
mbn.training.iteration.Update.__call__ = counted
sys.exit(train.main(sys.argv[3:]))
"""


class Ended:
    """A process that got a signal after so many iterations: its exit code and what it said."""

    def __init__(self, folder, when, send, *arguments):
        mark, self.log = folder / f"mark{when}", folder / f"log{when}"
        # Into a file: a pipe would end with the last of the workers, not with the run.
        with self.log.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", WAITING, str(when), str(mark), *arguments],
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end = time.monotonic() + 200
        while not mark.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        send(process.pid)
        self.code = process.wait(timeout=200)

    @property
    def said(self):
        return self.log.read_text()


def lock_is_free(results):
    (path,) = results.rglob("lock")
    try:
        with lock(path):
            return True
    except UserError:
        return False


class Chain:
    """A run killed in its fourth iteration, stopped by a signal to its whole group in the third after that, and ended
    in this process, each time with another number of workers."""

    def __init__(self, root, folder):
        self.results = folder / "results"
        common = command(root, self.results, *TWO_EPOCHS)
        often = "machine.checkpoint_seconds=0.000001"
        self.killed = Ended(folder, 4, lambda pid: os.kill(pid, signal.SIGKILL), *common, "machine.workers=2", often)
        self.free_at_once = lock_is_free(self.results)
        self.at_kill = checkpoint_of(self.results)["iteration"]
        end = time.monotonic() + 20
        while not lock_is_free(self.results) and time.monotonic() < end:
            time.sleep(0.1)
        self.stopped = Ended(folder, 3, lambda pid: os.killpg(pid, signal.SIGTERM), *common, "machine.workers=1")
        self.at_stop = checkpoint_of(self.results)["iteration"]
        self.code = train.main(common)


@pytest.fixture(scope="module")
def interrupted(tree, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.build", jpegs.build_tiny)
        return Chain(tree, tmp_path_factory.mktemp("interrupted"))


def test_killed_and_stopped_in_mid_epoch_a_run_ends_with_the_same_bits(tree, interrupted, tmp_path, tiny):
    assert interrupted.killed.code == -signal.SIGKILL
    assert interrupted.at_kill == 3  # the fourth iteration had not been saved
    assert "resuming at iteration 3 of 10" in interrupted.stopped.said
    assert interrupted.code == 0
    assert train.main(command(tree, tmp_path, *TWO_EPOCHS)) == 0
    one, other = checkpoint_of(tmp_path), checkpoint_of(interrupted.results)
    assert one["model"].keys() == other["model"].keys()
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])
    momenta = [state["optimizer"]["state"] for state in (one, other)]
    assert all(torch.equal(momenta[0][i]["momentum_buffer"], momenta[1][i]["momentum_buffer"]) for i in momenta[0])
    assert torch.equal(one["generators"]["cpu"], other["generators"]["cpu"])
    free = {"seconds", "images_per_second", "date", "checksum"}
    some, others = ({k: v for k, v in read_record(r).items() if k not in free} for r in (tmp_path, interrupted.results))
    assert some == others


def test_a_killed_run_can_be_taken_up_at_once(interrupted):
    """Its workers outlive it by seconds and hold what they were forked with: the run's lock must not be among it."""
    assert interrupted.free_at_once


def test_a_signal_to_the_whole_group_stops_a_run_as_one_to_it_alone_does(interrupted):
    """`timeout`, schedulers of clusters and a terminal's Ctrl-C send it to the workers too."""
    assert "Traceback" not in interrupted.stopped.said
    assert interrupted.stopped.code == 75
    assert interrupted.at_stop == 6


# Mixed precision.


def test_bf16_is_part_of_the_name_and_trains_to_finite_weights(tree, tmp_path):
    full = config.load(command(tree, tmp_path, "norm=mbn"))
    mixed = config.load(command(tree, tmp_path, "norm=mbn", "precision=bf16"))
    assert config.run_name(full) != config.run_name(mixed)
    assert config.identity(mixed)["precision"] == "bf16"
    assert train.main(command(tree, tmp_path, "norm=mbn", "precision=bf16")) == 0
    result = read_record(tmp_path)
    assert result["name"] == config.run_name(mixed)
    assert 0 < result["test_loss"] < 100
    assert 0 < result["train_loss"] < 100
    state = checkpoint_of(tmp_path)["model"]
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {torch.float32}
    counts = [tensor for key, tensor in state.items() if key.endswith("memory_count")]
    assert len(counts) == 20
    assert all(count.count_nonzero() == 3 for count in counts)
    shutil.rmtree(tmp_path / "runs")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_bf16_computes_in_bfloat16_and_fp32_does_not(precision, dtype, tree, tmp_path, tiny, monkeypatch):
    dtypes = {True: set(), False: set()}
    conv2d = torch.nn.functional.conv2d

    def spy(*args, **kwargs):
        y = conv2d(*args, **kwargs)
        dtypes[torch.is_grad_enabled()].add(y.dtype)
        return y

    monkeypatch.setattr(torch.nn.functional, "conv2d", spy)
    overrides = ("norm=mbn", f"precision={precision}", "evaluate.precise=true", "machine.mode=eager")
    assert train.main(command(tree, tmp_path, *overrides)) == 0
    # In training; in the second forward, evaluation and all else.
    assert dtypes == {True: {dtype}, False: {dtype}}
