"""Batch renormalisation: BatchRenorm1d, 2d and 3d."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .base import BatchStatisticsNorm, Joint, check_number, is_trained, norm_layers
from .functional import average, batch_moments, move_averages, snapshot, statistics_dtype


class _BatchRenorm(BatchStatisticsNorm):
    r"""Batch normalisation corrected, within bounds, towards the moving averages that evaluation uses.

    Training, with sigma_B = sqrt(s2_B + eps), s2_B the batch's biased variance, and mu, sigma from before this update:

        r = stopgrad(clip(sigma_B / sigma, 1 / r_max, r_max))
        d = stopgrad(clip((mu_B - mu) / sigma, -d_max, d_max))
        y = gamma * ((x - mu_B) / sigma_B * r + d) + beta
        mu += momentum * (mu_B - mu);  sigma += momentum * (sigma_B - sigma)

    Evaluation: y = gamma * (x - mu) / sigma + beta. The first update copies mu_B and sigma_B: otherwise r and d would
    correct towards the initial 0 and 1. `set_renorm` changes r_max and d_max; 1 and 0 give batch norm. A batch whose
    mean or variance is not finite changes no average. With forwards=2 a layer that the network calls more than once in
    one `second_forward` takes all these batches in as one.

    Arguments:
        num_features: C, the number of channels.
        eps: added to the batch's variance, above 0.
        momentum: the share of the newest batch in the moving averages, in (0, 1].
        r_max, d_max: the bounds, r_max >= 1 and d_max >= 0.
        warmup_steps: the bounds are 1 and 0, which is batch norm, until the averages have taken in so many batches
            (counted on the device): for loops without a schedule, such as reinforcement learning's.
        forwards: 1, or 2 to update the averages in `second_forward` only.
        group_size: None, or N: mu_B, sigma_B, r and d are those of each group of N images. The averages move towards
            the mean over the groups of mu_B and sigma_B, weighted by their number of images.
        affine, bias: whether there are gamma (`weight`) and beta (`bias`).
        sync, process_group: True takes mu_B and s2_B over all processes in the group (default: of all).
        device, dtype: of the parameters; statistics have at least float32.

    State (in the state dict): `running_mean` (C,), `running_std` (C,), `num_batches_tracked` (), and r_max and d_max in
    `bounds` (2,) (state dicts without it leave them as they are). A BatchNorm's state dict loads too, with strict=True:
    running_std becomes sqrt(running_var + eps).

    Shapes: (N, C) or (N, C, L) for 1d, (N, C, H, W) for 2d, (N, C, D, H, W) for 3d; the output has the input's.

    Errors: ValueError for an impossible setting, an input of the wrong shape, or in training only one value a channel.
    RuntimeError where the statistics were cast to half precision, and with sync=True for second derivatives,
    `torch.func` and a process outside the group.

    Source: Ioffe, "Batch Renormalization", NeurIPS 2017, Algorithm 1.
    """

    statistics = ("running_mean", "running_std", "bounds")
    settings = ("momentum", "r_max", "d_max", "warmup_steps", "forwards", "group_size")
    scheduled = "bounds"

    running_std: Tensor
    num_batches_tracked: Tensor
    bounds: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        momentum: float = 0.01,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup_steps: int = 0,
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
        check_number("momentum", momentum, lambda: 0 < momentum <= 1, "in (0, 1]")
        check_number("warmup_steps", warmup_steps, lambda: warmup_steps >= 0, "at least 0")
        self.momentum = momentum
        self.warmup_steps = warmup_steps
        self.register_buffer("running_std", torch.ones(num_features, **self._like))
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device))
        # r_max and d_max in a tensor, so that a compiled or captured iteration uses new ones.
        self.register_buffer("bounds", torch.zeros(2, **self._like))
        self.set_bounds(r_max, d_max)

    @property
    def r_max(self) -> float:
        """The bound of r: it stays between 1 / r_max and r_max."""
        return self.scheduled_values()[0]

    @property
    def d_max(self) -> float:
        """The bound of d: it stays between -d_max and d_max."""
        return self.scheduled_values()[1]

    def set_bounds(self, r_max: float, d_max: float) -> None:
        """Set r_max >= 1 and d_max >= 0."""
        _check_bounds(r_max, d_max)
        self.set_scheduled_values(float(r_max), float(d_max))

    def _correction(self, mu: Tensor, sigma: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """r and d for a batch with mean mu and standard deviation sigma, from the averages mean and std."""
        r_max, d_max = self.bounds[0], self.bounds[1]
        if self.warmup_steps:
            warm = self.num_batches_tracked >= self.warmup_steps
            r_max, d_max = torch.where(warm, r_max, 1), torch.where(warm, d_max, 0)
        r = (sigma / std).clamp(r_max.reciprocal(), r_max)
        d = ((mu - mean) / std).clamp(-d_max, d_max)
        return r, d

    def normalize(self, x: Tensor, remember: bool, joint: Joint | None) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            # detach: no_grad does not stop forward-mode AD
            mu, s2 = batch_moments(x.detach()) if joint is None else (joint.mu, joint.s2)
            mean, std = self._for_each(x, self.running_mean), self._for_each(x, self.running_std)
            r, d = self._correction(mu, (s2 + self.eps).sqrt(), mean, std)
            if remember and not self.waits:  # this forward overwrites the averages that r and d come from
                r, d = snapshot(r, d)
        return self.renormalize(x, mu, s2, r, d, joint), mu, s2

    def together(self, mu: Tensor, s2: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, sigma, total = average(mu, (s2 + self.eps).sqrt(), n)
        return mean, sigma.square() - self.eps, total

    @torch.no_grad()
    def enter(self, mu: Tensor, s2: Tensor, n: int | Tensor) -> None:
        dtype = self.running_mean.dtype
        new = (mu.to(dtype), (s2.to(dtype) + self.eps).sqrt())
        move_averages((self.running_mean, self.running_std, self.num_batches_tracked), new, self.momentum)

    def test_statistics(self) -> tuple[Tensor, Tensor]:
        # The shared evaluation adds eps to a variance; sigma already has it inside.
        return self.running_mean, self.running_std.square() - self.eps

    @torch.no_grad()
    def set_test_statistics(self, mean: Tensor, variance: Tensor) -> None:
        self.running_mean.copy_(mean)
        self.running_std.copy_((variance + self.eps).sqrt())

    def normalizing(self, mu: Tensor, s2: Tensor, n: int | Tensor) -> tuple[Tensor, Tensor]:
        # y = ((x - mu_B) / sigma_B * r + d) = (x - (mu_B - d sigma_B / r)) / (sigma_B / r)
        sigma = (s2 + self.eps).sqrt()
        r, d = self._correction(mu, sigma, self.running_mean, self.running_std)
        return mu - d * sigma / r, sigma / r

    def reset_running_stats(self) -> None:
        """Put the averages back to mean 0 and standard deviation 1; the next batch is copied."""
        self.running_mean.zero_()
        self.running_std.fill_(1)
        self.num_batches_tracked.zero_()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Also load a BatchNorm's state, whose running_var holds a variance without eps."""
        variance, mean = state_dict.pop(prefix + "running_var", None), state_dict.get(prefix + "running_mean")
        if variance is not None:
            wide = variance.to(statistics_dtype(variance.dtype))
            state_dict[prefix + "running_std"] = (wide + self.eps).sqrt()
            if mean is not None:
                key = prefix + "num_batches_tracked"
                tracked = state_dict.get(key, torch.tensor(0, device=mean.device))  # older BatchNorms have none
                # If it stayed 0 with trained averages, the first update would overwrite these.
                state_dict[key] = tracked.clamp(min=int(is_trained(mean, variance, tracked)))
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
    check_number("r_max", (r_max, d_max), lambda: r_max >= 1 and d_max >= 0, "at least 1 and d_max at least 0")


def set_renorm(module: nn.Module, r_max: float, d_max: float) -> None:
    """Set r_max >= 1 and d_max >= 0 of every BatchRenorm inside module.

    Warns where module has no such layer. ValueError outside these bounds.
    """
    _check_bounds(r_max, d_max)
    layers = [layer for layer in norm_layers(module) if isinstance(layer, _BatchRenorm)]
    if not layers:
        warnings.warn('set_renorm found no BatchRenorm: call convert(model, norm="brn") before it', stacklevel=2)
        return
    first, *others = layers
    first.set_bounds(r_max, d_max)
    # Few kernel launches in all, and no copy from the host: the schedule changes them at every iteration.
    alike: list[Tensor] = []
    for layer in others:
        if (layer.bounds.device, layer.bounds.dtype) == (first.bounds.device, first.bounds.dtype):
            layer.known = first.known
            alike.append(layer.bounds)
        else:
            layer.set_bounds(r_max, d_max)
    if alike:
        torch._foreach_copy_(alike, [first.bounds] * len(alike))
