"""PreciseBN, a control: the test error with statistics recomputed over the training set with the final weights.

It separates what a method gains in training from what it gains at test time. Source: Wu and Johnson, "Rethinking
'Batch' in BatchNorm", 2021, section 3.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mbn.measure.statistics_gap import gap
from mbn.norm.base import norm_layers
from mbn.norm.memories import enter_noted
from mbn.norm.precise_statistics import set_precise_statistics
from mbn.system.cuda_graph import Captured, uncaptured, warn
from mbn.system.errors import first_line


def take_precise_statistics(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], captured: bool = False
) -> dict[str, float]:
    """Replace each layer's test statistics by those of its inputs over batches, every image with equal weight.

    batches: images as training augments them, and labels, which are not used. captured: capture the
    forward once for each size of batch and replay it, on a CUDA stream of its own (`own_stream`).

    The batches go through training-mode forwards with the weights fixed and dropout off. Memories and averages go along
    with them and are put back at the end: held where training ended, they would normalise by the statistics of other
    images. How the images are put into batches matters little, because each layer pools their moments exactly. But
    their size should be that of the run, by which the layers before were normalised in training. The model is in eval
    mode afterwards.

    Returns how far the statistics that are replaced were from the new ones, those of the population: "mean", "std", the
    means over channels, then over layers, of |mu_test - mu_pop| / sigma_pop and |log(sigma_test / sigma_pop)|, where
    sigma = sqrt(variance + eps).
    """
    layers = norm_layers(model)
    forwards: dict[int, Callable[[Tensor], object]] = {}

    def take(images: Tensor) -> None:
        """The forward and what is remembered of it, because a graph repeats nothing else."""
        for layer in layers:
            layer.noted = ()  # of a forward that could not be captured
        model(images)
        enter_noted(layers)

    def forward(images: Tensor) -> None:
        if captured:
            if len(images) not in forwards:
                forwards[len(images)] = Captured(
                    take, lambda error: warn(first_line(error), "forwards", "precise statistics are taken without")
                )
            forwards[len(images)](images)
        else:
            uncaptured(lambda: model(images), images.device)

    before = [[statistic.clone() for statistic in layer.test_statistics()] for layer in layers]
    set_precise_statistics(model, batches, forward=forward)
    model.eval()
    distances = []
    for layer, (mu, s2) in zip(layers, before, strict=True):
        population, variance = layer.test_statistics()
        distances.append(gap(mu, (s2 + layer.eps).sqrt(), population, (variance + layer.eps).sqrt()))
    return dict(zip(("mean", "std"), torch.stack(distances).mean(0).tolist(), strict=True))
