"""The layers with batch statistics side by side: how to make each, inputs for all, and a walk beside the reference."""

import pytest
import reference
import torch
from torch import nn
from torch.testing import assert_close

from mbn import second_forward, set_lambda, set_renorm
from mbn.norm.base import norm_layers
from mbn.norm.convert import NORMS, norm_of

# Settings with which a layer's output depends on what it remembers.
KINDS = {
    "bn": {},
    "brn": {"momentum": 0.3, "r_max": 1.5, "d_max": 1.0},
    "mbn paper": {"memory": 3, "decay": 0.8, "lam": 0.7, "gradient": "paper"},
    "mbn batch": {"memory": 3, "decay": 0.8, "lam": 0.7, "gradient": "batch"},
}
SHAPES = {"1d-2D": (4, 3), "1d-3D": (4, 3, 5), "2d": (4, 3, 5, 2), "3d": (4, 3, 2, 3, 2)}
kinds = pytest.mark.parametrize("kind", KINDS)
one_or_two = pytest.mark.parametrize("forwards", [1, 2])
shapes = pytest.mark.parametrize(("dims", "shape"), [(int(k[0]), v) for k, v in SHAPES.items()], ids=SHAPES)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def make(kind, channels=3, dims=4, dtype=torch.float64, affine=True, **settings):
    """A layer for inputs of so many dimensions."""
    layer = NORMS[kind.split()[0]][max(dims, 3) - 3]
    return layer(channels, affine=affine, **KINDS.get(kind, {}) | settings).to(dtype)


def reference_of(layer):
    """The reference with the settings of a layer that has remembered nothing yet."""
    (norm,) = (norm for norm, layers in NORMS.items() if type(layer) in layers)
    names = {"memory": "k", "decay": "eta"}
    settings = {names.get(name, name): getattr(layer, name) for name in layer.settings if name != "pretrained_batches"}
    ref = getattr(reference, norm.upper())(layer.num_features, **settings)
    ref.eps = layer.eps
    return ref


def inputs(n, channels, *spatial, at=0.0, dtype=torch.float64):
    """A batch whose channels have different means and scales, which move with `at`."""
    shape = (1, channels, *(1 for _ in spatial))
    scale, mean = (torch.linspace(*ends, channels, dtype=torch.float64).view(shape) for ends in ((0.5, 3), (-2, 3)))
    return (torch.randn(n, channels, *spatial, dtype=torch.float64) * scale * (1 + 0.3 * at) + mean + at).to(dtype)


def remember(layer, x):
    """Train on x with the forward that remembers, and return its output."""
    return second_forward(layer, x) if layer.forwards == 2 else layer(x)


def trained(kind, dims=4, dtype=torch.float64, **settings):
    """A layer that has remembered three batches, with a gamma and a beta that are not the initial ones."""
    layer = make(kind, 3, dims, dtype, **settings)
    for t in range(3):
        remember(layer, inputs(2 + t, 3, *(3, 2, 2)[: dims - 2], at=t, dtype=dtype))
    renew(layer)
    return layer


@torch.no_grad()
def renew(layer):
    """Give gamma and beta new values, as an optimiser's step does."""
    for p in layer.parameters():
        p.copy_(torch.randn(p.shape) + 1.5)


def set_changing(module, lam, r_max, d_max):
    """Set lambda, or r_max and d_max, of the layers that have them."""
    norms = {norm_of(layer) for layer in norm_layers(module)}
    if "mbn" in norms:
        set_lambda(module, lam)
    if "brn" in norms:
        set_renorm(module, r_max, d_max)


def network(kind, **settings):
    """From (N, 3, 5, 5) to (N, 3) through three layers for two kinds of input, with a stride and padding. The first
    layer has another eps, as in networks from several sources.
    """
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        make(kind, 4, **{"eps": 0.1, **settings}),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, stride=2, bias=False),
        make(kind, 5, **settings),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, 6, bias=False),
        make(kind, 6, dims=2, **settings),
        nn.Linear(6, 3),
    ).double()


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def unchanged(before, module):
    after = module.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def close(got, expected, tolerance, slack=0.0):
    """Within the tolerance, relative to the largest number expected, and slack."""
    expected = expected.detach().double()
    assert got.isfinite().all()
    assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()) + slack + 1e-12)


def rounding(batches, layer):
    """The error of a float32 mean's last bits, divided by the smallest sigma that a layer can meet."""
    if batches[0].dtype == torch.float64:
        return 0.0
    largest = max(float(x.abs().max()) for x in batches)
    dims = [0, *range(2, batches[0].dim())]
    smallest = min(float((x.double().var(dims, correction=0) + layer.eps).sqrt().min()) for x in batches)
    return 4 * torch.finfo(torch.float32).eps * float(affine_of(layer)[0].detach().abs().max()) * largest / smallest


def affine_of(layer):
    """gamma and beta in float64, as leaves that get gradients; 1 and 0 where the layer has none."""
    ones = torch.ones(layer.num_features, dtype=torch.float64)
    both = [ones, 0 * ones] if layer.weight is None else [p.detach().double() for p in (layer.weight, layer.bias)]
    return [value.clone().requires_grad_() for value in both]


def follow(layer, batches, steer=lambda layer, ref, x: None, tolerance=None, gradients=None):
    """Train on each batch beside the reference, and compare everything after each.

    steer: called before each batch, to change settings of both. gradients: compared by default in float64 alone.
    """
    ref, dtype = reference_of(layer), batches[0].dtype
    tolerance = tolerance or TOLERANCE[dtype]
    wide = min(tolerance, TOLERANCE[torch.float32])  # what is kept in float32 whatever the input

    def same(y, expected):
        close(y, expected, tolerance, rounding(batches, layer))

    for x in batches:
        x, x64 = x.detach().requires_grad_(), x.detach().double().requires_grad_()
        steer(layer, ref, x64.detach())
        renew(layer)
        gamma, beta = affine_of(layer)
        y, expected_y = layer(x), ref.forward(x64, gamma, beta)
        dl_dy = torch.randn(x.shape, dtype=dtype)
        got = torch.autograd.grad(y, [x, *layer.parameters()], dl_dy)
        assert y.dtype == got[0].dtype == dtype
        assert all(g.isfinite().all() for g in got)
        if gradients or (gradients is None and dtype == torch.float64):
            leaves = [x64, gamma, beta][: len(got)]
            for g, expected in zip(got, torch.autograd.grad(expected_y, leaves, dl_dy.double()), strict=True):
                close(g, expected, tolerance)
        same(y, expected_y)

        if ref.forwards == 2:
            renew(layer)
            gamma, beta = affine_of(layer)
            z = 0.9 * x.detach()  # new weights make another x of the batch
            same(second_forward(layer, z), ref.forward(z.double(), gamma, beta, 2))

        before = snapshot(layer)
        for name, expected in ref.buffers().items():
            close(before[name], expected, wide)
        layer.eval()
        same(layer(x.detach()), ref.evaluate(x.detach().double(), gamma, beta))
        assert unchanged(before, layer)
        layer.train()
