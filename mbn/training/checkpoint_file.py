"""Checkpoints: a state that torch.load(weights_only=True) reads, with a checksum; the last two are kept.

A file is what torch.save wrote, followed by a line with its SHA-256; torch.load reads it directly too.
"""

import hashlib
import io
import pickle
import sys
from pathlib import Path
from typing import Any

import torch

from mbn.system.errors import UserError, lacks_memory
from mbn.system.files import write_atomically

MARK = b"\nsha256 "
_TAIL = len(MARK) + 64


class DamagedError(Exception):
    """A checkpoint file whose bytes are not those that were written."""


def previous(path: Path) -> Path:
    """Where the checkpoint before path is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def damaged(path: Path) -> Path:
    """Where a damaged file is set aside."""
    return path.with_name(f"{path.stem}.damaged{path.suffix}")


def save(state: dict[str, Any], path: Path) -> None:
    """Write state to path atomically; what path held is kept as `previous(path)`. Errors: UserError."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    digest = hashlib.sha256(content).hexdigest().encode()
    write_atomically(path, content + MARK + digest, keep_as=previous(path))


def read(path: Path) -> dict[str, Any]:
    """Read one checkpoint file onto the CPU. Errors: DamagedError; OSError; what torch raises for lack of memory."""
    content = path.read_bytes()
    body, tail = content[:-_TAIL], content[-_TAIL:]
    if tail != MARK + hashlib.sha256(body).hexdigest().encode():
        raise DamagedError(f"{path} is damaged: its checksum is wrong")
    try:
        return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its message advises to load the file unsafely
        raise DamagedError(f"{path} is damaged: it does not hold a state alone") from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        if lacks_memory(error):  # its bytes are right, as the checksum says
            raise
        raise DamagedError(f"{path} is damaged: {(str(error).splitlines() or ['it ends early'])[0]}") from None


def newest(path: Path) -> dict[str, Any] | None:
    """The newest undamaged checkpoint, at path or the one before it, or None; warns of each that is damaged.

    A damaged file is set aside. Otherwise the next save would keep it as the previous checkpoint, and a crash during
    that save would leave no other. Errors: UserError where a file cannot be read.
    """
    for generation in (path, previous(path)):
        if not generation.exists():
            continue
        more = generation == path and previous(path).exists()
        try:
            return read(generation)
        except DamagedError as error:
            aside = damaged(generation)
            generation.replace(aside)
            then = "going back one checkpoint" if more else "no checkpoint is left, so training starts over"
            print(f"warning: {error}, and now {aside.name}; {then}.", file=sys.stderr)
        except OSError as error:
            then = "go on from the checkpoint before it" if more else "start over"
            raise UserError(
                f"cannot read {generation} ({error.strerror}): make it readable and run the command again, or move it "
                f"away to {then}."
            ) from None
    return None
