"""Paths arrive as they were typed, whatever Hydra's grammar would make of them."""

import subprocess

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from running import UGLY, load_script

from mbn.config import ConfigError, load, loading, sweep_lines
from mbn.config.folders import data_and_results
from mbn.config.typed_paths import PATHS

FOLDERS = [
    *(UGLY, f"/a/{UGLY}", "a,b", "null", "1", "[x]", "{a:b}", "'", '"a', '"a","b"', "it's", "a \\", "$", " a "),
    *("a${b", "${", "\udcff", "/tmp/a=(b),é"),
]
ANY = st.text(min_size=1) | st.text("""ab1ä~ \t=()[]{},:;#%$@!?*&|<>'"\\/.-+""", min_size=1)


def arrives(path):
    """Whether a path is the folder of that name: not ~, Hydra's quotes, interpolations or sign of a missing value."""
    in_quotes = path[0] in "'\"" and path[-1] == path[0]
    return not (in_quotes or path[0] == "~" or "${" in path or path == "???" or set(path) & set("\0\n"))


@given(ANY.filter(arrives), st.sampled_from(PATHS), st.sampled_from(["", "++"]))
@example("\\" * 3, "machine.data", "")
def test_any_path_arrives_unchanged_and_is_no_sweep(path, key, plus):
    (line,) = sweep_lines([f"{plus}{key}={path}"])
    (override,) = loading.parse(line)
    assert (override.key_or_group, override.value(), override.is_sweep_override()) == (key, path, False)


@pytest.mark.parametrize("path", FOLDERS)
def test_a_path_of_any_letters_is_the_folder_of_that_name(path):
    machine = load([f"machine.data={path}", f"++machine.results={path}/b"]).machine
    assert (machine.data, machine.results) == (path, f"{path}/b")
    settings = [f"machine.data={path}", f"++machine.results={path}/b"]
    assert tuple(map(str, data_and_results(settings))) == (path, f"{path}/b")
    lines = sweep_lines(["seed=0,1", *settings])
    assert [(c.seed, c.machine) for c in map(load, lines)] == [(0, machine), (1, machine)]


@pytest.mark.parametrize(
    ("typed", "path"),
    [
        ('"/a/Große, b"', "/a/Große, b"),
        ("'/a b'", "/a b"),
        (r"""'it\'s "a"'""", """it's "a\""""),
        ("~/a b", "/home/me/a b"),
        ("'~/a'", "/home/me/a"),
        ("a/~", "a/~"),
        ("${oc.env:HOME}/ä=b", "/home/me/ä=b"),
    ],
)
def test_quotes_the_home_folder_and_interpolations_mean_what_they_did(monkeypatch, typed, path):
    monkeypatch.setenv("HOME", "/home/me")
    for line in sweep_lines([f"machine.data={typed}"]):
        assert load(line).machine.data == path


def test_only_paths_are_quoted():
    assert load(["norm.lam=[0.1]", "seed=3"]).seed == 3
    with pytest.raises(ConfigError, match="has several values"):
        load(["seed=3,4"])


@pytest.mark.parametrize("path", [UGLY, "~/a b"])
def test_the_commands_of_a_dry_run_can_be_pasted_into_a_shell(monkeypatch, capsys, path):
    monkeypatch.setenv("HOME", "/home/me")
    given = f"machine.results={path}"
    assert load_script("reproduce").main(["table6", "--seeds", "1", "--dry-run", given]) == 0
    line, *_ = capsys.readouterr().out.splitlines()
    pasted = f"python() {{ printf '%s\\0' \"$@\"; }}; {line}"
    script, *overrides = subprocess.run(["bash", "-c", pasted], capture_output=True, text=True).stdout[:-1].split("\0")
    assert script == "train.py"
    assert load(overrides).machine.results == given.partition("=")[2].replace("~", "/home/me")
