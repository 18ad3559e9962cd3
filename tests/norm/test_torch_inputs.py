"""torch's own inputs for nn.BatchNorm, and what torch checks of every module with them, over our layers.

From `torch.testing._internal.common_modules`, which its test_modules.py reads; what a test below does is named after a
test there. What torch's test_nn.py checks of BatchNorm and no other test of ours does stands at the end.
"""

import copy
import importlib
import inspect
import io
import os
from unittest import mock

import pytest
import torch
from layer_kinds import KINDS, kinds, make, one_or_two, remember, snapshot, unchanged
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from mbn import held, set_lambda
from mbn.norm.convert import NORMS, TORCH

dims = pytest.mark.parametrize("d", [1, 2, 3])
modes = pytest.mark.parametrize("training", [True, False])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture(scope="module")
def module_db():
    """torch's entries for BatchNorm1d, 2d and 3d, without what else their import would do to this process."""
    settings = mock.patch("torch.backends.disable_global_flags")
    with mock.patch.dict(os.environ), mock.patch("sys.argv", ["test"]), settings:
        common = importlib.import_module("torch.testing._internal.common_modules")
    return {info.module_cls: info for info in common.module_db}


def refusal(kind, arguments):
    """The error for those of torch's arguments that our layers do not take, or None."""
    if not arguments.get("track_running_stats", True):
        return TypeError, "unexpected keyword argument 'track_running_stats'"
    if kind == "brn" and arguments.get("momentum", 0.1) is None:
        return ValueError, "momentum must be in"
    return None


def cases(module_db, kind, d, dtype, training):
    """For each of torch's inputs: what it is for, torch's layer, ours with the same arguments, and x."""
    info, layer = module_db[TORCH[d - 1]], NORMS[kind.split()[0]][d - 1]
    found, refused = info.module_inputs_func(info, "cpu", dtype, False, training), 0
    for case in found:
        given = case.constructor_input
        arguments = dict(inspect.signature(TORCH[d - 1]).bind(*given.args, **given.kwargs).arguments)
        own, error = KINDS[kind] | arguments | {"dtype": dtype}, refusal(kind, arguments)
        if kind.startswith("mbn"):
            own.pop("momentum", None)  # the memory is in its place
        if error:
            refused += 1
            with pytest.raises(error[0], match=error[1]):
                layer(**own)
            continue
        torchs, ours = (
            cls(**kw).train(training) for cls, kw in ((TORCH[d - 1], arguments | {"dtype": dtype}), (layer, own))
        )
        with torch.no_grad():
            for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
                q.copy_(p.copy_(torch.randn(p.shape)))
        yield case.desc, torchs, ours, case.forward_input.args[0]
    assert len(found) - refused >= 4


def results(layer, x, mode=None):
    """y, the gradients of x and of the parameters, and the buffers afterwards."""
    x = x.detach().clone(memory_format=torch.preserve_format) if mode is None else mode(x.detach())
    y = layer(x.requires_grad_())
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)], snapshot(layer)


@dims
@modes
@dtypes
@one_or_two
def test_forward_and_gradients_of_our_batch_norm_are_torchs_bit_for_bit(module_db, d, training, dtype, forwards):
    for _, torchs, ours, x in cases(module_db, "bn", d, dtype, training):
        ours.forwards = forwards
        before = snapshot(ours)
        expected, after = results(torchs, x)
        got, own = results(ours, x)
        assert all(map(torch.equal, got, expected))
        waits = before if forwards == 2 else after
        assert own.keys() == after.keys()
        assert all(torch.equal(own[name], waits[name]) for name in own)
        if forwards == 2 and training:
            remember(ours, x)
            assert unchanged(after, ours)


@dims
@modes
@dtypes
@kinds
def test_forward(module_db, kind, d, training, dtype):
    """At a memory that weighs nothing yet, and before anything was remembered, the output is batch norm's."""
    for _, torchs, ours, x in cases(module_db, kind, d, dtype, training):
        if kind == "brn":  # it begins at sigma = 1, and batch norm at a variance of 1
            ours.set_bounds(1, 0)
            ours.running_std.fill_((1 + ours.eps) ** 0.5)
        assert_close(results(ours, x)[0], results(torchs, x)[0])
        assert ours.training == training


@dims
@modes
@kinds
def test_repr_and_pickle(module_db, kind, d, training):
    for _, _, ours, x in cases(module_db, kind, d, torch.float64, training):
        layer = eval(repr(ours), {type(ours).__name__: type(ours), "nan": float("nan")})
        assert repr(layer) == repr(ours) == str(ours)
        saved = io.BytesIO()
        torch.save(ours, saved)
        saved.seek(0)
        again = torch.load(saved, weights_only=False)
        (got, after), (expected, own) = results(again, x), results(ours, x)
        assert all(map(torch.equal, got, expected))
        assert after.keys() == own.keys()
        assert all(torch.equal(after[name], own[name]) for name in own)


@dims
@kinds
def test_factory_kwargs_and_device_ctx_init(module_db, kind, d):
    for _, torchs, ours, _ in cases(module_db, kind, d, torch.float32, True):
        settings = {n: getattr(ours, n) for n in ours.settings}
        settings |= {"eps": ours.eps, "affine": ours.affine, "bias": ours.bias is not None}
        cls, channels = type(ours), ours.num_features
        for layer in (cls(channels, device="meta", dtype=torch.float64, **settings),):
            assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}
            assert {t.dtype for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()} == {
                torch.float64
            }
        with torch.device("meta"):
            layer = cls(channels, **settings)
        assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}
        assert {n: p.shape for n, p in layer.named_parameters()} == {n: p.shape for n, p in torchs.named_parameters()}
        assert repr(layer) == repr(ours)


@dims
@modes
@kinds
def test_non_contiguous_tensors(module_db, kind, d, training):
    """Inputs, gamma and beta that are every second number of something longer."""

    def spread(t):
        wide = t.new_full((*t.shape, 2), float("nan"))
        wide[..., 0] = t
        return wide[..., 0]

    for _, _, ours, x in cases(module_db, kind, d, torch.float64, training):
        other = copy.deepcopy(ours)
        for p in other.parameters():
            p.data = spread(p.data)
        (got, after), (expected, own) = results(other, x, spread), results(ours, x)
        assert_close(got, expected, atol=1e-12, rtol=1e-12, check_stride=False)
        assert_close(after, own, atol=1e-12, rtol=1e-12, check_stride=False)


@pytest.mark.parametrize("d", [2, 3])
@modes
@kinds
def test_memory_format(module_db, kind, d, training):
    """The output has the input's."""
    last = {2: torch.channels_last, 3: torch.channels_last_3d}[d]
    for desc, _, ours, x in cases(module_db, kind, d, torch.float64, training):
        other = copy.deepcopy(ours).to(memory_format=last)
        got, after = results(other, x, lambda x: x.contiguous(memory_format=last))
        expected, own = results(ours, x)
        assert_close(got, expected, atol=1e-12, rtol=1e-12, check_stride=False)
        assert_close(after, own, atol=1e-12, rtol=1e-12)
        assert desc == "zero_batch" or got[0].is_contiguous(memory_format=last)


@dims
@modes
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "brn"])
def test_grad_and_gradgrad(module_db, kind, d, training):
    """Of BRN and of a memory that weighs something test_derivatives has them."""
    for desc, _, ours, x in cases(module_db, kind, d, torch.float64, training):
        if desc == "zero_batch":
            continue
        x = x[:3, :, :2].detach().requires_grad_() if d > 1 else x.detach().requires_grad_()
        if kind.startswith("mbn"):
            set_lambda(ours, 0)
        with held(ours):
            for check in (gradcheck, gradgradcheck):
                assert check(lambda x, *_: ours(x), [x, *ours.parameters()], fast_mode=True)  # noqa: B023


@dims
@kinds
def test_if_train_and_eval_modes_differ(module_db, kind, d):
    for desc, _, ours, x in cases(module_db, kind, d, torch.float64, True):
        if desc != "zero_batch" and kind != "brn":  # whose first training forward is corrected towards evaluation's
            assert not torch.allclose(copy.deepcopy(ours)(x), copy.deepcopy(ours).eval()(x))


@dims
@modes
@kinds
def test_to_and_to_empty(module_db, kind, d, training):
    for _, _, ours, x in cases(module_db, kind, d, torch.float64, training):
        before, parameters = snapshot(ours), list(ours.parameters())
        for _ in range(2):
            ours.to("cpu")
            assert unchanged(before, ours)
        assert all(p is q for p, q in zip(parameters, ours.parameters(), strict=True))
        layer = copy.deepcopy(ours).to("meta")
        assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}
        layer.to_empty(device="cpu")
        layer.load_state_dict(before)
        (got, after), (expected, own) = results(layer, x), results(ours, x)
        assert all(map(torch.equal, got, expected))
        assert all(torch.equal(after[name], own[name]) for name in own)


@dims
@kinds
def test_errors(kind, d):
    """torch's error inputs, in all versions: newer ones refuse them at the first forward."""
    for eps in (0.0, -1.0):
        with pytest.raises(ValueError, match="eps must be above 0"):
            NORMS[kind.split()[0]][d - 1](10, eps=eps)


# Of torch's test_nn.py.


@kinds
@one_or_two
def test_a_large_batch_of_one_channel_keeps_its_digits(path, kind, forwards):
    """70,001 values, more than a kernel's grid has blocks. In float32 torch's own kernel loses a little of the mean."""
    momentum = {} if kind.startswith("mbn") else {"momentum": 1.0}
    layer = make(kind, 1, 2, torch.float32, forwards=forwards, **momentum)
    x = torch.linspace(-1, 1, 70_001)[:, None] + 3
    for _ in range(2):
        y = remember(layer, x)
    wide = x.double()
    assert_close(
        torch.stack(layer.test_statistics()).double(), torch.stack([wide.mean(0), wide.var(0)]), atol=0, rtol=1e-3
    )
    exact = (wide - wide.mean()) / (wide.var(correction=0) + 1e-5).sqrt()
    assert_close(y.double(), exact, atol=1e-2, rtol=0)


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=str)
@modes
@kinds
def test_mixed_precision_is_float32s_result_rounded(kind, narrow, training):
    """Half-precision inputs beside float32 parameters, and a layer that was cast as a whole."""
    x = torch.randn(8, 3, 4, 4).to(narrow)
    wide = make(kind, dtype=torch.float32).train(training)
    for layer in (copy.deepcopy(wide), copy.deepcopy(wide).to(narrow)):
        (got, _), (expected, _) = results(layer, x), results(copy.deepcopy(wide), x.float())
        assert [t.dtype for t in got] == [narrow, narrow, *(p.dtype for p in layer.parameters())]
        for t, e in zip(got, expected, strict=True):
            assert (t.float() - e).norm() <= {torch.float16: 2e-3, torch.bfloat16: 2e-2}[narrow] * e.norm()


@dims
@kinds
def test_a_state_dict_without_a_version_or_of_the_first_one_loads(kind, d):
    """Before torch 0.4.1 there was no counter, and before that no version either."""
    torchs, x = TORCH[d - 1](3), torch.randn(4, 3, *(2,) * d)
    torchs(x)
    state = torchs.state_dict()
    del state["num_batches_tracked"]
    for version in (None, 1):
        state._metadata[""] = {} if version is None else {"version": version}
        layer = make(kind, dims=2 + d, dtype=torch.float32)
        layer.load_state_dict(state)
        assert_close(layer.eval()(x), torchs.eval()(x))


@kinds
def test_running_statistics_of_one_batch_seen_many_times_are_that_batchs(kind):
    """test_batchnorm_update_stats."""
    layer, x = make(kind), torch.randn(16, 3, 5, 5).double() * 3 + 7
    for _ in range(300):
        remember(layer, x)
    torchs = nn.BatchNorm2d(3, momentum=1.0).double()
    torchs(x)
    assert_close(layer.eval()(x), torchs.eval()(x), atol=1e-2, rtol=1e-2)
    assert layer.train() is layer
