"""Batches of images in memory and in folders: which images, in which order, how cropped; however they are made."""

import itertools
import random

import numpy as np
import pytest
import torch
from jpegs import MEAN, STD, opened
from PIL import Image
from torchvision.transforms import functional as TF

from mbn.config import Dataset
from mbn.data import in_memory, random_streams
from mbn.data.in_memory import Arrays, DeviceDataset

# torch warns of more workers than cores: two cores are enough for what four workers must not change. Python 3.12 and
# later warn of a fork in a process with threads, which torch's are.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]


class Memory:
    """Random images of 8 pixels a side in memory. Labels are indices, in both kinds."""

    n = 200

    def __init__(self, tree, patch):
        self.patch = patch
        numbers = np.random.RandomState(0)
        self.images = {p: numbers.randint(0, 256, (n, 8, 8, 3), np.uint8) for p, n in (("train", 200), ("val", 9))}

    def open(self, at_once=1, seed=0, flip=True):
        """at_once: how many images are augmented together."""
        self.patch.setattr(in_memory, "BLOCK_ELSEWHERE", at_once)
        arrays = Arrays(self.images["train"], np.arange(200), self.images["val"], np.arange(9))
        return DeviceDataset(arrays, Dataset("digits", 9, 8, 200, 9, MEAN, STD, 2, flip), seed, torch.device("cpu"))

    def cut(self, seed, epoch, index):
        """A training image as torchvision crops it, and whether it is then mirrored."""
        top, left, flip = random_streams.crops_and_flips(seed, epoch, 200, 2)[index].tolist()
        return TF.crop(TF.pad(self.plain("train", index), 2), top, left, 8, 8), flip

    def plain(self, part, index):
        return TF.to_tensor(self.images[part][index])


class Folders:
    """Photographs in folders, cropped to 64 pixels a side."""

    n = 24

    def __init__(self, tree, patch):
        self.tree = tree

    def open(self, workers=0, seed=0, flip=True):
        data = opened(self.tree, workers, seed, flip=flip)
        data.train.labels, data.test.labels = np.arange(24), np.arange(9)
        return data

    def read(self, part, index):
        return Image.open(sorted((self.tree / part).glob("*/*"))[index]).convert("RGB")

    def cut(self, seed, epoch, index):
        image = self.read("train", index)
        *corners, flip = random_streams.resized_crop(seed, epoch, index, image.height, image.width)
        return TF.to_tensor(TF.resized_crop(image, *corners, [64, 64], antialias=True)), flip

    def plain(self, part, index):
        return TF.to_tensor(TF.center_crop(TF.resize(self.read(part, index), 73), 64))


@pytest.fixture
def kind(request, tree, monkeypatch):
    return request.param(tree, monkeypatch)


kinds = pytest.mark.parametrize("kind", [Memory, Folders], indirect=True)
# The way in which a batch is made must not change it.
ways = pytest.mark.parametrize(
    ("kind", "way"),
    [(Memory, 1), (Memory, 100), (Memory, 1000), (Folders, 0), (Folders, 1), (Folders, 4)],
    indirect=["kind"],
)


def batches_of(data, iteration, size, n):
    return list(itertools.islice(data.train_batches(iteration, size), n))


def assert_equal(some, others):
    for (a, b), (c, d) in zip(some, others, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


@kinds
@pytest.mark.parametrize(("size", "flip"), [(7, True), (7, False), (1000, True)])
def test_an_epoch_has_each_image_once_cropped_as_torchvision_would_by_its_own_draw(kind, size, flip):
    """A crop of the image in a black frame, or one of any size and shape; mirrored or not."""
    per_epoch = -(-kind.n // size)
    batches = batches_of(kind.open(seed=3, flip=flip), per_epoch, size, per_epoch)
    order = torch.from_numpy(random_streams.order(3, 1, kind.n))
    drawn = []
    for (images, labels), expected in zip(batches, order.split(size), strict=True):
        assert torch.equal(labels, expected)
        assert images.is_contiguous(memory_format=torch.channels_last)
        for image, index in zip(images, labels.tolist(), strict=True):
            cut, mirrored = kind.cut(3, 1, index)
            cut = TF.hflip(cut) if flip and mirrored else cut
            assert torch.equal(image, TF.normalize(cut, MEAN, STD))
            drawn.append(mirrored)
    assert 0.2 < sum(drawn) / len(drawn) < 0.8


@ways
def test_batches_are_the_same_from_any_iteration_of_any_epoch(kind, way):
    """The last batch of an epoch is smaller."""
    size = kind.n * 5 // 24
    every = batches_of(kind.open(), 0, size, 8)
    assert [len(labels) for _, labels in every[3:6]] == [size, kind.n - 4 * size, size]
    for start in (0, 3, 4, 6):
        assert_equal(batches_of(kind.open(way), start, size, 8 - start), every[start:])


@ways
def test_evaluation_sees_images_in_their_order_and_not_augmented(kind, way):
    data = kind.open(way)
    next(data.train_batches(0, 4))
    for part, batches, n in (("train", data.plain_train_batches(7), kind.n), ("val", data.test_batches(7), 9)):
        for (images, labels), expected in zip(batches, torch.arange(n).split(7), strict=True):
            assert torch.equal(labels, expected)
            for image, index in zip(images, labels.tolist(), strict=True):
                assert torch.equal(image, TF.normalize(kind.plain(part, index), MEAN, STD))


@ways
def test_batches_do_not_depend_on_or_change_any_other_random_numbers(kind, way):
    expected = batches_of(kind.open(), 0, 8, 2)
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert_equal(batches_of(kind.open(way), 0, 8, 2), expected)
    list(kind.open(way).test_batches(4))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
