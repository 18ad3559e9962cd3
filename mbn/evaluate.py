"""Loss and error on the test set."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class TestSet(Protocol):
    test_labels: Tensor

    def test_batch(self, start: int, size: int) -> tuple[Tensor, Tensor]: ...


class Measured(NamedTuple):
    """Mean loss; top-1 and top-5 error in percent."""

    loss: float
    error: float
    error_top5: float


@torch.no_grad()
def evaluate(model: Callable[[Tensor], Tensor], data: TestSet, batch_size: int) -> Measured:
    """Run model, which must be in eval mode, over the test images in batches, the last one smaller."""
    n = len(data.test_labels)
    loss = torch.zeros((), dtype=torch.float64)
    wrong = torch.zeros(2, dtype=torch.int64)
    for start in range(0, n, batch_size):
        images, labels = data.test_batch(start, batch_size)
        logits = model(images)
        loss += F.cross_entropy(logits.float(), labels, reduction="sum").cpu()
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        wrong += torch.stack([(~hits[:, 0]).sum(), (~hits.any(1)).sum()]).cpu()
    return Measured(loss.item() / n, 100 * wrong[0].item() / n, 100 * wrong[1].item() / n)
