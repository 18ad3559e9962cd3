"""Loss and error on a data set."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mbn.config import Config
from mbn.norm.functional import statistics_dtype
from mbn.system.cuda_graph import without_trials
from mbn.system.processes import ALONE, Processes
from mbn.system.signals import StoppedError

# Images of 32x32 pixels that are tested at a time; of larger ones, as many as have the same number of pixels. A few
# would not fill a GPU. On a CPU they should fit into its caches (ResNet-20: half the time of 1,000), and a signal is
# answered between two batches.
AT_A_TIME = {"cuda": 5000, "cpu": 125}
AT_A_TIME_ELSEWHERE = 1000


def batch_size_for(config: Config, device: torch.device) -> int:
    """evaluate.batch_size; if it is null, a size that suits the images and the device."""
    if config.evaluate.batch_size is not None:
        return config.evaluate.batch_size
    images = AT_A_TIME.get(device.type, AT_A_TIME_ELSEWHERE)
    return max(1, images * 32**2 // config.dataset.image_size**2)


class Evaluation(NamedTuple):
    """Mean loss; top-1 and top-5 error in percent."""

    loss: float
    error: float
    error_top5: float


@torch.no_grad()
@without_trials()
def evaluate(
    model: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], processes: Processes = ALONE
) -> Evaluation:
    """Run model, in the mode that it is in, over batches of images and labels; each of several processes over its own.

    Errors: StoppedError, in all processes, if the batches of one raise it.
    """
    n = 0
    # Of each batch, on the device: a GPU would have to be waited for at each read.
    losses: list[Tensor] = []
    errors: list[Tensor] = []
    stopped = False
    try:
        for images, labels in batches:
            logits = model(images)
            logits = logits.to(statistics_dtype(logits.dtype))
            n += len(labels)
            losses.append(F.cross_entropy(logits, labels, reduction="sum"))
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            errors.append(torch.stack([(~hits[:, 0]).sum(), (~hits.any(1)).sum()]))
    except StoppedError:
        stopped = True  # the others wait for this process's sums
    loss = sum(torch.stack(losses).tolist()) if losses else 0.0
    wrong = torch.stack(errors).sum(0).tolist() if errors else (0, 0)
    sums = torch.tensor([loss, n, *wrong, stopped], dtype=torch.float64)
    loss, n, top1, top5, stopped = processes.total(sums).tolist()
    if stopped:
        raise StoppedError
    return Evaluation(loss / n, 100 * top1 / n, 100 * top5 / n)
