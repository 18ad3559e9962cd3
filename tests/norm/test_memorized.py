"""MemorizedBatchNorm: every number of it against the float64 loops of `reference`."""

import copy
import random

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import mbn.norm.functional as functional
from mbn import (
    MemorizedBatchNorm1d,
    MemorizedBatchNorm2d,
    MemorizedBatchNorm3d,
    held,
    second_forward,
    set_lambda,
)
from mbn.norm.base import norm_layers
from mbn.norm.together import Together

BUFFERS = {"memory_mean", "memory_var", "memory_count", "memory_weight", "running_mean", "running_var"}
LAYERS = {2: MemorizedBatchNorm1d, 3: MemorizedBatchNorm1d, 4: MemorizedBatchNorm2d, 5: MemorizedBatchNorm3d}
GRADIENTS = ("paper", "batch")

gradients = pytest.mark.parametrize("gradient", GRADIENTS)


def inputs(n, channels, *spatial, at=0.0, dtype=torch.float64):
    """A batch whose channels have different means and scales, which move with `at`."""
    shape = (1, channels, *(1 for _ in spatial))
    scale = torch.linspace(0.5, 3, channels, dtype=torch.float64).view(shape)
    mean = torch.linspace(-2, 3, channels, dtype=torch.float64).view(shape)
    return (torch.randn(n, channels, *spatial, dtype=torch.float64) * scale * (1 + 0.3 * at) + mean + at).to(dtype)


def fill(layer, batches=3, spatial=(3, 2)):
    """Let the layer remember a few batches of different sizes."""
    dtype = layer.running_mean.dtype
    for t in range(batches):
        layer.eval().train()
        with torch.no_grad():
            x = inputs(2 + t, layer.num_features, *spatial, at=t, dtype=dtype)
            second_forward(layer, x) if layer.forwards == 2 else layer(x)
    return layer


def filled_pair(gradient="paper", lam=0.7, memory=4, decay=0.8, channels=3, batches=3):
    """A float64 layer with some memory, and the reference that remembers the same."""
    layer = MemorizedBatchNorm2d(channels, memory, decay, lam=lam, gradient=gradient).double()
    ref = reference.MBN(channels, memory, decay, lam, gradient=gradient)
    for t in range(batches):
        x = inputs(2 + t, channels, 3, 2, at=t)
        second_forward(layer, x)
        ref.remember(x)
    renew(layer)
    return layer, ref


def renew(layer):
    """Give gamma and beta new values, as an optimiser's step does."""
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.num_features) + 1.5)
        layer.bias.copy_(torch.randn(layer.num_features))


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def buffers(layer):
    return {name: getattr(layer, name) for name in BUFFERS}


def equal(before, after):
    assert before.keys() == after.keys()
    return all(torch.equal(before[name], after[name]) for name in before)


def walk(layer, ref, dtype, iterations, smallest, **tolerance):
    """Run layer and reference side by side and compare all there is to compare after each iteration."""
    layer.to(dtype)
    draw = random.Random(1)
    wide = {"check_dtype": False, **tolerance}
    for t in range(iterations):
        if t % 5 == 0:
            ref.lam = draw.choice([0.0, 0.1, 0.5, 0.9, 1.0])
            set_lambda(layer, ref.lam)
        renew(layer)
        spatial = draw.choice([(1, 1), (1, 3), (2, 2)]) if smallest == 1 else draw.choice([(2, 2), (1, 3)])
        shape = (draw.randint(smallest, 4), layer.num_features, *spatial)
        x = inputs(*shape, at=t / 20, dtype=dtype).requires_grad_()
        dl_dy = torch.randn(shape, dtype=dtype)
        gamma, beta = layer.weight.detach().double(), layer.bias.detach().double()
        x64 = x.detach().double()

        y = layer(x)
        dl_dx, dl_dgamma, dl_dbeta = torch.autograd.grad(y, [x, layer.weight, layer.bias], dl_dy)
        assert y.dtype == dl_dx.dtype == dtype
        expected = ref.backward(x64, gamma, dl_dy.double())  # before the reference remembers x
        assert_close(y, ref.first(x64, gamma, beta), **wide)
        assert_close([dl_dx, dl_dgamma, dl_dbeta], list(expected), **wide)

        if ref.forwards == 2:
            renew(layer)  # the step: other gamma and beta here, other weights below
            gamma, beta = layer.weight.detach().double(), layer.bias.detach().double()
            x64 = (x64 + 0.1 * inputs(*shape)).to(dtype).double()
            assert_close(second_forward(layer, x64.to(dtype)), ref.second(x64, gamma, beta), **wide)

        remembered = snapshot(layer)
        assert_close(buffers(layer), ref.buffers(), **wide)
        layer.eval()
        assert_close(layer(x), ref.evaluate(x.detach().double(), gamma, beta), **wide)
        layer.train()
        assert equal(remembered, layer.state_dict())


# Against the reference.


@pytest.mark.parametrize("forwards", [1, 2])
@gradients
def test_sixty_iterations_follow_the_reference(path, forwards, gradient):
    layer = MemorizedBatchNorm2d(3, memory=4, decay=0.8, forwards=forwards, gradient=gradient)
    ref = reference.MBN(3, 4, 0.8, forwards=forwards, gradient=gradient)
    walk(layer, ref, torch.float64, 60, 1, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("forwards", [1, 2])
@gradients
def test_sixty_iterations_follow_the_reference_in_float32(path, forwards, gradient):
    """Over six other seeds the worst error was 3e-6."""
    layer = MemorizedBatchNorm2d(3, memory=4, decay=0.8, forwards=forwards, gradient=gradient)
    ref = reference.MBN(3, 4, 0.8, forwards=forwards, gradient=gradient)
    walk(layer, ref, torch.float32, 60, 3, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("spatial", [(), (3,), (2, 3), (1, 3, 2)], ids=["2D", "3D", "4D", "5D"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@gradients
def test_every_input_shape_and_no_affine(path, spatial, affine, gradient):
    layer = LAYERS[2 + len(spatial)](3, lam=0.6, forwards=1, affine=affine, gradient=gradient).double()
    ref = reference.MBN(3, 20, lam=0.6, forwards=1, gradient=gradient)
    gamma, beta = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for t in range(3):
        x = inputs(3, 3, *spatial, at=t).requires_grad_()
        dl_dy = torch.randn_like(x)
        y = layer(x)
        (dl_dx,) = torch.autograd.grad(y, x, dl_dy)
        assert_close(dl_dx, ref.backward(x.detach(), gamma, dl_dy)[0], atol=1e-10, rtol=1e-10)
        assert_close(y, ref.first(x.detach(), gamma, beta), atol=1e-10, rtol=1e-10)
        assert_close(buffers(layer), ref.buffers(), atol=1e-10, rtol=1e-10)
    layer.eval()
    assert_close(layer(x), ref.evaluate(x.detach(), gamma, beta), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
@gradients
def test_memory_layout_of_the_input_does_not_matter(path, layout, gradient):
    layer, _ = filled_pair(gradient)
    x = inputs(4, 3, 5, 2)
    if layout == "channels_last":
        other = x.contiguous(memory_format=torch.channels_last)
    else:
        other = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert other.stride() != x.stride()
    dl_dy = torch.randn(1, 3, 5, 2, dtype=x.dtype).expand_as(x)  # as a mean over images hands it on
    results = []
    for v in (x, other):
        v = v.requires_grad_()
        with held(layer):
            y = layer(v)
        results.append([y, *torch.autograd.grad(y, [v, layer.weight, layer.bias], dl_dy)])
    if layout == "channels_last":
        assert results[1][0].is_contiguous(memory_format=torch.channels_last)
    assert_close(results[1], results[0], atol=1e-12, rtol=1e-12, check_stride=False)


# The two gradients.


def test_the_papers_gradient_is_the_derivative_of_the_output(path):
    layer, _ = filled_pair("paper")

    def f(x, gamma, beta):
        with held(layer):
            return torch.func.functional_call(layer, {"weight": gamma, "bias": beta}, (x,))

    x = inputs(3, 3, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(f, (x, layer.weight, layer.bias))


def test_the_batch_gradient_is_the_derivative_with_r_and_d_frozen(path):
    layer, ref = filled_pair("batch")
    x, dl_dy = inputs(3, 3, 2, 2), torch.randn(3, 3, 2, 2, dtype=torch.float64)
    R, D = ref.correction(x)
    gamma, beta = layer.weight.detach(), layer.bias.detach()

    def loss(x):
        mu, s2 = reference.moments(reference.vectors(x))
        y = [gamma * (R * (v - mu) / (s2 + 1e-5).sqrt() + D) + beta for v in reference.vectors(x)]
        return (reference.tensor(y, x.shape) * dl_dy).sum()

    h = 1e-5
    differences = torch.empty_like(x)
    for i in range(x.numel()):
        step = torch.zeros(x.numel(), dtype=x.dtype)
        step[i] = h
        differences.view(-1)[i] = (loss(x + step.view_as(x)) - loss(x - step.view_as(x))) / (2 * h)

    x.requires_grad_()
    (dl_dx,) = torch.autograd.grad(layer(x), x, dl_dy)
    assert_close(dl_dx, differences, atol=1e-7, rtol=1e-7)


def test_both_gradients_have_the_same_output(path):
    paper, _ = filled_pair("paper")
    batch = copy.deepcopy(paper)
    batch.gradient = "batch"
    x = inputs(3, 3, 2, 2)
    assert_close(paper(x), batch(x), atol=1e-12, rtol=1e-12)


@gradients
def test_the_references_closed_gradients_agree_with_autograd_through_eq_5(gradient):
    _, ref = filled_pair(gradient)
    x = inputs(3, 3, 2, 2).requires_grad_()
    gamma = torch.randn(3, dtype=torch.float64, requires_grad=True)
    beta = torch.randn(3, dtype=torch.float64, requires_grad=True)
    dl_dy = torch.randn_like(x)
    through_eq_5 = torch.autograd.grad(ref.normalize(x, gamma, beta), [x, gamma, beta], dl_dy)
    closed = ref.backward(x.detach(), gamma.detach(), dl_dy)
    assert_close(list(closed), list(through_eq_5), atol=1e-12, rtol=1e-12)


def test_the_papers_printed_backward_equations_mended(path):
    """'Backward Propagation', line by line, with dl/dxhat and x_{k+1} where the print has dl/dx and x_k."""
    layer, ref = filled_pair("paper")
    eps, gamma = layer.eps, layer.weight.detach()
    x, dl_dy = inputs(3, 3, 2, 2).requires_grad_(), torch.randn(3, 3, 2, 2, dtype=torch.float64)
    xs, dys = reference.vectors(x.detach()), reference.vectors(dl_dy)
    mu_hat, s2_hat = ref.training_statistics(x.detach())
    batches, alpha = [xs, *ref.memory], ref.alpha()
    total = sum(a * len(b) for a, b in zip(alpha, batches, strict=True))
    spread = sum(a * len(b) * (reference.moments(b)[0] - mu_hat) for a, b in zip(alpha, batches, strict=True))
    assert_close(spread, torch.zeros_like(spread), atol=1e-10, rtol=0)

    dl_dxhat = [dy * gamma for dy in dys]
    dl_ds2 = -0.5 * sum(g * (v - mu_hat) * (s2_hat + eps) ** -1.5 for g, v in zip(dl_dxhat, xs, strict=True))
    dl_dmu = sum(g * -1 / (s2_hat + eps).sqrt() for g in dl_dxhat) - 2 * dl_ds2 * spread / total
    dl_dx = [
        g / (s2_hat + eps).sqrt() + dl_ds2 * 2 / total * (v - mu_hat) + dl_dmu / total
        for g, v in zip(dl_dxhat, xs, strict=True)
    ]
    xhat = [(v - mu_hat) / (s2_hat + eps).sqrt() for v in xs]
    dl_dgamma = sum(dy * h for dy, h in zip(dys, xhat, strict=True))
    printed = [reference.tensor(dl_dx, x.shape), dl_dgamma, sum(dys)]

    gamma, beta = gamma.clone().requires_grad_(), layer.bias.detach().requires_grad_()
    through_eq_5 = torch.autograd.grad(ref.normalize(x, gamma, beta), [x, gamma, beta], dl_dy)
    assert_close(list(through_eq_5), printed, atol=1e-12, rtol=1e-12)
    got = torch.autograd.grad(layer(x), [x, layer.weight, layer.bias], dl_dy)
    assert_close(list(got), printed, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("frozen", ["weight", "bias", "input"])
@gradients
def test_what_asks_for_no_gradient_gets_none_and_the_rest_theirs(path, frozen, gradient):
    layer, ref = filled_pair(gradient)
    x, dl_dy = inputs(3, 3, 2, 2), torch.randn(3, 3, 2, 2, dtype=torch.float64)
    expected = dict(zip(["input", "weight", "bias"], ref.backward(x, layer.weight.detach(), dl_dy), strict=True))
    leaves = {"input": x, "weight": layer.weight, "bias": layer.bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    layer(x).backward(dl_dy)
    assert leaves[frozen].grad is None
    for name in leaves.keys() - {frozen}:
        assert_close(leaves[name].grad, expected[name], atol=1e-10, rtol=1e-10)


# What must hold by the definition.


@pytest.mark.parametrize("case", ["lambda=0", "empty memory"])
@gradients
def test_without_weight_on_the_memory_it_is_batch_norm(path, case, gradient):
    layer, _ = filled_pair(gradient, lam=0.0)
    if case == "empty memory":
        layer.forget()
        layer.lam = 0.9
    x, dl_dy = inputs(4, 3, 3, 2).requires_grad_(), torch.randn(4, 3, 3, 2, dtype=torch.float64)
    leaves = [x, layer.weight, layer.bias]
    y = layer(x)
    bn = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)
    assert_close(y, bn, atol=1e-12, rtol=1e-12)
    got, expected = (torch.autograd.grad(out, leaves, dl_dy) for out in (y, bn))
    assert_close(list(got), list(expected), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.1, 1.0])
def test_lambda_cancels_at_test_time(path, lam):
    """With lambda = 0 too: only training leaves the memory out."""
    layer, ref = filled_pair(lam=0.5)
    set_lambda(layer, lam)
    x = inputs(4, 3, 3, 2)
    assert_close(layer.eval()(x), ref.evaluate(x, layer.weight, layer.bias), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("sizes", [(12,), (4, 4, 4), (1, 5, 6), (2,) * 6, (1,) * 12])
def test_other_batches_of_the_same_images_pool_to_the_same_moments(path, sizes):
    """With eta = 1 the pool is that of the union, as PreciseBN has it."""
    images = inputs(12, 3, 2, 2)
    layer = MemorizedBatchNorm2d(3, decay=1.0, lam=1.0).double()
    for part in images.split(sizes):
        second_forward(layer, part)
    union = torch.var_mean(images, (0, 2, 3), correction=0)
    assert_close([layer.running_var, layer.running_mean], list(union), atol=1e-12, rtol=1e-12)
    assert layer.memory_weight == 48


@pytest.mark.parametrize("sizes", [(12,), (4, 8), (1, 5, 6), (5, 2, 5), (2,) * 6])
def test_other_batches_of_the_same_images_normalise_the_same(path, sizes):
    """With lambda = eta = 1 it does not matter which of the images are the current batch."""
    images = inputs(12, 3, 2, 2)
    layer = MemorizedBatchNorm2d(3, decay=1.0, lam=1.0).double()
    *remembered, current = images.split(sizes)
    for part in remembered:
        second_forward(layer, part)
    var, mean = torch.var_mean(images, (0, 2, 3), correction=0)
    mu_hat, sigma_hat = layer.training_statistics(current)
    assert_close([mu_hat, sigma_hat], [mean, (var + layer.eps).sqrt()], atol=1e-12, rtol=1e-12)
    y = F.batch_norm(current, mean, var, eps=layer.eps)
    assert_close(layer(current), y, atol=1e-10, rtol=1e-10)


@gradients
def test_training_statistics_are_those_of_the_forward_and_change_nothing(path, gradient):
    layer, ref = filled_pair(gradient)
    before, x = snapshot(layer), inputs(3, 3, 2, 2)
    mu_hat, s2_hat = ref.training_statistics(x)
    expected = [mu_hat, (s2_hat + layer.eps).sqrt()]
    assert_close(list(layer.training_statistics(x.requires_grad_())), expected, atol=1e-12, rtol=1e-12)
    assert equal(before, layer.state_dict())


def test_test_statistics_are_the_pool(path):
    layer, ref = filled_pair()
    m, v = ref.pooled()
    assert_close(list(layer.test_statistics()), [m, v], atol=1e-12, rtol=1e-12)


def test_before_anything_was_remembered_evaluation_is_the_identity(path):
    layer = MemorizedBatchNorm2d(3, eps=1e-12).double().eval()
    x = inputs(4, 3, 2, 2)
    assert_close(layer(x), x)


def test_evaluation_changes_no_buffer(path):
    layer, _ = filled_pair()
    before = snapshot(layer)
    layer.eval()
    layer(inputs(4, 3, 2, 2))
    with torch.no_grad():
        layer(inputs(4, 3, 2, 2))
    assert equal(before, layer.state_dict())


def test_forget_empties_the_memory():
    layer, _ = filled_pair()
    layer.forget()
    assert equal(dict(layer.named_buffers()), dict(MemorizedBatchNorm2d(3, 4, lam=0.7).double().named_buffers()))


# Numbers at the edge.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["one value", "constant channel", "6e4", "memory=1"])
@pytest.mark.parametrize("forwards", [1, 2])
@gradients
def test_nothing_becomes_nan_or_infinite(path, dtype, case, forwards, gradient):
    layer = MemorizedBatchNorm2d(3, 1 if case == "memory=1" else 3, lam=0.9, forwards=forwards, gradient=gradient)
    layer.to(dtype)
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
            y = second_forward(layer, x)
        layer.eval()
        for value in (y, *grads, *layer.state_dict().values(), layer(x)):
            assert value.isfinite().all()
        layer.train()
        assert y.dtype == dtype


def test_half_precision_input_is_normalised_in_float32(path):
    """The sum of squares of 6e4 overflows float16 by five orders of magnitude."""
    layer = MemorizedBatchNorm2d(2, forwards=1)
    x = torch.tensor([6e4, -6e4]).view(2, 1, 1, 1).expand(2, 2, 4, 4).half()
    assert_close(layer(x).float(), x.float() / 6e4, atol=1e-3, rtol=1e-3)
    assert_close(layer.memory_var[0], torch.full((2,), x[0, 0, 0, 0].item() ** 2))


# Precision, copies and state.


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to half", "to bfloat16"])
def test_narrow_casts_leave_the_memory_as_it_was(cast):
    layer = fill(MemorizedBatchNorm2d(3, lam=0.3))
    before = snapshot(layer)
    narrow = torch.bfloat16 if "bfloat16" in cast else torch.float16
    layer.to(narrow) if cast.startswith("to") else getattr(layer, cast)()
    assert layer.weight.dtype == layer.bias.dtype == narrow
    for name in BUFFERS:
        assert getattr(layer, name).dtype == torch.float32
        assert torch.equal(getattr(layer, name), before[name])
    assert layer.lam_tensor.dtype == torch.float32
    x = inputs(4, 3, 3, 2, dtype=narrow)
    assert second_forward(layer, x).dtype == narrow
    assert layer.memory_mean.dtype == torch.float32
    assert_close(layer.memory_mean[0], x.float().mean((0, 2, 3)))


def test_wide_casts_widen_the_memory_and_lambda():
    layer = fill(MemorizedBatchNorm2d(3, lam=0.1))
    before = snapshot(layer)
    layer.half().double()
    for name in BUFFERS:
        assert torch.equal(getattr(layer, name), before[name].double())
    assert layer.lam_tensor == torch.tensor(0.1, dtype=torch.float64)  # not float32's 0.1 in float64
    assert layer.float().memory_mean.dtype == torch.float32
    set_lambda(layer, 0.2)
    assert layer.lam_tensor == torch.tensor(0.2)


def test_cpu_autocast_normalises_bfloat16_with_float32_statistics():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), MemorizedBatchNorm2d(4, forwards=1))
    with torch.autocast("cpu", torch.bfloat16):
        y = net(inputs(4, 3, 6, 6, dtype=torch.float32))
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    layer = net[1]
    assert layer.memory_mean.dtype == layer.weight.grad.dtype == torch.float32
    assert_close(y.float().mean((0, 2, 3)), torch.zeros(4), atol=1e-2, rtol=0)
    assert_close(y.float().var((0, 2, 3)), torch.ones(4), atol=3e-2, rtol=0)


@pytest.mark.parametrize("forwards", [1, 2])
def test_a_copy_in_mid_memory_trains_on_identically(forwards):
    layer = fill(MemorizedBatchNorm2d(3, 5, lam=0.4, forwards=forwards))
    loaded = MemorizedBatchNorm2d(3, 5, lam=0.4, forwards=forwards)
    loaded.load_state_dict(layer.state_dict())
    copies = [layer, copy.deepcopy(layer), loaded]
    for t in range(7):
        x = inputs(2 + t % 3, 3, 2, 2, at=t, dtype=torch.float32)
        ys = [second_forward(c, x) if forwards == 2 else c(x) for c in copies]
        assert torch.equal(ys[0], ys[1])
        assert torch.equal(ys[0], ys[2])
    assert equal(layer.state_dict(), copies[1].state_dict())
    assert equal(layer.state_dict(), loaded.state_dict())


def test_a_deep_copy_shares_no_memory():
    layer = fill(MemorizedBatchNorm2d(3))
    before = snapshot(layer)
    second_forward(copy.deepcopy(layer), inputs(4, 3, 2, 2, dtype=torch.float32))
    assert equal(before, layer.state_dict())


@pytest.mark.parametrize("together", [False, True])
def test_a_memory_weight_of_either_shape_loads(together):
    """() in the state dicts of older versions, (1,) now."""
    layer, other = MemorizedBatchNorm2d(3), MemorizedBatchNorm2d(3)
    second_forward(layer, torch.randn(4, 3, 2, 2))
    state = layer.state_dict()
    assert state["memory_weight"].shape == (1,)
    state["memory_weight"] = state["memory_weight"][0].clone()
    if together:
        Together([other])
    other.load_state_dict(state)
    assert state["memory_weight"].shape == ()
    assert other.memory_weight.tolist() == [16]
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(layer(x), other(x))


def test_the_state_dict_holds_the_memory_and_not_lambda():
    assert MemorizedBatchNorm2d(3).state_dict().keys() == {"weight", "bias", *BUFFERS}
    layer = MemorizedBatchNorm2d(3, lam=0.9)
    layer.load_state_dict(MemorizedBatchNorm2d(3, lam=0.1).state_dict())
    assert layer.lam == 0.9
    assert layer.lam_tensor == torch.tensor(0.9)


def test_the_newest_batch_is_row_0_and_the_oldest_leaves():
    layer = MemorizedBatchNorm1d(1, memory=3)
    for value in range(5):
        second_forward(layer, torch.full((value + 2, 1), float(value)))
    assert layer.memory_mean[:, 0].tolist() == [4, 3, 2]
    assert layer.memory_count.tolist() == [6, 5, 4]


# Settings.


@pytest.mark.parametrize(
    "setting",
    [
        {"memory": 0},
        {"memory": 2.0},
        {"memory": True},
        {"decay": 0.0},
        {"decay": 1.1},
        {"lam": -0.1},
        {"lam": 1.1},
        {"lam": float("nan")},
        {"forwards": 3},
        {"forwards": 0},
        {"gradient": "full"},
    ],
    ids=str,
)
def test_impossible_settings_are_refused_by_name(setting):
    (name,) = setting
    with pytest.raises(ValueError, match="lambda" if name == "lam" else name):
        MemorizedBatchNorm2d(3, **setting)


def test_the_defaults_are_the_papers():
    layer = MemorizedBatchNorm2d(3)
    got = (layer.memory, layer.decay, layer.eps, layer.lam, layer.forwards, layer.gradient, layer.affine)
    assert got == (20, 0.9, 1e-5, 0.1, 2, "paper", True)


def test_set_lambda_reaches_every_layer_and_keeps_the_memory():
    net = nn.Sequential(fill(MemorizedBatchNorm2d(3)), nn.Sequential(MemorizedBatchNorm1d(2)), nn.BatchNorm1d(2))
    before = snapshot(net)
    set_lambda(net, 0.5)
    assert [layer.lam for layer in norm_layers(net)] == [0.5, 0.5]
    assert [layer.lam_tensor.item() for layer in norm_layers(net)] == [0.5, 0.5]
    assert equal(before, net.state_dict())
    with pytest.raises(ValueError, match=r"lambda must be in \[0, 1\], not 2"):
        set_lambda(net, 2)


# torch.compile.


def small_net(**settings):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        MemorizedBatchNorm2d(4, 3, lam=0.3, **settings),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 5, bias=False),
        MemorizedBatchNorm1d(5, 3, lam=0.3, **settings),
    )


@pytest.mark.parametrize("forwards", [1, 2])
@gradients
def test_a_compiled_net_trains_as_an_eager_one_and_is_compiled_once(forwards, gradient):
    """One graph for each of the two forwards; a change of lambda in mid-training must not compile anew.

    With forwards=1 the graph overwrites what its own backward needs (torch recomputes from it, pytorch#197039).
    """
    torch._dynamo.reset()
    eager = small_net(forwards=forwards, gradient=gradient).double()
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    tolerance = {"atol": 1e-10, "rtol": 1e-10}
    for t, lam in enumerate([0.3, 0.3, 0.5, 0.9, 0.0]):
        x, dl_dy = inputs(4, 3, 6, 6, at=t), torch.randn(4, 5, dtype=torch.float64)
        with torch._dynamo.config.patch(error_on_recompile=t > 0):
            results = []
            for net, module in ((eager, eager), (compiled, twin)):
                set_lambda(net, lam)
                y = net(x)
                module.zero_grad()
                y.backward(dl_dy)
                with torch.no_grad():
                    for p in module.parameters():
                        p -= 0.01 * p.grad
                second = second_forward(net, x) if forwards == 2 else None
                results.append([y, second, [p.grad for p in module.parameters()], module.state_dict()])
            assert_close(results[1], results[0], **tolerance)
    assert eager[1].memory_count.tolist() == [64, 64, 64]
    net_eval = [net.eval()(x) for net in (eager, compiled)]
    assert_close(*net_eval, **tolerance)


@gradients
def test_compiled_forwards_may_come_before_both_backwards(gradient):
    """As in a siamese network: the second call overwrites the memory that the first normalised with."""
    torch._dynamo.reset()
    eager = fill(MemorizedBatchNorm1d(3, lam=0.5, forwards=1, gradient=gradient).double(), spatial=())
    twin = copy.deepcopy(eager)
    a, b = inputs(4, 3).requires_grad_(), inputs(4, 3, at=3).requires_grad_()
    dl_dy, results = torch.randn(8, 3, dtype=torch.float64), []
    for layer in (eager, torch.compile(twin, fullgraph=True, backend="aot_eager")):
        y = torch.cat([layer(a), layer(b)])
        results.append(torch.autograd.grad(y, [a, b], dl_dy))
    assert_close(results[1], results[0], atol=1e-10, rtol=1e-10)


def test_eager_layers_call_torchs_kernels_and_compiled_ones_the_formula():
    x = torch.zeros(1)
    assert functional.has_native_kernels(x)
    assert not torch.compile(functional.has_native_kernels, fullgraph=True, backend="eager")(x)
