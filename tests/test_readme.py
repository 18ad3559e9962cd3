"""What the README shows works as written."""

import re
import shlex
import subprocess
import sys

import pytest
import torch
import torchvision

import train
from mbn.config import REPOSITORY, load, sweep_lines

README = (REPOSITORY / "README.md").read_text()
LINES = [
    part.strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    for part in line.partition(" # ")[0].split("&&")
]
TRAIN = [shlex.split(line)[2:] for line in LINES if line.startswith("python train.py")]
SCRIPTS = [shlex.split(line)[1:] for line in LINES if line.startswith("python scripts/")]


def test_the_readme_is_read_at_all():
    assert len(TRAIN) >= 8
    assert len(SCRIPTS) >= 5


def test_ci_runs_what_the_readme_shows_first_in_its_order():
    """All but the paper's run, which takes hours, and TensorBoard, which serves until it is stopped."""
    first = re.search(r"## Try it.*?```bash\n(.*?)```", README, re.DOTALL)[1].splitlines()
    commands = [part.strip() for line in first for part in line.partition(" # ")[0].split("&&")]
    shown = [c for c in commands if c.startswith(("pip", "python", "pytest"))]
    shown.remove("python train.py dataset=cifar10 model=resnet56 norm=mbn")
    ci = (REPOSITORY / ".ci" / "run").read_text()
    ran = re.findall(r"^(pip install|python train\.py|python scripts|pytest)(.*)$", ci, re.MULTILINE)
    ran = [(command + rest).replace(" -q --disable-pip-version-check", "") for command, rest in ran]
    assert [command.replace(" --durations=15", "") for command in ran] == shown


@pytest.mark.parametrize("arguments", TRAIN, ids=" ".join)
def test_a_train_command_is_a_run_or_a_sweep_of_runs(arguments):
    """Checked as train.py checks it; the quickstart itself is run by .ci/run."""
    if arguments[0] == "-m":
        assert len([load(line) for line in sweep_lines(arguments[1:])]) == 6
    else:
        load(arguments)


@pytest.mark.parametrize("arguments", SCRIPTS, ids=" ".join)
def test_a_script_command_runs(arguments, tmp_path):
    script, *rest = arguments
    if script == "scripts/check_gpu.py":
        done = subprocess.run([sys.executable, REPOSITORY / script, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    if script == "scripts/reproduce.py" and "--dry-run" not in rest:
        rest.append("--dry-run")
    done = subprocess.run(
        [sys.executable, REPOSITORY / script, *rest, f"machine.results={tmp_path}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_options_named_are_those_there_are(capsys):
    """Every `a b c` of the table of groups is an option of its group."""
    assert train.main(["--help"]) == 0
    shown = capsys.readouterr().out
    rows = re.findall(r"^\| `(dataset|model|norm)` \| (.*) \|$", README, re.MULTILINE)
    assert [group for group, _ in rows] == ["dataset", "model", "norm"]
    for group, options in rows:
        (listed,) = re.findall(rf"^  {group}=(\S+)$", shown, re.MULTILINE)
        named = {word for code in re.findall(r"`([^`]*)`", options) for word in code.split() if word.isalnum()}
        assert named - {"or", "2"} == set(listed.split("|")), group


def test_the_lines_for_ones_own_training_loop_run():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    prepare, step, end = block.split("...\n")
    images = torch.randn(2, 3, 64, 64)
    names: dict = {"torchvision": torchvision, "images": images}
    exec(prepare, names)
    model = names["model"]
    names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    names["loss"] = model(images).square().mean()
    exec(step, names)
    assert model.bn1.memory_count.count_nonzero() == 1
    exec(end, names)
    assert model.bn1.lam == 0.5
    model.eval()
    torch.testing.assert_close(names["plain"].eval()(images), model(images))
