"""Batch normalisation whose moving averages can wait for the second forward: BatchNorm1d, 2d and 3d."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import BatchStatisticsNorm
from .functional import batch_moments


class _BatchNorm(BatchStatisticsNorm):
    r"""torch's batch normalisation, with a choice of the forward pass that updates its moving averages.

    Training:    y = gamma * (x - mu_B) / sqrt(s2_B + eps) + beta, with the batch's mean and biased variance;
                 running_mean += momentum * (mu_B - running_mean), the same for running_var with the unbiased variance.
    Evaluation:  the same y with running_mean and running_var.

    With forwards=1 this is `torch.nn.BatchNorm1d/2d/3d`, with the same kernels and state dict. With forwards=2 the
    moving averages are updated by `second_forward(model, inputs)` only (Guo et al. 2018, "BN-2" of Figure 1).

    Arguments:
        num_features: C, the number of channels.
        eps: added to the variance.
        momentum: the share of the newest batch in the moving averages, in (0, 1].
        affine: whether there are gamma (`weight`) and beta (`bias`).
        forwards: 1 or 2.

    Shapes: (N, C) or (N, C, L) for 1d, (N, C, H, W) for 2d, (N, C, D, H, W) for 3d; the output has the input's.

    Errors: ValueError for an impossible setting, an input of the wrong shape, or in training only one value a channel.

    Source: Ioffe and Szegedy, "Batch Normalization", ICML 2015, as torch implements it.
    """

    statistics = ("running_mean", "running_var")
    settings = ("momentum", "forwards")

    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        forwards: int = 1,
    ) -> None:
        super().__init__(num_features, eps, affine, forwards)
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], not {momentum!r}")
        self.momentum = momentum
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def normalize_training(self, x: Tensor, remember: bool) -> Tensor:
        weight, bias = self._affine(x)
        # Without buffers there is nothing to update. Momentum 0 would not be enough: 0 * NaN is NaN.
        mean, var = (self.running_mean, self.running_var) if remember else (None, None)
        y = F.batch_norm(x, mean, var, weight, bias, True, self.momentum, self.eps)
        if remember and not self.deferred:
            self.num_batches_tracked.add_(1)
        return y

    def test_statistics(self) -> tuple[Tensor, Tensor]:
        return self.running_mean, self.running_var

    @torch.no_grad()
    def set_test_statistics(self, mean: Tensor, variance: Tensor) -> None:
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)

    @torch.no_grad()
    def training_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, s2 = batch_moments(x)
        return mu, (s2 + self.eps).sqrt()


class BatchNorm1d(_BatchNorm):
    __doc__ = _BatchNorm.__doc__
    input_dims = (2, 3)


class BatchNorm2d(_BatchNorm):
    __doc__ = _BatchNorm.__doc__
    input_dims = (4,)


class BatchNorm3d(_BatchNorm):
    __doc__ = _BatchNorm.__doc__
    input_dims = (5,)
