"""What all layers with batch statistics share: shapes, precision, and which forward pass remembers."""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .functional import affine_normalize, statistics_dtype


class BatchStatisticsNorm(nn.Module):
    """Base of BatchNorm, MemorizedBatchNorm and BatchRenorm.

    Input and output: (N, C) or (N, C, *spatial), as many dimensions as the subclass's `input_dims` allows. Any memory
    layout. The output has the input's dtype; statistics have at least float32, whatever the module's dtype.

    The layer's `phase` decides what a training forward does with its batch's statistics:
    `"first"` remembers them only if forwards is 1, `"second"` only if it is 2, `"held"` never.
    `second_forward` and `held` set the phase. Evaluation uses `test_statistics()` and changes nothing.

    Errors: ValueError for an input of the wrong number of dimensions or without any value.
    """

    input_dims: tuple[int, ...] = ()
    # Buffers that keep at least float32 when the module is cast to a narrower type.
    statistics: tuple[str, ...] = ("running_mean",)
    # The settings that `convert` passes on, in the order of the signature.
    settings: tuple[str, ...] = ()

    # `versions()` at the first training forward since the last `second_forward`, and at that call; empty if unknown.
    forward_versions: tuple[tuple[int, int], ...] = ()
    second_versions: tuple[tuple[int, int], ...] = ()

    running_mean: Tensor

    def __init__(self, num_features: int, eps: float, affine: bool, forwards: int) -> None:
        super().__init__()
        if forwards not in (1, 2):
            raise ValueError(f"forwards must be 1 or 2, not {forwards!r}")
        self.num_features = num_features
        self.eps = eps
        self.affine = affine
        self.forwards = forwards
        self.phase = "first"
        self._forgotten = False
        # True while an `AllMemories` enters the batches of this layer and others at once.
        self.deferred = False
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features))

    # What a subclass defines.

    def normalize_training(self, x: Tensor, remember: bool) -> Tensor:
        """Normalise x as in training. If remember is true, the layer also remembers the statistics of x."""
        raise NotImplementedError

    def test_statistics(self) -> tuple[Tensor, Tensor]:
        """The mean and variance (C,) by which evaluation would normalise now."""
        raise NotImplementedError

    def set_test_statistics(self, mean: Tensor, variance: Tensor) -> None:
        """Let evaluation normalise by this mean and variance (C,) from now on."""
        raise NotImplementedError

    def training_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and sqrt(variance + eps) (C,) that would normalise x in training now. Changes nothing."""
        raise NotImplementedError

    # What they share.

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in self.input_dims:
            wanted = " or ".join(f"{d}D" for d in self.input_dims)
            raise ValueError(f"{type(self).__name__} expects a {wanted} input, not {x.dim()}D")
        if x.shape[1] != self.num_features:
            raise ValueError(f"{type(self).__name__} expects {self.num_features} channels, not {x.shape[1]}")
        if not self.training:
            mu, s2 = self.test_statistics()
            return affine_normalize(x, mu, s2, *self._affine(x), self.eps)
        if x.numel() == 0:
            raise ValueError(f"{type(self).__name__} cannot take statistics of an empty batch")
        remember = self.phase == ("first", "second")[self.forwards - 1]
        if self.phase != "held" and self.forwards == 2:
            self._forgotten = not remember
            # is_compiling comes first: code that was compiled with a version would be compiled again for the next one.
            if not (torch.compiler.is_compiling() or remember or self.forward_versions) and torch.is_grad_enabled():
                self.forward_versions = self.versions()
        return self.normalize_training(x, remember)

    def _affine(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """gamma and beta in the statistics' precision, as torch's kernels need them for an x in half precision."""
        dtype = statistics_dtype(x.dtype)
        weight, bias = self.weight, self.bias
        return None if weight is None else weight.to(dtype), None if bias is None else bias.to(dtype)

    def versions(self) -> tuple[tuple[int, int], ...]:
        """Which tensors gamma and beta are, and how often each was written, as autograd counts it: their versions.

        Only of parameters: what stands in for one (under torch.func, or a parametrization) says nothing about the
        optimiser's step. Inference tensors have no version.
        """
        return tuple(
            (id(p), p._version)
            for p in (self.weight, self.bias)
            if isinstance(p, nn.Parameter) and not p.is_inference()
        )

    def train(self, mode: bool = True):
        if not mode and self._forgotten:
            self._forgotten = False
            _warn_forgotten()
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        kept = {name: getattr(self, name) for name in self.statistics}
        self.deferred = False  # its buffers are its own again
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            wide = statistics_dtype(after.dtype)
            if after.dtype != wide:
                # Cast the tensor from before: on the way through half precision it would lose bits.
                setattr(self, name, before.to(device=after.device, dtype=wide))
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.deferred = False  # a copy enters its batches on its own

    def extra_repr(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.settings)
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}, {shown}"


@functools.cache
def _warn_forgotten() -> None:
    """Warn only once in a process: otherwise every layer would warn about the same forgotten call."""
    warnings.warn(
        "eval() follows training forwards that remembered nothing (forwards=2), so evaluation uses statistics from "
        "before them: call second_forward(model, inputs) after each optimizer.step()",
        stacklevel=4,
    )


def norm_layers(module: nn.Module) -> list[BatchStatisticsNorm]:
    """All of our layers with batch statistics inside module, each once, in the order of registration."""
    return [layer for layer in module.modules() if isinstance(layer, BatchStatisticsNorm)]
