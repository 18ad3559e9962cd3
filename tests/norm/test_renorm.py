"""BatchRenorm against the float64 loops of `reference`, and the faults that public versions of it have."""

import copy
import random

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from mbn import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, held, second_forward, set_renorm
from mbn.norm.base import norm_layers

BUFFERS = {"running_mean", "running_std", "num_batches_tracked"}
LAYERS = {2: BatchRenorm1d, 3: BatchRenorm1d, 4: BatchRenorm2d, 5: BatchRenorm3d}


def inputs(n, channels, *spatial, at=0.0, dtype=torch.float64):
    """A batch whose channels have different means and scales, which move with `at`."""
    shape = (1, channels, *(1 for _ in spatial))
    scale = torch.linspace(0.5, 3, channels, dtype=torch.float64).view(shape)
    mean = torch.linspace(-2, 3, channels, dtype=torch.float64).view(shape)
    return (torch.randn(n, channels, *spatial, dtype=torch.float64) * scale * (1 + at) + mean + 4 * at).to(dtype)


def snapshot(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


def unchanged(before, layer):
    return all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def renew(layer):
    """Give gamma and beta new values, as an optimiser's step does."""
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.num_features) + 1.5)
        layer.bias.copy_(torch.randn(layer.num_features))


def where(value, lowest, highest):
    return "low" if value <= lowest else "high" if value >= highest else "between"


def walk(layer, ref, dtype, **tolerance):
    layer.to(dtype)
    draw = random.Random(2)
    wide = {"check_dtype": False, **tolerance}
    seen_r, seen_d = set(), set()
    for t in range(40):
        if t % 8 == 0:  # from batch norm to bounds that hardly clip
            ref.r_max, ref.d_max = [(1.0, 0.0), (1.2, 0.3), (1.5, 1.0), (3.0, 5.0), (1e3, 1e3)][t // 8]
            set_renorm(layer, ref.r_max, ref.d_max)
        renew(layer)
        spatial = draw.choice([(2, 2), (1, 3), (3, 1)])
        shape = (draw.randint(2, 5), layer.num_features, *spatial)
        x = inputs(*shape, at=draw.random(), dtype=dtype).requires_grad_()
        dl_dy = torch.randn(shape, dtype=dtype)
        gamma, beta = layer.weight.detach().double(), layer.bias.detach().double()
        x64 = x.detach().double()
        r, d = ref.correction(x64)
        seen_r |= {where(value, 1 / ref.r_max, ref.r_max) for value in r.tolist()}
        seen_d |= {where(value, -ref.d_max, ref.d_max) for value in d.tolist()}

        y = layer(x)
        got = torch.autograd.grad(y, [x, layer.weight, layer.bias], dl_dy)
        assert y.dtype == dtype
        assert_close(list(got), list(ref.backward(x64, gamma, dl_dy.double())), **wide)
        assert_close(y, ref.first(x64, gamma, beta), **wide)

        if ref.forwards == 2:
            renew(layer)
            gamma, beta = layer.weight.detach().double(), layer.bias.detach().double()
            x64 = (x64 + 0.1 * inputs(*shape)).to(dtype).double()
            assert_close(second_forward(layer, x64.to(dtype)), ref.second(x64, gamma, beta), **wide)

        before = snapshot(layer)
        assert_close({name: before[name] for name in BUFFERS}, ref.buffers(), **wide)
        layer.eval()
        assert_close(layer(x), ref.evaluate(x.detach().double(), gamma, beta), **wide)
        layer.train()
        assert unchanged(before, layer)
    assert seen_r == {"low", "high", "between"}
    assert seen_d == {"low", "high", "between"}


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("momentum", [0.01, 0.3])
def test_forty_iterations_follow_the_reference(path, forwards, momentum):
    layer = BatchRenorm2d(3, momentum=momentum, forwards=forwards)
    walk(layer, reference.BRN(3, momentum, forwards=forwards), torch.float64, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("forwards", [1, 2])
def test_forty_iterations_follow_the_reference_in_float32(path, forwards):
    layer = BatchRenorm2d(3, forwards=forwards)
    walk(layer, reference.BRN(3, forwards=forwards), torch.float32, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("spatial", [(), (3,), (2, 3), (1, 3, 2)], ids=["2D", "3D", "4D", "5D"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_every_input_shape_and_no_affine(path, spatial, affine):
    layer = LAYERS[2 + len(spatial)](3, affine=affine).double()
    ref = reference.BRN(3)
    gamma, beta = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for t in range(3):
        x = inputs(3, 3, *spatial, at=t).requires_grad_()
        dl_dy = torch.randn_like(x)
        y = layer(x)
        (dl_dx,) = torch.autograd.grad(y, x, dl_dy)
        assert_close(dl_dx, ref.backward(x.detach(), gamma, dl_dy)[0], atol=1e-10, rtol=1e-10)
        assert_close(y, ref.first(x.detach(), gamma, beta), atol=1e-10, rtol=1e-10)


def test_the_references_printed_gradients_agree_with_autograd():
    ref = reference.BRN(3, r_max=1.2, d_max=0.3)
    ref.remember(inputs(4, 3, 2, 2, at=1))
    x = inputs(4, 3, 2, 2).requires_grad_()
    gamma = torch.randn(3, dtype=torch.float64, requires_grad=True)
    beta = torch.randn(3, dtype=torch.float64, requires_grad=True)
    dl_dy = torch.randn_like(x)
    got = torch.autograd.grad(ref.normalize(x, gamma, beta), [x, gamma, beta], dl_dy)
    assert_close(list(got), list(ref.backward(x.detach(), gamma.detach(), dl_dy)), atol=1e-12, rtol=1e-12)


def test_bounds_1_and_0_are_batch_norm(path):
    layer = BatchRenorm2d(3, r_max=1, d_max=0).double()
    layer(inputs(4, 3, 2, 2, at=2))
    renew(layer)
    x, dl_dy = inputs(4, 3, 2, 2).requires_grad_(), torch.randn(4, 3, 2, 2, dtype=torch.float64)
    leaves = [x, layer.weight, layer.bias]
    y, bn = layer(x), F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)
    assert_close(y, bn, atol=1e-12, rtol=1e-12)
    got, expected = (torch.autograd.grad(out, leaves, dl_dy) for out in (y, bn))
    assert_close(list(got), list(expected), atol=1e-12, rtol=1e-12)


def test_without_clipping_training_normalises_as_evaluation_does(path):
    """(x - mu_B) / sigma_B r + d = (x - mu) / sigma: what the method is for."""
    layer = BatchRenorm2d(3, r_max=1e6, d_max=1e6).double()
    layer(inputs(4, 3, 2, 2))
    x = inputs(4, 3, 2, 2, at=1)
    twin = copy.deepcopy(layer).eval()
    assert_close(layer(x), twin(x), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("r_max", "d_max"), [(3.0, 5.0), (1.1, 0.2)])
def test_training_statistics_are_those_of_the_forward_and_change_nothing(path, r_max, d_max):
    layer = BatchRenorm2d(3, r_max=r_max, d_max=d_max).double()
    layer(inputs(4, 3, 2, 2))
    before, x = snapshot(layer), inputs(4, 3, 2, 2, at=0.7)
    mu, sigma = layer.training_statistics(x)
    assert unchanged(before, layer)
    y = (x - mu[:, None, None]) / sigma[:, None, None]
    assert_close(layer(x), y, atol=1e-10, rtol=1e-10)


# The faults of public versions.


def test_the_statistics_are_in_the_state_dict_and_a_loaded_layer_trains_on_identically():
    layer = BatchRenorm2d(3).double()
    for t in range(3):
        layer(inputs(4, 3, 2, 2, at=t))
    assert layer.state_dict().keys() == {"weight", "bias", *BUFFERS}
    loaded = BatchRenorm2d(3).double()
    loaded.load_state_dict(layer.state_dict())
    for t in range(3):
        x = inputs(4, 3, 2, 2, at=t)
        assert torch.equal(layer(x), loaded(x))
    assert unchanged(snapshot(layer), loaded)


def test_evaluation_changes_no_statistics(path):
    layer = BatchRenorm2d(3).double()
    layer(inputs(4, 3, 2, 2))
    before = snapshot(layer)
    layer.eval()
    layer(inputs(4, 3, 2, 2, at=3))
    assert unchanged(before, layer)


def test_sigma_starts_at_1_and_the_first_update_copies(path):
    """From 0 sigma divides by nothing; averages that remember their start open r and d on it."""
    layer = BatchRenorm2d(3).double()
    assert torch.equal(layer.running_std, torch.ones(3, dtype=torch.float64))
    x = inputs(4, 3, 2, 2)
    assert_close(layer.eval()(x), x, atol=1e-10, rtol=1e-10)
    layer.train()(x)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    assert_close(layer.running_mean, mean)
    assert_close(layer.running_std, (var + layer.eps).sqrt())
    y = layer(x)  # now r = 1 and d = 0
    assert_close(y, F.batch_norm(x, None, None, training=True), atol=1e-10, rtol=1e-10)


def test_the_standard_deviation_is_averaged_and_not_the_variance(path):
    layer = BatchRenorm1d(1, eps=1e-12, momentum=0.25).double()
    one = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    layer(one)
    layer(5 * one)
    assert_close(layer.running_std, torch.tensor([2.0], dtype=torch.float64))  # the variances' average has root 2.65


def test_r_and_d_are_applied_before_gamma_and_beta(path):
    layer = BatchRenorm1d(1, r_max=2.0, d_max=0.5, eps=1e-12).double()
    one = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    layer(one)
    with torch.no_grad():
        layer.weight.fill_(3)
        layer.bias.fill_(7)
    y = layer(4 * one + 9)  # xhat = -1, 1; r = 2 and d = 0.5, both clipped
    assert_close(y.flatten().tolist(), [3 * (-2 + 0.5) + 7, 3 * (2 + 0.5) + 7])


def test_the_gradient_flows_through_the_batchs_mean_and_deviation(path):
    """So it is orthogonal to a shift and to a stretch of the batch."""
    layer = BatchRenorm2d(3, eps=1e-12).double()
    layer(inputs(4, 3, 2, 2))
    x = inputs(4, 3, 2, 2, at=0.5).requires_grad_()
    (dl_dx,) = torch.autograd.grad(layer(x), x, torch.randn_like(x))
    zero = torch.zeros(3, dtype=torch.float64)
    assert_close(dl_dx.sum((0, 2, 3)), zero, atol=1e-10, rtol=0)
    assert_close((dl_dx * (x - x.mean((0, 2, 3), keepdim=True))).sum((0, 2, 3)), zero, atol=1e-9, rtol=0)
    assert dl_dx.abs().max() > 1e-2


def test_r_and_d_use_the_averages_from_before_the_update(path):
    layer = BatchRenorm1d(1, momentum=0.5, r_max=10, d_max=10, eps=1e-12).double()
    one = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    layer(one)
    y = layer(3 * one + 2)
    assert_close(y.flatten().tolist(), [-1.0, 5.0])  # about mean 0 and sigma 1, not 1 and 2


# The rest.


def test_a_loaded_batch_norms_averages_are_not_overwritten_by_the_first_update():
    old = nn.BatchNorm1d(2).double()
    old(inputs(5, 2))
    layer = BatchRenorm1d(2).double()
    layer.load_state_dict(old.state_dict())
    assert_close(layer.running_std, (old.running_var + layer.eps).sqrt())
    x = inputs(5, 2, at=2)
    layer(x)
    assert_close(layer.running_mean, old.running_mean + 0.01 * (x.mean(0) - old.running_mean))


@pytest.mark.parametrize(("r_max", "d_max"), [(0.9, 1.0), (2.0, -0.1), (float("nan"), 1.0), (2.0, float("nan"))])
def test_impossible_bounds_are_refused(r_max, d_max):
    with pytest.raises(ValueError, match="r_max must be at least 1 and d_max at least 0"):
        BatchRenorm2d(3, r_max=r_max, d_max=d_max)
    layer = BatchRenorm2d(3)
    with pytest.raises(ValueError, match="r_max must be at least 1 and d_max at least 0"):
        set_renorm(nn.Sequential(layer), r_max, d_max)
    assert (layer.r_max, layer.d_max, layer.bounds.tolist()) == (3.0, 5.0, [3.0, 5.0])


def test_set_renorm_reaches_every_layer():
    net = nn.Sequential(BatchRenorm2d(3), nn.Sequential(BatchRenorm1d(2)), nn.BatchNorm1d(2))
    set_renorm(net, 1.5, 0.25)
    assert [(layer.r_max, layer.d_max, layer.bounds.tolist()) for layer in norm_layers(net)] == [
        (1.5, 0.25, [1.5, 0.25])
    ] * 2


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16])
def test_narrow_casts_leave_the_statistics_in_float32(cast):
    layer = BatchRenorm2d(3)
    layer(inputs(4, 3, 2, 2, dtype=torch.float32))
    before = snapshot(layer)
    layer.to(cast)
    assert layer.weight.dtype == cast
    assert layer.bounds.dtype == torch.float32
    for name in BUFFERS:
        assert torch.equal(getattr(layer, name), before[name])
        assert getattr(layer, name).dtype == before[name].dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["one value", "constant channel", "6e4"])
@pytest.mark.parametrize("forwards", [1, 2])
def test_nothing_becomes_nan_or_infinite(path, dtype, case, forwards):
    layer = BatchRenorm2d(3, forwards=forwards).to(dtype)
    for _ in range(4):
        x = torch.randn(1, 3, 1, 1) if case == "one value" else torch.randn(2, 3, 3, 2)
        if case == "constant channel":
            x[:, 1] = 3
        if case == "6e4":
            x = 6e4 * x.sign()
        x = x.to(dtype).requires_grad_()
        y = layer(x)
        grads = torch.autograd.grad(y, [x, layer.weight, layer.bias], torch.randn_like(y))
        if forwards == 2:
            second_forward(layer, x)
        layer.eval()
        for value in (y, *grads, *layer.state_dict().values(), layer(x)):
            assert value.isfinite().all()
        layer.train()


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_memory_layout_of_the_input_does_not_matter(path, layout):
    layer = BatchRenorm2d(3).double()
    layer(inputs(4, 3, 2, 2))
    x = inputs(4, 3, 5, 2, at=1)
    if layout == "channels_last":
        other = x.contiguous(memory_format=torch.channels_last)
    else:
        other = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    dl_dy = torch.randn(1, 3, 5, 2, dtype=x.dtype).expand_as(x)
    results = []
    for v in (x, other):
        v = v.requires_grad_()
        with held(layer):
            y = layer(v)
        results.append([y, *torch.autograd.grad(y, [v, layer.weight, layer.bias], dl_dy)])
    assert_close(results[1], results[0], atol=1e-12, rtol=1e-12, check_stride=False)


@pytest.mark.parametrize("forwards", [1, 2])
def test_a_compiled_layer_trains_as_an_eager_one_and_is_compiled_once(forwards):
    """A change of r_max and d_max must not compile anew: the warm-up changes them at every iteration.

    With forwards=1 the graph overwrites what its own backward needs (torch recomputes from it, pytorch#197039).
    """
    torch._dynamo.reset()
    eager = BatchRenorm2d(3, forwards=forwards).double()
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for t, bound in enumerate([0.0, 0.1, 0.2, 5.0]):
        x, dl_dy = inputs(4, 3, 2, 2, at=t).requires_grad_(), torch.randn(4, 3, 2, 2, dtype=torch.float64)
        with torch._dynamo.config.patch(error_on_recompile=t > 0):
            results = []
            for layer, module in ((eager, eager), (compiled, twin)):
                set_renorm(layer, 1 + bound, bound)
                y = layer(x)
                grads = torch.autograd.grad(y, [x, module.weight, module.bias], dl_dy)
                second = second_forward(layer, x) if forwards == 2 else None
                results.append([y, grads, second, module.state_dict()])
            assert_close(results[1], results[0], atol=1e-10, rtol=1e-10)
    assert eager.num_batches_tracked == 4
    assert_close(compiled.eval()(x), eager.eval()(x), atol=1e-10, rtol=1e-10)
