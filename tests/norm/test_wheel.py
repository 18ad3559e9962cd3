"""The wheel holds the layers alone, and they work beside torch with nothing else installed."""

import re
import subprocess
import sys
import venv
import zipfile
from importlib import metadata

import pytest

import mbn
from mbn.config import REPOSITORY

# Run in a process of its own. sys.argv: the folder that the wheel is installed in, and the distributions that exist.
PROGRAM = """
import importlib.metadata, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

target, *distributions = sys.argv[1:]
there = {"mbn", *sys.stdlib_module_names}
for module, owners in importlib.metadata.packages_distributions().items():
    if any(owner.lower().replace("_", "-") in distributions for owner in owners):
        there.add(module)

class Only:
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, path, target) if name.partition(".")[0] in there else None

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Only]
sys.path.insert(0, target)
try:
    import hydra
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("hydra can be imported: nothing is shown")

import torch
import mbn

assert mbn.__file__.startswith(target), mbn.__file__
for name in mbn.__all__:
    getattr(mbn, name)
images = torch.randn(4, 3, 8, 8)
model = mbn.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)))
model(images).square().sum().backward()
with torch.no_grad():
    for p in model.parameters():
        p -= 0.1 * p.grad
mbn.second_forward(model, images)
assert model[1].memory_count[:2].tolist() == [4 * 6 * 6, 0]
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """As `pip wheel .` makes it; called directly, hatchling needs neither a network nor pip's isolation."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.iterdir()
    return path


def test_it_holds_the_layers_and_needs_torch_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        (about,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    layers = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "mbn" / "norm").glob("*.py")}
    assert files == {"mbn/__init__.py", "mbn/py.typed", *layers}
    needs = [need for need in re.findall("^Requires-Dist: (.*)$", about, re.MULTILINE) if "extra ==" not in need]
    assert needs == ["torch>=2.6"]
    assert f"\nVersion: {mbn.__version__}\n" in about


def needed_by(name):
    """The distribution and all that it needs on this machine, extras left out."""
    found, left = set(), [name]
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another platform
            continue
        if name not in found:
            found.add(name)
            left += [re.match(r"[\w.-]+", need)[0] for need in requirements if "extra ==" not in need]
    return sorted(found)


def test_installed_beside_torch_alone_a_converted_network_takes_both_forwards(wheel, tmp_path):
    target = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index", "--no-deps"]
    done = subprocess.run([*install, "--target", target, wheel], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    program = [sys.executable, "-P", "-W", "ignore", "-c", PROGRAM, target, *needed_by("torch")]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def user(wheel, tmp_path_factory):
    """A function that gives what mypy finds in a user's code, where the wheel is installed and nothing else."""
    folder = tmp_path_factory.mktemp("user")
    venv.create(folder / "venv")
    (site_packages,) = (folder / "venv").glob("**/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site_packages)
    (python,) = (path for path in (folder / "venv").glob("*/python*") if path.stem == "python")

    def found(*lines):
        """The numbers of the lines with an error, from 1, and all that mypy says."""
        (folder / "train.py").write_text("\n".join(lines))
        # torch is missing: to read it would take minutes.
        options = ["--ignore-missing-imports", "--python-executable", python, "--cache-dir", folder / "cache"]
        done = subprocess.run(
            [sys.executable, "-m", "mypy", *options, "train.py"], cwd=folder, capture_output=True, text=True
        )
        errors = re.findall(r"^train\.py:(\d+): error: ", done.stdout, re.MULTILINE)
        return sorted({int(number) for number in errors}), done.stdout + done.stderr

    return found


def test_mypy_finds_a_wrong_keyword_in_two_lines_of_a_users_code(user):
    lines, said = user("from mbn import convert", "model = convert(model, memry=40)")
    assert lines == [2], said
    assert 'Unexpected keyword argument "memry"' in said


def test_mypy_finds_a_misspelt_name_and_knows_all_by_a_star(user):
    lines, said = user("from mbn import MemorisedBatchNorm2d", "import mbn", "mbn.set_lamda(None, 0.5)")
    assert lines == [1, 3], said
    assert user("from mbn import *", "convert, held, UnitConv2d")[0] == []


def test_the_names_of_a_star_are_all_names():
    assert mbn.__all__ == sorted(mbn._HOME)


def test_mypy_knows_the_settings_of_each_norm_and_layer(user):
    right = [
        "from torch import nn",
        "from mbn import BatchRenorm1d, MemorizedBatchNorm2d, UnitConv2d, convert, norm_layers, to_batch_norm",
        "net = nn.Sequential()",
        'convert(net, memory=40, gradient="batch", pretrained_batches=0)',
        'convert(net, "brn", r_max=2.0, warmup_steps=9, sync=True)',
        'convert(net, norm="bn", momentum=None, replace={nn.Linear: lambda layer: layer}, process_group=None)',
        "MemorizedBatchNorm2d(3, 1e-3, memory=40), BatchRenorm1d(3, momentum=0.1)",
        "to_batch_norm(net), [layer.forwards + 1 for layer in norm_layers(net)]",
        "UnitConv2d(3, 8, 3, dilation=2), MemorizedBatchNorm2d(3).train().forwards",
    ]
    wrong = [
        'convert(net, memory="40")',
        'convert(net, "brn", memory=40)',
        'convert(net, "bn", r_max=2.0)',
        'convert(net, "gn")',
        "convert(net, affine=False)",
        "MemorizedBatchNorm2d(3, memry=40)",
        "BatchRenorm1d(3, 1e-5, 0.1)",
        'norm_layers(net)[0].forwards + "1"',
        "UnitConv2d(3, 8, 3, dilatoin=2)",
    ]
    lines, said = user(*right, *wrong)
    assert lines == [len(right) + i + 1 for i in range(len(wrong))], said
