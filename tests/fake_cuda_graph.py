"""A stand-in for CUDA graphs on the CPU: it repeats a function's operations on the very same tensors."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mbn.system import cuda_graph


class Tape(TorchDispatchMode):
    """Notes every operation with its tensors. `replay` repeats them; each result replaces the first one in place.

    As with a CUDA graph, no Python runs again: what the function took from the host (a number, a new tensor's contents)
    stays as it was at capture.
    """

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, result in self.operations:
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.numel() and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def capture(function):
    """Replaces `mbn.system.cuda_graph.capture`. Real capturing changes nothing, so here all changes are undone."""
    before = {}

    class Kept(Tape):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor) and id(tensor) not in made:
                    before.setdefault(id(tensor), (tensor, tensor.clone()))
            result = super().__torch_dispatch__(function, types, args, kwargs)
            made.update(id(t) for t in tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    made = set()
    tape = Kept()
    generator = torch.get_rng_state()
    try:
        with tape:
            function()
    finally:
        torch.set_rng_state(generator)
        with torch.no_grad():
            for tensor, value in reversed(before.values()):  # in reverse order: some are views of others
                tensor.copy_(value)
    return tape.replay


@pytest.fixture
def graphs(monkeypatch):
    """Graphs work on the CPU. A list whose length is the number of captures so far."""
    captured = []

    def counted(function):
        captured.append(function)
        return capture(function)

    monkeypatch.setattr(cuda_graph, "capture", counted)
    monkeypatch.setattr(cuda_graph, "supported", lambda device: True)
    return captured
