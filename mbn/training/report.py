"""What a run reports: rows of its journal, and what a person sees meanwhile."""

import sys
from typing import Any

from torch import Tensor
from tqdm import tqdm

from mbn.data.in_memory import Data
from mbn.measure.statistics_gap import Statistics, epoch_statistics, training_statistics
from mbn.measure.test_error import Evaluation, batch_size_for, evaluate
from mbn.methods import METHODS
from mbn.training.iteration import autocast
from mbn.training.state import State, Sums


def evaluation(state: State, data: Data) -> Evaluation:
    """Loss and errors on the test images; the model must be in eval mode."""
    with autocast(state.device, state.config.precision):
        return evaluate(state.model, data.test_batches(batch_size_for(state.config, state.device)))


def statistics_of(state: State, images: Tensor) -> Statistics:
    """The statistics with which a training forward would normalise these images now."""
    with autocast(state.device, state.config.precision):
        return training_statistics(state.model, images)


def row(kind: str, state: State, sums: Sums) -> dict[str, Any]:
    """A row of the journal: "train" within an epoch, "epoch" at its end."""
    numbers: dict[str, Any] = {
        "kind": kind,
        "iteration": state.iteration,
        "epoch": state.iteration / state.per_epoch,
        "images": state.images,
        "train_loss": sums.loss,
        "train_error": sums.error,
        "lr": state.scheduled["lr"],
        "images_per_second": round(state.images_per_second, 1),
    }
    change = METHODS[state.config.norm.name].change
    if change and change.logged:
        numbers[change.logged] = state.scheduled["method"][0]
    return numbers


def epoch_row(state: State, data: Data, training: Statistics) -> dict[str, Any]:
    """The row that ends an epoch, with test errors, weight norms and the gap between training and test statistics."""
    statistics = epoch_statistics(state.model, training)
    state.model.eval()
    tested = evaluation(state, data)
    state.model.train()
    measured = {"test_loss": tested.loss, "test_error": tested.error, "test_error_top5": tested.error_top5}
    return row("epoch", state, state.epoch_sums) | measured | statistics


def progress_bar(state: State) -> tqdm:
    return tqdm(total=state.length, initial=state.iteration, unit="it", disable=None, dynamic_ncols=True)


def show_sums(bar: tqdm, state: State) -> None:
    """The epoch's losses so far, beside the bar."""
    sums = state.epoch_sums
    bar.set_postfix_str(f"loss {sums.loss:.4f}, error {sums.error:.2f} %, {state.images_per_second:.0f} images/s")


def show_epoch(bar: tqdm, state: State, row: dict[str, Any]) -> None:
    """The line that an epoch leaves above the bar."""
    bar.write(
        f"epoch {row['epoch']:g} of {state.length / state.per_epoch:g}: training loss {row['train_loss']:.4f}, error "
        f"{row['train_error']:.2f} %; test loss {row['test_loss']:.4f}, error {row['test_error']:.2f} %; "
        f"{state.images_per_second:.0f} images/s",
        file=sys.stdout,
    )
    sys.stdout.flush()
