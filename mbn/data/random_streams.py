"""Random draws as functions of (seed, epoch, index): data order and augmentation.

They are the same for every method at a seed, for any number of workers, on any device and after a resume. NumPy
promises that the numbers of its legacy RandomState never change; torch promises nothing of the kind.
"""

import math

import numpy as np

# One stream for each purpose, so that one more draw from one changes nothing in the other.
ORDER, AUGMENTATION = 0, 1


def _stream(*key: int) -> np.random.RandomState:
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(key)))


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of n training images in an epoch: a permutation, int64 (n,)."""
    return _stream(seed, epoch, ORDER).permutation(n).astype(np.int64)


def crops_and_flips(seed: int, epoch: int, n: int, padding: int) -> np.ndarray:
    """For each of n images: the crop's top and left in the padded image, and whether to flip. int64 (n, 3)."""
    stream = _stream(seed, epoch, AUGMENTATION)
    corners = stream.randint(0, 2 * padding + 1, size=(n, 2))
    flips = stream.randint(0, 2, size=(n, 1))
    return np.concatenate([corners, flips], axis=1).astype(np.int64)


def resized_crop(seed: int, epoch: int, index: int, height: int, width: int) -> tuple[int, int, int, int, bool]:
    """torchvision's RandomResizedCrop of a height x width image, and whether to flip: top, left, height, width, flip.

    8 to 100 % of the area at an aspect ratio from 3/4 to 4/3. After ten draws that do not fit into the image, it is the
    largest crop in the image's middle with such an aspect ratio.
    """
    stream = _stream(seed, epoch, AUGMENTATION, index)
    flip = bool(stream.randint(0, 2))
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        area = height * width * stream.uniform(0.08, 1.0)
        ratio = math.exp(stream.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(stream.randint(0, height - h + 1)), int(stream.randint(0, width - w + 1)), h, w, flip
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w, flip
