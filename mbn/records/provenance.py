"""Where a run's numbers come from: the commit, the code, the versions of the libraries, the device."""

import ast
import functools
import hashlib
import io
import os
import platform
import subprocess
import tokenize
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mbn import __version__
from mbn.config import REPOSITORY

# Parts of mbn that train nothing.
NOT_TRAINING = ("benchmark", "launch", "tables", "grid.py")


def commit_and_dirty() -> tuple[str | None, bool | None]:
    """The commit of the tree that holds this package, and whether tracked files outside results/ differ from it.

    Without git both come from the environment variable MBN_COMMIT: set it to what
    `git describe --always --dirty --abbrev=40 --exclude '*'` prints where there is git. Without both: (None, None).
    """
    try:
        head = _git("rev-parse", "HEAD").strip()
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)results").strip()
        return head, bool(changed)
    except (OSError, subprocess.CalledProcessError):
        described = os.environ.get("MBN_COMMIT", "").strip()
        if not described:
            return None, None
        return described.removesuffix("-dirty"), described.endswith("-dirty")


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(REPOSITORY), *arguments], check=True, capture_output=True, encoding="utf-8"
    ).stdout


@functools.cache
def code() -> str:
    """SHA-256 of the code that trains: models/ and mbn/ without NOT_TRAINING, comments, docstrings and blank lines.

    Read once in a process, near its start, because it stands for the code that was imported.
    """
    digest = hashlib.sha256()
    for path in sorted(p for folder in ("mbn", "models") for p in (REPOSITORY / folder).rglob("*.py")):
        name = path.relative_to(REPOSITORY)
        if name.parts[1] not in NOT_TRAINING:
            digest.update(f"{name.as_posix()}\n{statements(path.read_text(encoding='utf-8'))}\n".encode())
    return digest.hexdigest()


def statements(text: str) -> str:
    """A module's lines without comments, docstrings and blank lines, the same under every version of Python."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            first, last = node.body[0].lineno, node.body[0].end_lineno or 0
            lines[first - 1 : last] = [""] * (last - first + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def described(made_by: Mapping[str, Any]) -> str:
    """The commit of a record or a checkpoint, and whether there were changes. Example: 0123456 and changes."""
    return (made_by["commit"] or "unknown")[:7] + " and changes" * bool(made_by["dirty"])


def with_code(made_by: Mapping[str, Any]) -> str:
    """Example: commit 0123456 and changes, code 89abcde."""
    return f"commit {described(made_by)}, code {(made_by['code'] or 'unknown')[:7]}"


def versions() -> dict[str, str]:
    import numpy
    import torch
    import torchvision

    return {
        "mbn": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a class of its own, which no checkpoint may hold
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
    }


def device_name(device: Any) -> str:
    """The device's name, such as 'cpu: AMD EPYC' or 'cuda: NVIDIA H100 80GB HBM3'."""
    import torch

    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip()
            for line in info.read_text(encoding="utf-8").splitlines()
            if "model name" in line
        ]
        model = names[0] if names else model
    return f"{device.type}: {model}"
