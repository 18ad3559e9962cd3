"""What an import loads: torch takes seconds."""

import subprocess
import sys

import pytest

from mbn.config import REPOSITORY

LAYERS = "MemorizedBatchNorm2d, convert, second_forward, set_lambda, to_batch_norm"
HEAVY = {"torchvision", "sklearn", "tensorboard"}


@pytest.mark.parametrize(
    ("code", "ours", "not_loaded"),
    [
        ("import mbn", ("mbn",), HEAVY | {"torch", "hydra", "omegaconf", "numpy", "yaml"}),
        (
            f"import torch; from mbn import {LAYERS}; convert(torch.nn.BatchNorm2d(3))",
            ("mbn", "mbn.norm"),
            HEAVY | {"hydra", "omegaconf"},
        ),
        (
            "import train, mbn.records.record; train.configuration.load([])",
            ("train", "mbn", "mbn.config", "mbn.methods", "mbn.records", "mbn.system"),
            HEAVY | {"torch"},
        ),
    ],
    ids=["mbn", "the README's two lines", "configuration and records"],
)
def test_an_import_loads_no_more_than_it_needs(code, ours, not_loaded):
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    modules = set(done.stdout.split())
    assert not modules & not_loaded
    loaded = {m for m in modules if m.split(".")[0] in ("mbn", "models", "train", "scripts", "tests")}
    assert {".".join(m.split(".")[:2]) for m in loaded} == set(ours)
