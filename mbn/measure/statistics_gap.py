"""How far training's statistics are from those that evaluation would use (the gap), and which channels are dead, before
a layer that normalises and behind a ReLU.
"""

import contextlib
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mbn.norm.base import BatchStatisticsNorm
from mbn.norm.normprop import StandardReLU
from mbn.norm.second_forward import held

# By the name of a layer with batch statistics: mu^ and sigma^. By the name of a ReLU: which of its channels are dead.
Statistics = dict[str, tuple[Tensor, ...]]


def named_norm_layers(model: nn.Module) -> dict[str, BatchStatisticsNorm]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, BatchStatisticsNorm)}


def named_relus(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.ReLU | StandardReLU)}


def _dead(relu: nn.Module, y: Tensor) -> Tensor:
    """For each channel of a ReLU's output whether it lets nothing through: all of it is what 0 becomes."""
    nothing = relu.forward(y.new_zeros(()))  # not relu(...), which would call its hooks again
    return (y <= nothing).transpose(0, 1).flatten(1).all(1)


def uses_dropout(model: nn.Module) -> bool:
    """Whether training forwards draw random numbers."""
    return any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in model.modules())


@torch.no_grad()
def training_statistics(model: nn.Module, images: Tensor) -> Statistics:
    """Each layer's mu^ and sigma^ = sqrt(s2^ + eps) for a training forward of images now, and each ReLU's dead channels
    (those of all its calls, if there are several). Changes nothing.

    This costs a forward pass at the end of each epoch. To keep copies instead would cost time in every iteration.
    """
    seen: Statistics = {}

    def note(name: str, layer: BatchStatisticsNorm, inputs: tuple[Tensor]) -> None:
        seen[name] = layer.training_statistics(inputs[0])

    def note_dead(name: str, relu: nn.Module, _: tuple[Tensor], y: Tensor) -> None:
        seen[name] = (torch.cat([*seen.get(name, ()), _dead(relu, y)]),)

    devices = [images.device] if images.device.type == "cuda" else []
    # Dropout must not use up training's draws. Without dropout the generators are left alone: threads share them.
    with (
        torch.random.fork_rng(devices, enabled=uses_dropout(model)),
        held(model),
        contextlib.ExitStack() as hooks,
    ):
        for name, layer in named_norm_layers(model).items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(note, name)))
        for name, relu in named_relus(model).items():
            hooks.enter_context(relu.register_forward_hook(partial(note_dead, name)))
        model(images)
    return seen


@torch.no_grad()
def epoch_statistics(model: nn.Module, training: Statistics) -> dict[str, Any]:
    """The numbers of weights and statistics in the journal's row of an epoch, read from the device at once.

    weight_norm(s): of all weights together and of each. gap_means, gap_stds: for each layer the means over channels of
    |mu^ - mu_test| / sigma_test and of |log(sigma^ / sigma_test)|; gap_mean, gap_std: their means over layers.
    layer_dead_channels: for each layer that has any, how many of its channels are dead; dead_channels: their sum;
    dead_layers: how many layers have dead channels only. (A channel is dead if its values do not vary in training: its
    variance s2^ = sigma^**2 - eps is below a thousandth of eps. Its output is then nearly beta, and only weight decay
    moves the weights before it. A layer that has dead channels only ends a dead branch.) stage_dead_relus: how many
    channels let nothing of the batch through their ReLU, for each stage, which is the child of the model that holds the
    ReLU (layer1, features); dead_relus: their sum.

    training: what `training_statistics` gave for the last iteration; with MBN these are the statistics of the batch and
    its whole memory. mu_test, sigma_test: what evaluation would use now. A model without batch statistics has weight
    norms and dead ReLUs only.
    """
    weights = {n: p.detach() for n, p in model.named_parameters() if n.endswith("weight") and p.dim() > 1}
    layers = named_norm_layers(model)
    measured = [torch.stack([w.norm() for w in weights.values()])]
    for name, layer in layers.items():
        mu, sigma = training[name]
        mu_test, s2_test = layer.test_statistics()
        distance = gap(mu, sigma, mu_test, (s2_test + layer.eps).sqrt())
        dead = (sigma.view(-1, layer.num_features) ** 2 < 1.001 * layer.eps).all(0).sum()
        measured.append(torch.cat([distance, dead[None].to(distance.dtype)]))
    relus = [name for name in named_relus(model) if name in training]  # one that was not called has none
    silent = [training[name][0].sum().to(measured[0].dtype) for name in relus]
    numbers = torch.cat([*measured, *(count[None] for count in silent)]).tolist()
    norms = dict(zip(weights, numbers, strict=False))
    row: dict[str, Any] = {"weight_norm": sum(v * v for v in norms.values()) ** 0.5, "weight_norms": norms}
    row |= _by_stage(dict(zip(relus, map(int, numbers[len(numbers) - len(relus) :]), strict=True)))
    if not layers:
        return row
    of_layers = numbers[len(norms) : len(numbers) - len(relus)]
    means, stds, lost = (dict(zip(layers, of_layers[i::3], strict=True)) for i in range(3))
    return row | {
        "gap_mean": sum(means.values()) / len(layers),
        "gap_std": sum(stds.values()) / len(layers),
        "gap_means": means,
        "gap_stds": stds,
        "dead_channels": int(sum(lost.values())),
        "dead_layers": sum(count == layers[name].num_features for name, count in lost.items()),
        "layer_dead_channels": {name: int(count) for name, count in lost.items() if count},
    }


def gap(mu: Tensor, sigma: Tensor, mu_of: Tensor, sigma_of: Tensor) -> Tensor:
    """How far statistics are from others (mu_of, sigma_of): the means over channels, and groups of images, of
    |mu - mu_of| / sigma_of and |log(sigma / sigma_of)|, as a tensor of two.
    """
    return torch.stack([((mu - mu_of).abs() / sigma_of).mean(), (sigma / sigma_of).log().abs().mean()])


def _by_stage(counts: dict[str, int]) -> dict[str, Any]:
    """The dead channels of each ReLU as they stand in a row; nothing where there is none."""
    stages: dict[str, int] = {}
    for name, count in counts.items():
        stage = name.partition(".")[0]
        stages[stage] = stages.get(stage, 0) + count
    return {"dead_relus": sum(stages.values()), "stage_dead_relus": stages} if stages else {}
