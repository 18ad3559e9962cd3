"""A profile's sums."""

import pytest
import torch

from mbn.benchmark.kernels import _summed, kernels


def test_time_with_a_kernel_running_counts_once_what_runs_side_by_side():
    """Nanoseconds:  a 0-100, b 50-150 beside it, c 200-300 with a short d inside, and nothing from 150 to 200."""
    found = _summed([(0, 100, "a"), (50, 150, "b"), (200, 300, "c"), (220, 230, "a")])
    assert found.span == pytest.approx(300e-9)
    assert found.busy == pytest.approx(250e-9)
    assert found.total == pytest.approx(310e-9)
    assert found.by_name["a"] == (2, pytest.approx(110e-9))
    assert found.number == 4
    assert found.longest(2) == ["a", "b"]


def test_operations_stand_for_kernels_on_a_cpu():
    x = torch.ones(100, 100)
    found = kernels(lambda: [x.mm(x) for _ in range(3)], torch.device("cpu"))
    assert found.by_name["aten::mm"][0] == 3
    assert 0 < found.busy <= found.span


def test_nothing_seen_is_an_error():
    with pytest.raises(RuntimeError, match="saw no kernel"):
        kernels(lambda: None, torch.device("cpu"))
