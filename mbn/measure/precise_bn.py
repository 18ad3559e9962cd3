"""PreciseBN, a control: the test error with statistics recomputed over the training set with the final weights.

It separates what a method gains in training from what it gains at test time. Source: Wu and Johnson, "Rethinking
'Batch' in BatchNorm", 2021, section 3.
"""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from mbn.norm.precise_statistics import set_precise_statistics
from mbn.system.cuda_graph import Recorded, first_line, warn


def take_precise_statistics(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], recorded: bool = False) -> None:
    """Replace each layer's test statistics by those of its inputs over batches, every image with equal weight.

    batches: images as training augments them, and labels, which are not used. recorded: record the
    forward once for each size of batch and play it back, on a CUDA stream of its own (`own_stream`).

    The batches go through training-mode forwards with memories and averages frozen and dropout off. How the images are
    put into batches matters little, because each layer pools their moments exactly. But their size should be that of
    the run, by which the layers before were normalised in training. The model is in eval mode afterwards.
    """
    forwards: dict[int, Callable[[Tensor], object]] = {}

    def forward(images: Tensor) -> None:
        if recorded and len(images) not in forwards:
            forwards[len(images)] = Recorded(model, lambda error: warn(first_line(error)))
        forwards.get(len(images), model)(images)

    set_precise_statistics(model, batches, forward=forward, roll=False)
    model.eval()
