"""Batch renormalisation: BatchRenorm1d, 2d and 3d."""

import warnings

import torch
from torch import Tensor, nn

from .base import BatchStatisticsNorm, norm_layers
from .functional import batch_moments, renormalized_batch_norm, snapshot


class _BatchRenorm(BatchStatisticsNorm):
    r"""Batch normalisation corrected, within bounds, towards the moving averages that evaluation uses.

    Training, with sigma_B = sqrt(s2_B + eps), s2_B the batch's biased variance, and mu, sigma from before this update:

        r = stopgrad(clip(sigma_B / sigma, 1 / r_max, r_max))
        d = stopgrad(clip((mu_B - mu) / sigma, -d_max, d_max))
        y = gamma * ((x - mu_B) / sigma_B * r + d) + beta
        mu += momentum * (mu_B - mu);  sigma += momentum * (sigma_B - sigma)

    Evaluation: y = gamma * (x - mu) / sigma + beta. The first update copies mu_B and sigma_B: otherwise r and d would
    correct towards the initial 0 and 1. `set_renorm` changes r_max and d_max; 1 and 0 give batch norm.

    Arguments:
        num_features: C, the number of channels.
        eps: added to the batch's variance.
        momentum: the share of the newest batch in the moving averages, in (0, 1].
        affine: whether there are gamma (`weight`) and beta (`bias`).
        r_max, d_max: the bounds, r_max >= 1 and d_max >= 0. Like lambda they are settings, not state.
        forwards: 1, or 2 to update the averages in `second_forward` only.

    State: `running_mean` (C,), `running_std` (C,), `num_batches_tracked` (). A BatchNorm's state dict loads too, with
    strict=True: running_std becomes sqrt(running_var + eps).

    Shapes: (N, C) or (N, C, L) for 1d, (N, C, H, W) for 2d, (N, C, D, H, W) for 3d; the output has the input's.

    Errors: ValueError for an impossible setting or an input of the wrong shape.

    Source: Ioffe, "Batch Renormalization", NeurIPS 2017, Algorithm 1.
    """

    statistics = ("running_mean", "running_std", "bounds")
    settings = ("momentum", "r_max", "d_max", "forwards")

    running_std: Tensor
    num_batches_tracked: Tensor
    bounds: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.01,
        affine: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        forwards: int = 1,
    ) -> None:
        super().__init__(num_features, eps, affine, forwards)
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], not {momentum!r}")
        self.momentum = momentum
        self.register_buffer("running_std", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        # r_max and d_max in a tensor, so that a compiled or captured iteration uses new ones.
        self.register_buffer("bounds", torch.zeros(2), persistent=False)
        self.set_bounds(r_max, d_max)

    def set_bounds(self, r_max: float, d_max: float) -> None:
        """Set r_max >= 1 and d_max >= 0."""
        _check_bounds(r_max, d_max)
        self.r_max, self.d_max = float(r_max), float(d_max)
        self.bounds[0].fill_(self.r_max)
        self.bounds[1].fill_(self.d_max)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        if not self.bounds.is_meta:
            self.set_bounds(self.r_max, self.d_max)
        return self

    def _correction(self, mu: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """r and d for a batch with mean mu and standard deviation sigma, from the current averages."""
        r_max, d_max = self.bounds[0], self.bounds[1]
        r = (sigma / self.running_std).clamp(r_max.reciprocal(), r_max)
        d = ((mu - self.running_mean) / self.running_std).clamp(-d_max, d_max)
        return r, d

    def normalize_training(self, x: Tensor, remember: bool) -> Tensor:
        weight, bias = self._affine(x)
        with torch.no_grad():
            mu, s2 = batch_moments(x)
            sigma = (s2 + self.eps).sqrt()
            r, d = self._correction(mu, sigma)
            if remember:  # this forward overwrites the averages that r and d come from
                r, d = snapshot(r, d)
        y = renormalized_batch_norm(x, mu, s2, r, d, weight, bias, self.eps)
        if remember:
            self.remember(mu, sigma)
        return y

    @torch.no_grad()
    def remember(self, mu: Tensor, sigma: Tensor) -> None:
        """Move the averages towards one batch's mean and standard deviation (C,); the very first are copied."""
        first = self.num_batches_tracked == 0
        for average, value in ((self.running_mean, mu), (self.running_std, sigma)):
            average.copy_(torch.where(first, value, average + self.momentum * (value - average)))
        if not self.deferred:
            self.num_batches_tracked.add_(1)

    def test_statistics(self) -> tuple[Tensor, Tensor]:
        # The shared evaluation adds eps to a variance; sigma already has it inside.
        return self.running_mean, self.running_std.square() - self.eps

    @torch.no_grad()
    def set_test_statistics(self, mean: Tensor, variance: Tensor) -> None:
        self.running_mean.copy_(mean)
        self.running_std.copy_((variance + self.eps).sqrt())

    @torch.no_grad()
    def training_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # y = ((x - mu_B) / sigma_B * r + d) = (x - (mu_B - d sigma_B / r)) / (sigma_B / r)
        mu, s2 = batch_moments(x)
        sigma = (s2 + self.eps).sqrt()
        r, d = self._correction(mu, sigma)
        return mu - d * sigma / r, sigma / r

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Also load a BatchNorm's state, whose running_var holds a variance without eps."""
        variance = state_dict.pop(prefix + "running_var", None)
        if variance is not None:
            state_dict[prefix + "running_std"] = (variance.to(self.running_std.dtype) + self.eps).sqrt()
            # Older BatchNorms have no counter. If it were 0, the first update would overwrite their averages.
            state_dict.setdefault(prefix + "num_batches_tracked", torch.tensor(1))
        super()._load_from_state_dict(state_dict, prefix, *args)


class BatchRenorm1d(_BatchRenorm):
    __doc__ = _BatchRenorm.__doc__
    input_dims = (2, 3)


class BatchRenorm2d(_BatchRenorm):
    __doc__ = _BatchRenorm.__doc__
    input_dims = (4,)


class BatchRenorm3d(_BatchRenorm):
    __doc__ = _BatchRenorm.__doc__
    input_dims = (5,)


def _check_bounds(r_max: float, d_max: float) -> None:
    if not (r_max >= 1 and d_max >= 0):
        raise ValueError(f"r_max must be at least 1 and d_max at least 0, not {r_max!r} and {d_max!r}")


def set_renorm(module: nn.Module, r_max: float, d_max: float) -> None:
    """Set r_max >= 1 and d_max >= 0 of every BatchRenorm inside module.

    Warns where module has no such layer. ValueError outside these bounds.
    """
    _check_bounds(r_max, d_max)
    layers = [layer for layer in norm_layers(module) if isinstance(layer, _BatchRenorm)]
    for layer in layers:
        layer.r_max, layer.d_max = float(r_max), float(d_max)
    if not layers:
        warnings.warn('set_renorm found no BatchRenorm: call convert(model, norm="brn") before it', stacklevel=2)
    else:  # three kernel launches in all, and no copy from the host: the schedule changes them at every iteration
        layers[0].set_bounds(r_max, d_max)
        torch._foreach_copy_([layer.bounds for layer in layers], [layers[0].bounds] * len(layers))
