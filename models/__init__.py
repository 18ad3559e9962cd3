"""The networks of the paper. They import torch only and are handed their layers: see `build`."""

from .build import CIFAR, IMAGENET, build

__all__ = ["CIFAR", "IMAGENET", "build"]
