"""Files of weights: checkpoints of ours, state_dicts of any program, safetensors; read without running their code."""

import argparse
import json
import textwrap
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from mbn.config import from_dict, identity
from mbn.system.errors import UserError
from mbn.system.files import write_atomically
from mbn.training import checkpoint_file

SAFETENSORS = ".safetensors"


class Weights(NamedTuple):
    """What a file holds: a state_dict, and of a file of ours the configuration (identity) of its run.

    ended: False for a checkpoint from within a run. journal: SHA-256 of the journal of that training, where it is
    known: older exports do not say.
    """

    state: dict[str, Any]
    described: dict[str, Any] | None = None
    ended: bool = True
    journal: str | None = None


def read(path: Path) -> Weights:
    """What a file holds. Runs no code from it. Errors: UserError."""
    if not path.is_file():
        raise UserError(f"{path} is not a file: name a checkpoint or a file of weights.")
    if path.suffix == SAFETENSORS:
        return _read_safetensors(path)
    none = UserError(f"{path} holds no state_dict of tensors: torch.save(model.state_dict(), FILE) writes one.")
    try:
        # Training programs save their options, which hold plain values, beside the weights.
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): make it readable.") from None
    except Exception:  # a wrong file can raise anything, and torch's message advises to load it unsafely
        raise none from None
    if isinstance(content, dict) and content.keys() >= {"model", "config", "identity"}:
        try:
            content = checkpoint_file.read(path)
        except checkpoint_file.DamagedError as error:
            before = checkpoint_file.previous(path)
            use = f"use {before}, or " if before.exists() else ""
            raise UserError(f"{error}: {use}train again.") from None
        state, ended = content["model"], content.get("iteration") == content.get("length")
        weights = Weights(state, _read_config(content["config"], path), ended, content.get("journal", ""))
    else:
        for key in ("state_dict", "model"):
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        weights = Weights(content)
    if not _is_state(weights.state):
        raise none
    return weights._replace(state=_without_prefix(weights.state))


def _read_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): make it readable.") from None
    except Exception as error:  # of a wrong file, or of numbers that torch does not have
        raise UserError(f"{path} is not a file of weights ({textwrap.shorten(str(error), 200)}).") from None
    described = _read_config(metadata["config"], path) if "config" in metadata else None
    return Weights(_without_prefix(tensors), described, journal=metadata.get("journal"))


def _is_state(content: Any) -> bool:
    """Whether a file's content is a state_dict."""
    return isinstance(content, dict) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items()
    )


def _without_prefix(state: dict[str, Any]) -> dict[str, Any]:
    """A state_dict with the names of the network's own, where DistributedDataParallel or torch.compile held it."""
    for prefix in ("module.", "_orig_mod.", "module."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _read_config(text: Any, path: Path) -> dict[str, Any]:
    """The identity of the run that a file describes, as JSON. Errors: UserError where it describes none."""
    try:
        return identity(from_dict(json.loads(text)))
    except UserError as error:
        why = str(error).rstrip(".")
    except (ValueError, TypeError, AttributeError, RecursionError):
        why = "it is not JSON with groups of settings"
    raise UserError(f"{path} has a configuration that no run has ({why}): use a file that train.py or --export wrote.")


def fill(model: nn.Module, state: dict[str, Any], misfit: str, path: Path) -> None:
    """Load a state_dict into a network. Errors: UserError where it does not fit or a value is not finite."""
    for name, tensor in model.state_dict().items():
        if name in state and state[name].is_floating_point() != tensor.is_floating_point():
            raise UserError(f"{misfit}: {name} has the type {state[name].dtype}, not {tensor.dtype}.")
    try:
        model.load_state_dict(state)
    except Exception as error:  # a tensor of an unusual kind can raise anything
        lines = str(error).splitlines()
        why = textwrap.shorten(" ".join(lines[1:2] or lines[:1]), 200).rstrip(".")
        raise UserError(f"{misfit}: {why}.") from None
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{path} holds values in {name} that are not finite: use earlier weights.")


def check_target(export: Path, weights: Path) -> None:
    """Check that nothing is lost by writing a file, and that it can be read again.

    Errors: UserError unless it is new or was exported before, and is called .safetensors.
    """
    if export.exists() and weights.exists() and export.samefile(weights):
        raise UserError(f"{export} holds the weights that are to be exported: name another file.", code=2)
    if export.is_symlink() or (export.exists() and not _is_exported(export)):
        raise UserError(f"{export} is there, and --export did not write it: name another file.", code=2)
    if export.suffix != SAFETENSORS:
        raise UserError(f"{export} would hold safetensors: call it {export.with_suffix(SAFETENSORS).name}.", code=2)


def _is_exported(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            _read_config((file.metadata() or {})["config"], path)
    except Exception:  # whatever it is, it is nothing of ours
        return False
    return True


def write(path: Path, model: nn.Module, described: dict[str, Any], journal: str | None) -> None:
    """Write a network's weights as safetensors, with the identity of their run and the SHA-256 of its journal."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    known = {"journal": journal} if journal else {}
    write_atomically(path, save(tensors, {"config": json.dumps(described), **known}))
