"""The batches that layers have noted, entered into the memories and averages of all layers of a network at once."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .base import BatchStatisticsNorm, counts_of, one_note
from .batch import _BatchNorm
from .functional import enter_batch, is_capturing, is_transformed, move_averages
from .memorized import _MemorizedBatchNorm
from .renorm import _BatchRenorm

Layer = TypeVar("Layer", bound=BatchStatisticsNorm)


@torch.no_grad()
def enter_noted(layers: Iterable[BatchStatisticsNorm]) -> None:
    """Enter what these layers have noted, one batch a layer: what it noted in several calls is pooled.

    Some thirty operations for all layers that are alike instead of twenty for each.
    """
    noted = [layer for layer in layers if layer.noted]
    # torch.func has no rule for operations on lists of tensors, and a CUDA graph takes no numbers from the host.
    if is_transformed() or any(is_capturing(layer.running_mean) for layer in noted):
        _enter_one_by_one(noted)
        return
    for memorized in _alike(noted, _MemorizedBatchNorm, lambda x: (x.memory, x.decay)):
        _enter_memorized(memorized)
    for renorm in _alike(noted, _BatchRenorm, lambda x: (x.momentum,)):
        _enter_averages(renorm)
    _enter_one_by_one(layer for layer in noted if layer.noted)


class AllMemories:
    """Enters a batch into the memories of all layers at once, from tensors that the layers share.

    In the forward that remembers, the layers only note their batch. `enter`, called once after it, takes the notes into
    the memories and counts the batch: some twenty operations for the whole network instead of twenty for each layer.
    The results have the same bits. The layers' state dict stays the same: their buffers become views of shared tensors.
    A layer that is cast or moved to another device enters its batches on its own again; make a new AllMemories then.

    layers: those whose forward remembers, each once. Errors: RuntimeError from `enter` if a layer was moved, or if its
    forward has not run since the last call (BatchNorm's is not missed: only its counter is kept here).
    """

    def __init__(self, layers: list[BatchStatisticsNorm]) -> None:
        self.layers = layers
        for layer in layers:
            layer.deferred = True
        self.memories: list[Memories | Averages] = [
            *(Memories(group) for group in _alike(layers, _MemorizedBatchNorm, lambda x: (x.memory, x.decay))),
            *(Averages(group) for group in _alike(layers, _BatchRenorm, lambda x: (x.momentum,))),
        ]
        self.counters = [layer.num_batches_tracked for layer in layers if isinstance(layer, _BatchNorm)]

    @torch.no_grad()
    def enter(self) -> None:
        """Take the batch that every layer has noted into all memories, averages and counters."""
        if not all(layer.deferred for layer in self.layers):
            raise RuntimeError("a layer was moved or cast since its AllMemories was made: make a new one")
        for memories in self.memories:
            memories.enter()
        _enter_one_by_one(layer for layer in self.layers if layer.noted)
        if self.counters:
            torch._foreach_add_(self.counters, 1)

    def drop(self) -> None:
        """Forget what layers have noted and not entered."""
        for layer in self.layers:
            layer.noted = ()


# The buffers of a layer's memory, in the order of `functional.enter_batch`.
MEMORY = ("memory_mean", "memory_var", "memory_count", "running_mean", "running_var", "memory_weight")


class Memories:
    """The memories of MemorizedBatchNorm layers with the same size k and the same decay, in shared tensors.

    memory: mean, var (k, sum of C) and count (k, L) of all L layers, and their pools m, v (sum of C) and w (L,).
    """

    def __init__(self, layers: list[_MemorizedBatchNorm]) -> None:
        self.layers = layers
        self.memory = _joined(layers)
        _share(layers, MEMORY, _split(layers, self.memory))
        self.owner, self.powers = _owner(layers), layers[0].powers()
        self.counts: dict[tuple[int | Tensor, ...], Tensor] = {}

    def enter(self) -> None:
        """Take in what the layers have noted as the entry of age 0; the oldest entries leave."""
        mean, var, n = _take_notes(self.layers, self.memory[0])
        if all(isinstance(each, int) for each in n):
            if n not in self.counts:  # on the device, made once for each size of batch
                self.counts[n] = counts_of(n, mean)
            count = self.counts[n]
        else:
            count = counts_of(n, mean)
        enter_batch(self.memory, (mean, var, count), self.powers, self.owner)


# The buffers of a layer's averages, in the order of `functional.move_averages`.
AVERAGES = ("running_mean", "running_std", "num_batches_tracked")


class Averages:
    """The moving averages of BatchRenorm layers with the same momentum, in shared tensors.

    averages: mean, std (sum of C) and how many batches they have seen (L,), of all L layers.
    """

    def __init__(self, layers: list[_BatchRenorm]) -> None:
        self.layers = layers
        self.averages = _joined_averages(layers)
        _share(layers, AVERAGES, _split_averages(layers, self.averages))
        self.owner, self.eps = _owner(layers), _eps(layers)

    def enter(self) -> None:
        """Move the averages towards what the layers have noted."""
        mean, var, _ = _take_notes(self.layers, self.averages[0])
        move_averages(self.averages, (mean, (var + self.eps).sqrt()), self.layers[0].momentum, self.owner)


def _enter_one_by_one(layers: Iterable[BatchStatisticsNorm]) -> None:
    for layer in layers:
        layer.enter(*one_note(layer.noted))
        layer.noted = ()


def _enter_memorized(layers: list[_MemorizedBatchNorm]) -> None:
    """Enter what the layers have noted, into memories that each layer has on its own."""
    memory = _joined(layers)
    mean, var, n = _take_notes(layers, memory[0])
    enter_batch(memory, (mean, var, counts_of(n, mean)), layers[0].powers(), _owner(layers))
    buffers = [getattr(layer, name) for layer in layers for name in MEMORY]
    torch._foreach_copy_(buffers, [part for parts in _split(layers, memory) for part in parts])


def _enter_averages(layers: list[_BatchRenorm]) -> None:
    """Move averages that each layer has on its own towards what the layers have noted."""
    averages = _joined_averages(layers)
    mean, var, _ = _take_notes(layers, averages[0])
    move_averages(averages, (mean, (var + _eps(layers)).sqrt()), layers[0].momentum, _owner(layers))
    buffers = [getattr(layer, name) for name in AVERAGES[:2] for layer in layers]
    parts = list(zip(*_split_averages(layers, averages), strict=True))
    torch._foreach_copy_(buffers, [*parts[0], *parts[1]])
    torch._foreach_copy_([layer.num_batches_tracked for layer in layers], list(parts[2]))


def _alike(
    layers: Iterable[BatchStatisticsNorm], cls: type[Layer], settings: Callable[[Layer], tuple]
) -> list[list[Layer]]:
    """The layers of a class in groups with the same settings, device and precision.

    Without those of a subclass that enters its batches in a way of its own.
    """
    groups: dict[Hashable, list[Layer]] = {}
    for layer in layers:
        if isinstance(layer, cls) and type(layer).enter is cls.enter:
            key = (*settings(layer), layer.running_mean.device, layer.running_mean.dtype)
            groups.setdefault(key, []).append(layer)
    return list(groups.values())


def _take_notes(layers: Sequence[BatchStatisticsNorm], like: Tensor) -> tuple[Tensor, Tensor, tuple[int | Tensor, ...]]:
    """What each layer has noted, as one batch: the means and variances of all channels, and each layer's n."""
    if not all(layer.noted for layer in layers):
        raise RuntimeError("a layer noted nothing since the last batch was entered: its forward did not run")
    batches = [one_note(layer.noted) for layer in layers]
    for layer in layers:
        layer.noted = ()
    mean, var = torch.cat([mu for mu, _, _ in batches]), torch.cat([s2 for _, s2, _ in batches])
    return mean.to(like.dtype), var.to(like.dtype), tuple(n for _, _, n in batches)


def _share(layers: Sequence[BatchStatisticsNorm], names: tuple[str, ...], parts: Iterable[tuple[Tensor, ...]]) -> None:
    """Let the buffers of these names be each layer's parts of shared tensors."""
    for layer, own in zip(layers, parts, strict=True):
        for name, part in zip(names, own, strict=True):
            setattr(layer, name, part)


def _joined(layers: list[_MemorizedBatchNorm]) -> tuple[Tensor, ...]:
    """The memories of several layers in one, in the order of MEMORY."""
    mean, var, count, m, v, w = ([getattr(layer, name) for layer in layers] for name in MEMORY)
    return torch.cat(mean, 1), torch.cat(var, 1), torch.stack(count, 1), torch.cat(m), torch.cat(v), torch.cat(w)


def _split(layers: list[_MemorizedBatchNorm], memory: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """The parts of joined memories that are each layer's, as views, in the order of MEMORY."""
    widths = [layer.num_features for layer in layers]
    mean, var, count, m, v, w = memory
    parts = (mean.split(widths, 1), var.split(widths, 1), count.unbind(1), m.split(widths), v.split(widths), w.split(1))
    return list(zip(*parts, strict=True))


def _joined_averages(layers: list[_BatchRenorm]) -> tuple[Tensor, Tensor, Tensor]:
    """The averages of several layers in one, in the order of AVERAGES."""
    mean, std, tracked = ([getattr(layer, name) for layer in layers] for name in AVERAGES)
    return torch.cat(mean), torch.cat(std), torch.stack(tracked)


def _split_averages(layers: list[_BatchRenorm], averages: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """The parts of joined averages that are each layer's, as views, in the order of AVERAGES."""
    widths = [layer.num_features for layer in layers]
    mean, std, tracked = averages
    return list(zip(mean.split(widths), std.split(widths), tracked.unbind(), strict=True))


def _eps(layers: list[_BatchRenorm]) -> Tensor:
    """Each channel's eps."""
    return torch.cat([layer.running_mean.new_full((layer.num_features,), layer.eps) for layer in layers])


def _owner(layers: Sequence[BatchStatisticsNorm]) -> Tensor | None:
    """The number of the layer that each channel belongs to; None for one layer."""
    if len(layers) == 1:
        return None
    device, widths = layers[0].running_mean.device, [layer.num_features for layer in layers]
    numbers = torch.arange(len(layers), device=device)
    return numbers.repeat_interleave(torch.tensor(widths, device=device), output_size=sum(widths))
