"""How much of the processors a container may use: what `docker --cpus=2` and Kubernetes' limits set."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# In each version of cgroups: the kind of its mount, and what its line in /proc/self/cgroup names.
VERSIONS = {"cgroup2": "", "cgroup": "cpu"}


def quota(root: Path = Path("/")) -> float:
    """Processors' worth of time that this process and the groups around it may use; inf without a limit or cgroups.

    root: where `proc` is, for tests.
    """
    limits = [math.inf]
    with contextlib.suppress(OSError, ValueError, IndexError):
        for folder in _groups(root):
            limits += _limits(folder)
    return min(limits)


def _groups(root: Path) -> Iterator[Path]:
    """The folders of this process's group and of those around it, up to the mount."""
    lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    paths = {name: path for _, names, path in (line.split(":", 2) for line in lines) for name in names.split(",")}
    for line in (root / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        before, _, after = line.partition(" - ")
        top, mount, (kind, *_, options) = *before.split()[3:5], after.split()
        name = VERSIONS.get(kind)
        if name not in paths or (name and name not in options.split(",")):
            continue
        own = PurePosixPath(paths[name])
        # In a container the path may be the host's, of which only the part below top is mounted.
        below = own.relative_to(top) if own.is_relative_to(top) else PurePosixPath()
        for group in (below, *below.parents):
            if ".." not in group.parts:
                yield root / mount.lstrip("/") / group


def _limits(folder: Path) -> Iterator[float]:
    """The limit that a group's files set, if there is one."""

    def numbers(*names: str) -> list[str]:
        return " ".join((folder / name).read_text(encoding="utf-8") for name in names).split()

    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max" is no limit
            allowed, period = map(int, numbers(*names))
            if allowed > 0 and period > 0:
                yield allowed / period
