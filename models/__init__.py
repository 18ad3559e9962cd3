"""The networks of the paper. They import torch only and are handed their layers: see `build`."""

from .build import build

__all__ = ["build"]
