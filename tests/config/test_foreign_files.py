"""Files and values that no configuration can be made of are one sentence, with exit code 2; one value is one run."""

import itertools
import math
import random
import shutil

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from running import compose

import train
from mbn import grid
from mbn.config import CONFIGS, ConfigError, from_dict, load, run_name, sweep_lines, to_dict
from mbn.system.setting_fields import leaves
from mbn.system.yaml_file import read_yaml


def sentence(error):
    message = str(error)
    assert message.endswith(".")
    assert message.isprintable()
    assert ". " not in message
    assert len(message) < 600
    assert error.code == 2
    return message


# Files.

# By what is said of them: contents, with the line of the fault.
FAULTS = {
    "tabs": [(3, "norm:\n\tdecay: 0.5\n")],
    "set a second time": [(3, "seed: 1\nseed: 2\n"), (4, "norm:\n  decay: 1\n  'decay': 1\n"), (3, "1: a\n'1': b\n")],
    "not UTF-8": [(3, "seed: 1\n# größer\n".encode("latin-1")), (2, b"\xff\xfes\0e\0e\0d\0")],
    "second document": [(None, "seed: 1\n---\nseed: 2\n")],
    "not allowed here": [(2, "seed: !foo 3\n"), (2, "seed: !!python/object/apply:os.system [id]\n")],
    "repeats itself": [
        (None, "norm: &a\n  x: *a\n"),
        (None, "a: &a [*a]\n"),
        (None, "a: &a [1]\n" + "".join(f"{y}: &{y} [{f'*{x},' * 9}]\n" for x, y in itertools.pairwise("abcdefg"))),
    ],
    "must hold lines": [(None, "- 1\n- 2\n"), (None, "3\n"), (None, "hello\n")],
    "is not YAML": [
        (None, "seed: 'a\n"), (3, "seed: [1\nnorm: 2\n"), (None, "seed: \0\n"), (2, "[1, 2]: 3\n"), (2, "<<: 3\n")
    ],
    "impossible value": [(None, f"seed: {'9' * 5000}\n")],
    "too deeply": [(None, f"seed: {'[' * 5000}\n")],
    "is read as 8": [(2, "seed: 010\n"), (3, "machine:\n  data: 010\n")],
    "is read as 16": [(2, "seed: 0x10\n"), (2, "seed: 0b10000\n")],
    "is read as 90": [(2, "seed: 1:30\n")],
    "is read as true": [(3, "machine:\n  again: yes\n"), (2, "precision: on\n")],
    "is read as false": [(2, "precision: no\n"), (2, "norm: [Off]\n")],
}  # fmt: skip


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes one of the files of a copy of configs/, and uses the copy."""
    folder = tmp_path / "configs"
    shutil.copytree(CONFIGS, folder)
    monkeypatch.setattr("mbn.config.loading.CONFIGS", folder)

    def put(content, name="experiment/mine"):
        path = folder / f"{name}.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return put


@pytest.mark.parametrize(("says", "line", "text"), [(k, line, text) for k, v in FAULTS.items() for line, text in v])
def test_a_file_that_cannot_be_read_is_one_sentence_with_its_name_and_line(says, line, text, write):
    header = "# @package _global_\n"
    path = write(header.encode() + text if isinstance(text, bytes) else header + text)
    with pytest.raises(ConfigError) as caught:
        load(["experiment=mine"])
    message = sentence(caught.value)
    assert message.startswith(f"{path}, line {line}" if line else f"{path}")
    assert says in message


@pytest.mark.parametrize("name", ["config", "norm/mbn", "schedule/paper", "dataset/cifar10"])
def test_every_file_that_is_used_is_read_strictly(name, write):
    path = write((CONFIGS / f"{name}.yaml").read_bytes() + b"\nnew: 010\n", name)
    with pytest.raises(ConfigError, match=f"{path}, line [0-9]+: '010' is read as 8: write 8, or quotes"):
        load([])


def test_a_file_that_is_not_used_is_not_read(write):
    write("\t", "experiment/other")
    write("\t", "norm/gn")
    load([])


def test_a_folder_of_that_name_and_a_wrong_list_of_defaults_are_one_sentence(write):
    path = write("")
    for text in (
        "defaults: 3",
        "defaults: [[1]]",
        "defaults: [{override /norm: 3}]",
        "hydra: {run: x}",
        "# @package a b c",
    ):
        write(text)
        with pytest.raises(ConfigError, match=str(path)) as caught:
            load(["experiment=mine"])
        sentence(caught.value)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match="mine"):
        load(["experiment=mine"])


def test_numbers_mean_the_same_in_a_file_and_in_a_command(write):
    lines = [
        "seed: 1_0",
        "batch_size: +7",
        "optimizer: {weight_decay: 1e-3, momentum: .5}",
        "machine: {data: 2020-01-01}",
    ]
    write("\ufeff# @package _global_\n" + "\n".join(lines))
    typed = "seed=1_0 batch_size=+7 optimizer.weight_decay=1e-3 optimizer.momentum=.5 machine.data=2020-01-01"
    assert load(["experiment=mine"]) == load(typed.split())


@settings(max_examples=150)
@given(st.binary(max_size=30) | st.text("a:-[]{}&*!|>'\"#%@, \t\n019.~", max_size=40).map(str.encode))
@example(b"a: 2020-13-45")
@example(b"!.")
@example(b"a: 1:30.")
@example(b"0:")
def test_any_bytes_are_a_mapping_or_one_sentence(tmp_path, content):
    path = tmp_path / "any.yaml"
    path.write_bytes(content)
    said = None
    try:
        read = read_yaml(path)
    except ConfigError as error:
        said = sentence(error)
    assert said.startswith(str(path)) if said is not None else isinstance(read, dict)


TABLES = {
    "rows: 3": "rows",
    "rows: {a: [[1]]}": "rows",
    "rows: {8: [batch_size=8]}": "rows",
    "columns: [a]": "columns",
    "base: norm=bn": "base",
    "paper: {test_error: {'8': ['1']}}": "needs a number or null for each of the 2",
    "paper: {error: {}}": "error",
    "metrics: [loss]": "loss",
    "claims: 3": "claims",
    "claims: [3]": "means nothing",
    "cells: {a: 3}": "cells",
    "title: [1]": "title",
    "seed: 010": "line 2",
    "\ttitle: a": "line 2",
}


@pytest.mark.parametrize("line", TABLES)
def test_a_table_of_another_form_is_one_sentence_with_its_files_name(line, tmp_path):
    content = yaml.safe_load((grid.GRIDS / "table4.yaml").read_text(encoding="utf-8"))
    content.pop(line.strip().partition(":")[0], None)
    path = tmp_path / "mine.yaml"
    path.write_text(f"# mine\n{line}\n{yaml.safe_dump(content)}", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        grid.read("mine", tmp_path)
    message = sentence(caught.value)
    assert message.startswith(str(path))
    assert TABLES[line] in message


@pytest.mark.parametrize("wrong", ["batch_size=[", "batch_size=many", "colour=1", "batch_size.a=1", "norm=bnn"])
def test_a_wrong_setting_of_a_table_is_one_sentence_with_its_cell(wrong):
    cell = grid.Cell("mine", "8", "BN", ("dataset=cifar10", wrong), {})
    with pytest.raises(ConfigError, match="mine, row 8, column BN: ") as caught:
        cell.config(0)
    sentence(caught.value)


# Values.

VALUES = [
    *("[[0.1]]", "[null]", "[{a:1}]", "{a:1}", "{a:[1]}", "[0.1,[null]]", "[[[[[[]]]]]]", "{}", "[true]", "null"),
    *("9" * 400, f"[{'9' * 400}]", "9" * 5000, "[" * 300, "nan", "[-inf]", "1e400", "???", "[???]", "''", "\x1b[31m"),
    *("[${x}]", "${norm}", "[${norm}]", "${oc.env:NOT_THERE}", "${oc.decode:'[[1]]'}", "${a", "yes", "2", "'0x10'"),
]  # fmt: skip
KEYS = [key for key, _, value in leaves(compose("model=nin")) if not isinstance(value, str)]


def misread(key, value):
    """Whether a value ends in anything except a configuration, or one sentence."""
    try:
        c = load(["model=nin", f"{key}={value}"])
    except ConfigError as error:
        sentence(error)
        return False
    return from_dict(to_dict(c)) != c or not run_name(c)


PAIRS = [(key, value) for key in [*KEYS, "dataset.name", "norm.name", "precision", "norm"] for value in VALUES]


@pytest.mark.parametrize(("key", "value"), random.Random(0).sample(PAIRS, 40))
def test_a_value_that_a_setting_cannot_have_is_one_sentence(key, value):
    assert not misread(key, value)


@pytest.mark.long("7", "Nested, endless, huge and foreign values of every setting: taken as they are, or one sentence")
def test_every_such_value_of_every_setting(count, figure):
    pairs = random.Random(0).sample(PAIRS, count(len(PAIRS)))
    figure(sum(not misread(key, value) for key, value in pairs), len(pairs))


@pytest.mark.parametrize("key", ["schedule.lr", "schedule.milestones", "norm.lam", "dataset.mean", "dataset.std"])
@pytest.mark.parametrize(
    "value", [[[0.1]], [None], [{"a": 1}], {"a": [1]}, 10**400, [10**400], [True], ["0.1"], "0.1", 1]
)
def test_a_list_setting_takes_only_a_list_of_numbers(key, value):
    plain = to_dict(compose())
    group, _, name = key.partition(".")
    plain[group][name] = value
    with pytest.raises(ConfigError, match=f"^{key} must be a list of numbers such as") as caught:
        from_dict(plain)
    sentence(caught.value)


@pytest.mark.parametrize("value", ["010", "'010'", "0x10", "1:30", "'１０'", "1.0", "1e1", "yes"])
def test_a_whole_number_is_typed_in_one_way(value):
    with pytest.raises(ConfigError, match="seed must be a whole number"):
        load([f"seed={value}"])


def test_numbers_from_the_environment_are_taken(monkeypatch):
    monkeypatch.setenv("MINE", "7")
    monkeypatch.setenv("PLACE", "/a/7")
    c = load(["seed=${oc.env:MINE}", "schedule.scale=${oc.env:MINE}", "machine.data=${oc.env:PLACE}"])
    assert (c.seed, c.schedule.scale, c.machine.data) == (7, 7.0, "/a/7")


plain_values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
nested = st.recursive(
    plain_values, lambda some: st.lists(some) | st.dictionaries(st.text(max_size=4), some), max_leaves=6
)


@settings(max_examples=200)
@given(st.sampled_from([*KEYS, "norm", "machine", "norm.name", "dataset.name", "precision"]), nested)
def test_any_plain_value_is_taken_as_it_is_or_one_sentence(key, value):
    plain = node = to_dict(compose("model=nin"))
    *groups, last = key.split(".")
    for name in groups:
        node = node[name]
    node[last] = value
    try:
        c = from_dict(plain)
    except ConfigError as error:
        sentence(error)
    else:
        assert node[last] == value or value in ({}, math.inf)
        assert from_dict(to_dict(c)) == c


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "${seed}", "${nothing}", "${"])
def test_nothing_in_a_plain_configuration_is_looked_up(value, monkeypatch):
    monkeypatch.setenv("HOME", "paper")
    for group, key in [("norm", "gradient"), ("machine", "mode"), ("machine", "device"), ("norm", "name")]:
        plain = to_dict(compose())
        plain[group][key] = value
        with pytest.raises(ConfigError):
            from_dict(plain)
    plain = to_dict(compose())
    plain["machine"]["data"] = value
    assert from_dict(plain).machine.data == value


FLOATS = [(key, value) for key, _, value in leaves(compose("model=nin", "norm=mbn")) if isinstance(value, float | list)]


@pytest.mark.parametrize(("key", "value"), FLOATS, ids=[key for key, _ in FLOATS])
def test_one_number_is_one_run_however_it_is_written(key, value):
    def names(*numbers):
        """The run's name with each number; None where it is refused."""
        found = []
        for number in numbers:
            more = ",0.5,0.7" if key.startswith("dataset") else ""
            try:
                text = f"[{number}{more}]" if isinstance(value, list) else number
                found.append(run_name(load(["model=nin", f"{key}={text}"])))
            except ConfigError:
                found.append(None)
        return found

    zero, one, other = names("0.0", "1.0", "0.25")
    assert names("-0.0", "0", "-0") == [zero] * 3
    assert names("1", "1.00", "1e0") == [one] * 3
    assert other not in (None, zero, one) or key == "schedule.milestones" or key.startswith("machine")


def test_the_settings_that_may_be_zero_are_among_those():
    assert "-0.0" not in f"{to_dict(load(['optimizer.momentum=-0.0', 'norm.lam=[-0.0]', 'dataset.mean=[-0.0,0,0]']))}"


# Sweeps.


def test_a_sweep_over_a_pattern_is_one_over_the_options_that_it_fits():
    assert sweep_lines(["norm=glob(b*)"]) == [["norm=bn"], ["norm=brn"]]
    assert sweep_lines(["norm=glob([b*,g*],exclude=brn)"]) == [["norm=bn"], ["norm=gn"]]
    assert (
        len(
            sweep_lines(
                ["norm=shuffle(bn,mbn)", "seed=sort(2,1)", "norm.eps=choice(1,2)", "forwards=tag(a,choice(1,2))"]
            )
        )
        == 16
    )


@pytest.mark.parametrize(
    "override",
    [
        *("norm=glob(x*)", "seed=glob(*)", "seed=interval(0,1)", "seed=range(0,0)", "seed=range(0,3,0)"),
        *("seed=range(0,1000000000)", "seed=range(0.5,1,0)", "seed=shuffle(range(0,99999))", "seed=choice()"),
    ],
)  # fmt: skip
def test_a_sweep_without_runs_or_without_end_is_one_sentence(override, capsys):
    assert train.main(["-m", "dataset=digits", override]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
