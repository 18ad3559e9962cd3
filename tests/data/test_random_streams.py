"""Order and augmentation as functions of (seed, epoch, index)."""

import itertools
import math
import types

import numpy as np
import pytest
import torch
from jpegs import described, opened
from torchvision.transforms import RandomResizedCrop

from mbn.config.registry import DATASETS
from mbn.data import datasets, random_streams
from mbn.data.in_memory import DeviceDataset
from mbn.data.random_streams import crops_and_flips, order, resized_crop


def test_the_order_is_a_permutation():
    for n in (1, 2, 10, 1437):
        assert sorted(order(1, 2, n)) == list(range(n))


def test_draws_are_those_of_the_first_version():
    """Other streams would change every result at a given seed."""
    assert order(0, 0, 10).tolist() == [6, 1, 0, 5, 3, 8, 7, 9, 2, 4]
    assert order(3, 7, 50000)[:8].tolist() == [7870, 4745, 46851, 44473, 49130, 30627, 12225, 3499]
    assert crops_and_flips(0, 0, 4, 4).tolist() == [[3, 6, 0], [3, 5, 1], [4, 5, 1], [7, 8, 0]]
    assert crops_and_flips(3, 7, 50000, 4)[-3:].tolist() == [[5, 7, 0], [7, 6, 1], [2, 4, 1]]
    assert resized_crop(0, 0, 0, 300, 400) == (11, 29, 274, 337, True)
    assert resized_crop(0, 0, 1, 300, 400) == (136, 54, 147, 180, False)
    assert resized_crop(12, 3, 1_281_166, 500, 375) == (220, 111, 168, 200, False)


@pytest.mark.parametrize(
    "draw",
    [
        lambda *key: order(*key, 100).tolist(),
        lambda *key: crops_and_flips(*key, 100, 4).tolist(),
        lambda *key: [resized_crop(*key, i, 300, 400) for i in range(5)],
    ],
    ids=["order", "crops_and_flips", "resized_crop"],
)
def test_draws_depend_on_seed_epoch_and_index_alone(draw):
    first = draw(5, 3)
    np.random.seed(2)
    torch.manual_seed(2)
    assert first not in [draw(6, 3), draw(5, 4), draw(3, 5)]
    assert draw(5, 3) == first


@pytest.mark.parametrize("name", ["digits", "imagenet"])  # CIFAR's numbers are drawn as the digits'
def test_no_data_set_draws_the_same_numbers_twice(name, tree, monkeypatch):
    """SeedSequence pads a key with zeros: (seed, epoch, 1) and (seed, epoch, 1, 0) are one stream."""
    assert random_streams._stream(3, 2, 1).randint(1 << 30) == random_streams._stream(3, 2, 1, 0).randint(1 << 30)
    drawn, stream = [], random_streams._stream
    monkeypatch.setattr(random_streams, "_stream", lambda *key: drawn.append(key) or stream(*key))
    if DATASETS[name].streamed:
        data = opened(tree)
    else:
        data = DeviceDataset(datasets.digits(None), described(image_size=32), 0, torch.device("cpu"))
    size = len(data.train) if DATASETS[name].streamed else 1437
    for batches in (data.train_batches(0, size), data.test_batches(1000), data.plain_train_batches(1000)):
        list(itertools.islice(batches, 3))  # of training images: three epochs
    padded = [(*key, 0)[:4] for key in drawn]
    assert len(padded) >= 6
    assert len(set(padded)) == len(padded)


def test_all_crops_and_both_flips_are_equally_likely():
    n = 50000
    drawn = crops_and_flips(0, 0, n, 4)
    cells = np.bincount((drawn[:, 0] * 9 + drawn[:, 1]) * 2 + drawn[:, 2], minlength=162)
    assert len(cells) == 162
    expected = n / 162
    assert abs(cells - expected).max() < 5 * expected**0.5


class Largest(np.random.RandomState):
    """A stream of the largest numbers: the whole area at aspect ratio 4/3, too wide for most images."""

    def uniform(self, low, high):
        return high


def torch_of(stream):
    """The parts of torch that torchvision's get_params uses, with the numbers of a stream."""
    uniform = types.SimpleNamespace(uniform_=lambda low, high: np.float64(stream.uniform(low, high)))
    return types.SimpleNamespace(
        empty=lambda _: uniform,
        randint=lambda low, high, size: np.int64(stream.randint(low, high)),
        exp=lambda x: np.float64(math.exp(x)),
        tensor=list,
        log=lambda values: [math.log(v) for v in values],
    )


@pytest.mark.parametrize("stream", [random_streams._stream, lambda *_: Largest(0)], ids=["random", "largest"])
@pytest.mark.parametrize("height", [1, 10, 40, 60, 80, 100, 300, 1000])
def test_crops_are_torchvisions_when_it_is_given_the_same_draws(height, stream, monkeypatch):
    """Also for long images, where ten draws may find no crop: then the largest one in the middle is taken."""
    monkeypatch.setattr(random_streams, "_stream", stream)
    for i, width in enumerate((1, 2, 4, 10, 40, 60, 80, 100, 300, 500) * 20):
        numbers = stream(7, 2, random_streams.AUGMENTATION, i)
        flip = bool(numbers.randint(0, 2))
        with monkeypatch.context() as patch:
            patch.setattr("torchvision.transforms.transforms.torch", torch_of(numbers))
            image = torch.empty(3, height, width, device="meta")
            crop = RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
        assert resized_crop(7, 2, i, height, width) == (*(int(v) for v in crop), flip)
