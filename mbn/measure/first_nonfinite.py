"""Which tensor was the first that was not finite, found without waiting for the device."""

import torch
from torch import Tensor, nn

from mbn.measure.statistics_gap import named_norm_layers


def first_nonfinite(model: nn.Module) -> str | None:
    """The name of the first parameter or buffer that is not finite, or None. Waits for the device."""
    tensors = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
    # A sum is finite only if all its terms are. (If finite terms overflow, training cannot go on either.)
    sums = torch.stack([t.sum(dtype=torch.float32) for t in tensors.values()])
    bad = ~torch.isfinite(sums)
    if not bad.any().item():
        return None
    return list(tensors)[int(bad.nonzero()[0].item())]


def push(rows: Tensor, row: Tensor) -> None:
    """Drop the first, oldest row and add row as the last one: in place, and without an index from the host."""
    rows.copy_(torch.cat([rows[1:], row[None].to(rows.dtype)]))


class Watch:
    """Notes before each iteration which tensors are finite: the images, the parameters, the layers' statistics.

    One iteration later a NaN is everywhere, so its origin must be noted before. A NaN in a memory shows in the pooled
    statistics, before these normalise anything. The notes of the last iterations stay on the device.
    """

    def __init__(self, model: nn.Module, rows: int) -> None:
        parameters = dict(model.named_parameters())
        statistics = {
            f"{name}.{key}".removeprefix("."): buffer
            for name, layer in named_norm_layers(model).items()
            for key, buffer in layer.named_buffers()
            if key.startswith("running_")
        }
        self.names = ["the images", *parameters, *statistics]
        self.tensors = [*(p.detach() for p in parameters.values()), *statistics.values()]
        self.norms = torch.zeros(rows, len(self.names), device=self.tensors[0].device, dtype=self.tensors[0].dtype)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> None:
        """Take note before an iteration."""
        # A norm is finite only if every value is.
        push(self.norms, torch.stack(torch._foreach_norm([images, *self.tensors])))

    def first_bad(self, back: int) -> str | None:
        """The first tensor that was not finite before an iteration; back: 1 for the last one, 2 for the one before."""
        bad = (~self.norms[-back].isfinite()).nonzero()
        return self.names[int(bad[0].item())] if len(bad) else None
