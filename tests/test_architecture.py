"""Who may import whom: one way, from the programs on top to the layers and the system below."""

import ast
import functools
import graphlib
import shutil
import sys

import pytest

from mbn.config import REPOSITORY

# What each part of mbn may import of the others, from the bottom to the top. None imports models or a program.
PARTS = {
    "norm": "",
    "system": "",
    "methods": "system",
    "config": "system methods",
    "data": "system methods config",
    "records": "system methods config",
    "grid": "system methods config",
    "network_layers": "norm system methods config",
    "measure": "norm system methods config",
    "training": "norm system methods config data records network_layers measure",
    "launch": "system methods config data records grid",
    "tables": "system methods config records grid launch",
    "benchmark": "norm system methods config data records grid network_layers measure training launch",
}
PROGRAMS = ("train", "scripts")
# These two can be taken into another project.
TORCH_ALONE = ("mbn.norm", "models")


def modules(root):
    """Path by dotted name; a package goes by its own name."""
    paths = [root / "train.py", *(p for folder in ("mbn", "models", "scripts") for p in (root / folder).rglob("*.py"))]
    names = [".".join(path.relative_to(root).with_suffix("").parts) for path in paths]
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


@functools.cache
def imported(package, text):
    """What a module of that package imports, inside functions too: dotted names of modules, or of names in modules."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def module_of(name, known):
    """The module of ours that an imported name is or is in, where mbn's names are norm's; otherwise a first name."""
    module = name
    while module and module not in known:
        module = module.rpartition(".")[0]
    if module == "mbn" and name not in ("mbn", "mbn.__version__"):
        return "mbn.norm"
    return module or name.partition(".")[0]


def part(name):
    """The part of mbn that a module belongs to, "" for mbn itself."""
    return [*name.split("."), ""][1]


def allowed(name, target):
    """Whether one module of ours may import another."""
    if name.startswith("models"):
        return target.startswith("models")
    if name.startswith("mbn"):
        may = (part(name), *PARTS.get(part(name), "norm").split())
        return target == "mbn" or (target.startswith("mbn.") and part(target) in may)
    return True


def faults(root):
    """Every import that breaks a rule, as a sentence."""
    known = modules(root)
    graph = {}
    for name, path in known.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        graph[name] = {module_of(target, known) for target in imported(package, path.read_text())} - {name}
    for name, targets in graph.items():
        if name.startswith("mbn.") and part(name) not in PARTS:
            yield f"{name} has no place in PARTS"
        for target in targets:
            if target.partition(".")[0] not in ("mbn", "models", *PROGRAMS):
                if name.startswith(TORCH_ALONE) and target not in ("torch", *sys.stdlib_module_names):
                    yield f"{name} needs {target}, and should need torch alone"
            elif not allowed(name, target):
                yield f"{name} imports {target}"
    try:
        graphlib.TopologicalSorter({name: targets & set(known) for name, targets in graph.items()}).prepare()
    except graphlib.CycleError as error:
        yield f"a circle: {' -> '.join(error.args[1])}"


def test_imports_go_one_way():
    assert list(faults(REPOSITORY)) == []


def test_no_part_may_import_one_above_it():
    above = set(PARTS)
    for name, may in PARTS.items():
        above.remove(name)
        assert above.isdisjoint(may.split())


LATER = "\n\ndef later():\n    {}\n"


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("mbn/norm/base.py", "from mbn.training import run", "mbn.norm.base imports mbn.training.run"),
        ("mbn/norm/convert.py", "from ..config.schema import Config", "mbn.norm.convert imports mbn.config.schema"),
        ("mbn/norm/renorm.py", "import scipy", "mbn.norm.renorm needs scipy, and should need torch alone"),
        ("mbn/system/files.py", "from mbn import grid", "mbn.system.files imports mbn.grid"),
        ("mbn/system/errors.py", "from . import files", "a circle: "),
        ("mbn/tables/page.py", "from mbn import second_forward", "mbn.tables.page imports mbn.norm"),
        ("mbn/launch/pool.py", LATER.format("import mbn.tables.page"), "mbn.launch.pool imports mbn.tables.page"),
        ("mbn/training/run.py", LATER.format("import train"), "mbn.training.run imports train"),
        ("mbn/training/run.py", "import models", "mbn.training.run imports models"),
        ("mbn/__init__.py", "from .config import load", "mbn imports mbn.config"),
        ("mbn/helpers.py", "", "mbn.helpers has no place in PARTS"),
        ("models/nin.py", "from mbn.norm.batch import BatchNorm2d", "models.nin imports mbn.norm.batch"),
        ("models/nin.py", "import torchvision", "models.nin needs torchvision, and should need torch alone"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, file, text, fault):
    for folder in ("mbn", "models", "scripts"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "train.py", tmp_path)
    with (tmp_path / file).open("a") as open_file:
        open_file.write(f"\n{text}\n")
    assert any(found.startswith(fault) for found in faults(tmp_path))
