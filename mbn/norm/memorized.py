"""Memorized batch normalisation: MemorizedBatchNorm1d, 2d and 3d."""

import warnings

import torch
from torch import Tensor, nn

from .base import BatchStatisticsNorm, norm_layers
from .functional import (
    batch_moments,
    memorized_batch_norm,
    memorized_moments,
    pool,
    renormalized_batch_norm,
    snapshot,
    values_per_channel,
)

GRADIENTS = ("paper", "batch")


class _MemorizedBatchNorm(BatchStatisticsNorm):
    r"""Normalise by the pooled statistics of the current batch and of the last k remembered ones.

    Training, for the current batch B and remembered batches i of age a_i (0 is the newest), with n values each:

        alpha_B = 1,  alpha_i = lambda * eta**a_i                              (eq. 8)
        mu^ = sum alpha n mu / sum alpha n                                     (eq. 6)
        s2^ = sum alpha n ((mu - mu^)**2 + s2) / sum alpha n
        y   = gamma * (x - mu^) / sqrt(s2^ + eps) + beta                       (eq. 7)

    Evaluation uses the pool of the memory alone, with weights eta**a_i. While the memory is empty it uses
    `running_mean` and `running_var` as they were initialised (0 and 1) or loaded from a BatchNorm's state dict.

    With forwards=2 (the paper's double forward) only `second_forward(model, inputs)` remembers a batch; with
    forwards=1 every training forward remembers its own.

    Arguments:
        num_features: C, the number of channels.
        memory: k, how many batches are remembered.
        decay: eta in (0, 1]. Every newer batch multiplies a remembered batch's weight by eta.
        eps: added to the variance.
        affine: whether there are gamma (`weight`) and beta (`bias`).
        lam: lambda in [0, 1], the memory's weight; `set_lambda` changes it during training. Not in the state dict.
        forwards: 1 or 2.
        gradient: "paper" differentiates through mu^ and s2^ with the memory constant. This keeps only the batch's share
            rho = n_B / (n_B + W) of batch norm's two correction terms. "batch" (ours, not the paper's) gives the same y
            and keeps both terms whole: the memory's correction is a constant, like batch renormalisation's r and d.

    State (in the state dict): `memory_mean`, `memory_var` (k, C) and `memory_count` (k,), where row a holds the batch
    of age a, and a count of 0 marks an empty row; their pool `running_mean`, `running_var` (C,), which evaluation uses;
    the pool's weight `memory_weight` (1,) = sum eta**a n (state dicts with shape () load too).

    Shapes: (N, C) or (N, C, L) for 1d, (N, C, H, W) for 2d, (N, C, D, H, W) for 3d; the output has the input's.

    Errors: ValueError for an impossible setting, or an input of the wrong shape.

    Source: Guo et al., "Double Forward Propagation for Memorized Batch Normalization", AAAI 2018.
    """

    statistics = (
        "running_mean",
        "running_var",
        "memory_mean",
        "memory_var",
        "memory_count",
        "memory_weight",
        "lam_tensor",
    )
    settings = ("memory", "decay", "lam", "forwards", "gradient")

    running_var: Tensor
    memory_mean: Tensor
    memory_var: Tensor
    memory_count: Tensor
    memory_weight: Tensor
    lam_tensor: Tensor
    # What a forward leaves for `AllMemories`: the batch's mean, biased variance and number of values (0: no batch).
    noted_mean: Tensor
    noted_var: Tensor
    noted_count: int

    def __init__(
        self,
        num_features: int,
        memory: int = 20,
        decay: float = 0.9,
        eps: float = 1e-5,
        affine: bool = True,
        lam: float = 0.1,
        forwards: int = 2,
        gradient: str = "paper",
    ) -> None:
        super().__init__(num_features, eps, affine, forwards)
        if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
            raise ValueError(f"memory must be a whole number of at least 1, not {memory!r}")
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be in (0, 1], not {decay!r}")
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient must be 'paper' or 'batch', not {gradient!r}")
        self.memory = memory
        self.decay = decay
        self.gradient = gradient
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("memory_mean", torch.zeros(memory, num_features))
        self.register_buffer("memory_var", torch.zeros(memory, num_features))
        self.register_buffer("memory_count", torch.zeros(memory))
        # Not of shape (): torch 2.11 drops what a compiled function writes into a float64 scalar on the CPU.
        self.register_buffer("memory_weight", torch.zeros(1))
        # A tensor, so that a compiled or captured iteration uses a new lambda without being compiled or captured again.
        self.register_buffer("lam_tensor", torch.zeros(()), persistent=False)
        self.lam = lam
        self.noted_count = 0

    @property
    def lam(self) -> float:
        """lambda, the memory's weight. The current batch has weight 1."""
        return self._lam

    @lam.setter
    def lam(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise ValueError(f"lambda must be in [0, 1], not {value!r}")
        self._lam = float(value)
        self.lam_tensor.fill_(self._lam)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        if not self.lam_tensor.is_meta:
            self.lam_tensor.fill_(self._lam)  # in float64 it would otherwise keep float32's rounding of 0.1
        return self

    def normalize_training(self, x: Tensor, remember: bool) -> Tensor:
        weight, bias = self._affine(x)
        m, v, W = self.running_mean, self.running_var, self.lam_tensor * self.memory_weight
        if remember and not self.deferred:  # this forward overwrites them
            m, v, W = snapshot(m, v, W)
        if self.gradient == "paper":
            y, mu, s2 = memorized_batch_norm(x, m, v, W, weight, bias, self.eps)
        else:
            with torch.no_grad():
                mu, s2 = batch_moments(x)
                mu_hat, s2_hat, _ = memorized_moments(mu, s2, values_per_channel(x), m, v, W)
                inv_hat = (s2_hat + self.eps).rsqrt()
                r = (s2 + self.eps).sqrt() * inv_hat
                d = (mu - mu_hat) * inv_hat
            y = renormalized_batch_norm(x, mu, s2, r, d, weight, bias, self.eps)
        if remember:
            self.remember(mu, s2, values_per_channel(x))
        return y

    @torch.no_grad()
    def remember(self, mu: Tensor, s2: Tensor, n: int) -> None:
        """Enter one batch's mean and biased variance (C,) over n values as age 0; the oldest entry leaves.

        In an `AllMemories`, which train.py uses, the batch is only noted here: `Memories.enter` in memories.py enters
        it by the same rule, for all layers at once. Who changes the rule changes both.
        """
        if self.deferred:
            self.noted_mean.copy_(mu)
            self.noted_var.copy_(s2)
            self.noted_count = n
            return
        dtype = self.memory_mean.dtype
        self.memory_mean.copy_(torch.cat([mu.to(dtype)[None], self.memory_mean[:-1]]))
        self.memory_var.copy_(torch.cat([s2.to(dtype)[None], self.memory_var[:-1]]))
        self.memory_count.copy_(torch.cat([self.memory_count.new_full((1,), n), self.memory_count[:-1]]))
        age = torch.arange(self.memory, device=mu.device, dtype=dtype)
        m, v, w = pool(self.memory_mean, self.memory_var, self.decay**age * self.memory_count)
        self.running_mean.copy_(m)
        self.running_var.copy_(v)
        self.memory_weight.copy_(w)

    def test_statistics(self) -> tuple[Tensor, Tensor]:
        return self.running_mean, self.running_var

    @torch.no_grad()
    def set_test_statistics(self, mean: Tensor, variance: Tensor) -> None:
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)

    @torch.no_grad()
    def training_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, s2 = batch_moments(x)
        W = self.lam_tensor * self.memory_weight
        mu_hat, s2_hat, _ = memorized_moments(mu, s2, values_per_channel(x), self.running_mean, self.running_var, W)
        return mu_hat, (s2_hat + self.eps).sqrt()

    def forget(self) -> None:
        """Empty the memory and put the test statistics back to mean 0 and variance 1."""
        for name in ("memory_mean", "memory_var", "memory_count", "memory_weight", "running_mean"):
            getattr(self, name).zero_()
        self.running_var.fill_(1)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Also load a BatchNorm's state: evaluation uses its running statistics, and the memory starts empty."""
        if prefix + "running_mean" in state_dict and prefix + "memory_mean" not in state_dict:
            for name in ("memory_mean", "memory_var", "memory_count", "memory_weight"):
                state_dict[prefix + name] = torch.zeros_like(getattr(self, name))
            state_dict.pop(prefix + "num_batches_tracked", None)
        weight = state_dict.get(prefix + "memory_weight")
        if weight is not None:  # of shape () in older state dicts
            state_dict[prefix + "memory_weight"] = weight.reshape(self.memory_weight.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


class MemorizedBatchNorm1d(_MemorizedBatchNorm):
    __doc__ = _MemorizedBatchNorm.__doc__
    input_dims = (2, 3)


class MemorizedBatchNorm2d(_MemorizedBatchNorm):
    __doc__ = _MemorizedBatchNorm.__doc__
    input_dims = (4,)


class MemorizedBatchNorm3d(_MemorizedBatchNorm):
    __doc__ = _MemorizedBatchNorm.__doc__
    input_dims = (5,)


def set_lambda(module: nn.Module, value: float) -> None:
    """Set lambda, in [0, 1], of every MemorizedBatchNorm inside module; the memories are kept.

    The paper's schedule: 0.1, then 0.5 and 0.9 from 40 % and 60 % of training. Warns where module has no such layer.
    ValueError outside [0, 1].
    """
    layers = [layer for layer in norm_layers(module) if isinstance(layer, _MemorizedBatchNorm)]
    if not layers:
        warnings.warn("set_lambda found no MemorizedBatchNorm: call convert(model) before it", stacklevel=2)
    for layer in layers:
        layer.lam = value
