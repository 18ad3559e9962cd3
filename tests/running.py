"""What the tests of whole runs share: a tiny network, runs in this process and in others, and what they left."""

import copy
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import models
import train
from mbn import config
from mbn.config import REPOSITORY
from mbn.data import datasets
from mbn.records import provenance, record
from mbn.training import checkpoint


class Tiny(nn.Module):
    """Milliseconds an iteration; with dropout, so that the generators' state matters."""

    def __init__(self, layers, classes):
        super().__init__()
        self.conv = layers.conv(3, 6, 4, stride=4, bias=False)
        self.norm = layers.norm(6)
        self.act = layers.act()
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(6 * 4, classes)

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        return self.fc(self.dropout(nn.functional.avg_pool2d(x, 4).flatten(1)))


def build_tiny(*, layers, classes, **_):
    return Tiny(layers, classes)


class Small(nn.Module):
    """Three layers with statistics and dropout, a few milliseconds an iteration."""

    def __init__(self, layers, classes):
        super().__init__()
        widths = [3, 8, 8, 16]
        self.convs = nn.ModuleList(
            layers.conv(a, b, 3, stride=2, padding=1, bias=False) for a, b in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(layers.norm(b) for b in widths[1:])
        self.act = layers.act()
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(16, classes)

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.act(norm(conv(x)))
        return self.fc(self.dropout(x.mean((2, 3))))


def build_small(*, layers, classes, **_):
    return Small(layers, classes)


# 6 iterations an epoch, the last one smaller, and a third of a second epoch.
TINY = ["dataset=digits", "batch_size=256", "schedule.iterations=8", "machine.threads=1", "machine.device=cpu"]


COMMIT = "c0ffee" * 6 + "c0ff"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


_load = config.load  # before a test puts load_quickly in its place
compose = functools.cache(lambda *overrides: _load(list(overrides)))
digits = functools.cache(functools.partial(datasets.digits, Path()))


def load_quickly(overrides):
    """config.load, its results remembered: composing takes longer than a run of the tiny network."""
    results = [o.partition("=")[2] for o in overrides if o.startswith("machine.results=")]
    loaded = copy.deepcopy(compose(*(o for o in overrides if not o.startswith("machine.results="))))
    loaded.machine.results = results[-1]
    return loaded


class Run:
    """What a command's run has left in a results folder."""

    def __init__(self, results, overrides):
        self.results = Path(results)
        self.config = load_quickly([*overrides, f"machine.results={results}"])
        self.name = config.run_name(self.config)
        self.folder = self.results / "runs" / self.name
        self.checkpoint_path = self.folder / "checkpoint.pt"
        self.record_path = self.results / "records" / f"{self.name}.json"

    def checkpoint(self):
        return checkpoint.read(self.checkpoint_path)

    def record(self):
        return record.read(self.record_path)

    def rows(self):
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def points(self):
        """TensorBoard's points: (step, value) by tag."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        assert len(list(self.folder.glob("events.out.tfevents.*"))) == 1
        events = EventAccumulator(str(self.folder), size_guidance={"scalars": 0})
        events.Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


TIMES = {"seconds", "images_per_second", "date", "checksum"}


def without(mapping, keys):
    return {key: value for key, value in mapping.items() if key not in keys}


def assert_same_bits(a, b, path=""):
    """Two nested states with tensors in them, equal to the bit."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same_bits(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def assert_same_run(a: Run, b: Run):
    """Two runs of one configuration that ended with the same bits, timing aside."""
    one, other = a.checkpoint(), b.checkpoint()
    for key in ("name", "identity", "iteration", "length", "model", "optimizer", "generators", "journal_lines"):
        assert_same_bits(one[key], other[key], key)
    assert without(a.record(), TIMES) == without(b.record(), TIMES)
    assert [without(row, TIMES) for row in a.rows()] == [without(row, TIMES) for row in b.rows()]
    speed = {"speed/images_per_second"}
    assert without(a.points(), speed) == without(b.points(), speed)


def fingerprint(run: Run) -> str:
    """SHA-256 of all that a run ended with but timing: what `assert_same_run` compares."""
    digest = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key, inner in value.items():
                add(key)
                add(inner)
        elif isinstance(value, (list, tuple)):
            digest.update(f"{len(value)}".encode())
            for inner in value:
                add(inner)
        else:
            digest.update(repr(value).encode())

    state = run.checkpoint()
    add({key: state[key] for key in ("name", "identity", "iteration", "length", "journal_lines")})
    add({key: state[key] for key in ("model", "optimizer", "generators")})
    add(without(run.record(), TIMES))
    add([without(row, TIMES) for row in run.rows()])
    points = without(run.points(), {"speed/images_per_second"})
    assert all(steps == sorted(set(steps)) for steps in ([s for s, _ in series] for series in points.values()))
    add(dict(sorted(points.items())))
    return digest.hexdigest()


def with_new_fields(cls, *fields):
    """A later version of a class of the schema."""
    return dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,))


def run_here(capsys, monkeypatch, *overrides) -> Outcome:
    """`train.py overrides` in this process, with the tiny network in place of any other."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(models, "build", build_tiny)
    monkeypatch.setattr(train.configuration, "load", load_quickly)
    monkeypatch.setattr(datasets, "digits", lambda _: digits())
    # Not the working tree's, which may change while the tests run.
    monkeypatch.setattr(provenance, "commit_and_dirty", lambda: (COMMIT, False))
    capsys.readouterr()
    try:
        code = train.main(list(overrides))
    finally:
        torch.set_num_threads(threads)
    return Outcome(code, *capsys.readouterr())


def load_script(name):
    """A program of scripts/ as a module."""
    specification = importlib.util.spec_from_file_location(f"{name}_script", REPOSITORY / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def start(*arguments, cwd=None, **environment) -> subprocess.Popen:
    """`train.py arguments` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "train.py"), *arguments],
        cwd=cwd,
        # Without git, so that a working tree that changes while the tests run changes no record.
        env={**os.environ, "GIT_DIR": os.devnull, "MBN_COMMIT": COMMIT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process, timeout=120) -> Outcome:
    """What a process has said, at its end."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout} s: {out}{err}") from None
    return Outcome(process.returncode, out, err)
