"""scripts/evaluate.py on files of other programs and on nonsense: read safely, or refused in one sentence."""

import argparse
import copy
import json
import math
import os
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import build_tiny, compose, digits, load_script
from safetensors import safe_open
from safetensors.torch import save_file

import models
from mbn import config
from mbn.data import datasets
from mbn.network_layers import from_config
from mbn.training import checkpoint_file, weights_file

script = load_script("evaluate")
OVERRIDES = ["dataset=digits", "norm=bn", "machine.device=cpu"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The tiny network in place of any other, and settings that are composed once."""
    monkeypatch.setattr(models, "build", build_tiny)
    monkeypatch.setattr(script.configuration, "load", lambda overrides: copy.deepcopy(compose(*overrides)))
    monkeypatch.setattr(datasets, "digits", lambda _: digits())


@pytest.fixture
def state():
    torch.manual_seed(0)
    return build_tiny(layers=from_config(compose(*OVERRIDES)), classes=10).state_dict()


@pytest.fixture
def result(capsys):
    """A function that runs the script, and returns its first line without the file's name."""

    def run(path, *more):
        capsys.readouterr()
        assert script.main([str(path), *OVERRIDES, *map(str, more)]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out.removeprefix(f"{path} ").splitlines()

    return run


@pytest.fixture
def refusal(capsys):
    """A function that runs the script, and returns its error, which is one sentence without escape sequences."""

    def run(path, *more):
        capsys.readouterr()
        assert script.main([str(path), *OVERRIDES, *map(str, more)]) in (1, 2)
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(r"error: [^\n\x1b]{1,600}\.\n", err)
        return err

    return run


# Of other programs.

PREFIXES = ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_of_a_network_that_was_wrapped_are_read_without_the_wrappers(prefix, state, tmp_path, result):
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"model": {prefix + name: tensor for name, tensor in state.items()}}, tmp_path / "wrapped.pt")
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "wrapped.safetensors")
    plain = result(tmp_path / "plain.pt")
    assert result(tmp_path / "wrapped.pt") == result(tmp_path / "wrapped.safetensors") == plain


def test_checkpoints_of_torchvisions_training_script_are_read(state, tmp_path, result):
    """They hold the options as an argparse.Namespace; of others, a config of their own."""
    torch.save(state, tmp_path / "plain.pt")
    content = {"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1, name="a", inner=argparse.Namespace())}
    torch.save(content, tmp_path / "theirs.pth")
    torch.save({"model": state, "config": {"lr": 0.1}}, tmp_path / "others.pth")
    assert result(tmp_path / "theirs.pth") == result(tmp_path / "others.pth") == result(tmp_path / "plain.pt")


# Nonsense.


def changed(name, change):
    def make(state):
        return state | {name: change(state[name])}

    return make


WRONG = {
    "numbers as names": lambda state: dict(enumerate(state.values())),
    "a number among names": lambda state: state | {0: torch.zeros(1)},
    "a dictionary inside": lambda state: state | {"inner": {"a": torch.zeros(1)}},
    "bytes as weights": changed("conv.weight", lambda t: t.to(torch.int8)),
    "complex": changed("conv.weight", lambda t: t.to(torch.complex64)),
    "sparse": changed("fc.weight", lambda t: t.to_sparse()),
    "another shape": changed("fc.bias", lambda t: t[:3]),
    "no values": changed("fc.weight", lambda t: t.to("meta")),
    "quantized": changed("fc.weight", lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
    "names that a terminal obeys": lambda state: state | {"\x1b[31m\n": torch.zeros(1)},
    "empty": lambda state: {},
}


@pytest.mark.filterwarnings("ignore:.*quantize.*")
@pytest.mark.parametrize("wrong", WRONG)
def test_a_state_dict_of_something_else_is_one_sentence(wrong, state, tmp_path, refusal):
    torch.save(WRONG[wrong](state), tmp_path / "weights.pt")
    assert f"{tmp_path}/weights.pt" in refusal(tmp_path / "weights.pt")


tensors = st.builds(
    lambda shape, dtype: torch.ones(shape).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64]),
)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
keys = st.sampled_from(["conv.weight", "fc.bias", "model", "state_dict", "config", "identity", ""]) | plain
nests = st.recursive(
    tensors | plain, lambda inner: st.dictionaries(keys, inner, max_size=4) | st.lists(inner), max_leaves=8
)


@settings(max_examples=60)
@given(nests)
def test_any_nested_values_are_one_sentence(tmp_path, refusal, content):
    torch.save(content, tmp_path / "weights.pt")
    refusal(tmp_path / "weights.pt")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["conv.weight", "norm.running_var", "fc.bias"])
def test_a_value_that_is_not_finite_is_refused_with_its_tensors_name(value, name, state, tmp_path, refusal):
    state[name].view(-1)[0] = value
    torch.save(state, tmp_path / "weights.pt")
    assert f"values in {name} that are not finite" in refusal(tmp_path / "weights.pt")
    assert not (tmp_path / "new").exists()


def test_finite_weights_whose_outputs_are_not_finite_have_no_error(state, tmp_path, refusal):
    state["fc.weight"].fill_(3e38)
    torch.save(state, tmp_path / "weights.pt")
    assert "outputs that are not finite" in refusal(tmp_path / "weights.pt", "--export", tmp_path / "new.safetensors")
    assert not (tmp_path / "new.safetensors").exists()


# Configurations inside of files.


def identity(**changes):
    return config.identity(compose(*OVERRIDES)) | changes


SECRET = {"norm": {"name": "mbn", "lam": [0.5], "gradient": "${oc.env:SECRET}"}}
NO_CONFIGURATIONS = {
    "no JSON": "{",
    "empty": "",
    "a number": "3",
    "a list": "[1]",
    "another program's": '{"architectures": ["ResNet"]}',
    "nested": "[" * 100_000,
    "a long number": '{"seed": ' + "9" * 5000 + "}",
    "a list as a name": json.dumps(identity(norm={"name": ["bn"]})),
    "a machine of no settings": json.dumps(identity(machine=3)),
    "a number as a text": json.dumps(identity(seed="3")),
    "not a number": json.dumps(identity(optimizer={"momentum": math.nan})),
    "an unknown setting": json.dumps(identity(**{"\x1b[31m": 3})),
    "the environment": json.dumps(identity(**SECRET)),
    "the environment as a network": json.dumps(identity(model={"name": "${oc.env:SECRET}"})),
    "a setting's value": json.dumps(identity(seed="${batch_size}")),
}


@pytest.mark.parametrize("kind", [".safetensors", ".pt"])
@pytest.mark.parametrize("text", NO_CONFIGURATIONS.values(), ids=list(NO_CONFIGURATIONS))
def test_a_configuration_inside_of_a_file_is_checked_and_nothing_in_it_is_looked_up(
    text, kind, state, tmp_path, refusal, monkeypatch
):
    monkeypatch.setenv("SECRET", "paper")  # allowed, if it were looked up
    path = tmp_path / f"weights{kind}"
    if kind == ".pt":
        checkpoint_file.save({"model": state, "config": text, "identity": "{}"}, path)
    else:
        save_file(state, path, {"config": text})
    assert "has a configuration that no run has" in refusal(path)


def test_a_path_in_a_checkpoints_configuration_stands_for_itself(state, tmp_path, result, monkeypatch):
    monkeypatch.setenv("SECRET", "/nowhere")
    plain = config.to_dict(compose(*OVERRIDES))
    plain["machine"] |= {"data": "${oc.env:SECRET}", "results": "${oc.env:NONE}"}
    torch.save(state, tmp_path / "plain.pt")
    path = tmp_path / "checkpoint.pt"
    checkpoint_file.save({"model": state, "config": json.dumps(plain), "identity": "{}"}, path)
    assert result(path) == result(tmp_path / "plain.pt")
    assert config.from_dict(plain).machine.data == "${oc.env:SECRET}"


def test_what_is_no_dictionary_of_weights_in_a_checkpoint_of_ours_is_one_sentence(tmp_path, refusal):
    text = json.dumps(identity())
    for model in (3, [torch.zeros(1)], {0: torch.zeros(1)}):
        checkpoint_file.save({"model": model, "config": text, "identity": "{}"}, tmp_path / "checkpoint.pt")
        assert "no state_dict" in refusal(tmp_path / "checkpoint.pt")


# Exports.


def same(path):
    return path


def symlink(path):
    link = path.with_name("link.safetensors")
    link.symlink_to(path)
    return link


def hard_link(path):
    link = path.with_name("hard.safetensors")
    link.hardlink_to(path)
    return link


def through_a_folder(path):
    (path.parent / "folder").symlink_to(path.parent)
    return path.parent / "folder" / path.name


def relative(path):
    return os.path.relpath(path)


def roundabout(path):
    return f"{path.parent}/../{path.parent.name}/./{path.name}"


@pytest.mark.parametrize("spelling", [same, symlink, hard_link, through_a_folder, relative, roundabout])
@pytest.mark.parametrize("name", ["checkpoint.pt", "weights.safetensors"])
def test_an_export_into_the_file_that_is_evaluated_is_refused_before_anything(
    spelling, name, state, tmp_path, refusal, monkeypatch
):
    path = tmp_path / name
    torch.save(state, path) if name.endswith("pt") else save_file(state, path, {"config": json.dumps(identity())})
    before = path.read_bytes()
    monkeypatch.setattr(weights_file, "read", None)
    assert "holds the weights that are to be exported" in refusal(path, "--export", spelling(path))
    assert path.read_bytes() == before


def test_an_export_replaces_only_what_an_export_wrote(state, tmp_path, result, refusal):
    torch.save(state, tmp_path / "weights.pt")
    new = tmp_path / "new.safetensors"
    assert result(tmp_path / "weights.pt", "--export", new)[1] == f"wrote {new}"
    assert result(tmp_path / "weights.pt", "--export", new)[1] == f"wrote {new} over the export before it"
    with safe_open(new, "pt") as file:
        assert json.loads(file.metadata()["config"])["dataset"] == identity()["dataset"]
    save_file(state, tmp_path / "downloaded.safetensors", {"format": "pt"})
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("downloaded.safetensors", "notes.txt", "folder", "dangling"):
        assert "--export did not write it" in refusal(tmp_path / "weights.pt", "--export", tmp_path / name)
    assert "call it new.safetensors" in refusal(tmp_path / "weights.pt", "--export", tmp_path / "new.pt")
    assert not (tmp_path / "new.pt").exists()
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert (tmp_path / "dangling").is_symlink()
