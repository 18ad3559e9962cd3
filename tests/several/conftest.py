import pytest
from processes import Processes


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Three processes that have imported torch, and work together."""
    with Processes(3, tmp_path_factory.mktemp("processes")) as processes:
        yield processes
