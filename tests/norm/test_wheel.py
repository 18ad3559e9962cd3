"""The wheel holds the layers alone, and they work beside torch with nothing else installed."""

import re
import subprocess
import sys
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
