"""PreciseBN, a control: the test error with statistics recomputed over the training set with the final weights.

It separates what a method gains in training from what it gains at test time. Source: Wu and Johnson, "Rethinking
'Batch' in BatchNorm", 2021, section 3.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mbn.measure.statistics_gap import named_norm_layers, observed
from mbn.norm.base import BatchStatisticsNorm
from mbn.norm.functional import batch_moments, values_per_channel
from mbn.norm.second_forward import held
from mbn.system.cuda_graph import Recorded, first_line, warn


class Moments:
    """Running mean and biased variance of all values seen, (C,) in float64 (Chan et al. 1979), changed in place."""

    def __init__(self, layer: BatchStatisticsNorm) -> None:
        self.mean = torch.zeros_like(layer.running_mean, dtype=torch.float64)
        self.variance, self.n = self.mean.clone(), self.mean.new_zeros(())

    def add(self, mean: Tensor, variance: Tensor, n: int) -> None:
        """Take in the moments of n more values."""
        self.n += n
        share = n / self.n
        distance = mean - self.mean
        self.mean += share * distance
        self.variance.mul_(1 - share).add_(share * variance).add_(share * (1 - share) * distance.square())


@torch.no_grad()
def set_precise_statistics(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], recorded: bool = False) -> None:
    """Replace each layer's test statistics by those of its inputs over batches, every image with equal weight.

    batches: images as training augments them, and labels, which are not used. recorded: record the
    forward once for each size of batch and play it back, on a CUDA stream of its own (`own_stream`).

    The batches go through training-mode forwards with memories and averages frozen and dropout off. How the images are
    put into batches matters little, because each layer pools their moments exactly. But their size should be that of
    the run, by which the layers before were normalised in training. The model is in eval mode afterwards.
    """
    layers = named_norm_layers(model)
    moments = {name: Moments(layer) for name, layer in layers.items()}

    def note(name: str, _: BatchStatisticsNorm, x: Tensor) -> None:
        moments[name].add(*batch_moments(x), values_per_channel(x))

    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    forwards: dict[int, Callable[[Tensor], object]] = {}
    with held(model), observed(model, note):
        for images, _ in batches:
            if recorded and len(images) not in forwards:
                forwards[len(images)] = Recorded(model, lambda error: warn(first_line(error)))
            forwards.get(len(images), model)(images)
    model.eval()
    for name, layer in layers.items():
        layer.set_test_statistics(moments[name].mean, moments[name].variance)
