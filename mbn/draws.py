"""Random draws as functions of (seed, epoch, index): data order and augmentation.

They are the same for every method at a seed, for any number of workers, on any device and after a resume. NumPy
guarantees the streams of its legacy RandomState for ever, as neither torch nor its own Generator does.
"""

import numpy as np

# One stream for each purpose, so that what one of them draws never shifts another.
ORDER, AUGMENTATION = 0, 1


def _stream(seed: int, epoch: int, purpose: int) -> np.random.RandomState:
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence((seed, epoch, purpose))))


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of n training images in an epoch: a permutation, int64 (n,)."""
    return _stream(seed, epoch, ORDER).permutation(n).astype(np.int64)


def crops_and_flips(seed: int, epoch: int, n: int, padding: int) -> np.ndarray:
    """For each of n images: the crop's top and left in the padded image, and whether to flip. int64 (n, 3)."""
    stream = _stream(seed, epoch, AUGMENTATION)
    corners = stream.randint(0, 2 * padding + 1, size=(n, 2))
    flips = stream.randint(0, 2, size=(n, 1))
    return np.concatenate([corners, flips], axis=1).astype(np.int64)
