import pytest
import torch

# These tensors are small: a second thread costs more than it gives, four times as much on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """Every test starts from the same state, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(params=["native", "formula"])
def path(request, monkeypatch):
    """Both ways to compute a layer: around torch's batch-norm kernels, and the formula that a compiler gets."""
    if request.param == "formula":
        monkeypatch.setattr("mbn.norm.functional.has_native_kernels", lambda x: False)
    return request.param
