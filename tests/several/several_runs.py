"""What processes of a test do: `train.py` in each, as torchrun would start it, in a group that is already there."""

import contextlib
import io
import itertools
import os
import signal
from unittest import mock

import jpegs
import running
import torch
import torch.distributed as dist
from running import Small, load_quickly

import models
import train
from mbn import config
from mbn.norm.base import norm_layers
from mbn.system import signals
from mbn.system.processes import NAMES
from mbn.training import conditions
from mbn.training import run as training_run
from mbn.training.iteration import Update
from mbn.training.trained import Trained

# Six iterations an epoch, the last one of 187 images, which two and three processes do not share evenly.
RUN = ("dataset=digits", "batch_size=250", "schedule.iterations=12", "machine.threads=1", "machine.device=cpu")


def from_files(root, workers=0):
    """A run on the images of `jpegs.make_tree`: 24, so that the last batch has four, and nine for tests."""
    return (
        *(*jpegs.RUN, f"machine.data={root}", f"machine.workers={workers}"),
        *("norm=mbn", "batch_size=5", "schedule.epochs=2"),
    )


class Wide(Small):
    """The small network in float64."""

    def __init__(self, layers, classes, dropout):
        super().__init__(layers, classes, dropout)
        self.double()

    def forward(self, x):
        return super().forward(x.double())


def environment():
    """What torchrun sets for this process; nothing in the tests' own process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return {}
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    return dict(zip(NAMES, (rank, size, rank, size, "localhost", "0"), strict=True))


class Stops:
    """Sends one process a signal after so many of its iterations."""

    def __init__(self, at, rank, number=signal.SIGTERM):
        self.at, self.rank, self.number = at, rank, number

    def __call__(self):
        if dist.is_initialized() and dist.get_rank() != self.rank:
            return
        original, count = Update.__call__, itertools.count(1)

        def call(update, *args):
            original(update, *args)
            if next(count) == self.at:
                os.kill(os.getpid(), self.number)

        Update.__call__ = call


def command(results, *overrides, run=RUN, float64=True, dropout=0.0, before=lambda: None):
    """Exit code, stdout and stderr of `train.py` in this process. before: called when all is in place."""

    def build(*, layers, classes, **_):
        network = Wide(layers, classes, dropout) if float64 else Small(layers, classes, dropout)
        assert all(layer.sync is None for layer in norm_layers(network))
        return network

    dtype = torch.get_default_dtype()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.dict(os.environ, environment()),
            mock.patch.object(models, "build", build),
            mock.patch.object(config, "load", load_quickly),
            mock.patch.object(train, "leave"),
            mock.patch.object(training_run, "SAVES_APART", 0.0),
            # What `before` may replace.
            mock.patch.object(Update, "__call__", Update.__call__),
            mock.patch.object(conditions, "provenance", conditions.provenance),
            mock.patch.object(Trained, "_train_error", Trained._train_error),
            mock.patch.object(signals, "FINISH_WITHIN", signals.FINISH_WITHIN),
            mock.patch.object(torch.nn.Dropout, "forward", torch.nn.Dropout.forward),
            mock.patch.object(torch, "compile", torch.compile),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            stack.enter_context(patch)
        before()
        try:
            torch.set_default_dtype(torch.float64 if float64 else dtype)
            code = train.main([*run, f"machine.results={results}", *overrides])
        finally:
            torch.set_default_dtype(dtype)
    return code, out.getvalue(), err.getvalue()


def left(results, *overrides, run=RUN):
    return running.Run(results, [*run, *overrides])
