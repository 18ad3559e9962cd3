"""Batch normalisation whose moving averages can wait for the second forward: BatchNorm1d, 2d and 3d."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import BatchStatisticsNorm, Joint, check_number
from .functional import average, joint_batch_norm, statistics_dtype


class _BatchNorm(BatchStatisticsNorm):
    r"""torch's batch normalisation, with a choice of the forward pass that updates its moving averages.

    Training:    y = gamma * (x - mu_B) / sqrt(s2_B + eps) + beta, with the batch's mean and biased variance;
                 running_mean += momentum * (mu_B - running_mean), the same for running_var with the unbiased variance.
    Evaluation:  the same y with running_mean and running_var.

    With forwards=1 this is `torch.nn.BatchNorm1d/2d/3d`, with the same kernels and state dict. With forwards=2 the
    moving averages are updated by `second_forward(model, inputs)` only (Guo et al. 2018, "BN-2" of Figure 1).

    Arguments:
        num_features: C, the number of channels.
        eps: added to the variance, above 0.
        momentum: the share of the newest batch in the moving averages, in [0, 1]; None for the mean of all batches.
        forwards: 1 or 2.
        group_size: None, or N: mu_B and s2_B are those of each group of N images. The averages move towards the mean
            over the groups of their means and unbiased variances, weighted by their number of images.
        affine, bias: whether there are gamma (`weight`) and beta (`bias`).
        sync, process_group: True takes mu_B and s2_B over all processes in the group (default: of all).
        device, dtype: of the parameters; statistics have at least float32.

    State: that of torch's layer, whose state dicts load, also those without `num_batches_tracked`.

    Shapes: (N, C) or (N, C, L) for 1d, (N, C, H, W) for 2d, (N, C, D, H, W) for 3d; the output has the input's.

    Errors: ValueError for an impossible setting, an input of the wrong shape, or in training only one value a channel.
    RuntimeError where the statistics were cast to half precision, and with sync=True for second derivatives,
    `torch.func` and a process outside the group.

    Source: Ioffe and Szegedy, "Batch Normalization", ICML 2015, as torch implements it.
    """

    statistics = ("running_mean", "running_var")
    settings = ("momentum", "forwards", "group_size")
    uses_what_it_remembers = False

    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        momentum: float | None = 0.1,
        forwards: int = 1,
        group_size: int | None = None,
        affine: bool = True,
        bias: bool = True,
        sync: bool | None = None,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, bias, forwards, group_size, sync, process_group, device, dtype)
        check_number("momentum", momentum, lambda: momentum is None or 0 <= momentum <= 1, "in [0, 1] or None")
        self.momentum = momentum
        self.register_buffer("running_var", torch.ones(num_features, **self._like))
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device))

    def normalize_empty(self, x: Tensor, remember: bool) -> Tensor:
        return self.normalize_training(x, remember, None)  # torch counts it too

    def normalize_training(self, x: Tensor, remember: bool, joint: Joint | None) -> Tensor:
        weight, bias = self._affine(x)
        if joint is not None:
            mu, s2, n, group = joint
            if remember:
                self.take(mu, s2 * (n / (n - 1)), n)
            return joint_batch_norm(x, mu, s2, 1 / n, weight, bias, self.eps, group)
        # Without buffers there is nothing to update. Momentum 0 would not be enough: 0 * NaN is NaN.
        mean, var = (self.running_mean, self.running_var) if remember else (None, None)
        momentum = self._share_of_newest() if remember else 0.0
        if remember:  # before the averages move, as in torch: under torch.func it may raise
            self._count()
        return F.batch_norm(x, mean, var, weight, bias, True, momentum, self.eps)

    def normalize(self, x: Tensor, remember: bool, joint: Joint | None) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = self._affine(x)
        mean = x.new_zeros(x.shape[1], dtype=statistics_dtype(x.dtype))
        variance = mean.clone()
        # At momentum 1 it writes into them the batch's mean and unbiased variance.
        return F.batch_norm(x, mean, variance, weight, bias, True, 1.0, self.eps), mean, variance

    def together(self, mu: Tensor, s2: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return average(mu, s2, n)

    def take(self, mu: Tensor, s2: Tensor, n: int | Tensor) -> None:
        self._move_averages(mu, s2)
        self._count()

    def _share_of_newest(self) -> float:
        return self.momentum if self.momentum is not None else 1 / (float(self.num_batches_tracked) + 1)

    @torch.no_grad()
    def _move_averages(self, mean: Tensor, variance: Tensor) -> None:
        share = self._share_of_newest()
        for moving, value in ((self.running_mean, mean), (self.running_var, variance)):
            moving.lerp_(value.to(moving.dtype), share)

    def _count(self) -> None:
        if not self.deferred:
            self.num_batches_tracked.add_(1)

    def test_statistics(self) -> tuple[Tensor, Tensor]:
        return self.running_mean, self.running_var

    @torch.no_grad()
    def set_test_statistics(self, mean: Tensor, variance: Tensor) -> None:
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)

    def normalizing(self, mu: Tensor, s2: Tensor, n: int | Tensor) -> tuple[Tensor, Tensor]:
        return mu, (s2 + self.eps).sqrt()

    def reset_running_stats(self) -> None:
        """Put the averages back to mean 0 and variance 1."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Also load a state without a counter, as older BatchNorms have: the own one stays."""
        mean, key = state_dict.get(prefix + "running_mean"), prefix + "num_batches_tracked"
        if mean is not None and key not in state_dict:
            own = self.num_batches_tracked
            state_dict[key] = torch.tensor(0, device=mean.device) if own.is_meta else own.clone()
        super()._load_from_state_dict(state_dict, prefix, *args)


class BatchNorm1d(_BatchNorm):
    __doc__ = _BatchNorm.__doc__
    input_dims = (2, 3)


class BatchNorm2d(_BatchNorm):
    __doc__ = _BatchNorm.__doc__
    input_dims = (4,)


class BatchNorm3d(_BatchNorm):
    __doc__ = _BatchNorm.__doc__
    input_dims = (5,)
