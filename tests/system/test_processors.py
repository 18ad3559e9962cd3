"""How much of the processors a container may use, from the files of cgroups."""

import math

import pytest

from mbn.config import cores, run_identity
from mbn.system.processors import quota

V1 = "4:memory:{path}\n3:cpuset:/\n2:cpu,cpuacct:{path}\n0::/\n"
V2 = "0::{path}\n"
MOUNT_V1 = (
    "33 31 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
    "34 31 0:31 {top} /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
)
MOUNT_V2 = "31 23 0:28 {top} /sys/fs/cgroup ro,relatime - cgroup2 cgroup rw,nsdelegate\n"
BOTH = MOUNT_V1 + MOUNT_V2.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ")


@pytest.fixture
def computer(tmp_path):
    """A function that makes the files of a machine: a process's group, the mounts, and limits (quota, period)."""

    def make(version, mounts, limits):
        files = {"proc/self/cgroup": version, "proc/self/mountinfo": mounts}
        for group, limit in limits.items():
            if version.startswith("0"):
                files[f"sys/fs/cgroup{group}/cpu.max"] = f"{limit}\n"
            else:
                names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                folder = f"sys/fs/cgroup/cpu,cpuacct{group}"
                files |= {f"{folder}/{name}": f"{part}\n" for name, part in zip(names, limit.split(), strict=True)}
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("version", "mounts", "path", "top", "limits", "allowed"),
    [
        (V2, MOUNT_V2, "/", "/", {"": "200000 100000"}, 2),  # docker --cpus=2
        (V2, MOUNT_V2, "/", "/", {"": "max 100000"}, math.inf),
        (V2, MOUNT_V2, "/", "/", {}, math.inf),  # the root has no such file
        (V2, MOUNT_V2, "/pod/box", "/", {"/pod/box": "max 100000", "/pod": "50000 100000"}, 0.5),
        (V2, MOUNT_V2, "/pod/box", "/", {"/pod/box": "150000 100000", "/pod": "400000 100000"}, 1.5),
        (V2, MOUNT_V2, "/pod", "/", {"/other": "100000 100000"}, math.inf),
        (V2, MOUNT_V2, "/../../x", "/", {"": "100000 100000", "/../..": "1 1000"}, 1),  # a group outside the mount
        (V1, MOUNT_V1, "/docker/box", "/docker/box", {"": "300000 100000"}, 3),
        (V1, MOUNT_V1, "/docker/box", "/", {"": "300000 100000"}, 3),
        (V1, MOUNT_V1, "/a", "/", {"/a": "-1 100000"}, math.inf),
        (V1, MOUNT_V1, "/a/b", "/", {"/a": "25000 50000"}, 0.5),
        (V1, BOTH, "/", "/", {"": "100000 100000"}, 1),
        (V2, "nonsense\n", "/", "/", {"": "200000 100000"}, math.inf),
        ("nonsense\n", MOUNT_V2, "/", "/", {}, math.inf),
        (V2, MOUNT_V2, "/", "/", {"": "0 0"}, math.inf),
    ],
)
def test_a_limit_of_the_group_or_of_one_around_it_is_found(computer, version, mounts, path, top, limits, allowed):
    assert quota(computer(version.format(path=path), mounts.format(top=top), limits)) == allowed


def test_a_machine_without_cgroups_has_no_limit(tmp_path):
    assert quota(tmp_path) == math.inf


@pytest.mark.parametrize(("allowed", "used"), [(2.0, 2), (1.5, 2), (0.1, 1), (1000.0, 64), (math.inf, 64)])
def test_cores_are_the_limit_rounded_up_and_at_most_those_of_the_machine(monkeypatch, allowed, used):
    monkeypatch.setattr(run_identity, "quota", lambda: allowed)
    monkeypatch.setattr(run_identity.os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert cores() == used
