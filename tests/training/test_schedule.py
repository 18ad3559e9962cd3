"""Learning rate and lambda over a run, as literal lists; what imports what."""

import subprocess
import sys

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
