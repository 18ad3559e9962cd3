"""One of our layers for one of torch's, and back."""

from typing import Any

from torch import nn

from .base import BatchStatisticsNorm
from .batch import _BatchNorm
from .convert_activation import ACTIVATION, what_follows
from .convert_attributes import cannot_carry, carry_parameters, more_attributes
from .freeze import require_gradients_again
from .functional import statistics_dtype
from .memorized import _MemorizedBatchNorm

TORCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# A SyncBatchNorm does not know how many dimensions its inputs have.
ANY_DIMS = (2, 3, 4, 5)


def to_ours(
    what: str,
    old: Any,
    layers: tuple[type[Any], ...],
    settings: dict[str, Any],
    sync: bool | None,
    process_group: Any,
) -> BatchStatisticsNorm:
    """The layer that is to take old's place, with all that is old's except the hooks. old stays as it is.

    what: old's name in the network; layers: those for BatchNorm1d, 2d and 3d. TypeError if no layer can.
    """
    kind = type(old).__name__

    def refuse(problem: str) -> TypeError:
        return TypeError(f"{what}, a {kind}, cannot be converted: it {problem}")

    otherwise = f"convert(model, replace={{{kind}: function}}) says what takes its place"
    problem = _why_not_ours(old, sync, otherwise) or cannot_carry(old, STATISTICS, otherwise)
    if problem is not None:
        raise refuse(problem)
    of_any_dims = isinstance(old, nn.SyncBatchNorm)
    ours = layers[1] if of_any_dims else next(b for a, b in zip(TORCH, layers, strict=True) if isinstance(old, a))
    dims = ANY_DIMS if of_any_dims else ours.input_dims
    try:
        follows = what_follows(old, dims)
    except Exception as error:
        raise refuse(f"cannot be copied and tried ({error}): {otherwise}") from error
    if follows is None:
        raise refuse(f"does more than batch norm, and what it does is not known: {otherwise}")

    if issubclass(ours, _BatchNorm) and "momentum" not in settings:
        if old.momentum is not None and not 0 <= old.momentum <= 1:
            raise refuse(f"has momentum={old.momentum!r}, which must be in [0, 1] or None: set it before")
        settings = {"momentum": old.momentum, **settings}
    mean = old.running_mean
    new = ours(
        len(mean),  # which torch trusts, and not num_features
        eps=old.eps,
        affine=False,
        sync=sync,
        process_group=old.process_group if of_any_dims and process_group is None else process_group,
        device=mean.device,
        dtype=mean.dtype,
        **settings,
    )
    if of_any_dims:
        new.input_dims = dims
    children, new.followed_by = follows
    more = more_attributes(old, (nn.SyncBatchNorm if of_any_dims else nn.BatchNorm2d)(1))
    taken = [name for name in (*children, *more) if hasattr(new, name)]
    if taken:
        raise refuse(f"has an attribute {taken[0]!r}, which means something else in a {ours.__name__}: {otherwise}")
    new.affine, new.training = old.affine, old.training
    carry_parameters(old, new)
    state = {name: old._buffers[name] for name in STATISTICS if old._buffers[name] is not None}
    new._load_from_state_dict(state, "", {}, False, [], [], [])
    new._modules.update(children)
    new.__dict__.update(more, origin=_without_tensors(old))
    return new


def _why_not_ours(old: Any, sync: bool | None, otherwise: str) -> str | None:
    """What stands against a layer of ours in old's place, as a sentence without its subject."""
    if isinstance(old, nn.modules.lazy.LazyModuleMixin):
        return "is lazy and has no channels yet: run the network once before"
    if not isinstance(old, (*TORCH, nn.SyncBatchNorm)):
        return f"is of a class that convert does not know: {otherwise}"
    if isinstance(old, nn.SyncBatchNorm) and not sync:
        return "takes its statistics over all processes: convert(model, sync=True) makes layers that do so too"
    if not old.track_running_stats or old.running_mean is None or old.running_var is None:
        return (
            "has no running statistics and evaluates by the batch's own, which our layers never do: give it "
            f"track_running_stats=True, or {otherwise}"
        )
    if not old.eps > 0:
        return f"has eps={old.eps!r}, which must be above 0: set it before"
    own = (old.weight, old.bias, old.running_var)
    if any(t is not None and t.shape != old.running_mean.shape for t in own):
        return f"has parameters and statistics of different shapes: {otherwise}"
    return None


def _without_tensors(old: Any) -> nn.Module:
    """Of old: its class, settings and how many batches it has seen; for the way back."""
    shell = old.__class__.__new__(old.__class__)
    nn.Module.__init__(shell)
    names = ("num_features", "eps", "momentum", "affine", "track_running_stats")
    tracked = old.num_batches_tracked
    seen = 0 if tracked is None or tracked.is_meta else int(tracked)
    shell.__dict__.update({name: vars(old)[name] for name in names}, num_batches_tracked=seen)
    return shell


def check_for_torch(what: str, layer: BatchStatisticsNorm) -> None:
    """Raise TypeError if no layer of torch can take the place of this one, whose name is what."""
    problem = cannot_carry(layer, (*layer.statistics, "num_batches_tracked"), "take it off before")
    if problem is None and type(layer).forward is not BatchStatisticsNorm.forward:
        problem = "has a forward of its own, which a BatchNorm has not: let a module hold the layer and do the rest"
    if problem is not None:
        raise TypeError(f"{what}, a {type(layer).__name__}, cannot become a BatchNorm: it {problem}")


def to_torchs(old: Any, ours: type[Any], torchs: type[Any], wide: dict[nn.Parameter, nn.Parameter]) -> nn.Module:
    """The layer of torch that is to take the place of old, which is of class ours. old must not be used any more.

    torchs: the BatchNorm for its number of dimensions, if old was not converted from another. wide: for parameters in
    half precision the same in float32.
    """
    if old.frozen:  # which a BatchNorm cannot be; it stays in eval mode until train() is called
        require_gradients_again(old)
    new: Any = old.origin if old.origin is not None else torchs(1, affine=False)
    mean, var = old.test_statistics()
    seen = new.__dict__.pop("num_batches_tracked", 0)
    memorized = isinstance(old, _MemorizedBatchNorm)
    tracked = (old.memory_count > 0).sum() + seen if memorized else old.num_batches_tracked
    if isinstance(old, _BatchNorm):
        new.momentum = old.momentum
    if isinstance(new, nn.SyncBatchNorm):
        new.process_group = old.process_group
    new.num_features, new.eps, new.affine, new.training = old.num_features, old.eps, old.affine, old.training
    carry_parameters(old, new)
    dtype = mean.dtype
    for name, p in new._parameters.items():
        if p is not None:
            dtype = statistics_dtype(p.dtype)
            if p.dtype != dtype:  # a BatchNorm's kernel takes statistics in float32 with such parameters alone
                new._parameters[name] = wide.setdefault(p, nn.Parameter(p.detach().to(dtype), p.requires_grad))
    for name, value in zip(STATISTICS, (mean.to(dtype), var.to(dtype), tracked), strict=True):
        new._buffers[name] = value
    new._modules.update({name: child for name, child in old._modules.items() if name != ACTIVATION})
    new.__dict__.update(more_attributes(old, ours(1)))
    return new
