"""Learning rate and lambda over a run, as literal lists; what imports what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from mbn.config import REPOSITORY
from mbn.training.schedule import value_at

LR, LAM, STONES = [0.1, 0.01, 0.001], [0.1, 0.5, 0.9], [0.4, 0.6]


@pytest.mark.parametrize(
    ("iterations", "lr", "lam"),
    [
        (1, [0.1], [0.1]),
        (2, [0.1, 0.01], [0.1, 0.5]),  # 0.8 and 1.2
        (3, [0.1, 0.1, 0.001], [0.1, 0.1, 0.9]),  # 1.2 and 1.8
        (5, [0.1, 0.1, 0.01, 0.001, 0.001], [0.1, 0.1, 0.5, 0.9, 0.9]),  # 2 and 3
        (
            7,  # 2.8 and 4.2
            [0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001],
            [0.1, 0.1, 0.1, 0.5, 0.5, 0.9, 0.9],
        ),
        (
            10,  # 4 and 6
            [0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.001, 0.001],
            [0.1, 0.1, 0.1, 0.1, 0.5, 0.5, 0.9, 0.9, 0.9, 0.9],
        ),
    ],
)
def test_the_papers_schedule_at_every_iteration(iterations, lr, lam):
    assert [value_at(LR, STONES, t, iterations) for t in range(iterations)] == lr
    assert [value_at(LAM, STONES, t, iterations) for t in range(iterations)] == lam


def test_the_papers_run_changes_at_31280_and_46920_of_78200():
    instants = (0, 31279, 31280, 46919, 46920, 78199)
    assert [value_at(LR, STONES, t, 78200) for t in instants] == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert [value_at(LAM, STONES, t, 78200) for t in instants] == [0.1, 0.1, 0.5, 0.5, 0.9, 0.9]


def test_milestones_are_exact_in_the_decimals_that_were_typed():
    """0.07 * 100 is 7.000000000000001 in binary, which would put the change at iteration 8."""
    for percent in range(1, 100):
        changes = [t for t in range(101) if value_at([1, 2], [percent / 100], t, 100) == 2]
        assert changes[0] == percent


def test_one_value_is_a_constant():
    assert [value_at([0.9], STONES, t, 7) for t in range(7)] == [0.9] * 7
    assert [value_at([0.9], [], t, 3) for t in range(3)] == [0.9] * 3


# What imports what.


def modules_after(code):
    """The names in sys.modules after running code in a fresh Python."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


OURS = ("mbn", "models", "train", "scripts", "tests")


def ours(modules):
    return sorted(m for m in modules if m.split(".")[0] in OURS)


def test_importing_mbn_loads_nothing_of_ours_nor_torch():
    modules = modules_after("import mbn")
    assert ours(modules) == ["mbn"]
    assert not modules & {"torch", "torchvision", "hydra", "omegaconf", "numpy", "tensorboard", "yaml"}


def test_the_two_lines_of_the_readme_load_torch_and_the_layers_only():
    modules = modules_after(
        "from mbn import MemorizedBatchNorm2d, convert, second_forward, set_lambda, to_batch_norm\n"
        "convert(__import__('torch').nn.BatchNorm2d(3))"
    )
    assert "torch" in modules
    assert all(m == "mbn" or m.startswith("mbn.norm") for m in ours(modules))
    assert not modules & {"torchvision", "hydra", "omegaconf", "tensorboard", "sklearn"}


def test_the_configuration_and_records_are_read_without_torch():
    modules = modules_after("import train, mbn.records.record; train.configuration.load([])")
    assert not modules & {"torch", "torchvision", "sklearn", "tensorboard"}


def imported(path):
    """What the module at path imports, anywhere in it: absolute dotted names."""
    package = path.relative_to(REPOSITORY).with_suffix("").parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            home = list(package[: len(package) - node.level]) if node.level else []
            home += node.module.split(".") if node.module else []
            # `from . import x` may name a module or an attribute: both are kept.
            names |= {".".join([*home, alias.name]) for alias in node.names}
    return names


def inside(name, *packages):
    return any(name == p or name.startswith(p + ".") for p in packages)


def sources(folder):
    return sorted((REPOSITORY / folder).rglob("*.py"))


@pytest.mark.parametrize("path", sources("models"), ids=str)
def test_networks_import_torch_alone(path):
    third_party = {n for n in imported(path) if n.split(".")[0] not in sys.stdlib_module_names}
    assert all(inside(n, "torch", "models") for n in third_party), third_party


@pytest.mark.parametrize("path", sources("mbn"), ids=str)
def test_the_package_imports_neither_networks_nor_scripts(path):
    assert not [n for n in imported(path) if inside(n, "models", "scripts", "train", "tests")]


@pytest.mark.parametrize("path", sources("mbn/norm"), ids=str)
def test_the_layers_import_torch_and_each_other_alone(path):
    third_party = {n for n in imported(path) if n.split(".")[0] not in sys.stdlib_module_names}
    assert all(inside(n, "torch", "mbn.norm") for n in third_party), third_party


def test_the_import_test_sees_every_kind_of_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "REPOSITORY", tmp_path)
    path = tmp_path / "mbn" / "norm" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text("import a.b\nfrom c import d\nfrom . import e\nfrom .f import g\nfrom ..h import i\n")
    assert imported(path) == {"a.b", "c.d", "mbn.norm.e", "mbn.norm.f.g", "mbn.h.i"}


def test_there_is_something_to_look_at():
    assert {p.name for p in sources("models")} >= {"build.py", "vgg.py"}
    assert Path("mbn/norm/memorized.py") in [p.relative_to(REPOSITORY) for p in sources("mbn/norm")]
