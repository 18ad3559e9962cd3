"""Loss and error on a data set."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Measured(NamedTuple):
    """Mean loss; top-1 and top-5 error in percent."""

    loss: float
    error: float
    error_top5: float


@torch.no_grad()
def evaluate(model: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> Measured:
    """Run model, which must be in eval mode, over batches of images and labels."""
    n = 0
    loss = 0.0
    wrong = torch.zeros(2, dtype=torch.int64)
    for images, labels in batches:
        logits = model(images).float()
        n += len(labels)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        wrong += torch.stack([(~hits[:, 0]).sum(), (~hits.any(1)).sum()]).cpu()
    return Measured(loss / n, 100 * wrong[0].item() / n, 100 * wrong[1].item() / n)
