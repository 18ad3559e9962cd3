"""What a run measures for a row of its journal."""

from typing import Any

import torch
from torch import Tensor

from mbn.data.in_memory import Data
from mbn.measure.statistics_gap import Statistics, epoch_statistics, named_relus, training_statistics
from mbn.methods import METHODS, group_of
from mbn.system.cuda_graph import uncaptured
from mbn.system.signals import StopRequest
from mbn.training.iteration import autocast
from mbn.training.state import State, Sums
from mbn.training.trained import Trained


def statistics_of(state: State, images: Tensor) -> Statistics:
    """The statistics with which a training forward would normalise these images now, and the dead channels of ReLUs.

    With groups of images, of which each of several processes has its own, a row for every group of all processes. A
    channel is dead if it is in every process.
    """
    with autocast(state.device, state.config.precision):
        found = uncaptured(lambda: training_statistics(state.model, images), state.device)
    if not state.processes.several:
        return found
    relus = {name: found.pop(name) for name in named_relus(state.model) if name in found}
    if group_of(state.config.norm) is not None:
        found = _of_all_groups(state, found)
    return found | _dead_everywhere(state, relus)


def _of_all_groups(state: State, own: Statistics) -> Statistics:
    """The rows of all processes together; own: those of this one, which may have none."""
    every = state.processes.everyones({name: (mu.cpu(), sigma.cpu()) for name, (mu, sigma) in own.items()})
    return {
        name: (
            torch.cat([of_one[name][0] for of_one in every]).to(state.device),
            torch.cat([of_one[name][1] for of_one in every]).to(state.device),
        )
        for name in own
    }


def _dead_everywhere(state: State, relus: Statistics) -> Statistics:
    """The channels of ReLUs that are dead in every process."""
    if not relus:
        return {}
    alive = state.processes.total(torch.cat([~dead for (dead,) in relus.values()]).float())
    parts = (alive == 0).split([len(dead) for (dead,) in relus.values()])
    return {name: (dead,) for name, dead in zip(relus, parts, strict=True)}


def row(kind: str, state: State, sums: Sums, rate: float) -> dict[str, Any]:
    """A row of the journal: "train" within an epoch, "epoch" at its end. rate: images a second since the last row."""
    numbers: dict[str, Any] = {
        "kind": kind,
        "iteration": state.iteration,
        "epoch": state.iteration / state.per_epoch,
        "images": state.images,
        "train_loss": sums.loss,
        "train_error": sums.error,
        "lr": state.scheduled["lr"],
        "images_per_second": round(rate, 1),
    }
    change = METHODS[state.config.norm.name].change
    if change and change.logged:
        numbers[change.logged] = state.scheduled["method"][0]
    return numbers


def epoch_row(state: State, data: Data, training: Statistics, rate: float, stop: StopRequest) -> dict[str, Any]:
    """The row that ends an epoch, with test errors, weight norms and the gap between training and test statistics.

    Errors: StoppedError where a signal ends the test.
    """
    statistics = epoch_statistics(state.model, training)
    state.model.eval()
    tested = Trained(state.config, state.model, data, state.device, stop, state.processes).evaluation()
    state.model.train()
    measured = {"test_loss": tested.loss, "test_error": tested.error, "test_error_top5": tested.error_top5}
    return row("epoch", state, state.epoch_sums, rate) | measured | statistics
