"""The conditions under which a run is trained: what its bits depend on beside its configuration.

A run that is resumed under other conditions has several parts. Its checkpoint and its record list them all.
"""

import sys
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch

from mbn.config.schema import Machine
from mbn.records import provenance

Conditions = dict[str, Any]
# Between the names of devices that were used one after the other.
THEN = ", then "


def conditions(
    machine: Machine, device: torch.device, threads: int, mode: str, data: str, processes: int = 1
) -> Conditions:
    """The conditions of this process. mode: as `choose_mode` gives it; data: the data set's fingerprint.

    The number of processes is a part of them only if there are several. Errors: UserError where the code was edited
    while it was imported.
    """
    provenance.check_imported()
    on_gpu = device.type == "cuda"
    commit, dirty = provenance.commit_and_dirty()
    return {
        "device": provenance.device_name(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else None,
        "threads": threads,
        "mode": mode,
        "tf32": machine.tf32 if on_gpu else None,
        "deterministic": machine.deterministic if on_gpu else None,
        "code": provenance.code(),
        "commit": commit,
        "dirty": dirty,
        "versions": provenance.versions(),
        "data": data,
        **({"processes": processes} if processes > 1 else {}),
    }


def parts_of(saved: dict[str, Any]) -> list[Conditions]:
    """The parts that a checkpoint lists. One from before they were kept knows its devices and its code alone."""
    if "parts" in saved:
        return list(saved["parts"])
    machine = saved["machine"]
    return [
        {
            **{"from": 0, "device": THEN.join(saved.get("devices") or [machine["device"]]), "cpu_capability": None},
            **{"threads": machine["threads"], "mode": machine["mode"], "tf32": None, "deterministic": None},
            **{"code": saved.get("code"), "commit": saved["commit"], "dirty": saved["dirty"]},
            **{"versions": None, "data": None},
        }
    ]


def changes(then: Conditions, now: Conditions) -> list[str]:
    """What is known to differ, such as "threads 1 -> 2". Another commit with the same code is no change."""
    then = then | {"device": then["device"].rpartition(THEN)[2]}
    if now["device"].startswith(f"{then['device']}:"):  # from before names were kept
        then["device"] = now["device"]
    before, after = then.get("processes", 1), now.get("processes", 1)
    said = [f"processes {before} -> {after}"] if before != after else []
    for key in ("device", "cpu_capability", "threads", "mode", "tf32", "deterministic", "data"):
        if None not in (then[key], now[key]) and then[key] != now[key]:
            said.append(f"{key.replace('_', ' ')} {_short(then[key])} -> {_short(now[key])}")
    if not same_code(then, now):
        said.append(f"{provenance.with_code(then)} -> {provenance.with_code(now)}")
    versions = then["versions"] or {}
    return said + [
        f"{name} {version} -> {now['versions'][name]}"
        for name, version in versions.items()
        if name in now["versions"] and version != now["versions"][name]
    ]


def _short(value: Any) -> str:
    """A fingerprint by its first digits; anything else as it is."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def same_code(a: Conditions, b: Conditions) -> bool:
    """Whether two parts had the same code, or, where one does not know its hash, the same commit."""
    key = "commit" if None in (a["code"], b["code"]) else "code"
    return a[key] == b[key]


def go_on(parts: list[Conditions], iteration: int, now: Conditions) -> list[Conditions]:
    """The parts of a run that goes on under the present conditions; what has changed is said in one line."""
    if iteration == 0:
        return with_part([], 0, now)
    trained = before(parts, iteration)
    said = changes(trained[-1], now)
    if said:
        print(
            f"warning: conditions change at iteration {iteration:,} ({', '.join(said)}): the bits may not be those of "
            "a run without a change, and the record lists all parts; machine.again=true trains all of it under one.",
            file=sys.stderr,
        )
    if trained[-1]["versions"] is None:
        print(
            "note: this checkpoint is from before versions, data and journal were kept in it, so a change of them "
            "before now cannot be seen.",
            file=sys.stderr,
        )
    return with_part(trained, iteration, now)


def before(parts: list[Conditions], iteration: int) -> list[Conditions]:
    """The parts that begin before an iteration: the others have trained nothing of what led to it."""
    return [part for part in parts if part["from"] < iteration]


def with_part(parts: list[Conditions], iteration: int, now: Conditions) -> list[Conditions]:
    """The parts, and one from this iteration on where its conditions are not those of the last one."""
    same = parts and {**parts[-1], "from": 0} == {**now, "from": 0}
    return parts if same else [*parts, {"from": iteration, **now}]


def made_by(parts: list[Conditions]) -> dict[str, Any]:
    """Commit, dirty and code of a whole run. More than one code counts as dirty: no commit would give the result."""
    dirty = {part["dirty"] for part in parts}
    dirty |= {True for pair in pairwise(parts) if not same_code(*pair)}
    return {
        "commit": parts[-1]["commit"],
        "dirty": True if True in dirty else None if None in dirty else False,
        "code": parts[-1]["code"],
    }


def devices(parts: Iterable[Conditions]) -> str:
    """The names of the devices, in the order in which they were used: cuda: NVIDIA H100, then cpu: AMD EPYC."""
    names: list[str] = []
    for part in parts:
        for name in part["device"].split(THEN):
            if names and name.startswith(f"{names[-1]}:"):  # from before names were kept
                names.pop()
            names += [name] if names[-1:] != [name] else []
    return THEN.join(names)
