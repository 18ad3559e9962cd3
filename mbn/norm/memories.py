"""The memories of all layers of a network in shared tensors, so that all of them take in a batch at once."""

import torch
from torch import Tensor

from .base import BatchStatisticsNorm
from .batch import _BatchNorm
from .memorized import _MemorizedBatchNorm
from .renorm import _BatchRenorm


class AllMemories:
    """Enters a batch into the memories of all layers at once. Without it each layer does this on its own.

    In the forward that remembers, the layers only note their batch. `enter`, called once after it, takes the notes into
    the memories and counts the batch: some twenty operations for the whole network instead of twenty for each layer.
    The results have the same bits. The layers' state dict stays the same: their buffers become views of shared tensors.
    A layer that is cast or moved to another device enters its batches on its own again; make a new AllMemories then.

    layers: those whose forward remembers, each once. Errors: RuntimeError from `enter` if a layer was moved, or if its
    forward has not run since the last call.
    """

    def __init__(self, layers: list[BatchStatisticsNorm]) -> None:
        self.layers = layers
        alike: dict[object, list[_MemorizedBatchNorm]] = {}
        for layer in layers:
            layer.deferred = True
            if isinstance(layer, _MemorizedBatchNorm):
                key = (layer.memory, layer.decay, layer.memory_mean.device, layer.memory_mean.dtype)
                alike.setdefault(key, []).append(layer)
        self.memories = [Memories(group) for group in alike.values()]
        self.counters = [x.num_batches_tracked for x in layers if isinstance(x, _BatchNorm | _BatchRenorm)]

    @torch.no_grad()
    def enter(self) -> None:
        """Take the batch that every layer has noted into all memories and counters."""
        if not all(layer.deferred for layer in self.layers):
            raise RuntimeError("a layer was moved or cast since its AllMemories was made: make a new one")
        for memories in self.memories:
            memories.enter()
        if self.counters:
            torch._foreach_add_(self.counters, 1)


class Memories:
    """The memories of MemorizedBatchNorm layers with the same size k and the same decay, in shared tensors.

    mean, var (k, sum of C) and count (k, L) hold the entries of all L layers; m, v (sum of C) and w (L,) their pools.
    """

    def __init__(self, layers: list[_MemorizedBatchNorm]) -> None:
        self.layers = layers
        widths = [layer.num_features for layer in layers]
        self.mean = torch.cat([layer.memory_mean for layer in layers], 1)
        self.var = torch.cat([layer.memory_var for layer in layers], 1)
        self.count = torch.stack([layer.memory_count for layer in layers], 1)
        self.m = torch.cat([layer.running_mean for layer in layers])
        self.v = torch.cat([layer.running_var for layer in layers])
        self.w = torch.cat([layer.memory_weight for layer in layers])
        for i, (layer, mean, var, m, v) in enumerate(
            zip(layers, *(t.split(widths, -1) for t in (self.mean, self.var, self.m, self.v)), strict=True)
        ):
            layer.memory_mean, layer.memory_var, layer.memory_count = mean, var, self.count[:, i]
            layer.running_mean, layer.running_var, layer.memory_weight = m, v, self.w[i : i + 1]
            # Not views: a compiled forward writes them, and its inputs must not share storage.
            layer.noted_mean, layer.noted_var = torch.zeros_like(m), torch.zeros_like(v)
        device, dtype = self.mean.device, self.mean.dtype
        # The layer that each channel belongs to, and eta**a.
        self.owner = torch.arange(len(layers), device=device).repeat_interleave(torch.tensor(widths, device=device))
        self.share = (layers[0].decay ** torch.arange(layers[0].memory, device=device, dtype=dtype))[:, None]
        self.counts: dict[tuple[int, ...], Tensor] = {}

    def enter(self) -> None:
        """Take in what the layers have noted as the entry of age 0; the oldest entries leave.

        The rule of `_MemorizedBatchNorm.remember`, for all layers at once.
        """
        n = tuple(layer.noted_count for layer in self.layers)
        if 0 in n:
            raise RuntimeError("a layer noted nothing since the last batch was entered: its forward did not run")
        for layer in self.layers:
            layer.noted_count = 0
        if n not in self.counts:  # on the device, made once for each size of batch
            self.counts[n] = torch.tensor(n, device=self.count.device, dtype=self.count.dtype)
        for memory, new in (
            (self.mean, torch.cat([layer.noted_mean for layer in self.layers])),
            (self.var, torch.cat([layer.noted_var for layer in self.layers])),
            (self.count, self.counts[n]),
        ):
            memory.copy_(torch.cat([new[None], memory[:-1]]))
        # `functional.pool`, for all layers.
        weight = self.share * self.count
        torch.sum(weight, 0, out=self.w)
        share = (weight / self.w)[:, self.owner]
        torch.sum(share * self.mean, 0, out=self.m)
        torch.sum(share * ((self.mean - self.m).square() + self.var), 0, out=self.v)
