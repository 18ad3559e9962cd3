"""A tree of photographs, and a copy that a test may damage."""

import shutil

import jpegs
import pytest


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    return jpegs.make_tree(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture
def copied(tree, tmp_path):
    """A copy of the tree that a test may damage."""
    return shutil.copytree(tree, tmp_path / "imagenet")
