"""PreciseBN, a control: the test error with statistics taken anew over the training set with the final weights.

It separates what a method gains in training from what it gains at test time. Source: Wu and Johnson, "Rethinking
'Batch' in BatchNorm", 2021, section 3.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .gap import named_norm_layers
from .norm.base import held
from .norm.functional import batch_moments, values_per_channel


class Moments:
    """Running mean and biased variance of all values seen, in float64 (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.n = 0
        self.mean: Tensor | float = 0.0
        self.variance: Tensor | float = 0.0

    def add(self, mean: Tensor, variance: Tensor, n: int) -> None:
        """Take in the moments of n more values."""
        mean, variance = mean.double(), variance.double()
        share = n / (self.n + n)
        distance = mean - self.mean
        self.mean = self.mean + share * distance
        self.variance = (1 - share) * self.variance + share * variance + share * (1 - share) * distance.square()
        self.n += n


@torch.no_grad()
def set_precise_statistics(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Replace each layer's test statistics by those of its inputs over batches, every image with equal weight.

    batches: images as training augments them, and labels, which are not used.

    The batches go through training-mode forwards with memories and averages frozen and dropout off. Which batches
    images come in matters little, as each layer pools their moments exactly, but the run's batch size is what the
    layers before it were normalised with. The model is in eval mode afterwards.
    """
    layers = named_norm_layers(model)
    moments = {name: Moments() for name in layers}

    def note(name: str):
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            moments[name].add(*batch_moments(inputs[0]), values_per_channel(inputs[0]))

        return hook

    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        with held(model):
            for images, _ in batches:
                model(images)
    finally:
        for hook in hooks:
            hook.remove()
    model.eval()
    for name, layer in layers.items():
        layer.set_test_statistics(torch.as_tensor(moments[name].mean), torch.as_tensor(moments[name].variance))
