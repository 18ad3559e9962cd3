"""Twenty losses of each method in float64, which hold on any machine and any version of torch.

Weights and images come from NumPy's legacy generator, whose numbers never change. The training is so smooth that a
perturbation does not grow. When a method is meant to change, `python tests/training/test_golden.py` writes golden.json
again.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from layer_kinds import set_changing
from running import Tiny

from mbn import network_layers
from mbn.training.iteration import Update
from mbn.training.schedule import renorm_values, value_at

PATH = Path(__file__).with_name("golden.json")
METHODS = {
    **{f"bn forwards={f}": (network_layers.bn, {"forwards": f}) for f in (1, 2)},
    **{f"brn forwards={f}": (network_layers.brn, {"forwards": f, "momentum": 0.1}) for f in (1, 2)},
    **{
        f"mbn forwards={f} gradient={g}": (network_layers.mbn, {"forwards": f, "gradient": g, "lam": 0.1, "memory": 6})
        for f in (1, 2)
        for g in ("paper", "batch")
    },
    "gn": (network_layers.gn, {"forwards": 1}),
    "normprop": (network_layers.normprop, {"forwards": 1}),
}
ITERATIONS = 20


def losses(method, perturbation=0.0):
    """The losses of 20 iterations. perturbation: a relative change of all weights."""
    draw = np.random.RandomState(0)
    make, settings = METHODS[method]
    model = Tiny(make(**settings), 10).double()
    model.dropout.p = 0.0
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.copy_(torch.from_numpy(draw.standard_normal(p.shape)) * (2 / p[0].numel()) ** 0.5)
            elif "norm" in name:  # gamma and beta away from their initial values, so that they matter
                p.add_(torch.from_numpy(0.1 * draw.standard_normal(p.shape)))
            else:
                p.copy_(torch.from_numpy(0.1 * draw.standard_normal(p.shape)))
            p.mul_(1 + perturbation)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    update = Update(model, optimizer, settings["forwards"], "eager", "fp32", torch.device("cpu"))
    update.window = update.window.double()
    # Eight batches of 48 images, again and again: something to learn.
    images = torch.from_numpy(draw.standard_normal((8, 48, 3, 32, 32)) + draw.standard_normal((8, 1, 3, 1, 1)))
    labels = torch.from_numpy(draw.randint(0, 10, (8, 48)))
    measured = []
    for t in range(ITERATIONS):
        lam = value_at([0.1, 0.5, 0.9], [0.4, 0.6], t, ITERATIONS)
        set_changing(model, lam, *renorm_values(None, t, ITERATIONS))
        update(images[t % 8], labels[t % 8])
        measured += [loss for loss, _ in update.drain()]
    return measured


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_the_committed_ones(method):
    committed = json.loads(PATH.read_text())[method]
    assert len(committed) == ITERATIONS
    assert losses(method) == pytest.approx(committed, rel=1e-6, abs=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_perturbation_does_not_grow(method):
    """Otherwise differences in the last bits on another machine would grow too."""
    assert losses(method, 1e-15) == pytest.approx(losses(method), rel=1e-9, abs=0)


def test_methods_differ():
    committed = list(json.loads(PATH.read_text()).values())
    assert len(committed) == len(METHODS)
    assert len({tuple(round(v, 6) for v in values) for values in committed}) >= len(METHODS) - 1


@pytest.mark.long("9", "Losses of 20 iterations of each method that are the committed ones within 1e-6")
def test_every_loss(figure):
    committed = json.loads(PATH.read_text())
    pairs = [pair for method in METHODS for pair in zip(losses(method), committed[method], strict=True)]
    worst = max(abs(a / b - 1) for a, b in pairs)
    figure(sum(abs(a / b - 1) <= 1e-6 for a, b in pairs), len(pairs), f"the worst differs by {worst:.1g}")


def main():
    PATH.write_text(json.dumps({method: losses(method) for method in METHODS}, indent=1) + "\n")


if __name__ == "__main__":
    main()
