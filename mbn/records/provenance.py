"""Where a run's numbers come from: the commit, the versions of the libraries, the device."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from mbn import __version__
from mbn.config import REPOSITORY


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
    return subprocess.run(["git", "-C", str(REPOSITORY), *arguments], check=True, capture_output=True, text=True).stdout


def versions() -> dict[str, str]:
    import numpy
    import torch
    import torchvision

    return {
        "mbn": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
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
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{device.type}: {model}"
