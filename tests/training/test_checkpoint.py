"""Damaged checkpoints are noticed, set aside, and the generation before them is used."""

import contextlib
import hashlib
import pickle

import pytest
import torch
from running import PowerCutError, Trap, assert_same_run, cut, send

from mbn.training import checkpoint


@pytest.fixture
def two(here, left, after):
    """A run whose power was cut in its 5th iteration: the path of its checkpoint, at iteration 4, 3 being kept too."""
    after(5, cut)
    with pytest.raises(PowerCutError):
        here("machine.checkpoint_seconds=1e-9")
    return left().checkpoint_path


@pytest.mark.parametrize(
    "damage",
    ["flipped", "cut short", "empty", "empty with a right checksum", "malicious", "malicious with a right checksum"],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_with_a_warning(here, left, whole, two, tmp_path, damage):
    sprung, content = tmp_path / "sprung", two.read_bytes()
    half = len(content) // 2
    state = checkpoint.read(two)
    state["model"]["conv.weight"] = Trap(sprung)
    checkpoint.save(state, tmp_path / "malicious")
    two.write_bytes(
        {
            "flipped": content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :],
            "cut short": content[:half],
            "empty": b"",
            "empty with a right checksum": checkpoint.MARK + hashlib.sha256().hexdigest().encode(),
            "malicious": pickle.dumps(Trap(sprung)),
            "malicious with a right checksum": (tmp_path / "malicious").read_bytes(),
        }[damage]
    )
    done = here()
    assert done.code == 0
    assert done.err.count("\n") == 1
    assert f"warning: {two} is damaged" in done.err
    assert "resuming at iteration 3 of 8" in done.out
    assert not sprung.exists()
    assert_same_run(left(), whole())
    with contextlib.suppress(Exception):  # a careless reader falls into the trap
        torch.load(checkpoint.damaged(two), weights_only=False)
    assert sprung.exists() == damage.startswith("malicious")


def test_a_damaged_checkpoint_never_becomes_the_generation_before(here, two, after):
    """A crash between the two renames of the next save leaves that generation alone."""
    two.write_bytes(two.read_bytes()[:-1])
    after(1, send("SIGTERM"))
    here()
    assert checkpoint.read(two)["iteration"] == 4
    assert checkpoint.read(checkpoint.previous(two))["iteration"] == 3


def test_without_any_whole_checkpoint_the_run_starts_over(here, left, whole, two):
    for path in (two, checkpoint.previous(two)):
        path.write_bytes(b"nonsense")
    done = here()
    assert done.err.count("warning") == 2
    assert "resuming" not in done.out
    assert_same_run(left(), whole())
