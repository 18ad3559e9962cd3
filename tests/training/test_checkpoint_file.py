"""Checkpoint files: what is read is what was saved; a damaged one is set aside, and the one before it is used."""

import contextlib
import errno
import hashlib
import pickle
import re

import pytest
import torch
from running import PowerCutError, Trap, assert_same_run, cut, send
from test_files import names, small_disk

from mbn.system.errors import UserError
from mbn.training import checkpoint_file


def test_a_checkpoint_is_read_as_it_was_saved_by_torch_too(tmp_path):
    path = tmp_path / "checkpoint.pt"
    state = {"weights": torch.randn(3, 4), "iteration": 7, "config": "{}", "sums": [0.1, 2, 3]}
    checkpoint_file.save(state, path)
    for read in (checkpoint_file.newest(path), torch.load(path, weights_only=True)):
        assert torch.equal(read.pop("weights"), state["weights"])
        assert read == {"iteration": 7, "config": "{}", "sums": [0.1, 2, 3]}


def test_the_previous_checkpoint_is_kept(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for iteration in range(3):
        checkpoint_file.save({"iteration": iteration}, path)
    assert checkpoint_file.newest(path) == {"iteration": 2}
    assert checkpoint_file.read(checkpoint_file.previous(path)) == {"iteration": 1}
    assert names(tmp_path) == ["checkpoint.previous.pt", "checkpoint.pt"]
    path.unlink()  # as between the two renames of a save
    assert checkpoint_file.newest(path) == {"iteration": 1}


def test_any_flipped_bit_of_a_checkpoint_is_noticed(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint_file.save({"weights": torch.randn(3)}, path)
    content = path.read_bytes()
    for place in range(0, len(content), 37):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(checkpoint_file.DamagedError, match=r"checkpoint\.pt"):
            checkpoint_file.read(path)


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_previous_one(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint_file.save({"iteration": 1}, path)
    with small_disk(10_000), pytest.raises(UserError, match="free some space"):
        checkpoint_file.save({"weights": torch.zeros(100_000)}, path)
    assert checkpoint_file.newest(path) == {"iteration": 1}


def test_lack_of_memory_does_not_set_a_sound_checkpoint_aside(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    for iteration in range(2):
        checkpoint_file.save({"iteration": iteration}, path)

    def load(*_, **__):
        raise RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", load)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            checkpoint_file.newest(path)
    assert checkpoint_file.newest(path) == {"iteration": 1}


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint_file.newest(tmp_path / "checkpoint.pt") is None


# Damage.


def test_a_damaged_checkpoint_without_one_before_it_says_that_training_starts_over(tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"nonsense")
    assert checkpoint_file.newest(path) is None
    assert re.fullmatch(r"warning: .*; no checkpoint is left, so training starts over\.\n", capsys.readouterr().err)


@pytest.fixture
def two(here, left, after):
    """A run whose power was cut in its 5th iteration: the path of its checkpoint. Iterations 4 and 3 are kept."""
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
    state = checkpoint_file.read(two)
    state["model"]["conv.weight"] = Trap(sprung)
    checkpoint_file.save(state, tmp_path / "malicious")
    two.write_bytes(
        {
            "flipped": content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :],
            "cut short": content[:half],
            "empty": b"",
            "empty with a right checksum": checkpoint_file.MARK + hashlib.sha256().hexdigest().encode(),
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
    with contextlib.suppress(Exception):  # an unsafe reader falls into the trap
        torch.load(checkpoint_file.damaged(two), weights_only=False)
    assert sprung.exists() == damage.startswith("malicious")


@pytest.mark.parametrize(
    ("last", "then"),
    [(2, "go on from the checkpoint before it"), (1, "start over")],
)
def test_a_checkpoint_that_cannot_be_read_is_said_with_what_moving_it_away_would_do(tmp_path, monkeypatch, last, then):
    path = tmp_path / "checkpoint.pt"
    for iteration in range(1, last + 1):
        checkpoint_file.save({"iteration": iteration}, path)

    def denied(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint_file, "read", denied)
    with pytest.raises(UserError, match=rf"make it readable and run the command again, or move it away to {then}\.$"):
        checkpoint_file.newest(path)


def test_a_damaged_checkpoint_is_never_kept_as_the_previous_one(here, two, after):
    """After a crash between the two renames of the next save, only the previous checkpoint is left."""
    two.write_bytes(two.read_bytes()[:-1])
    after(1, send("SIGTERM"))
    here()
    assert checkpoint_file.read(two)["iteration"] == 4
    assert checkpoint_file.read(checkpoint_file.previous(two))["iteration"] == 3


def test_without_any_whole_checkpoint_the_run_starts_over(here, left, whole, two):
    for path in (two, checkpoint_file.previous(two)):
        path.write_bytes(b"nonsense")
    done = here()
    back, over, aside = done.err.splitlines()
    assert "training starts over, and the rows are kept in metrics.aside-1.jsonl" in aside
    assert back.startswith(f"warning: {two} is damaged")
    assert back.endswith("; going back one checkpoint.")
    assert over.endswith("no checkpoint is left, so training starts over.")
    assert "resuming" not in done.out
    assert_same_run(left(), whole())
