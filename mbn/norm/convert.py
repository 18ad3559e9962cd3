"""Exchange the BatchNorm layers of any network for ours, and back."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar, overload

from torch import nn

from .base import BatchStatisticsNorm
from .batch import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .convert_attributes import move_hooks
from .convert_layer import TORCH, check_for_torch, to_ours, to_torchs
from .memorized import MemorizedBatchNorm1d, MemorizedBatchNorm2d, MemorizedBatchNorm3d
from .renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from .replace_modules import replace_modules

# For each norm: the layers that replace BatchNorm1d, 2d and 3d.
NORMS: dict[str, tuple[type[BatchStatisticsNorm], ...]] = {
    "mbn": (MemorizedBatchNorm1d, MemorizedBatchNorm2d, MemorizedBatchNorm3d),
    "brn": (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d),
    "bn": (BatchNorm1d, BatchNorm2d, BatchNorm3d),
}
# What changes a setting of layers that are there already; other settings need new layers.
SETTERS = {"lam": "set_lambda changes it", "r_max": "set_renorm changes it", "d_max": "set_renorm changes it"}

# convert returns the class that it was given, except for a BatchNorm itself.
Network = TypeVar("Network", bound=nn.Module)
# Of classes. Mapping[type[nn.Module], ...] would refuse a dict whose keys are all of one subclass.
Replace = Mapping[Any, Callable[[Any], nn.Module]]


def norm_of(layer: nn.Module) -> str | None:
    """The norm that a layer of ours belongs to; None for another layer."""
    return next((norm for norm, layers in NORMS.items() if isinstance(layer, layers)), None)


@overload
def convert(
    module: Network,
    norm: Literal["mbn"] = "mbn",
    *,
    memory: int = 20,
    decay: float = 0.9,
    lam: float = 0.1,
    gradient: str = "paper",
    forwards: int = 2,
    group_size: int | None = None,
    pretrained_batches: float = 10,
    replace: Replace | None = None,
    sync: bool | None = None,
    process_group: Any = None,
) -> Network: ...
@overload
def convert(
    module: Network,
    norm: Literal["brn"],
    *,
    momentum: float = 0.01,
    r_max: float = 3.0,
    d_max: float = 5.0,
    warmup_steps: int = 0,
    forwards: int = 1,
    group_size: int | None = None,
    replace: Replace | None = None,
    sync: bool | None = None,
    process_group: Any = None,
) -> Network: ...
@overload
def convert(
    module: Network,
    norm: Literal["bn"],
    *,
    momentum: float | None = 0.1,
    forwards: int = 1,
    group_size: int | None = None,
    replace: Replace | None = None,
    sync: bool | None = None,
    process_group: Any = None,
) -> Network: ...
def convert(
    module: nn.Module,
    norm: str = "mbn",
    *,
    replace: Replace | None = None,
    sync: bool | None = None,
    process_group: Any = None,
    **settings: Any,
) -> nn.Module:
    """Exchange every BatchNorm inside module for a layer of ours, in place, and return module.

    If module is itself a BatchNorm, its replacement is returned. A BatchNorm that is used in two places stays one
    layer. Layers that are already ours stay as they are, if they are of this norm and have these settings.

    The new layers hold the very same parameters (an optimiser made before still works). They take over running
    statistics (see pretrained_batches), eps, device, dtype, train mode, forward and backward hooks, child modules, and
    attributes that were set on the old ones; "bn" also takes over the momentum. A layer that the network also holds in
    a list, tuple, dict or set of its own is exchanged there too; what else holds it (a deque, a frozenset, a partial, a
    bound method) keeps the old one.

    A subclass of BatchNorm with a forward of its own (timm's BatchNormAct2d, a BatchNorm with a ReLU) becomes a layer
    of ours that applies the same activation or dropout after it has normalised. What it applies is found by comparing
    copies on random inputs: its own child modules, or a well-known activation. Where none fits, say it with replace.

    Arguments:
        module: any network. For layers of two norms, convert its parts one by one.
        norm: "mbn", "brn" or "bn" (ours, whose averages can wait for a second forward).
        settings: the layer's own settings by name, such as memory=40 or gradient="batch" for "mbn". forwards is 2 by
            default for "mbn" (call `second_forward` after each step), and 1 for "brn" and "bn".
        replace: {class: function} for layers that convert does not know. function(layer) returns the module that takes
            the place of a layer of this class or of a subclass; BatchNorm layers in it are converted as all others. A
            layer that function returns itself stays as it is. Example, for torchvision's FrozenBatchNorm2d:

                def unfrozen(old):
                    new = nn.BatchNorm2d(len(old.weight), device=old.weight.device)
                    new.load_state_dict(old.state_dict(), strict=False)
                    new.running_var.add_(old.eps - new.eps).clamp_(min=0)  # an eps of 0 (COCO's) would be refused
                    return new

                convert(model, replace={FrozenBatchNorm2d: unfrozen})

        sync, process_group: True takes the statistics over the batches of all processes in the group (default: of all).
            Then SyncBatchNorm layers are converted too, with a process group of their own if they have one and none is
            given. They do not know the dimensions of their input: they become the layers for 2d, and accept 2D to 5D.

    Warns where module holds no BatchNorm and no layer of ours.

    Errors: ValueError for an unknown norm, and for a layer of ours in module that is of another norm or has another
    value of a setting that is given. TypeError for a setting the layer does not have (the message lists those it has),
    for a module that FSDP has sharded, for a replace that is not {class: function} or whose function returns no module,
    and, by its name, for a layer that cannot be converted: it is lazy; a SyncBatchNorm without sync=True; has no
    running statistics; has an eps that is not above 0, or a momentum outside [0, 1] that "bn" would take over; is
    parametrized, pruned, or compiled on its own; has a forward that was set on this one object, hooks on its state
    dict, parameters and buffers that BatchNorm has not, or of shapes that do not fit each other; is of a class whose
    forward is not understood. After an error nothing has been changed.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"convert needs a module, such as Network(), and not {module!r}")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, not {norm!r}")
    layers = NORMS[norm]
    for name in settings:
        if name not in layers[0].settings:
            kept = "; eps, weight and bias stay those of the old layer" if name in ("eps", "affine", "bias") else ""
            raise TypeError(f"{norm} takes no setting {name!r} here; theirs are {', '.join(layers[0].settings)}{kept}")
    _check_replace(replace or {})
    if sync is None and process_group is not None:
        sync = True
    common = {"sync": sync, "process_group": process_group}
    checked = settings | {name: value for name, value in common.items() if value is not None}
    replaced: dict[nn.Module, nn.Module] = {}
    converted: dict[nn.Module, nn.Module] = {}
    ours, sharded = 0, _is_sharded(module)
    for name, layer in list(_walk(module, "", replace or {}, replaced, set())):
        what = f"layer {name}" if name else "the module"
        _check_not_wrapped(what, layer, nn.modules.batchnorm._BatchNorm)
        if isinstance(layer, BatchStatisticsNorm):
            _check_ours(what, layer, norm, checked)
            ours += 1
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            if sharded:
                raise TypeError("FSDP has sharded the module, and knows the old layers: call convert before FSDP")
            converted[layer] = to_ours(what, layer, layers, settings, sync, process_group)
    if not (replaced or converted or ours):
        frozen = any(type(layer).__name__ == "FrozenBatchNorm2d" for layer in module.modules())
        instead = "; replace= says what takes the place of its FrozenBatchNorm2d" if frozen else ""
        found = "convert found no nn.BatchNorm1d, 2d or 3d in the module and changed nothing"
        warnings.warn(found + instead, stacklevel=2)

    # Not in what replace has given, which may hold the old layer.
    module = _put(module, replaced, list(module.modules()))
    return _put(module, converted, [*module.modules(), *converted.values()])


def _check_not_wrapped(what: str, module: nn.Module, cls: type[nn.Module]) -> None:
    """Raise TypeError where module is what torch.compile put around a layer of cls: it would go on calling that one."""
    if isinstance(getattr(module, "_orig_mod", None), cls):
        name = cls.__name__.lstrip("_")
        raise TypeError(f"{what} is a {name} inside torch.compile: call torch.compile after, and not before")


def _check_replace(replace: Replace) -> None:
    if not isinstance(replace, Mapping):
        raise TypeError(f"replace must be {{class: function}}, and not {replace!r}")
    for cls, function in replace.items():
        if not isinstance(cls, type) or not callable(function) or isinstance(function, type | nn.Module):
            raise TypeError(
                "replace must be {class: function}, where function(layer) returns the module that takes its place, and "
                f"not {{{cls!r}: {function!r}}}"
            )


def _put(module: nn.Module, instead: dict[nn.Module, nn.Module], parents: list[nn.Module]) -> nn.Module:
    """Put new layers in place of old ones in parents, with the old ones' hooks; return what module is then."""
    replace_modules(parents, instead)
    for old, new in instead.items():
        if new is not old:
            move_hooks(old, new)
    return instead.get(module, module)


def _walk(
    module: nn.Module, name: str, replace: Replace, replaced: dict[nn.Module, nn.Module], seen: set[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """Each module once, with its name, as the network will be when all in replaced has taken its place.

    Fills replaced with what the functions of replace return, and does not look into what they replace.
    """
    if module in seen or module in replaced:
        return
    function = next((replace[cls] for cls in type(module).__mro__ if cls in replace), None)
    if function is None:
        seen.add(module)
        yield name, module
        for child_name, child in module._modules.items():
            if child is not None:
                yield from _walk(child, f"{name}.{child_name}".lstrip("."), replace, replaced, seen)
        return
    new = function(module)
    if not isinstance(new, nn.Module):
        raise TypeError(f"replace of {type(module).__name__} must return a module, not {type(new).__name__}")
    replaced[module] = new
    if new is not module:
        new.train(module.training)
        yield from new.named_modules(seen, name)


def _is_sharded(module: nn.Module) -> bool:
    """Whether FSDP manages parameters inside module. By name: to import FSDP takes long."""
    classes = {cls.__name__ for part in module.modules() for cls in type(part).__mro__}
    return bool(classes & {"FSDPModule", "FullyShardedDataParallel"})


def _check_ours(what: str, layer: BatchStatisticsNorm, norm: str, settings: dict[str, Any]) -> None:
    """Refuse a layer of ours that is not what was asked for."""
    has, is_already = norm_of(layer), f"{what} is a {type(layer).__name__} already"
    if has != norm:
        raise ValueError(
            f"{is_already}, of norm={has!r} and not {norm!r}: "
            f"convert(to_batch_norm(model), norm={norm!r}) makes a copy with such layers, for a new optimizer"
        )
    for setting, value in settings.items():
        if getattr(layer, setting) != value:
            copied = f"convert(to_batch_norm(model), norm={norm!r}, {setting}={value!r}) makes a copy with it"
            raise ValueError(
                f"{is_already}, with {setting}={getattr(layer, setting)!r} and not "
                f"{value!r}: {SETTERS.get(setting, copied + ', for a new optimizer')}"
            )


def to_batch_norm(module: Network) -> Network:
    """Return a copy of module with torch's layers in place of ours, equal to it in eval mode.

    For export (ONNX, serving, fusing) and for everything else that knows only torch's layers. The copy shares nothing
    with module, whose training can go on. Its running statistics are those that module's evaluation uses.

    A layer that `convert` made becomes one of the class that it was before, with its old momentum; num_batches_tracked
    counts also the batches in the memory. Any other layer of ours becomes an `nn.BatchNorm1d/2d/3d`. Its parameters and
    statistics have at least float32, also in a network in half precision, whose inputs torch's BatchNorm takes all the
    same: a small variance would be 0 in float16. ONNX wants one precision: export `to_batch_norm(model).half()`.

    Errors: TypeError, by its name, for a layer that is parametrized or pruned, or has a forward or tensors that a
    BatchNorm has not; RuntimeError under FSDP, which lets nobody copy a module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"to_batch_norm needs a module, and not {module!r}")
    if _is_sharded(module):
        raise RuntimeError(
            "to_batch_norm works on a copy, and FSDP lets nobody copy a module: load its full state dict "
            "(torch.distributed.checkpoint.state_dict) into the same network without FSDP, and give it that one"
        )
    for name, layer in module.named_modules():
        what = f"layer {name}" if name else "the module"
        _check_not_wrapped(what, layer, BatchStatisticsNorm)
        if isinstance(layer, BatchStatisticsNorm):
            check_for_torch(what, layer)
    copied = copy.deepcopy(module)
    wide: dict[nn.Parameter, nn.Parameter] = {}
    instead: dict[nn.Module, nn.Module] = {}
    for layer in copied.modules():
        for layers in NORMS.values():
            for ours, torchs in zip(layers, TORCH, strict=True):
                if isinstance(layer, ours):
                    instead[layer] = to_torchs(layer, ours, torchs, wide)
    return _put(copied, instead, [*copied.modules(), *instead.values()])  # type: ignore[return-value]
