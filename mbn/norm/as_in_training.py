"""Forwards in training mode with the weights fixed, and a network that is afterwards what it was before."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .base import norm_layers
from .memories import enter_noted
from .second_forward import held, phase


@contextlib.contextmanager
def kept(module: nn.Module) -> Iterator[None]:
    """A context at whose end everything that our layers inside module remember is what it was at its start."""
    before = [(buffer, buffer.clone()) for layer in norm_layers(module) for buffer in layer.buffers(recurse=False)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


@contextlib.contextmanager
def as_in_training(
    module: nn.Module, roll: bool, forward: Callable[[Any], Any] | None = None
) -> Iterator[Callable[[Any], Any]]:
    """A context that gives a function of an input: module's forward with our layers in training mode, no gradients.

    Every other module is in eval mode, so that no dropout draws. Of our layers those that are in training mode take
    part, and where none is (a network that was trained) all that module.train() reaches: not those that are frozen.

    roll: whether the memories and averages take each batch in, as in training. They stay as they then are (`kept` puts
    them back); the modes of module are put back at the end. forward: called with each input in place of module.
    """
    ours = norm_layers(module)
    modes = [(child, child.training) for child in module.modules()]
    unfrozen = [(layer, layer.unfrozen_mode) for layer in ours]
    try:
        if not any(layer.training for layer in ours):
            module.train()
        layers = [layer for layer in ours if layer.training]
        of_two = [layer for layer in layers if layer.forwards == 2]
        for child in module.modules():
            child.training = child in layers

        def take(x: Any) -> Any:
            with torch.no_grad(), phase(of_two, "second") if roll else held(module):
                y = (forward or module)(x)
            if roll:
                enter_noted(layers)
            return y

        yield take
    finally:
        for child, mode in modes:
            child.training = mode
        for layer, mode in unfrozen:
            layer.unfrozen_mode = mode
