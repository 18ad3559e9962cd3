"""The page of `train.py --help`."""

import re

import pytest

import train
from mbn import config, methods
from mbn.config import load
from mbn.system.setting_fields import leaves

# A setting as it stands on the page, and what stands behind it.
SETTING = re.compile(r"^(?:  )?([a-z_.0-9]+=.*?)(?:  +(.*))?$", re.MULTILINE)


def page(capsys, *overrides):
    """The page, and the part of it with the settings."""
    assert train.main([*overrides, "--help"]) == 0
    text = capsys.readouterr().out
    return text, text.partition("settings:\n")[2].partition("\n\nresults")[0]


@pytest.mark.parametrize(
    "overrides",
    [[], ["experiment=quickstart", "machine.data=/a b", "machine.again=true"], ["dataset=imagenet", "model=resnet18"]]
    + [[f"norm={name}", "model=nin"] for name in methods.METHODS],
    ids=" ".join,
)
def test_what_the_page_shows_can_be_typed_and_is_explained(capsys, overrides):
    _, shown = page(capsys, *overrides)
    typed = dict(SETTING.findall(shown))
    wanted = load(overrides)
    assert load(list(typed)) == wanted
    keys = {key.removesuffix(".name") for key, field, _ in leaves(wanted) if field.name != "schedule"}
    assert {key.partition("=")[0] for key in typed} == keys - {"optimizer", "evaluate", "machine"}
    lines = shown.splitlines()
    for setting, beside in typed.items():
        below = lines[next(i for i, line in enumerate(lines) if line.strip() == setting) + 1] if not beside else ""
        assert re.search("[a-z]{2}", beside or below)


def test_every_setting_and_group_has_an_explanation():
    """A group that is chosen, such as norm=, is explained by its name."""
    schemas = [config.Config(norm=method.settings()) for method in methods.METHODS.values()]
    schemas += [config.Config(model=network.settings()) for network in config.NETWORKS.values()]
    for schema in schemas:
        explained = {key: field.metadata["explanation"] for key, field, _ in leaves(schema)}
        assert [key for key, text in explained.items() if not (text or explained.get(f"{key}.name"))] == []


def test_the_page_is_read_in_a_window_of_100_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text, shown = page(capsys, "machine.data=data", "machine.results=results")
    assert max(map(len, text.splitlines())) <= 100
    order = ("batch_size=", "forwards=", "seed=", "schedule ", "norm=mbn", "dataset=", "evaluate ", "machine ")
    assert sorted(order, key=lambda start: shown.index(f"\n{start}" if start != order[0] else start)) == list(order)


def test_the_page_shows_choices_commands_that_are_right_results_and_exit_codes(capsys):
    text, _ = page(capsys, "machine.results=/a b")
    for group in config.groups():
        assert f"\n  {group}={'|'.join(config.options(group))}\n" in text
    commands = re.findall(r"^  python train.py (.*?)(?:   .*)?$", text, re.MULTILINE)
    assert len(commands) == 6
    for command in commands:
        for line in config.sweep_lines([word for word in command.split() if not word.startswith("-")]):
            load(line)
    assert "tensorboard --logdir '/a b/runs'" in text
    assert re.findall(r"^  (\d+)    *", text.partition("exit codes:\n")[2], re.MULTILINE) == ["0", "1", "2", "75", "76"]
