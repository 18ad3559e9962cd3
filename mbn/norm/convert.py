"""Exchange the BatchNorm layers of any network for ours, and back."""

import copy
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .base import BatchStatisticsNorm
from .batch import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNorm
from .memorized import MemorizedBatchNorm1d, MemorizedBatchNorm2d, MemorizedBatchNorm3d
from .renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d

# For each norm: the layers that replace BatchNorm1d, 2d and 3d.
NORMS: dict[str, tuple[type[BatchStatisticsNorm], ...]] = {
    "mbn": (MemorizedBatchNorm1d, MemorizedBatchNorm2d, MemorizedBatchNorm3d),
    "brn": (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d),
    "bn": (BatchNorm1d, BatchNorm2d, BatchNorm3d),
}
TORCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# What changes a setting of layers that are there already; other settings need new layers.
SETTERS = {"lam": "set_lambda changes it", "r_max": "set_renorm changes it", "d_max": "set_renorm changes it"}


def norm_of(layer: nn.Module) -> str | None:
    """The norm that a layer of ours belongs to; None for another layer."""
    return next((norm for norm, layers in NORMS.items() if isinstance(layer, layers)), None)


def convert(module: nn.Module, norm: str = "mbn", **settings: Any) -> nn.Module:
    """Exchange every `nn.BatchNorm1d/2d/3d` inside module for a layer of ours, in place, and return module.

    The new layers hold the very same parameters (an optimiser made before still works), and take over the running
    statistics, eps, device, dtype, requires_grad and train mode of the old ones. A BatchNorm that is used in two places
    stays one layer. If module is itself a BatchNorm, its replacement is returned. Layers that are already ours stay as
    they are, if they are of this norm and have these settings. Forward hooks on a BatchNorm are not carried over. "bn"
    keeps the old layer's momentum.

    Arguments:
        module: any network. For layers of two norms, convert its parts one by one.
        norm: "mbn", "brn" or "bn" (ours, whose averages can wait for a second forward).
        settings: the layer's own settings by name, such as memory=40 or gradient="batch" for "mbn". forwards is 2 by
            default for "mbn" (call `second_forward` after each step), and 1 for "brn" and "bn".

    Warns where module holds no BatchNorm and no layer of ours.

    Errors: ValueError for an unknown norm, and for a layer of ours in module that is of another norm or has another
    value of a setting that is given; TypeError for a setting the layer does not have (the message lists those it has),
    and for a SyncBatchNorm or a lazy BatchNorm inside module. In that case nothing is changed.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, not {norm!r}")
    allowed = [
        name for name in inspect.signature(NORMS[norm][0]).parameters if name not in ("num_features", "eps", "affine")
    ]
    for name in settings:
        if name not in allowed:
            raise TypeError(f"{norm} layers have no setting {name!r}; theirs are {', '.join(allowed)}")
    for name, layer in module.named_modules():
        _check_torchs(layer)
        _check_ours(name, layer, norm, settings)
    if not any(isinstance(layer, (BatchStatisticsNorm, *TORCH)) for layer in module.modules()):
        warnings.warn("convert found no nn.BatchNorm1d, 2d or 3d in the module and changed nothing", stacklevel=2)

    def exchange(layer: nn.Module) -> nn.Module | None:
        for ours, torchs in zip(NORMS[norm], TORCH, strict=True):
            if isinstance(layer, torchs):
                return _to_ours(layer, ours, settings)
        return None

    return _exchange(module, exchange)


def _check_torchs(layer: nn.Module) -> None:
    """Refuse a BatchNorm that cannot be converted."""
    if isinstance(layer, nn.SyncBatchNorm):
        raise TypeError(
            "SyncBatchNorm cannot be converted: its statistics are taken over all processes, ours over one; "
            "call convert before convert_sync_batchnorm, or do without it"
        )
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and isinstance(layer, nn.modules.batchnorm._BatchNorm):
        raise TypeError("a lazy BatchNorm has no channels yet: run the network once before convert")
    if isinstance(layer, TORCH) and type(layer).forward is not nn.modules.batchnorm._BatchNorm.forward:
        raise TypeError(f"{type(layer).__name__} has a forward of its own, which convert would lose")


def _check_ours(name: str, layer: nn.Module, norm: str, settings: dict[str, Any]) -> None:
    """Refuse a layer of ours that is not what was asked for."""
    has = norm_of(layer)
    if has is None:
        return
    what = f"layer {name} is" if name else "the module is"
    if has != norm:
        raise ValueError(
            f"{what} a {type(layer).__name__} already, of norm={has!r} and not {norm!r}: "
            f"convert(to_batch_norm(model), norm={norm!r}) makes a copy with such layers, for a new optimizer"
        )
    for setting, value in settings.items():
        if getattr(layer, setting) != value:
            copied = f"convert(to_batch_norm(model), norm={norm!r}, {setting}={value!r}) makes a copy with it"
            raise ValueError(
                f"{what} a {type(layer).__name__} already, with {setting}={getattr(layer, setting)!r} and not "
                f"{value!r}: {SETTERS.get(setting, copied + ', for a new optimizer')}"
            )


def to_batch_norm(module: nn.Module) -> nn.Module:
    """Return a copy of module with `nn.BatchNorm` in place of our layers, equal to it in eval mode.

    For export (ONNX, serving, fusing) and for everything else that knows only torch's layers. The copy shares nothing
    with module, whose training can go on. Its running statistics are those that module's evaluation uses.
    """

    def exchange(layer: nn.Module) -> nn.Module | None:
        for layers in NORMS.values():
            for ours, torchs in zip(layers, TORCH, strict=True):
                if isinstance(layer, ours):
                    return _to_torch(layer, torchs)
        return None

    return _exchange(copy.deepcopy(module), exchange)


def _exchange(module: nn.Module, exchange) -> nn.Module:
    """Replace each layer for which exchange gives another; a shared layer is replaced by the same one everywhere."""
    replaced: dict[nn.Module, nn.Module] = {}
    for layer in list(module.modules()):
        new = exchange(layer)
        if new is not None:
            replaced[layer] = new
    for parent in list(module.modules()):
        # Not named_children(): it lists a layer only once if one parent holds it twice.
        for name, child in parent._modules.items():
            if child in replaced:
                parent._modules[name] = replaced[child]
    return replaced.get(module, module)


def _to_ours(old: Any, ours: type[Any], settings: dict[str, Any]) -> BatchStatisticsNorm:
    if issubclass(ours, _BatchNorm) and old.momentum is not None:
        settings = {"momentum": old.momentum, **settings}
    new = ours(old.num_features, eps=old.eps, affine=False, **settings)
    like = old.weight if old.weight is not None else old.running_mean
    if like is not None:
        new.to(device=like.device, dtype=like.dtype)
    new.affine, new.weight, new.bias = old.affine, old.weight, old.bias
    if old.running_mean is not None:
        state = {k: v for k, v in old.state_dict().items() if k not in ("weight", "bias")}
        problems: tuple[list[str], list[str], list[str]] = ([], [], [])
        new._load_from_state_dict(state, "", {}, False, *problems)
    new.train(old.training)
    return new


def _to_torch(old: BatchStatisticsNorm, torchs: Callable[..., Any]) -> nn.Module:
    new = torchs(old.num_features, eps=old.eps, affine=False)
    mean, variance = old.test_statistics()
    dtype = mean.dtype if old.weight is None else old.weight.dtype
    new.to(device=mean.device, dtype=dtype)
    with torch.no_grad():
        new.running_mean.copy_(mean)
        new.running_var.copy_(variance)
    new.affine, new.weight, new.bias = old.affine, old.weight, old.bias
    new.train(old.training)
    return new
