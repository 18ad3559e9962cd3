"""What the tests of whole runs share: small networks, runs in this process and in others, and what they left."""

import copy
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import killing
import pytest
import torch
from torch import nn

import models
import train
from mbn import config
from mbn.config import REPOSITORY
from mbn.data import datasets
from mbn.norm.base import norm_layers
from mbn.records import provenance, record
from mbn.training import checkpoint_file
from mbn.training.iteration import Update


class Tiny(nn.Module):
    """An iteration takes milliseconds. It has dropout, so that the generators' state matters."""

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
    """Two layers with statistics, so that the second one's input depends on what the first one normalises by."""

    def __init__(self, layers, classes=10, dropout=0.0, widths=(4, 5)):
        super().__init__()
        a, b = widths
        self.conv1, self.norm1, self.act1 = layers.conv(3, a, 3, padding=1, bias=False), layers.norm(a), layers.act()
        self.dropout = nn.Dropout(dropout)
        self.conv2, self.norm2, self.act2 = layers.conv(a, b, 3, stride=2, bias=False), layers.norm(b), layers.act()
        self.fc = nn.Linear(b, classes)

    def forward(self, x):
        x = self.dropout(self.act1(self.norm1(self.conv1(x))))
        return self.fc(self.act2(self.norm2(self.conv2(x))).mean((2, 3)))


def build_small(*, layers, classes, **_):
    return Small(layers, classes, dropout=0.1, widths=(8, 16))


@torch.no_grad()
def follow(model: Small, references, x, remember=True):
    """Put x through the model as it is now, with references in place of its layers; return the input of each."""
    given = []
    for conv, layer, reference in zip((model.conv1, model.conv2), norm_layers(model), references, strict=True):
        given.append(conv(x))
        groups = [reference.normalize(group, layer.weight, layer.bias) for group in reference.groups(given[-1])]
        x = torch.cat(groups).relu()
        if remember:
            reference.remember(given[-1])
    return given


# 6 iterations an epoch, the last one smaller, and a third of a second epoch.
TINY = ["dataset=digits", "batch_size=256", "schedule.iterations=8", "machine.threads=1", "machine.device=cpu"]


COMMIT, DIRTY = "c0ffee" * 6 + "c0ff", False
# A folder's name with all that Hydra, Python's formats and a shell could stumble over.
UGLY = 'Große  =a,b (c) [d] {e} #5 100%s $HOME `f` it\'s "g" \\h\\'


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


_load = config.load  # before a test replaces it by load_quickly
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
        self.record_path = record.path_of(self.results, self.name)

    def checkpoint(self):
        return checkpoint_file.read(self.checkpoint_path)

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


TIMES = {"time", "seconds", "images_per_second", "date", "journal", "checksum"}


def without(mapping, keys):
    return {key: value for key, value in mapping.items() if key not in keys}


def assert_same_bits(a, b, path=""):
    """Assert that two nested states with tensors are equal to the bit."""
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


def ended(run: Run):
    """All that a run ended with, timing aside."""
    state, points = run.checkpoint(), without(run.points(), {"throughput/images_per_second"})
    assert all(steps == sorted(set(steps)) for steps in ([s for s, _ in series] for series in points.values()))
    keys = ("name", "identity", "iteration", "length", "journal_lines", "model", "optimizer", "generators")
    rows = [without(row, TIMES) for row in run.rows()]
    made = without(run.record(), TIMES)
    if made["controls"]:
        made["controls"]["by"] = without(made["controls"]["by"], TIMES)
    return [{key: state[key] for key in keys}, made, rows, dict(sorted(points.items()))]


def assert_same_run(a: Run, b: Run):
    """Assert that two runs of one configuration ended with the same bits, timing aside."""
    assert_same_bits(ended(a), ended(b))


def fingerprint(run: Run) -> str:
    """SHA-256 of all that a run ended with, timing aside."""
    digest = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            add(list(value.items()))
        elif isinstance(value, (list, tuple)):
            digest.update(f"{len(value)}".encode())
            for inner in value:
                add(inner)
        else:
            digest.update(repr(value).encode())

    add(ended(run))
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
    # A fixed commit: the working tree may change while the tests run.
    monkeypatch.setattr(provenance, "commit_and_dirty", lambda: (COMMIT, DIRTY))
    capsys.readouterr()
    try:
        code = train.main(list(overrides))
    finally:
        torch.set_num_threads(threads)
    return Outcome(code, *capsys.readouterr())


# Fixtures, for the conftest.py of the folders that need them.


@pytest.fixture
def here(capsys, monkeypatch, tmp_path):
    """A function that runs `train.py` with TINY and more, in this process, its results in a temporary folder."""
    return lambda *more: run_here(capsys, monkeypatch, *TINY, f"machine.results={tmp_path / 'results'}", *more)


@pytest.fixture
def left(tmp_path):
    """What such a run has left."""
    return lambda *more: Run(tmp_path / "results", [*TINY, *more])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A function that gives an uninterrupted run of TINY and more, trained once."""

    @functools.cache
    def get(*more):
        results = tmp_path_factory.mktemp("whole")
        with pytest.MonkeyPatch.context() as patch:
            silent = types.SimpleNamespace(readouterr=lambda: ("", ""))  # capsys is for functions only
            assert run_here(silent, patch, *TINY, f"machine.results={results}", *more).code == 0
        return Run(results, [*TINY, *more])

    return get


@pytest.fixture
def after(monkeypatch):
    """A function that lets action(update) be called once, after so many iterations from now."""

    def arrange(iterations, action):
        original = Update.__call__
        numbers = itertools.count(1)

        def call(self, images, labels):
            original(self, images, labels)
            if next(numbers) == iterations:
                monkeypatch.setattr(Update, "__call__", original)
                action(self)

        monkeypatch.setattr(Update, "__call__", call)

    return arrange


@pytest.fixture
def reads(monkeypatch):
    """The names of the methods by which the host has read tensors so far: each read waits for the GPU."""
    found = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def counted(tensor, *args, _original=original, _name=name, **kwargs):
            found.append(_name)
            return _original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return found


class PowerCutError(Exception):
    pass


def cut(*_):
    raise PowerCutError


def send(name):
    return lambda *_: os.kill(os.getpid(), getattr(signal, name))


class Trap:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def load_script(name):
    """A program of scripts/ as a module."""
    specification = importlib.util.spec_from_file_location(f"{name}_script", REPOSITORY / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def start(*arguments, cwd=None, program=REPOSITORY / "train.py", **environment) -> subprocess.Popen:
    """`train.py arguments` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(program), *arguments],
        cwd=cwd,
        env={**os.environ, "PATH": killing.WITHOUT_GIT, "MBN_COMMIT": COMMIT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process, timeout=900) -> Outcome:
    """What a process printed, once it has ended."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout} s: {out}{err}") from None
    return Outcome(process.returncode, out, err)
