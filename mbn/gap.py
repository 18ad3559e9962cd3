"""Of training's statistics: the gap (how far they are from those evaluation would use), and which channels are dead."""

import torch
from torch import Tensor, nn

from .norm.base import BatchStatisticsNorm, held

Statistics = dict[str, tuple[Tensor, Tensor]]


def named_norm_layers(model: nn.Module) -> dict[str, BatchStatisticsNorm]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, BatchStatisticsNorm)}


@torch.no_grad()
def training_statistics(model: nn.Module, images: Tensor) -> Statistics:
    """Each layer's mu^ and sigma^ = sqrt(s2^ + eps) for a training forward of images now. Changes nothing.

    An extra forward pass, instead of copies kept in every iteration: only an epoch's last iteration is asked for.
    """
    seen: Statistics = {}

    def note(name: str):
        def hook(layer: nn.Module, inputs: tuple[Tensor]) -> None:
            seen[name] = layer.training_statistics(inputs[0])  # type: ignore[operator]

        return hook

    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in named_norm_layers(model).items()]
    devices = [images.device] if images.device.type == "cuda" else []
    try:
        # Dropout's draws belong to the training forward.
        with torch.random.fork_rng(devices), held(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@torch.no_grad()
def statistics_gap(model: nn.Module, training: Statistics) -> dict[str, tuple[float, float]]:
    """For each layer the means over channels of |mu^ - mu_test| / sigma_test and |log(sigma^ / sigma_test)|.

    training: what `training_statistics` gave for the last iteration; test: what evaluation would use now.
    """
    gaps = {}
    for name, layer in named_norm_layers(model).items():
        mu, sigma = training[name]
        mu_test, s2_test = layer.test_statistics()
        sigma_test = (s2_test + layer.eps).sqrt()
        gaps[name] = (
            ((mu - mu_test).abs() / sigma_test).mean().item(),
            (sigma / sigma_test).log().abs().mean().item(),
        )
    return gaps


@torch.no_grad()
def dead_channels(model: nn.Module, training: Statistics) -> dict[str, int]:
    """For each layer that has any, how many of its channels training normalised although their values did not vary.

    Their variance s2^ = sigma^**2 - eps is below a thousandth of eps, so that their output is beta (nearly), and weight
    decay is all that moves the weights before them. A layer all of whose channels are dead ends a dead branch.

    training: what `training_statistics` gave; with MBN s2^ is that of the batch and of its whole memory.
    """
    layers = named_norm_layers(model)
    counts = {name: int((sigma**2 < 1.001 * layers[name].eps).sum()) for name, (_, sigma) in training.items()}
    return {name: count for name, count in counts.items() if count}
