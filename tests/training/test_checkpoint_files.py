"""A checkpoint on the disk: what is read is what was saved, or the one before."""

import pytest
import torch
from test_files import names, small_disk

from mbn.system.errors import UserError
from mbn.training import checkpoint


def test_a_checkpoint_is_read_as_it_was_saved_by_torch_too(tmp_path):
    path = tmp_path / "checkpoint.pt"
    state = {"weights": torch.randn(3, 4), "iteration": 7, "config": "{}", "sums": [0.1, 2, 3]}
    checkpoint.save(state, path)
    for read in (checkpoint.newest(path), torch.load(path, weights_only=True)):
        assert torch.equal(read.pop("weights"), state["weights"])
        assert read == {"iteration": 7, "config": "{}", "sums": [0.1, 2, 3]}


def test_the_generation_before_is_kept(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for iteration in range(3):
        checkpoint.save({"iteration": iteration}, path)
    assert checkpoint.newest(path) == {"iteration": 2}
    assert checkpoint.read(checkpoint.previous(path)) == {"iteration": 1}
    assert names(tmp_path) == ["checkpoint.previous.pt", "checkpoint.pt"]
    path.unlink()  # as between the two renames of a save
    assert checkpoint.newest(path) == {"iteration": 1}


def test_any_flipped_bit_of_a_checkpoint_is_noticed(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save({"weights": torch.randn(3)}, path)
    content = path.read_bytes()
    for place in range(0, len(content), 37):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(checkpoint.DamagedError, match=r"checkpoint\.pt"):
            checkpoint.read(path)


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_one_before(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save({"iteration": 1}, path)
    with small_disk(10_000), pytest.raises(UserError, match="free some space"):
        checkpoint.save({"weights": torch.zeros(100_000)}, path)
    assert checkpoint.newest(path) == {"iteration": 1}


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.newest(tmp_path / "checkpoint.pt") is None
