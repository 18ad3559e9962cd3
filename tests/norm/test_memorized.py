"""MemorizedBatchNorm: the equations as the paper prints them, what follows from its definition, and its state."""

import copy

import pytest
import reference
import torch
import torch.nn.functional as F
from layer_kinds import inputs, make, reference_of, renew, snapshot, trained, unchanged
from torch.testing import assert_close

from mbn import MemorizedBatchNorm2d, second_forward
from mbn.norm import functional
from mbn.norm.memories import AllMemories


def test_both_gradients_have_the_same_output(path):
    paper = trained("mbn paper", forwards=2)
    batch = copy.deepcopy(paper)
    batch.gradient = "batch"
    x = inputs(3, 3, 2, 2)
    assert_close(paper(x), batch(x), atol=1e-12, rtol=1e-12)


def test_the_papers_backward_equations_without_their_misprints(path):
    """'Backward Propagation', line by line. The paper misprints dl/dxhat as dl/dx and x_{k+1} as x_k."""
    layer = make("mbn paper", forwards=2)
    ref = reference_of(layer)
    for t in range(3):
        x = inputs(2 + t, 3, 3, 2, at=t)
        second_forward(layer, x)
        ref.remember(x)
    renew(layer)
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
    got = torch.autograd.grad(layer(x), [x, layer.weight, layer.bias], dl_dy)
    assert_close(list(got), printed, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("sizes", [(12,), (4, 8), (1, 5, 6), (5, 2, 5), (2,) * 6, (1,) * 12])
def test_the_same_images_in_other_batches_normalise_the_same(path, sizes):
    """With lambda = eta = 1 it does not matter which of the images are the current batch, nor at test time how many."""
    images = inputs(12, 3, 2, 2)
    var, mean = torch.var_mean(images, (0, 2, 3), correction=0)
    layer = MemorizedBatchNorm2d(3, decay=1.0, lam=1.0).double()
    *remembered, current = images.split(sizes)
    for part in remembered:
        second_forward(layer, part)
    mu_hat, sigma_hat = layer.training_statistics(current)
    assert_close([mu_hat, sigma_hat], [mean, (var + layer.eps).sqrt()], atol=1e-12, rtol=1e-12)
    y = second_forward(layer, current)
    assert_close(y, F.batch_norm(current, mean, var, eps=layer.eps), atol=1e-10, rtol=1e-10)
    assert_close(list(layer.test_statistics()), [mean, var], atol=1e-12, rtol=1e-12)
    assert layer.memory_weight == 48


def test_forget_empties_the_memory():
    layer = trained("mbn paper")
    layer.forget()
    assert not unchanged(snapshot(layer), trained("mbn paper"))
    assert_close(dict(layer.named_buffers()), dict(make("mbn paper").named_buffers()), atol=0, rtol=0)


@pytest.mark.parametrize("together", [False, True])
def test_a_memory_weight_of_either_shape_loads(together):
    """() in the state dicts of older versions, (1,) now."""
    layer, other = MemorizedBatchNorm2d(3), MemorizedBatchNorm2d(3)
    second_forward(layer, torch.randn(4, 3, 2, 2))
    state = layer.state_dict()
    assert state["memory_weight"].shape == (1,)
    state["memory_weight"] = state["memory_weight"][0].clone()
    if together:
        AllMemories([other])
    other.load_state_dict(state)
    assert state["memory_weight"].shape == ()
    assert other.memory_weight.tolist() == [16]
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(layer(x), other(x))


def test_a_state_in_float16_whose_counts_overflowed_loads_its_pool():
    layer, other = MemorizedBatchNorm2d(3), MemorizedBatchNorm2d(3)
    for _ in range(3):
        second_forward(layer, torch.randn(4, 3, 128, 128) * 2 + 1)  # 65,536 values a channel
    state = {name: value.half() for name, value in layer.state_dict().items()}
    assert state["memory_weight"].isinf()
    assert state["memory_count"].isinf().any()
    other.load_state_dict(state)
    x = torch.randn(4, 3, 2, 2)
    assert other(x).isfinite().all()
    assert_close(other.eval()(x), layer.eval()(x), atol=5e-3, rtol=0)
    second_forward(other.train(), x)
    assert other.memory_count.tolist()[:3] == [16, 160, 0]
    assert other(x).isfinite().all()


def test_eager_layers_call_torchs_kernels_and_compiled_ones_the_formula():
    x = torch.zeros(1)
    assert functional.has_native_kernels(x)
    assert not torch.compile(functional.has_native_kernels, fullgraph=True, backend="eager")(x)
