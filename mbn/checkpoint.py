"""Checkpoints: a state that torch.load(weights_only=True) reads, with a checksum, in two generations.

A file is what torch.save wrote, followed by a line with its SHA-256; torch.load reads it directly all the same.
"""

import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import torch

from .files import write_atomically

MARK = b"\nsha256 "
_TAIL = len(MARK) + 64


class DamagedError(Exception):
    """A checkpoint file whose bytes are not those that were written."""


def previous(path: Path) -> Path:
    """Where the generation before path is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save(state: dict[str, Any], path: Path) -> None:
    """Write state to path atomically; what path held is kept as `previous(path)`. Errors: UserError."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    digest = hashlib.sha256(content).hexdigest().encode()
    write_atomically(path, content + MARK + digest, keep_as=previous(path))


def read(path: Path) -> dict[str, Any]:
    """Read one checkpoint file onto the CPU. Errors: DamagedError; OSError."""
    content = path.read_bytes()
    body, tail = content[:-_TAIL], content[-_TAIL:]
    if tail != MARK + hashlib.sha256(body).hexdigest().encode():
        raise DamagedError(f"{path} is damaged: its checksum is wrong")
    return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)


def load(path: Path) -> dict[str, Any] | None:
    """The newest undamaged generation of path; None where there is none. Warns of each that is damaged."""
    for generation in (path, previous(path)):
        if not generation.exists():
            continue
        try:
            return read(generation)
        except DamagedError as error:
            print(f"warning: {error}; going back one checkpoint.", file=sys.stderr)
    return None
