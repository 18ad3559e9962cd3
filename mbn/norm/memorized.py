"""Memorized batch normalisation: MemorizedBatchNorm1d, 2d and 3d."""

import contextlib
import warnings
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from .base import BatchStatisticsNorm, Joint, check_number, is_trained, norm_layers, whole
from .functional import (
    as_values,
    batch_moments,
    enter_batch,
    is_capturing,
    joint_batch_norm,
    memorized_batch_norm,
    memorized_moments,
    pool,
    snapshot,
    statistics_dtype,
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
    `running_mean` and `running_var` as they were initialised (0 and 1) or loaded from a BatchNorm's state dict. Those
    of a trained BatchNorm enter the memory with the first batch that is remembered, see pretrained_batches.

    With forwards=2 (the paper's double forward) only `second_forward(model, inputs)` remembers a batch, one entry a
    call, also where the network calls the layer more than once; with forwards=1 every training forward remembers its
    own. A batch whose mean or variance is not finite is not remembered.

    Arguments:
        num_features: C, the number of channels.
        eps: added to the variance, above 0.
        memory: k, how many batches are remembered.
        decay: eta in (0, 1]. Every newer batch multiplies a remembered batch's weight by eta.
        lam: lambda in [0, 1], the memory's weight; `set_lambda` changes it during training.
        gradient: "paper" differentiates through mu^ and s2^ with the memory constant. This keeps only the batch's share
            rho = n_B / (n_B + W), W = lambda sum eta**a_i n_i, of batch norm's two correction terms. "batch" (ours, not
            the paper's) gives the same y and keeps both terms whole: the memory's correction is a constant, like batch
            renormalisation's r and d. With sigma = sqrt(s2 + eps), xhat = (x - mu^) / sigma^,
            xhat_B = (x - mu_B) / sigma_B and means over B:
                paper: dx = gamma / sigma^ * (dy - rho mean(dy) - rho xhat mean(dy xhat))
                batch: dx = gamma / sigma^ * (dy - mean(dy) - xhat_B mean(dy xhat_B))
        forwards: 1 or 2.
        group_size: None, or N: the images of a batch are cut into groups of N, and B above is each group. One entry a
            batch is remembered, the moments and the n of all groups together.
        pretrained_batches: the statistics of a trained BatchNorm count as so many batches of the n of the first batch
            that is remembered; 0 leaves them out of the memory.
        affine, bias: whether there are gamma (`weight`) and beta (`bias`).
        sync, process_group: True takes n, mu and s2 over the batches of all processes in the group (default: of all).
        device, dtype: of the parameters; statistics have at least float32.

    State (in the state dict): `memory_mean`, `memory_var` (k, C) and `memory_count` (k,), where row a holds the batch
    of age a, a count of 0 marks an empty row, and one of -B statistics that count as B batches; their pool
    `running_mean`, `running_var` (C,), which evaluation uses; the pool's weight `memory_weight` (1,) = sum eta**a n
    (state dicts with shape () load too); lambda, `lam_tensor` () (state dicts without it leave lambda as it is). Of a
    state dict in float16 whose weight has overflowed only the pool is loaded, as that of a trained BatchNorm.

    Shapes: (N, C) or (N, C, L) for 1d, (N, C, H, W) for 2d, (N, C, D, H, W) for 3d; the output has the input's.

    Errors: ValueError for an impossible setting, an input of the wrong shape, or in training one value a channel where
    its gradient would be 0: with gradient="batch", lambda 0 or an empty memory (compiled or captured code refuses it
    always). RuntimeError where the statistics were cast to half precision, and with sync=True for second derivatives,
    `torch.func` and a process outside the group.

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
    settings = ("memory", "decay", "lam", "gradient", "forwards", "group_size", "pretrained_batches")
    scheduled = "lam_tensor"

    running_var: Tensor
    memory_mean: Tensor
    memory_var: Tensor
    memory_count: Tensor
    memory_weight: Tensor
    lam_tensor: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        memory: int = 20,
        decay: float = 0.9,
        lam: float = 0.1,
        gradient: str = "paper",
        forwards: int = 2,
        group_size: int | None = None,
        pretrained_batches: float = 10,
        affine: bool = True,
        bias: bool = True,
        sync: bool | None = None,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, bias, forwards, group_size, sync, process_group, device, dtype)
        check_number("memory", memory, lambda: whole(memory) >= 1, "a whole number of at least 1")
        self.memory = whole(memory)
        check_number("decay", decay, lambda: 0 < decay <= 1, "in (0, 1]")
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient must be 'paper' or 'batch', not {gradient!r}")
        check_number("pretrained_batches", pretrained_batches, lambda: 0 <= pretrained_batches < inf, "at least 0")
        self.decay = decay
        self.gradient = gradient
        self.pretrained_batches = pretrained_batches
        self.register_buffer("running_var", torch.ones(num_features, **self._like))
        self.register_buffer("memory_mean", torch.zeros(self.memory, num_features, **self._like))
        self.register_buffer("memory_var", torch.zeros(self.memory, num_features, **self._like))
        self.register_buffer("memory_count", torch.zeros(self.memory, **self._like))
        # Not of shape (): torch 2.11 drops what a compiled function writes into a float64 scalar on the CPU.
        self.register_buffer("memory_weight", torch.zeros(1, **self._like))
        # A tensor, so that a compiled or captured iteration uses a new lambda without being compiled or captured again.
        self.register_buffer("lam_tensor", torch.zeros((), **self._like))
        self.lam = lam

    @property
    def lam(self) -> float:
        """lambda, the memory's weight. The current batch has weight 1."""
        return self.scheduled_values()[0]

    @lam.setter
    def lam(self, value: float) -> None:
        check_number("lambda", value, lambda: 0 <= value <= 1, "in [0, 1]")
        self.set_scheduled_values(float(value))

    def _weight_beside(self, n: int | Tensor) -> Tensor:
        """W = lambda w (1,), the memory's weight beside a batch of n values."""
        return self.lam_tensor * as_values(self.memory_weight, n)

    def normalize(self, x: Tensor, remember: bool, joint: Joint | None) -> tuple[Tensor, Tensor, Tensor]:
        n: int | Tensor = values_per_channel(x) if joint is None else joint.n
        m, v, W = self.running_mean, self.running_var, self._weight_beside(n)
        if remember and not self.waits:  # this forward overwrites them
            m, v, W = snapshot(m, v, W)
        m, v = self._for_each(x, m), self._for_each(x, v)
        if self.gradient == "paper":
            weight, bias = self._affine(x)
            if joint is None:
                y, mu, s2 = memorized_batch_norm(x, m, v, W, weight, bias, self.eps)
            else:
                mu, s2 = joint.mu, joint.s2
                mu_hat, s2_hat, rho = memorized_moments(mu, s2, n, m, v, W)
                y = joint_batch_norm(x, mu_hat, s2_hat, rho / n, weight, bias, self.eps, joint.group)
        else:
            with torch.no_grad():
                # detach: no_grad does not stop forward-mode AD
                mu, s2 = batch_moments(x.detach()) if joint is None else (joint.mu, joint.s2)
                mu_hat, s2_hat, _ = memorized_moments(mu, s2, n, m, v, W)
                inv_hat = (s2_hat + self.eps).rsqrt()
                r = (s2 + self.eps).sqrt() * inv_hat
                d = (mu - mu_hat) * inv_hat
            y = self.renormalize(x, mu, s2, r, d, joint)
        return y, mu, s2

    def together(self, mu: Tensor, s2: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return pool(mu, s2, n)

    def check_single_value(self, x: Tensor) -> None:
        if self.gradient == "paper" and not torch.compiler.is_compiling() and not is_capturing(x):
            with contextlib.suppress(RuntimeError):  # under a transform there is nothing to read
                if float(self._weight_beside(1)) > 0:
                    return
        super().check_single_value(x)

    def powers(self) -> Tensor:
        """eta**a, (k, 1), for each entry's age a."""
        like = self.memory_mean
        return (self.decay ** torch.arange(self.memory, device=like.device, dtype=like.dtype))[:, None]

    @torch.no_grad()
    def enter(self, mu: Tensor, s2: Tensor, n: int | Tensor) -> None:
        like = self.memory_mean
        count = n.to(like).reshape(1) if isinstance(n, Tensor) else like.new_full((1,), n)
        memory = (self.memory_mean, self.memory_var, self.memory_count[:, None])
        pooled = (self.running_mean, self.running_var, self.memory_weight)
        enter_batch((*memory, *pooled), (mu.to(like.dtype), s2.to(like.dtype), count), self.powers())

    def test_statistics(self) -> tuple[Tensor, Tensor]:
        return self.running_mean, self.running_var

    @torch.no_grad()
    def set_test_statistics(self, mean: Tensor, variance: Tensor) -> None:
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)

    def normalizing(self, mu: Tensor, s2: Tensor, n: int | Tensor) -> tuple[Tensor, Tensor]:
        W = self._weight_beside(n)
        mu_hat, s2_hat, _ = memorized_moments(mu, s2, n, self.running_mean, self.running_var, W)
        return mu_hat, (s2_hat + self.eps).sqrt()

    def forget(self) -> None:
        """Empty the memory and put the test statistics back to mean 0 and variance 1."""
        for name in ("memory_mean", "memory_var", "memory_count", "memory_weight", "running_mean"):
            getattr(self, name).zero_()
        self.running_var.fill_(1)
        if self.origin is not None:
            self.origin.__dict__["num_batches_tracked"] = 0

    reset_running_stats = forget

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Also load a BatchNorm's state: its running statistics wait in the memory if it was trained."""
        weight = state_dict.get(prefix + "memory_weight")
        if weight is not None and weight.dtype == torch.float16 and not weight.is_meta and not weight.isfinite().all():
            # Saved in float16, which ends at 65,504: numbers of values are lost, the pool is not.
            for name in ("memory_mean", "memory_var", "memory_count", "memory_weight"):
                state_dict.pop(prefix + name, None)
        mean, var = state_dict.get(prefix + "running_mean"), state_dict.get(prefix + "running_var")
        if mean is not None and var is not None and prefix + "memory_mean" not in state_dict:
            tracked = state_dict.pop(prefix + "num_batches_tracked", None)
            like = {"device": mean.device, "dtype": statistics_dtype(mean.dtype)}
            count = torch.zeros(self.memory, **like)
            trained = self.pretrained_batches > 0 and is_trained(mean, var, tracked)
            if trained:
                count[0] = -self.pretrained_batches
            for name, value in (("memory_mean", mean), ("memory_var", var)):
                state_dict[prefix + name] = torch.zeros(self.memory, self.num_features, **like)
                if trained:
                    state_dict[prefix + name][0] = value
            state_dict[prefix + "memory_count"], state_dict[prefix + "memory_weight"] = count, count[:1].clone()
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
