"""One iteration of training (Algorithm 1 of the paper)."""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbn.measure.first_nonfinite import Watch, push
from mbn.norm.base import norm_layers
from mbn.norm.functional import statistics_dtype
from mbn.norm.memories import AllMemories
from mbn.norm.normprop import project_unit_rows, unit_layers
from mbn.norm.second_forward import phase
from mbn.system import cuda_graph
from mbn.system.cuda_graph import Captured, one_at_a_time, uncaptured, warn
from mbn.system.errors import first_line
from mbn.system.processes import ALONE, Processes
from mbn.training.execution import COMPILED, GRAPHS


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision for precision="bf16"; nothing for "fp32"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


# What torch.compile has made, by function and kind of network.
_compiled: dict[tuple[Callable, Any], Callable] = {}


def compiled(method: Callable, kind: Any) -> Callable:
    """torch.compile of a bound method, made once for all objects of a kind: runs side by side, one run after another.

    kind: hashable. Objects of one kind differ only in the values of their tensors, which compiled code takes as
    arguments. For objects that differ in more, torch compiles again, but at most eight times for one code object. So
    each kind has a code object of its own.
    """
    key = (method.__func__, kind)  # type: ignore[attr-defined]
    if key not in _compiled:
        function = key[0]
        own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        _compiled[key] = torch.compile(own, fullgraph=True, dynamic=False)
    return functools.partial(_compiled[key], method.__self__)  # type: ignore[attr-defined]


# Losses stay on the device. They are read together, once every this many iterations.
READ_EVERY = 50


class Update:
    """First forward, loss, backward, optimiser step; then, with forwards=2, the second forward that remembers.

    mode: "eager"; "compile" to compile both forwards with torch.compile for batches of batch_size images (an epoch's
    last, smaller one is not worth it); "graph" to capture the whole iteration with its compiled forwards, once for each
    batch size, and replay it (call it inside `own_stream`); "graph-eager" for the same without compiling. Where
    capturing fails `mode` becomes "eager", with a warning.

    The learning rate and everything a layer remembers are tensors changed in place. The losses and errors of the last
    iterations stay on the device until `drain`, and so do the notes of `watch`: an iteration never waits for the
    host.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        forwards: int,
        mode: str,
        precision: str,
        device: torch.device,
        batch_size: int | None = None,
        processes: Processes = ALONE,
        share: Callable[[int], slice] = ALONE.share,
    ):
        self.model = model
        self.device = device
        self.precision = precision
        self.optimizer = optimizer
        self.mode = mode
        self.layers = [layer for layer in norm_layers(model) if layer.forwards == 2] if forwards == 2 else []
        self.memories = AllMemories(self.layers or [layer for layer in norm_layers(model) if layer.forwards == 1])
        self.projects = bool(unit_layers(model))
        # Before the first step too: the effect of a step depends on the row's norm.
        project_unit_rows(model)
        self.processes = processes
        # Images in the batch of all processes, and in this one's share of a whole batch.
        self.n = batch_size or 0
        self.full = len(range(batch_size)[share(batch_size)]) if batch_size else None
        self.first: Callable[..., tuple[Tensor, Tensor]] = self._first
        self.second: Callable[..., None] = self._second
        if mode in COMPILED:
            kind = (repr(model), forwards, precision, device, batch_size)
            self.first, self.second = compiled(self._first, kind), compiled(self._second, kind)
        # One for each size of batch.
        self.captured: dict[int, Captured] = {}
        self.watch = Watch(model, READ_EVERY)
        self.window = torch.zeros(READ_EVERY, 2, device=device)
        self.pending = 0

    def _first(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(self.device, self.precision):
            logits = self.model(images)
        wide = logits.to(statistics_dtype(logits.dtype))
        if self.processes.several:  # the sum over processes is the mean over the whole batch, whatever their shares
            loss = F.cross_entropy(wide, labels, reduction="sum") / self.n
        else:
            loss = F.cross_entropy(wide, labels)
        errors = (logits.detach().argmax(1) != labels).sum()
        return loss, torch.stack([loss.detach(), errors.to(loss.dtype)])

    def _second(self, images: Tensor) -> None:
        # It returns nothing, so the compiler leaves out everything after the last layer's statistics.
        self.model(images)

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Train on one batch, or on this process's share of one: images (B, 3, H, W), labels (B,).

        The model must be in training mode, and `n` the number of images of all processes, if there are several.
        """
        if self.mode in GRAPHS:
            if len(labels) not in self.captured:
                self.captured[len(labels)] = Captured(self._iterate, self._not_captured)
            self.captured[len(labels)](images, labels)
        elif self.mode == "compile" and not cuda_graph.supported(self.device):
            with one_at_a_time:
                self._iterate(images, labels)
        else:  # other runs of this process may be captured at this moment
            uncaptured(lambda: self._iterate(images, labels), self.device)
        self.pending += 1

    def _iterate(self, images: Tensor, labels: Tensor) -> None:
        """One iteration without anything that depends on the host, so that it can be captured."""
        self.watch(images)
        # A process that gets nothing of a batch asks what the others got, which compiled code cannot.
        whole = self.full in (None, len(images)) and len(images) > 0
        first, second = (self.first, self.second) if whole else (self._first, self._second)
        loss, measured = first(images, labels)
        loss.backward()
        if self.processes.several:
            measured = self._add_up(measured)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.projects:
            project_unit_rows(self.model)
        if self.layers:
            with torch.no_grad(), autocast(self.device, self.precision), phase(self.layers, "second"):
                second(images)
        self.memories.enter()
        push(self.window, measured)

    def _add_up(self, measured: Tensor) -> Tensor:
        """Add up gradients, losses and errors over the processes, in one message. Returns the loss and the errors.

        Not by DistributedDataParallel: in its first iteration, also after a resume, it sends other messages than later,
        in which sums have other last bits.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        sums = torch.cat([measured.to(gradients[0].dtype), *(gradient.reshape(-1) for gradient in gradients)])
        measured, *parts = self.processes.total(sums).split([len(measured), *(g.numel() for g in gradients)])
        torch._foreach_copy_(gradients, [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)])
        return measured

    def _not_captured(self, error: Exception) -> None:
        """Go on in eager mode: the iteration that could not be captured has changed nothing yet."""
        warn(first_line(error))
        self.mode = "eager"
        self.first, self.second = self._first, self._second
        self.memories.drop()
        self.optimizer.zero_grad()  # these gradients were captured, but never computed

    def drain(self) -> list[tuple[float, int]]:
        """Loss (mean over the batch) and number of errors of each iteration since the last call; waits for the device.

        Must be called at least every READ_EVERY iterations.
        """
        assert self.pending <= READ_EVERY
        rows = self.window.tolist()[READ_EVERY - self.pending :]
        self.pending = 0
        return [(loss, int(errors) if errors == errors else 0) for loss, errors in rows]
