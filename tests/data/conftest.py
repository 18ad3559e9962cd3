"""A tree of photographs, as it is or to be spoilt."""

import shutil

import jpegs
import pytest


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    return jpegs.make_tree(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture
def copied(tree, tmp_path):
    """The tree, to be spoilt."""
    return shutil.copytree(tree, tmp_path / "imagenet")
