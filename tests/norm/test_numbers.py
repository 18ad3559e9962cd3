"""Layers, settings and inputs that Hypothesis draws, against the reference."""

import contextlib
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layer_kinds import follow, make


@st.composite
def cases(draw):
    """A layer's kind and settings, and the batches that it sees."""
    norm = draw(st.sampled_from(["mbn", "mbn", "brn", "bn"]))
    dims = draw(st.integers(2, 5))
    channels = draw(st.integers(1, 3))
    spatial = draw(st.lists(st.integers(1, 3), min_size=dims - 2, max_size=dims - 2))
    sizes = draw(st.lists(st.integers(2, 4), min_size=1, max_size=4))  # one value a channel is refused
    options = {"forwards": draw(st.integers(1, 2)), "eps": draw(st.sampled_from([1e-5, 1e-3, 0.1]))}
    if norm == "mbn":
        options["lam"] = draw(st.floats(0, 1))
        options["decay"] = draw(st.floats(0.1, 1))
        options["memory"] = draw(st.integers(1, 4))
        options["gradient"] = draw(st.sampled_from(["paper", "batch"]))
    else:
        options["momentum"] = draw(st.floats(0.01, 1))
    if norm == "brn":
        options["r_max"], options["d_max"] = draw(st.floats(1, 4)), draw(st.floats(0, 5))
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    scale, offset = draw(st.floats(0.1, 10)), draw(st.floats(-3, 3))
    layout = draw(st.sampled_from(["contiguous", "channels last", "sliced", "transposed"]))
    native, seed = draw(st.booleans()), draw(st.integers(0, 1 << 20))
    return norm, dims, channels, spatial, sizes, options, dtype, scale, offset, layout, native, seed


def laid_out(x, layout):
    """The same values with other strides."""
    if layout == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        wide = x.new_full((2 * x.shape[0], *x.shape[1:]), float("nan"))
        wide[::2] = x
        return wide[::2]
    return x.transpose(0, 1).contiguous().transpose(0, 1) if layout == "transposed" else x


def holds(case):
    """Every layer equals its reference, whatever its settings and inputs."""
    norm, dims, channels, spatial, sizes, options, dtype, scale, offset, layout, native, seed = case
    torch.manual_seed(seed)
    layer = make(norm, channels, dims, torch.promote_types(dtype, torch.float32), **options)
    drawn = [scale * (torch.randn(n, channels, *spatial) + offset) for n in sizes]
    formula = mock.patch("mbn.norm.functional.has_native_kernels", return_value=False)
    with contextlib.nullcontext() if native else formula:
        follow(layer, [laid_out(x.to(dtype), layout) for x in drawn])


RULES = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=60, **RULES)
@given(cases())
def test_any_layer_equals_its_reference(case):
    holds(case)


@pytest.mark.long("8", "Layers of MBN, BRN and BN drawn by Hypothesis that equal their reference")
def test_many_layers(count, figure):
    total = count(5000)
    seen = []

    @settings(max_examples=total, **RULES)
    @given(cases())
    def check(case):
        holds(case)
        seen.append(1)

    try:
        check()
        wrong = ""
    except Exception as error:
        wrong = str(error)[:300]
    figure(min(len(seen), total) if not wrong else len(seen) - 1, total, wrong)
