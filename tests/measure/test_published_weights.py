"""The weights in results/weights: each is of a run whose record is here, and gives the test error of that record."""

import json
import os
import re
from pathlib import Path

import pytest
from running import load_script
from safetensors import safe_open

from mbn.config import REPOSITORY, from_dict, run_name
from mbn.records import record

RESULTS = REPOSITORY / "results"
FILES = sorted((RESULTS / "weights").rglob("*.safetensors"))
DATA = Path(os.environ.get("MBN_DATA") or REPOSITORY / "data")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_published_weights_are_of_a_run_with_a_record(path):
    with safe_open(path, "pt") as file:
        described = json.loads(file.metadata()["config"])
    name = run_name(from_dict({**described, "machine": {"data": "data", "results": "results"}}))
    assert RESULTS / "weights" / f"{name}.safetensors" == path
    assert record.path_of(RESULTS, name).exists()


@pytest.mark.skipif(not (DATA / "cifar-10-batches-py").is_dir(), reason=f"CIFAR-10 is not in {DATA}")
def test_published_weights_have_the_test_error_of_their_record(capsys):
    """One file of ResNet-20, which takes ten seconds."""
    path = next(path for path in FILES if path.parent.name == "resnet20" and path.name.startswith("mbn-"))
    capsys.readouterr()
    assert load_script("evaluate").main([str(path), f"machine.data={DATA}", "machine.device=cpu"]) == 0
    measured = float(re.search(r"top-1 error (\d+\.\d\d) %", capsys.readouterr().out)[1])
    expected = record.read(record.path_of(RESULTS, f"cifar10/resnet20/{path.stem}"))["test_error"]
    assert measured == pytest.approx(expected, abs=0.05)
