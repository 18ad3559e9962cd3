"""A method, a network, a data set and a table of one's own, each added to a copy of the checkout as README says."""

import json
import shutil
import subprocess
import sys

import pytest

from mbn.config import REPOSITORY

COLOUR = "#123456"
# The files that each of them adds.
FILES = {
    "models/tiny.py": """
from torch import nn

def tiny(layers, classes):
    return nn.Sequential(
        layers.conv(3, 4, 3, stride=4, padding=1, bias=False), layers.norm(4), layers.act(), nn.Flatten(),
        nn.Linear(4 * 8 * 8, classes),
    )
""",
    "configs/model/tiny.yaml": "name: tiny\n",
    "mbn/data/noise.py": """
import numpy as np
from mbn.data.in_memory import Arrays

def noise(folder):
    images, labels = np.arange(30 * 32 * 32 * 3).reshape(30, 32, 32, 3).astype(np.uint8), np.arange(30) % 2
    return Arrays(images[:20], labels[:20], images[20:], labels[20:])
""",
    "configs/dataset/noise.yaml": """
name: noise
classes: 2
train_images: 20
test_images: 10
mean: [0.5, 0.5, 0.5]
std: [0.3, 0.3, 0.3]
""",
    "configs/norm/ln.yaml": """
# @package _global_
forwards: 1
norm:
  name: ln
  eps: 0.25
""",
    "scripts/grids/mine.yaml": """
title: Batch sizes, tiny on noise
about: Two iterations.
base: [dataset=noise, model=tiny, schedule.iterations=2]
rows:
  "8": [batch_size=8]
  "16": [batch_size=16]
columns:
  LN: [norm=ln]
""",
}
# What is added to existing files: to which file, before which line, and what.
ENTRIES = [
    (
        "mbn/network_layers.py",
        "def bn(",
        """
def ln(forwards, eps):
    return Layers(nn.Conv2d, partial(nn.GroupNorm, 1, eps=eps), _relu)

def ln_values(config, iteration, iterations):
    return (config.norm.eps / (iteration + 1),)

def set_ln(model, eps):
    model[1].eps = eps

""",
    ),
    (
        "mbn/methods.py",
        "# Colours that",
        """
@dataclass
class LN(Norm):
    eps: float = setting(1e-5, "added to the variance", ABOVE_0)

""",
    ),
    (
        "mbn/methods.py",
        '    "bn": Method(',
        f"""    "ln": Method(
        label="LN", layers="mbn.network_layers:ln", colour="{COLOUR}", marker="x", settings=LN, statistics=False,
        change=Change("mbn.network_layers:ln_values", "mbn.network_layers:set_ln", logged="eps"),
    ),
""",
    ),
    ("mbn/config/registry.py", '    "resnet20": Network(', '    "tiny": Network(small="tiny.tiny"),\n'),
    (
        "mbn/config/registry.py",
        '    "digits": Source(',
        '    "noise": Source("mbn.data.noise:noise", in_tables=True),\n',
    ),
]


@pytest.fixture
def checkout(tmp_path):
    for part in ("mbn", "models", "configs", "scripts"):
        shutil.copytree(REPOSITORY / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "train.py", tmp_path)
    for name, text in FILES.items():
        assert not (tmp_path / name).exists()
        (tmp_path / name).write_text(text)
    for name, line, text in ENTRIES:
        path = tmp_path / name
        assert path.read_text().count(f"\n{line}") == 1
        path.write_text(path.read_text().replace(f"\n{line}", f"\n{text}{line}"))
    return tmp_path


def test_a_method_a_network_a_data_set_and_a_table_are_added_by_their_files_and_an_entry_each(checkout):
    def command(script, *arguments):
        done = subprocess.run(
            [sys.executable, checkout / script, *arguments], cwd=checkout, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def missing():
        return [
            line
            for line in command("scripts/reproduce.py", "mine", "--seeds", "1", "--dry-run").splitlines()
            if "norm=ln" in line
        ]

    first, second = missing()
    assert ("batch_size=8" in first, "batch_size=16" in second) == (True, True)
    settings = "dataset=noise model=tiny schedule.iterations=2 batch_size=8 norm=ln machine.device=cpu"
    command("train.py", *settings.split(), "machine.mode=eager", "machine.threads=1")
    assert missing() == [second]

    (record,) = (checkout / "results" / "records" / "noise" / "tiny").glob("ln-f1-b8-s0-*.json")
    result = json.loads(record.read_text())
    assert (result["iterations"], result["config"]["schedule"]["lr"]) == (2, [0.1, 0.01, 0.001])
    (journal,) = (checkout / "results" / "runs").rglob("metrics.jsonl")
    assert json.loads(journal.read_text().splitlines()[-1])["eps"] == 0.125

    # Drawn in place of one of the tables that the figures show.
    (checkout / "scripts" / "grids" / "mine.yaml").replace(checkout / "scripts" / "grids" / "table4-resnet20.yaml")
    command("scripts/plots.py")
    figure = (checkout / "results" / "figures" / "batch-size.svg").read_text()
    assert COLOUR in figure
    assert "LN" in figure
