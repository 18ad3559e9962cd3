"""What a layer takes over from the one whose place it takes, and what it cannot take over."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

PARAMETERS = ("weight", "bias")
# Forward and backward hooks. Those of state dicts know the old layer's names, and are refused.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def cannot_carry(layer: nn.Module, buffers: Collection[str], otherwise: str) -> str | None:
    """Why no other layer can take the place of this one, as a sentence without its subject; None if one can.

    buffers: those that the other layer takes over. otherwise: what to do where nothing better is known.
    """
    if parametrize.is_parametrized(layer):
        return "is parametrized: call torch.nn.utils.parametrize.remove_parametrizations on it before"
    if any(f"{name}_mask" in layer._buffers for name in PARAMETERS):
        return "is pruned: call torch.nn.utils.prune.remove on it before"
    methods = [name for name in vars(layer) if callable(getattr(type(layer), name, None))]
    if methods:
        return (
            f"has a {methods[0]} that was set on this one object: take it off before, as "
            "accelerate.hooks.remove_hook_from_module does, and put it on the new layer"
        )
    if layer._compiled_call_impl is not None:
        return "is compiled on its own: call its compile() after, and not before"
    if any(vars(layer)[name] for name in STATE_HOOKS):
        return "has hooks on its state dict, which has other names in the new layer: remove them before"
    places = ((layer._parameters, PARAMETERS), (layer._buffers, buffers))
    strange = [name for held, known in places for name, t in held.items() if t is not None and name not in known]
    strange += [name for name in (*PARAMETERS, *buffers) if isinstance(vars(layer).get(name), torch.Tensor)]
    return f"has a tensor {strange[0]!r} which the new layer would not know: {otherwise}" if strange else None


def carry_parameters(old: nn.Module, new: nn.Module) -> None:
    """Give new the very same weight and bias. Not by assignment: accelerate makes others of what is registered."""
    for name in PARAMETERS:
        new.__dict__.pop(name, None)
        new._parameters[name] = old._parameters.get(name)


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give new the hooks of old, in the same dicts, so that `handle.remove()` still works. old has none afterwards."""
    for name in HOOKS:
        hooks = vars(old)[name]
        old.__dict__[name] = type(hooks)()
        hooks.update(vars(new)[name])
        new.__dict__[name] = hooks
    if old._is_full_backward_hook is not None:
        new._is_full_backward_hook = old._is_full_backward_hook


def more_attributes(layer: nn.Module, plain: nn.Module) -> dict[str, Any]:
    """The attributes that layer has and a plain layer of its kind has not: what its users have set."""
    known = (*PARAMETERS, *vars(plain))
    return {name: value for name, value in vars(layer).items() if name not in known and not hasattr(type(plain), name)}
