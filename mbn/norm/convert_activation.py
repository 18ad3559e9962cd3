"""What a BatchNorm with a forward of its own does beside normalising, found by comparison."""

import contextlib
import copy
import inspect
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .batch import BatchNorm2d
from .convert_attributes import HOOKS, carry_parameters

# The classes that normalise and do no more.
PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# The name of the child that stands for an activation which the old layer's forward calls as a function.
ACTIVATION = "its_activation"

# The children of a new layer, and the names of those that it applies to the normalised x, in this order.
Follows = tuple[dict[str, nn.Module | None], tuple[str, ...]]


def what_follows(old: nn.Module, dims: tuple[int, ...]) -> Follows | None:
    """What our layer must apply to the normalised x so that it does what old does; None if it is not known.

    Candidates are old's own children, some of them or all in any order, and well-known activations. The first one
    with which ours equals old is taken: outputs and gradients on random inputs of so many dims, in eval and in training
    mode, with the same random numbers drawn by both. It is tried with copies on the CPU that have random parameters and
    statistics. old and the random number generators stay as they are.
    """
    if type(old) in PLAIN and not old._modules:
        return {}, ()
    if len(inspect.signature(type(old).forward).parameters) != 2:  # it may be called with more than x, as ours cannot
        return None
    # The device innermost, so that the caller's default changes nothing.
    with torch.random.fork_rng(devices=()), torch.no_grad(), torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(0)
        trial = _trial(old)
        inputs = [_input(trial.running_mean, d) for d in dims]
        expected = [_outputs(trial, x) for x in inputs]
        if not any(expected):
            return None
        for children, names in _candidates(old):
            new = _candidate(trial, dims, children, names)
            if all(ys is None or _close(ys, _outputs(new, x)) for x, ys in zip(inputs, expected, strict=True)):
                return children, names
    return None


def _candidates(old: nn.Module) -> Iterator[Follows]:
    children = old._modules
    if type(old).forward in [cls.forward for cls in PLAIN]:
        yield children, ()
        return
    # First all in the order of registration. Of many there would be too many orders.
    for length in range(len(children), -1, -1) if len(children) < 4 else (len(children), 0):
        for names in itertools.permutations(children, length) if len(children) < 4 else [tuple(children)[:length]]:
            yield children, names
    own = [value for name, value in vars(old).items() if isinstance(value, float) and name not in ("eps", "momentum")]
    for activation in (
        *(nn.ReLU(), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Hardswish(), nn.Mish(), nn.ReLU6(), nn.SELU()),
        *(nn.Sigmoid(), nn.Hardsigmoid(), nn.Tanh(), nn.Hardtanh(), nn.Softplus(), nn.Softsign()),
        *(kind(value) for value in (*own, 0.01, 0.1, 0.2, 1.0) for kind in (nn.LeakyReLU, nn.ELU)),
    ):
        yield children | {ACTIVATION: activation}, (ACTIVATION,)


class _OneProcess(nn.SyncBatchNorm):
    """A SyncBatchNorm that also trains on the CPU beside other processes."""

    forward = nn.modules.batchnorm._BatchNorm.forward


def _trial(old: nn.Module) -> Any:
    """A copy of old on the CPU without hooks, with random parameters and statistics that tell activations apart."""
    cls: Any = type(old)
    without_hooks: Any = cls.__new__(cls)
    without_hooks.__dict__.update(
        {name: type(value)() if name in HOOKS else value for name, value in vars(old).items()}
    )
    group = getattr(old, "process_group", None)
    trial = copy.deepcopy(without_hooks, {id(group): group})  # a group cannot be copied
    if isinstance(old, nn.SyncBatchNorm):
        trial.__class__ = type(cls.__name__, (cls, _OneProcess), {})
    if any(t.is_meta for t in (*trial.parameters(), *trial.buffers())):
        trial.to_empty(device="cpu")
        for t in (*trial.parameters(), *trial.buffers()):
            t.uniform_(0.1, 1) if t.is_floating_point() else t.zero_()
    trial.to("cpu", torch.float32)
    channels = len(trial.running_mean)
    # Large, so that what an activation cuts off is reached; of both signs.
    values = {"weight": (3 + 3 * torch.rand(channels)) * torch.randn(channels).sign(), "bias": torch.randn(channels)}
    for name, value in values.items():
        if trial._parameters[name] is not None:
            trial._parameters[name] = nn.Parameter(value)
    trial._buffers["running_mean"] = torch.randn(channels)
    trial._buffers["running_var"] = 0.5 + torch.rand(channels)
    return trial


def _candidate(trial: Any, dims: tuple[int, ...], children: dict, names: tuple[str, ...]) -> nn.Module:
    new: Any = BatchNorm2d(len(trial.running_mean), trial.eps, affine=False, sync=False)
    carry_parameters(trial, new)
    new.running_mean, new.running_var = trial.running_mean, trial.running_var
    new._modules.update({name: trial._modules.get(name, child) for name, child in children.items()})
    new.input_dims, new.followed_by = dims, names
    return new


def _input(mean: Tensor, dims: int) -> Tensor:
    x = torch.randn(64 if dims == 2 else 8, len(mean), *(4,) * (dims - 2))
    x[0] *= 8  # for values far from 0, and many near it
    return x


def _outputs(layer: Any, x: Tensor) -> list[Any] | None:
    """What layer makes of x and the gradients of x, weight and bias, in eval and training mode; None if it raises."""
    outputs, layer = [], copy.deepcopy(layer)
    with contextlib.suppress(Exception), torch.enable_grad():
        for training in (False, True):
            torch.default_generator.manual_seed(1)
            leaf = x.clone().requires_grad_()
            y = layer.train(training)(leaf.clone())
            leaves = [leaf, *(p for p in (layer.weight, layer.bias) if p is not None)]
            gradients = torch.autograd.grad(y, leaves, y.detach().cos(), allow_unused=True)
            outputs.append((y.detach(), gradients))
    return outputs if len(outputs) == 2 else None


def _close(one: list[Any], other: list[Any] | None) -> bool:
    return other is not None and all(
        y.shape == z.shape
        and torch.allclose(y, z, rtol=1e-5, atol=1e-5)
        and all(
            a is b or (a is not None and b is not None and bool((a - b).abs().max() <= 1e-3 * a.abs().max()))
            for a, b in zip(dy, dz, strict=True)
        )
        for (y, dy), (z, dz) in zip(one, other, strict=True)
    )
