"""The equations of batch, memorized batch and batch re-normalisation as functions of tensors.

Letters follow the paper: x input, mu and s2 (sigma squared) mean and biased variance over all but the channel
dimension, a hat for the statistics that normalise, n the number of values a channel's statistics were taken over.
Every x is (N, C) or (N, C, *spatial); every statistic is (C,), in at least float32.

Each normalisation stands here twice: as a formula that autograd differentiates and `torch.compile` fuses, and as an
`autograd.Function` around torch's own batch-norm kernels, which is faster without a compiler. Tests compare both
with the same float64 reference.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision statistics are computed and kept in: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def per_channel(statistic: Tensor, x: Tensor) -> Tensor:
    """View a (C,) tensor so that it broadcasts over x of shape (N, C, *spatial)."""
    return statistic.view(1, -1, *(1,) * (x.dim() - 2))


def has_native_kernels(x: Tensor) -> bool:
    """Whether to call torch's batch-norm kernels for x. When the code is compiled, the formula is better."""
    return x.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling()


def snapshot(*statistics: Tensor) -> tuple[Tensor, ...]:
    """The same values, for a forward that overwrites the buffers of these statistics before its backward runs.

    In a compiled graph AOTAutograd computes cheap values again in the backward, from the buffers as they are by then
    (pytorch#197039: wrong gradients without an error). It never computes a concatenation again.
    """
    if not torch.compiler.is_compiling():
        return statistics
    parts = torch.cat([s.flatten() for s in statistics]).split([s.numel() for s in statistics])
    return tuple(part.view(s.shape) for part, s in zip(parts, statistics, strict=True))


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel mean mu_B and biased variance s2_B of x, in at least float32. Differentiable if x needs gradients."""
    x = x.to(statistics_dtype(x.dtype))
    if has_native_kernels(x) and not (torch.is_grad_enabled() and x.requires_grad):
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    return _Moments.apply(x)


class _Moments(torch.autograd.Function):
    """mu_B and s2_B in one pass over x; backward dx = dmu / n + (x - mu) ds2 2 / n, in one pass too.

    Autograd alone would also differentiate s2 through mu. That term is a sum over x that is exactly zero.
    """

    @staticmethod
    def forward(ctx, x):
        s2, mu = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        ctx.save_for_backward(x, mu)
        return mu, s2

    @staticmethod
    def backward(ctx, dmu, ds2):
        x, mu = ctx.saved_tensors
        n = values_per_channel(x)
        return per_channel(dmu / n, x) + (x - per_channel(mu, x)) * per_channel(ds2 * (2 / n), x)


def values_per_channel(x: Tensor) -> int:
    """n = N * H * W, the number of values that each channel's statistics are taken over."""
    return x.numel() // x.shape[1]


def pool(mu: Tensor, s2: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pool the moments of several batches into those of their weighted union (eq. 6).

        w = sum weight_i;  m = sum weight_i mu_i / w;  v = sum weight_i ((mu_i - m)**2 + s2_i) / w

    mu, s2: (k, C), the batches' means and biased variances; weight: (k,), alpha_i n_i, zero for an entry that is not
    there. Returns m (C,), v (C,) and w (). At least one weight must be positive.
    """
    w = weight.sum()
    share = (weight / w)[:, None]
    m = (share * mu).sum(0)
    v = (share * ((mu - m).square() + s2)).sum(0)
    return m, v, w


def memorized_moments(mu: Tensor, s2: Tensor, n: int, m: Tensor, v: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The moments that normalise a batch together with its memory (eq. 6), and the batch's share of them.

        rho  = n / (n + W)
        mu^  = mu + (1 - rho) (m - mu)
        s2^  = rho s2 + (1 - rho) v + rho (1 - rho) (mu - m)**2

    mu, s2, n: the current batch's moments and number of values; m, v: the pooled memory; W = lambda w its weight, ().
    W = 0 gives the batch's own moments exactly. Returns mu^ (C,), s2^ (C,), rho ().
    """
    rho = n / (n + W)
    rest = W / (n + W)
    mu_hat = mu + rest * (m - mu)
    s2_hat = rho * s2 + rest * v + rho * rest * (mu - m).square()
    return mu_hat, s2_hat, rho


def affine_normalize(
    x: Tensor, mu: Tensor, s2: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """y = gamma (x - mu) / sqrt(s2 + eps) + beta (eq. 7) with given statistics, in x's dtype."""
    if has_native_kernels(x):
        return F.batch_norm(x, mu, s2, weight, bias, False, 0.0, eps)
    scale = (s2 + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    # Not x * scale + shift, which loses digits by cancellation where a channel varies little about a large mean.
    y = (x.to(scale.dtype) - per_channel(mu, x)) * per_channel(scale, x)
    if bias is not None:
        y = y + per_channel(bias, x)
    return y.to(x.dtype)


def memorized_batch_norm(
    x: Tensor,
    m: Tensor,
    v: Tensor,
    W: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Memorized batch normalisation with the paper's gradient: the memory is constant, the batch's moments are not.

    Arguments as in `memorized_moments` and eq. 7. Returns y and, for the memory, the batch's own mu and s2 (detached).
    Backward, where xhat is the normalised x and means run over the batch:
        dx = gamma / sigma^ * (dy - rho mean(dy) - rho xhat mean(dy xhat))
    """
    if has_native_kernels(x):
        return _PaperGradient.apply(x, m, v, W, weight, bias, eps)
    mu, s2 = batch_moments(x)
    mu_hat, s2_hat, _ = memorized_moments(mu, s2, values_per_channel(x), m, v, W)
    return affine_normalize(x, mu_hat, s2_hat, weight, bias, eps), mu.detach(), s2.detach()


class _PaperGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, m, v, W, weight, bias, eps):
        mu, s2 = batch_moments(x)
        mu_hat, s2_hat, rho = memorized_moments(mu, s2, values_per_channel(x), m, v, W)
        ctx.save_for_backward(x, weight, mu_hat, s2_hat, rho)
        ctx.eps = eps
        ctx.mark_non_differentiable(mu, s2)
        return affine_normalize(x, mu_hat, s2_hat, weight, bias, eps), mu, s2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, _dmu, _ds2):
        x, weight, mu_hat, s2_hat, rho = ctx.saved_tensors
        invstd = (s2_hat + ctx.eps).rsqrt()
        # Batch norm's backward has both correction terms whole. rho times it, plus 1 - rho times the term without
        # corrections, is the paper's gradient with its misprints corrected.
        dx, dweight, dbias = _batch_norm_backward(dy, x, weight, mu_hat, invstd)
        scale = invstd if weight is None else weight * invstd
        dx = dx.mul_(rho.to(dx.dtype)).addcmul_(dy, per_channel((scale * (1 - rho)).to(dx.dtype), dx))
        return dx, None, None, None, *_wanted(ctx, 4, dweight, dbias), None


def renormalized_batch_norm(
    x: Tensor,
    mu: Tensor,
    s2: Tensor,
    r: Tensor,
    d: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """y = gamma ((x - mu_B) / sigma_B * r + d) + beta, with r and d constant and sigma_B = sqrt(s2_B + eps).

    mu and s2 must be x's own moments from `batch_moments`, detached. Gradients still flow through these moments.
    Batch renormalisation has this form (Ioffe 2017, algorithm 1), and so has MBN with gradient="batch", where
    r = sigma_B / sigma^ and d = (mu_B - mu^) / sigma^. Backward, where xhat_B is x normalised by the batch alone:
        dx = gamma r / sigma_B * (dy - mean(dy) - xhat_B mean(dy xhat_B))
    """
    if has_native_kernels(x):
        return _RenormalizedBatchNorm.apply(x, mu, s2, r, d, weight, bias, eps)
    mu, s2 = batch_moments(x)
    scale, shift = _renormalized_affine(r, d, weight, bias)
    return affine_normalize(x, mu, s2, scale, shift, eps)


class _RenormalizedBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mu, s2, r, d, weight, bias, eps):
        ctx.save_for_backward(x, mu, s2, r, d, weight)
        ctx.eps = eps
        scale, shift = _renormalized_affine(r, d, weight, bias)
        return affine_normalize(x, mu, s2, scale, shift, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, mu, s2, r, d, weight = ctx.saved_tensors
        scale = r if weight is None else weight * r
        dx, dscale, dshift = _batch_norm_backward(dy, x, scale, mu, (s2 + ctx.eps).rsqrt())
        return dx, None, None, None, None, *_wanted(ctx, 5, dscale * r + dshift * d, dshift), None


def _renormalized_affine(r: Tensor, d: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """gamma (xhat r + d) + beta as one affine map of xhat: its scale and its shift."""
    scale = r if weight is None else weight * r
    shift = d if weight is None else weight * d
    return scale, shift if bias is None else shift + bias


def _wanted(ctx, first: int, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs from position first on; None for one that needs none, such as an absent weight."""
    wanted = ctx.needs_input_grad[first:]
    return tuple(g if w else None for g, w in zip(gradients, wanted, strict=False))


def _batch_norm_backward(dy: Tensor, x: Tensor, weight: Tensor | None, mu: Tensor, invstd: Tensor):
    """torch's training-mode batch-norm backward about any mean and inverse standard deviation: dx, dweight, dbias."""
    # Without a weight use ones, because the kernel for half precision wants one in float32. dweight is then unused.
    weight = torch.ones_like(invstd) if weight is None else weight
    return torch.ops.aten.native_batch_norm_backward(
        dy, x, weight, None, None, mu, invstd, True, 0.0, [True, True, True]
    )
