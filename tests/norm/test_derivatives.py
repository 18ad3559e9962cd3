"""First and second derivatives: against numbers, against plain autograd of the formula, and against nn.BatchNorm."""

import contextlib
import itertools
from unittest import mock

import pytest
import torch
from layer_kinds import KINDS, inputs, kinds, make, one_or_two, remember, renew, trained
from torch import nn
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import functional_call
from torch.testing import assert_close

from mbn import held, second_forward, set_lambda
from mbn.norm.functional import batch_moments, renormalized_batch_norm

# What torch itself calls, in its rules for forward mode and (2.6) in gradcheck.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:Please use `torch.vmap` instead"),
]
OURS = [kind for kind in KINDS if kind != "bn"]
TIGHT = {"atol": 1e-10, "rtol": 1e-10}
# What the memory may be: where it weighs nothing, a little, or almost everything, or holds no numbers.
MEMORIES = {
    "empty": lambda layer: layer.forget(),
    "lambda 0": lambda layer: set_lambda(layer, 0),
    "lambda 0, not finite": lambda layer: (set_lambda(layer, 0), layer.running_mean.fill_(float("nan"))),
    "rho near 1": lambda layer: layer.memory_weight.fill_(1e-12),
    "rho 0.3": lambda layer: None,
    "rho near 0": lambda layer: layer.memory_weight.fill_(1e12),
}


def formula():
    return mock.patch("mbn.norm.functional.has_native_kernels", return_value=False)


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def checked(function, wanted):
    """First and second derivatives against numbers, by reverse and by forward mode, one by one and batched."""
    assert gradcheck(function, wanted, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(function, wanted, check_fwd_over_rev=True)


@pytest.mark.parametrize(
    ("memory", "affine", "spatial"),
    [
        *((memory, "weight and bias", (2,)) for memory in MEMORIES),
        *itertools.product(["lambda 0", "rho 0.3"], ["weight and bias", "weight", "none"], [(), (1, 2)]),
    ],
)
def test_the_papers_gradient_and_its_derivative_are_those_of_the_output(path, memory, affine, spatial):
    """The memory is a constant, so the numbers are those of the layer."""
    layer = trained("mbn paper", dims=2 + len(spatial), affine=affine != "none", bias=affine == "weight and bias")
    MEMORIES[memory](layer)
    x, *parameters = leaves(inputs(3, 3, *spatial), *layer.parameters())
    names = [name for name, _ in layer.named_parameters()]

    def output(x, *parameters):
        with held(layer):
            return functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    checked(output, [x, *parameters])


@pytest.mark.parametrize("affine", ["weight and bias", "weight", "bias", "none"])
@pytest.mark.parametrize("spatial", [(), (2,), (1, 2)], ids=["2D", "3D", "4D"])
def test_with_r_and_d_fixed_the_gradient_and_its_derivative_are_those_of_the_output(path, affine, spatial):
    """Of BRN and of MBN with gradient "batch", whose r and d are constants by definition."""
    r, d = torch.tensor([0.5, 1, 2], dtype=torch.float64), torch.tensor([-1, 0, 0.5], dtype=torch.float64)
    weight, bias = torch.randn(2, 3, dtype=torch.float64)
    parameters = [p if name in affine else None for name, p in (("weight", weight), ("bias", bias))]
    given = [p is not None for p in parameters]

    def output(x, *parameters):
        left = iter(parameters)
        affine = [next(left) if each else None for each in given]
        return renormalized_batch_norm(x, *batch_moments(x.detach()), r, d, *affine, 1e-5)

    checked(output, leaves(inputs(3, 3, *spatial), *(p for p in parameters if p is not None)))


def by_hand(layer, x, weight, bias):
    """The layer's y with the memory, or r and d, as constants, in plain operations of autograd."""
    view = (1, -1, *(1,) * (x.dim() - 2))
    dims = [0, *range(2, x.dim())]
    mu, s2 = x.mean(dims), x.var(dims, correction=0)
    sigma = (s2 + layer.eps).sqrt()
    if getattr(layer, "gradient", "") == "paper":
        w = layer.memory_weight * layer.lam
        rho = (x.numel() / 3) / (x.numel() / 3 + w)
        m, v = layer.running_mean, layer.running_var
        mu_hat = m + rho * (mu - m)
        s2_hat = (1 - rho) * v + rho * s2 + rho * (1 - rho) * (mu - m).square()
        xhat = (x - mu_hat.view(view)) / (s2_hat + layer.eps).sqrt().view(view)
    else:
        with held(layer):  # y = xhat r + d, of which r and d are taken as numbers
            mean, std = layer.training_statistics(x.detach())
        r, d = sigma.detach() / std, (mu.detach() - mean) / std
        xhat = (x - mu.view(view)) / sigma.view(view) * r.view(view) + d.view(view)
    return xhat * weight.view(view) + bias.view(view)


@pytest.mark.parametrize("kind", OURS)
def test_a_hessian_vector_product_is_that_of_the_equations(path, kind):
    layer = trained(kind)
    for p in layer.parameters():
        p.requires_grad_()
    x, vector = inputs(3, 3, 2, 2).requires_grad_(), torch.randn(3, 3, 2, 2, dtype=torch.float64)
    results = []
    with held(layer):
        for y in (layer(x), by_hand(layer, x, layer.weight, layer.bias)):
            wanted = [x, layer.weight, layer.bias]
            first = grad((y - 1).pow(3).sum(), wanted, create_graph=True)
            product = (first[0] * vector).sum() + first[1].sin().sum() + first[2].square().sum()
            results.append([y, *first, *grad(product, wanted)])
    assert_close(*results, **TIGHT)


# In networks.


def critic(layer):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 3, 2, bias=False), layer, nn.Tanh(), nn.Flatten(), nn.Linear(27, 1)).double()


def hessian_vector(net, x):
    weight = net[0].weight
    (first,) = grad(net(x).pow(2).sum(), [weight], create_graph=True)
    return grad((first * torch.ones_like(first)).sum(), [weight])[0]


def penalty(net, x):
    """A gradient penalty, whose loss reaches every parameter through the gradient alone."""
    x = x.clone().requires_grad_()
    (first,) = grad(net(x).sum(), [x], create_graph=True)
    loss = (first.flatten(1).norm(dim=1) - 1).square().sum()
    return grad(loss, [p for p in net.parameters() if p.requires_grad], allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("derivative", [hessian_vector, penalty])
@kinds
@one_or_two
def test_second_derivatives_of_a_critic_are_those_of_the_formula_and_of_batch_norm(derivative, kind, forwards):
    """At a memory that weighs nothing yet all kinds are batch norm; later both ways to compute a layer agree."""
    x = inputs(4, 2, 4, 4)
    nets = [critic(make(kind, forwards=forwards)), critic(make(kind, forwards=forwards)), critic(nn.BatchNorm2d(3))]
    for t in range(3):
        results = [derivative(nets[0], x + t)]
        with formula():
            results.append(derivative(nets[1], x + t))
        if t == 0 and kind != "brn":  # whose first batch is corrected towards mean 0 and variance 1
            results.append(derivative(nets[2], x))
        for other in results[1:]:
            assert_close(results[0], other, **TIGHT)
        batch = inputs(4, 3, 3, 3, at=t)
        for net in nets[:2]:
            remember(net[1], batch)


@kinds
def test_a_gradient_penalty_directly_behind_the_layer(path, kind):
    """What flows into the layer depends on parameters then, and gamma has a gradient of its own."""
    layer, behind = trained(kind, dims=2), nn.Linear(3, 2).double()
    x, results = inputs(4, 3).requires_grad_(), []
    twin = nn.BatchNorm1d(3).double()
    twin.load_state_dict(layer.state_dict() | {"running_var": torch.ones(3)}, strict=False)
    with held(layer):
        ys = [layer(x), twin(x) if kind == "bn" else by_hand(layer, x, layer.weight, layer.bias)]
    for y, norm in zip(ys, [layer, twin if kind == "bn" else layer], strict=True):
        (first,) = grad(behind(y).pow(3).sum(), [x], create_graph=True)
        results.append(grad(first.square().sum(), [norm.weight, norm.bias, *behind.parameters(), x]))
    assert_close(*results, **TIGHT)
    assert all(g.abs().max() > 1e-3 for g in results[0])


@kinds
def test_gradients_made_to_be_differentiated_are_the_gradients(kind):
    layer, x = trained(kind), inputs(4, 3, 2, 2).requires_grad_()
    dy = torch.randn_like(x)
    results = []
    for create_graph in (False, True):
        with held(layer):
            results.append(grad(layer(x), [x, *layer.parameters()], dy, create_graph=create_graph))
    assert_close(*results, **TIGHT)
    assert [g.requires_grad for gs in results for g in gs[:2]] == [False, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@kinds
def test_second_derivatives_of_half_precision_inputs_beside_float32_parameters(kind, dtype):
    layer, narrow = trained(kind, dtype=torch.float32), inputs(8, 3, 2, 2, dtype=dtype)
    results = []
    for x in (narrow.requires_grad_(), narrow.detach().float().requires_grad_()):
        with held(layer):
            (first,) = grad(layer(x).float().sin().sum(), [x], create_graph=True)
        second = grad(first.float().square().sum(), [x, *layer.parameters()])
        assert first.dtype == second[0].dtype == x.dtype
        results.append([first, *second])
    for got, expected in zip(*results, strict=True):
        error = (got.float() - expected).norm() / expected.norm()
        assert error < {torch.float16: 0.01, torch.bfloat16: 0.05}[dtype]


@pytest.mark.parametrize("wanted", [w for w in itertools.product([True, False], repeat=3) if any(w)], ids=str)
@kinds
def test_frozen_tensors_have_no_second_derivative_and_the_others_theirs(kind, wanted):
    """Where the input or gamma is frozen, what comes from behind still depends on the parameters there."""
    results = []
    for context in (contextlib.nullcontext(), formula()):
        torch.manual_seed(2)
        layer, behind, x = trained(kind), nn.Conv2d(3, 2, 1).double(), inputs(4, 3, 2, 2)
        own = [t.requires_grad_(w) for t, w in zip((x, layer.weight, layer.bias), wanted, strict=True)]
        asked = [t for t in own if t.requires_grad]
        with context, held(layer):
            first = grad(behind(layer(x)).pow(3).sum(), asked, create_graph=True)
            second = grad(sum(g.square().sum() for g in first), [*asked, *behind.parameters()])
        results.append([*first, *second])
    assert_close(*results, **TIGHT)


class Ignored(torch.autograd.Function):
    """The sum of x, whose gradient is undefined, as of a branch that a loss leaves out."""

    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, dy):
        return None


@kinds
def test_an_output_without_a_gradient_gives_its_input_none_or_zero(path, kind):
    layer, x = trained(kind), inputs(4, 3, 2, 2).requires_grad_()
    (Ignored.apply(layer(x)) + 2 * x.sum()).backward()
    assert_close(x.grad, torch.full_like(x, 2))


@pytest.mark.parametrize("where", ["input", "weight", "module"])
@kinds
def test_a_hook_on_a_gradient_runs_once(kind, where):
    """Also where the gradient is to be differentiated."""
    layer, x = trained(kind), inputs(4, 3, 2, 2).requires_grad_()
    inside, ran = x * 1, []

    def double(g):
        ran.append(1)
        return 2 * g

    with held(layer):
        plain = grad(layer(inside).pow(3).sum(), [x, layer.weight], retain_graph=True)
        if where == "module":
            layer.register_full_backward_hook(lambda _, dx, dy: (double(dx[0]),))
        else:
            (inside if where == "input" else layer.weight).register_hook(double)
        hooked = grad(layer(inside).pow(3).sum(), [x, layer.weight], create_graph=True)
    assert len(ran) == 1
    factors = (1, 2) if where == "weight" else (2, 1)
    assert_close(list(hooked), [f * g for f, g in zip(factors, plain, strict=True)], **TIGHT)


# The memory moves on before the backward runs.


def siamese(layer, a, b):
    """The second call overwrites the memory that the first one normalised with."""
    return layer(a) + layer(b)


def second_before_backward(layer, a, b):
    y = layer(a)
    second_forward(layer, b)
    return y


def moved_by_others(layer, a, b):
    """As `load_state_dict`, `forget` and set_test_statistics write in place."""
    y = layer(a)
    with torch.no_grad():
        for buffer in layer.buffers():
            buffer.zero_()
    return y


@pytest.mark.parametrize(
    ("kind", "case", "forwards"),
    [
        (kind, *case)
        for case in ((siamese, 1), (second_before_backward, 2), (moved_by_others, 1))
        for kind in KINDS
        if (kind, case[0]) != ("bn", moved_by_others)  # torch's kernel refuses it
    ],
)
def test_a_memory_that_moves_on_before_the_backward_changes_no_derivative(path, kind, case, forwards):
    """The derivatives are those of a network in which each call has a layer of its own, with the memory of then."""
    a, b = inputs(3, 3, 2, 2).requires_grad_(), inputs(4, 3, 2, 2, at=2)[:3].requires_grad_()
    layers, results = [trained(kind, forwards=forwards) for _ in range(2)], []
    layers[1].load_state_dict(layers[0].state_dict())
    moved, still = layers

    def apart(layer, a, b):
        with held(layer):
            y = layer(a)
        if case is not siamese:
            return y
        remember(layer, a.detach())
        with held(layer):
            return y + layer(b)

    for layer, y in ((moved, case(moved, a, b)), (still, apart(still, a, b))):
        wanted = [a, *([b] if case is siamese else []), layer.weight]
        first = grad(y.pow(3).sum(), wanted, create_graph=True)
        results.append([y, *first, *grad(sum(g.square().sum() for g in first), wanted)])
    assert_close(*results, **TIGHT)


def test_parameters_that_change_before_the_backward_are_refused_as_torch_does():
    """Nothing wrong in silence: gamma is needed as it was."""
    layer, x = trained("mbn paper"), inputs(3, 3, 2, 2).requires_grad_()
    y = layer(x)
    renew(layer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
