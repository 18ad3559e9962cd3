"""The equations of batch, memorized batch and batch re-normalisation as functions of tensors.

Letters follow the paper: x input, mu and s2 (sigma squared) mean and biased variance over all but the channel
dimension, a hat for the statistics that normalise, n the number of values a channel's statistics were taken over.
Every x is (N, C) or (N, C, *spatial); every statistic is (C,), in at least float32.

Each normalisation of one process's batches stands here twice: as a formula that autograd differentiates and
`torch.compile` fuses, and as an `autograd.Function` around torch's own batch-norm kernels, which is faster without a
compiler. Tests compare both with the same float64 reference. Second derivatives (create_graph=True), `torch.func` and
forward-mode AD always differentiate the formula.

The functions named joint take a group of processes, whose batches are normalised as one. They stand here once, and have
no second derivatives.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.autograd import forward_ad

# torch 2.14 has renamed it.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision statistics are computed and kept in: float32, or float64 for float64 inputs."""
    if dtype.is_complex:  # torch's kernels say that they do not take it
        return dtype
    return torch.float64 if dtype == torch.float64 else torch.float32  # torch.promote_types stays in exported graphs


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype), of which nothing stays in exported graphs where it has this dtype."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def is_exporting() -> bool:
    """Whether `torch.export` traces the code, alone or for ONNX."""
    return getattr(torch.compiler, "is_exporting", lambda: False)()  # torch 2.6 lacks it


def per_channel(statistic: Tensor, x: Tensor) -> Tensor:
    """View a (C,) tensor so that it broadcasts over x of shape (N, C, *spatial)."""
    return statistic.view(1, -1, *(1,) * (x.dim() - 2))


def has_native_kernels(x: Tensor) -> bool:
    """Whether to call torch's batch-norm kernels for x. When the code is compiled, the formula is better."""
    return not torch.compiler.is_compiling() and x.device.type in ("cpu", "cuda") and not is_transformed()


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode AD is at work, which know nothing of our Functions."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, in which no value of x can be read."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def snapshot(*statistics: Tensor) -> tuple[Tensor, ...]:
    """The same values, for a forward that overwrites the buffers of these statistics before its backward runs.

    In a compiled graph AOTAutograd computes cheap values again in the backward, from the buffers as they are by then
    (pytorch#197039: wrong gradients without an error). It never computes a concatenation again, unless it is set to
    save memory. There torch.compile leaves the layer as it is, and with fullgraph=True this raises RuntimeError.
    """
    saves_memory = functorch_config.activation_memory_budget < 1 or functorch_config.aggressive_recomputation
    if not torch.compiler.is_compiling():
        return tuple(s.clone() for s in statistics) if saves_memory else statistics
    if saves_memory:
        raise RuntimeError(
            "torch._functorch.config computes activations again in the backward pass, when this layer's statistics "
            "are others: leave activation_memory_budget at 1 and aggressive_recomputation at False, or use "
            "convert(..., forwards=2) and second_forward"
        )
    parts = torch.cat([s.flatten() for s in statistics]).split([s.numel() for s in statistics])
    return tuple(part.view(s.shape) for part, s in zip(parts, statistics, strict=True))


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel mean mu_B and biased variance s2_B of x, in at least float32. Differentiable if x needs gradients."""
    x = x.to(statistics_dtype(x.dtype))
    if is_transformed():  # in compiled code too
        s2, mu = torch.var_mean(x, _all_but_channels(x), correction=0)
        return mu, s2
    if has_native_kernels(x) and not (torch.is_grad_enabled() and x.requires_grad):
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    return _Moments.apply(x)


class _Moments(torch.autograd.Function):
    """mu_B and s2_B in one pass over x; backward dx = dmu / n + (x - mu) ds2 2 / n, in one pass too.

    Autograd alone would also differentiate s2 through mu. That term is a sum over x that is exactly zero.
    """

    @staticmethod
    def forward(ctx, x):
        s2, mu = torch.var_mean(x, _all_but_channels(x), correction=0)
        ctx.save_for_backward(x, mu)
        return mu, s2

    @staticmethod
    def backward(ctx, dmu, ds2):
        x, mu = ctx.saved_tensors
        n = values_per_channel(x)
        return per_channel(dmu / n, x) + (x - per_channel(mu, x)) * per_channel(ds2 * (2 / n), x)


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


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


def average(mu: Tensor, spread: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted means over several batches: sum weight_i mu_i / w, sum weight_i spread_i / w, and w. As `pool`."""
    w = weight.sum()
    share = (weight / w)[:, None]
    return (share * mu).sum(0), (share * spread).sum(0), w


def side_by_side(x: Tensor, groups: int) -> Tensor:
    """Groups of x's images as channels of their own: (groups g, C, *spatial) to (g, groups C, *spatial)."""
    if groups == 1:
        return x
    if x.stride(1) == 1:  # channels last, as the result is then
        return x.movedim(1, -1).unflatten(0, (groups, -1)).movedim(0, -2).flatten(-2).movedim(-1, 1)
    return x.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)


def one_after_another(y: Tensor, groups: int, channels_last: bool) -> Tensor:
    """The way back from `side_by_side`."""
    if groups == 1:
        return y
    if channels_last:
        return y.movedim(1, -1).unflatten(-1, (groups, -1)).movedim(-2, 0).flatten(0, 1).movedim(-1, 1)
    return y.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)


def in_one_layout(x: Tensor) -> Tensor:
    """x; of a single image (1, C, *spatial) on a CPU, for whose values gradients are wanted, (1, C, pixels).

    torch's kernels take the strides of x and of the gradient of y for those of one layout. Those of a single image fit
    several, and then the gradients are wrong, without an error, in nn.BatchNorm too (torch 2.6 to 2.14).
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # it would depend on the number of images
        return x
    single = x.dim() > 3 and x.shape[0] == 1 and x.device.type == "cpu" and torch.is_grad_enabled()
    return x.flatten(2) if single else x


def in_its_layout(y: Tensor, x: Tensor) -> Tensor:
    """The way back from `in_one_layout`, to the shape of x, and with channels last where x has them so."""
    if y.dim() == x.dim():
        return y
    y = y.unflatten(2, x.shape[2:])
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return y.clone(memory_format=last) if x.stride(1) == 1 else y


def as_values(count: Tensor, n: int | Tensor) -> Tensor:
    """count as numbers of values: one of -B, of statistics that a BatchNorm brought along, means B batches of n values.

    Done without asking whether there is one, because other code writes these buffers too (DistributedDataParallel,
    loaders).
    """
    if isinstance(n, int):
        return F.leaky_relu(count, -n)  # the same in one operation
    return torch.maximum(count, count * -n) + 0  # 0. and not -0., which looks strange in a memory


def enter_batch(
    memory: tuple[Tensor, ...],
    new: tuple[Tensor, Tensor, Tensor],
    powers: Tensor,
    owner: Tensor | None = None,
) -> None:
    """Enter a batch as the entry of age 0 into the memories of L layers with C channels together, in place.

    memory: mean, var (k, C) and count (k, L), the entries, the newest first; their pools m, v (C,) and w (L,). new: the
    batch's mean and biased variance (C,) and its n (L,). powers: (k, 1), eta**a. owner: (C,), the layer of each
    channel; None for one layer.

    A layer whose batch is not finite keeps what it has, without the host being asked. A count below 0 stands for that
    many batches of the new one's n.
    """
    mean, var, count, m, v, w = memory
    new_mean, new_var, n = new
    of_layers, of_channels = _finite(new_mean, new_var, n, owner)
    next_mean = torch.cat([new_mean[None], mean[:-1]])
    next_var = torch.cat([new_var[None], var[:-1]])
    next_count = torch.cat([n[None], as_values(count, n)[:-1]])
    weight = powers * next_count
    next_w = weight.sum(0)
    share = weight / next_w
    if owner is not None:
        share = share[:, owner]
    next_m = (share * next_mean).sum(0)
    next_v = (share * ((next_mean - next_m).square() + next_var)).sum(0)
    for buffer, value in ((mean, next_mean), (var, next_var), (m, next_m), (v, next_v)):
        _put(buffer, of_channels, value)
    for buffer, value in ((count, next_count), (w, next_w)):
        _put(buffer, of_layers, value)


def move_averages(
    averages: tuple[Tensor, Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    momentum: float,
    owner: Tensor | None = None,
) -> None:
    """Move the moving averages of L layers with C channels together towards a batch, in place.

        mean += momentum (new mean - mean);  std += momentum (new std - std);  the very first batch is copied

    averages: mean, std (C,) and how many batches they have seen, (L,); one layer without owner has () or (1,). owner
    as in `enter_batch`.
    A layer whose batch is not finite keeps what it has.
    """
    mean, std, tracked = averages
    of_layers, of_channels = _finite(*new, mean.new_zeros(tracked.shape), owner)
    first = tracked == 0
    if owner is not None:
        first = first[owner]
    for average, value in zip((mean, std), new, strict=True):
        _put(average, of_channels, torch.where(first, value, average + momentum * (value - average)))
    tracked.add_(of_layers)


def _put(buffer: Tensor, chosen: Tensor, value: Tensor) -> None:
    """Write value into buffer where chosen."""
    if torch.compiler.is_compiling() or is_transformed():
        buffer.copy_(torch.where(chosen, value, buffer))
    else:  # one operation instead of two
        torch.where(chosen, value, buffer, out=buffer)


def _finite(mu: Tensor, s2: Tensor, like: Tensor, owner: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which layers have finite statistics in all channels: for each layer (the shape of like), and for each channel.

    A mean counts as infinite where the pool could not square its distance from another such mean.
    """
    total = torch.addcmul(s2, mu, mu, value=4)
    finite = total - total == 0
    if owner is None:
        finite = finite.all()
        return finite, finite
    of_layers = torch.ones_like(like).scatter_reduce(0, owner, finite.to(like.dtype), "amin") > 0
    return of_layers, of_layers[owner]


def memorized_moments(
    mu: Tensor, s2: Tensor, n: int | Tensor, m: Tensor, v: Tensor, W: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The moments that normalise a batch together with its memory (eq. 6), and the batch's share of them.

        rho  = n / (n + W)
        mu^  = mu + (1 - rho) (m - mu)
        s2^  = rho s2 + (1 - rho) v + rho (1 - rho) (mu - m)**2

    mu, s2, n: the current batch's moments and number of values; m, v: the pooled memory; W = lambda w its weight, (1,).
    W = 0 gives the batch's own moments exactly, whatever m and v are. Returns mu^ (C,), s2^ (C,), rho (1,).
    """
    total = n + W
    rho, rest = n / total, W / total
    # 0 * NaN and 0 * inf would be NaN; s2 is inf where x is about 1e20. rest is 0 there: for a 0 torch makes a tensor.
    counts = rest > 0
    m, v = torch.where(counts, m, mu), torch.where(counts, v, rest)
    delta = m - mu
    # As few operations as they take: where they are not compiled, each is a kernel to launch.
    mu_hat = torch.addcmul(mu, rest, delta)
    s2_hat = torch.addcmul(rho * s2, rest, torch.addcmul(v, rho * delta, delta))
    return mu_hat, s2_hat, rho


def affine_normalize(
    x: Tensor, mu: Tensor, s2: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """y = gamma (x - mu) / sqrt(s2 + eps) + beta (eq. 7) with given statistics, in x's dtype."""
    if has_native_kernels(x):
        return F.batch_norm(x, mu, s2, weight, bias, False, 0.0, eps)
    return _affine_formula(x, mu, s2, weight, bias, eps)


def _affine_formula(
    x: Tensor, mu: Tensor, s2: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    scale = (s2 + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    # Not x * scale + shift, which loses digits by cancellation where a channel varies little about a large mean.
    y = (x.to(scale.dtype) - per_channel(mu, x)) * per_channel(scale, x)
    if bias is not None:
        y = y + per_channel(bias, x)
    # Where there is nothing to cast, torch 2.11's compiler takes y and y.to(x.dtype) for two outputs of a Function, and
    # gives the gradient of one to the other.
    return y if y.dtype == x.dtype else y.to(x.dtype)


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
        ctx.set_materialize_grads(False)  # no tensors of zeros for the gradients of mu and s2
        return affine_normalize(x, mu_hat, s2_hat, weight, bias, eps), mu, s2

    @staticmethod
    def backward(ctx, dy, _dmu, _ds2):
        if dy is None:
            return 7 * (None,)
        x, weight, mu_hat, s2_hat, rho = ctx.saved_tensors
        if torch.is_grad_enabled():
            moments = _about_the_memory(x, mu_hat, s2_hat, rho)
            dx, *affine = _gradient_formula(dy, x, weight, *moments, rho / values_per_channel(x), ctx.eps)
            return dx, None, None, None, *_wanted(ctx, 4, *affine), None
        invstd = (s2_hat + ctx.eps).rsqrt()
        # Batch norm's backward has both correction terms whole. rho times it, plus 1 - rho times the term without
        # corrections, is the paper's gradient with its misprints corrected. As dx is linear in gamma, and the other
        # gradients do not depend on it, rho gamma in place of gamma spares a pass over dx.
        whole = _ones_if_none(weight, invstd)
        part = rho * whole
        dx, dweight, dbias = _batch_norm_backward(dy, x, part, mu_hat, invstd)
        dx.addcmul_(dy, per_channel((whole - part) * invstd, dx))
        return dx, None, None, None, *_wanted(ctx, 4, dweight, dbias), None


def _about_the_memory(x: Tensor, mu_hat: Tensor, s2_hat: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    """mu^ and s2^ as functions of x that can be differentiated, from their values: the memory may have moved on.

    With delta = m - mu: mu^ = rho mu + constant, s2^ = rho s2 + rho (1 - rho) delta**2 + constant.
    """
    mu, s2 = batch_moments(x)
    moved_mu, moved_s2 = mu - mu.detach(), s2 - s2.detach()  # 0, with the gradients of mu and s2
    rest = 1 - rho
    delta = torch.where(rest > 0, (mu_hat - mu.detach()) / rest, 0)
    square = (delta - moved_mu).square() - delta.square()
    return mu_hat + rho * moved_mu, s2_hat + rho * moved_s2 + rho * rest * square


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
    def backward(ctx, dy):
        x, mu, s2, r, d, weight = ctx.saved_tensors
        scale = r if weight is None else weight * r
        if torch.is_grad_enabled():
            got = _gradient_formula(dy, x, scale, *batch_moments(x), 1 / values_per_channel(x), ctx.eps)
        else:
            got = _batch_norm_backward(dy, x, scale, mu, (s2 + ctx.eps).rsqrt())
        dx, dscale, dshift = got
        return dx, None, None, None, None, *_wanted(ctx, 5, dscale * r + dshift * d, dshift), None


def _renormalized_affine(r: Tensor, d: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """gamma (xhat r + d) + beta as one affine map of xhat: its scale and its shift."""
    scale = r if weight is None else weight * r
    shift = d if weight is None else weight * d
    return scale, shift if bias is None else shift + bias


def joint_moments(x: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """mu, s2 (C,) and n (1,) of all processes' x together, without gradients. A process's x may be empty.

    Moments are gathered and pooled; sums of squares would lose digits. One message of 2 C + 1 numbers.
    """
    with torch.no_grad():
        n = values_per_channel(x)
        if n > 0:
            mu, s2 = batch_moments(x)
        else:
            mu = s2 = torch.zeros(x.shape[1], device=x.device, dtype=statistics_dtype(x.dtype))
        mu, s2, n_joint = pool(*gathered(mu, s2, mu.new_full((1,), n), group))
        return mu, s2, n_joint.reshape(1)


def gathered(mu: Tensor, s2: Tensor, n: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """mu, s2 (C,) and n (1,) of every process: (processes, C) twice, and (processes,). One message."""
    own = torch.cat([mu, s2, n])
    every = own.new_empty(dist.get_world_size(group) * len(own))
    _all_gather(every, own, group=group)
    mus, s2s, ns = every.view(-1, len(own)).split([len(mu), len(mu), 1], 1)
    return mus, s2s, ns[:, 0]


def joint_batch_norm(
    x: Tensor,
    mu: Tensor,
    s2: Tensor,
    share: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group: Any,
    r: Tensor | None = None,
    d: Tensor | None = None,
) -> Tensor:
    """y = gamma ((x - mu) / sqrt(s2 + eps) * r + d) + beta with statistics of all processes in group; r = 1, d = 0.

    Backward, where sums run over the joint batch: gradients flow through its moments to every process's x, with the
    given share of batch norm's corrections, (1,): 1 / n for its whole gradient, rho / n for the paper's.
        dx = gamma r / sqrt(s2 + eps) * (dy - share sum(dy) - share xhat sum(dy xhat))
    Gradients of weight and bias are those of this process, as for every other parameter. One message of 2 C numbers.
    """
    return _JointBatchNorm.apply(x, mu, s2, share, weight, bias, eps, group, r, d)


class _JointBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mu, s2, share, weight, bias, eps, group, r, d):
        ctx.save_for_backward(x, mu, s2, share, weight, r, d)
        ctx.eps, ctx.group = eps, group
        scale, shift = (weight, bias) if r is None else _renormalized_affine(r, d, weight, bias)
        return affine_normalize(x, mu, s2, scale, shift, eps)

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():
            raise RuntimeError("sync=True has no second derivatives: call backward without create_graph")
        x, mu, s2, share, weight, r, d = ctx.saved_tensors
        scale = weight if r is None else _renormalized_affine(r, d, weight, None)[0]
        invstd = (s2 + ctx.eps).rsqrt()
        if x.numel() > 0:
            _, *both = _batch_norm_backward(dy, x, scale, mu, invstd, wants_dx=False)
        else:  # the kernel takes no empty tensor; from dy, so that a compiler leaves the message in the backward
            both = 2 * [dy.to(mu.dtype).sum(_all_but_channels(dy))]
        own = torch.stack(both)
        sums = own.clone()
        dist.all_reduce(sums, group=ctx.group)
        dx = dy
        if x.numel() > 0:
            factor = invstd if scale is None else scale * invstd
            a, b = -share * sums * factor
            dx = affine_normalize(x, mu, s2, a, b, ctx.eps).addcmul_(dy, per_channel(factor, dy))
        dscale, dshift = own
        dweight = dscale if r is None else dscale * r + dshift * d
        return dx, None, None, None, *_wanted(ctx, 4, dweight, dshift), None, None, None, None


def _wanted(ctx, first: int, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs from position first on; None for one that needs none, such as an absent weight."""
    return tuple(g if ctx.needs_input_grad[i] else None for i, g in enumerate(gradients, first))


def _gradient_formula(
    dy: Tensor,
    x: Tensor,
    scale: Tensor | None,
    mu: Tensor,
    s2: Tensor,
    share: float | Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dscale and dshift of y = scale (x - mu) / sqrt(s2 + eps) + shift, in operations that autograd differentiates.

    share: of batch norm's corrections in dx, as in `joint_batch_norm`.
    """
    invstd = (s2 + eps).rsqrt()
    dy, xhat = dy.to(mu.dtype), (x.to(mu.dtype) - per_channel(mu, x)) * per_channel(invstd, x)
    dims = _all_but_channels(x)
    dscale, dshift = (dy * xhat).sum(dims), dy.sum(dims)
    a, b = (per_channel(share * each, x) for each in (dscale, dshift))
    dx = (dy - b - xhat * a) * per_channel(invstd if scale is None else scale * invstd, x)
    return dx.to(x.dtype), dscale, dshift


def _ones_if_none(weight: Tensor | None, like: Tensor) -> Tensor:
    """gamma, which is 1 where there is none."""
    return torch.ones_like(like) if weight is None else weight


def _batch_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mu: Tensor, invstd: Tensor, wants_dx: bool = True
):
    """torch's training-mode batch-norm backward about any mean and inverse standard deviation: dx, dweight, dbias.

    dx is None where it is not wanted.
    """
    # The kernel for half precision wants a weight in float32. dweight is unused where there is none.
    weight = _ones_if_none(weight, invstd)
    return torch.ops.aten.native_batch_norm_backward(
        dy, x, weight, None, None, mu, invstd, True, 0.0, [wants_dx, True, True]
    )
