"""Which tensor was the first that was not finite, found without waiting for the device."""

import torch
from torch import Tensor, nn

from .norm.base import BatchStatisticsNorm
from .update import WINDOW


class Watch:
    """Notes before each iteration which tensors are finite: the images, the parameters, the layers' statistics.

    One iteration later a NaN is everywhere, so that its origin must be known from before. A NaN in a memory shows in
    the pooled statistics, before these normalise anything.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        statistics = {
            f"{name}.{key}".removeprefix("."): buffer
            for name, layer in model.named_modules()
            if isinstance(layer, BatchStatisticsNorm)
            for key, buffer in layer.named_buffers()
            if key.startswith("running_")
        }
        self.names = ["the images", *parameters, *statistics]
        self.tensors = [*(p.detach() for p in parameters.values()), *statistics.values()]
        self.norms: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, images: Tensor) -> None:
        """Take note before an iteration. Must be followed by `forget` at least every WINDOW iterations."""
        assert len(self.norms) < WINDOW
        # A norm is finite only if every value is.
        self.norms.append(torch.stack(torch._foreach_norm([images, *self.tensors])))

    def first_bad(self, offset: int) -> str | None:
        """The first tensor that was not finite before an iteration, counted from the last `forget`."""
        bad = (~self.norms[offset].isfinite()).nonzero()
        return self.names[int(bad[0].item())] if len(bad) else None

    def forget(self) -> None:
        self.norms.clear()
