"""A small tree of real photographs in ImageNet's layout, cut from scikit-learn's two."""

import functools
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mbn.config import Dataset
from mbn.data.image_folder import ImageFolders

CLASSES = ("n01440764", "n02102040", "n03888257")
TRAIN, VAL = 8, 3
# What train.py must know about the tree.
NUMBERS = ("dataset.classes=3", "dataset.train_images=24", "dataset.test_images=9")
# Small images are enough for a run.
RUN = (
    *("dataset=imagenet", "model=resnet18", "dataset.image_size=65", *NUMBERS),
    *("machine.threads=1", "machine.device=cpu"),
)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@functools.cache
def photographs() -> list[np.ndarray]:
    """One for each class: a palace, a flower, and the palace upside down."""
    from sklearn.datasets import load_sample_images

    palace, flower = load_sample_images().images
    return [palace, flower, palace[::-1, ::-1]]


def cut(draws: np.random.RandomState, label: int) -> Image.Image:
    """A piece of 70 to 220 pixels a side of the class's photograph."""
    photograph = photographs()[label]
    height, width = draws.randint(70, 221, size=2)
    top = draws.randint(0, photograph.shape[0] - height + 1)
    left = draws.randint(0, photograph.shape[1] - width + 1)
    return Image.fromarray(np.ascontiguousarray(photograph[top : top + height, left : left + width]))


def make_tree(root: Path) -> Path:
    """train/ and val/ with 8 and 3 images a class; among them, as in ImageNet, one in grey, one in CMYK, and a PNG that
    is named .JPEG; and a .png."""
    draws = np.random.RandomState(0)
    for part, n in (("train", TRAIN), ("val", VAL)):
        for label, name in enumerate(CLASSES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                image = cut(draws, label)
                path = folder / f"{name}_{i}.JPEG"
                if (part, i) == ("train", 3):
                    special = [("L", "JPEG"), ("RGB", "PNG"), ("CMYK", "JPEG")][label]
                    image.convert(special[0]).save(path, special[1])
                elif (part, i, label) == ("train", 4, 0):
                    image.save(path.with_suffix(".png"))
                else:
                    image.save(path, "JPEG", quality=90)
    return root


def described(image_size=64, flip=True):
    """The settings of the tree as a data set."""
    return Dataset("imagenet", 3, image_size, 24, 9, MEAN, STD, 0, flip)


def opened(root, workers=0, seed=0, **settings):
    return ImageFolders(described(**settings), root, seed, torch.device("cpu"), workers)
