"""A small network and the plain loop with which a client's loop is compared."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mbn import convert, second_forward
from mbn.norm.base import norm_layers

# Settings with which what a layer remembers matters from the second iteration on.
KINDS = {
    "bn": {"norm": "bn"},
    "mbn": {"norm": "mbn", "memory": 3, "lam": 0.7},
    "mbn forwards=1": {"norm": "mbn", "memory": 3, "lam": 0.7, "forwards": 1},
    "brn": {"norm": "brn", "momentum": 0.3, "r_max": 1.5, "d_max": 1.0},
}


def network(kind="mbn"):
    """From (N, 3, 7, 7) to (N, 4), with the same weights at each call. kind: of KINDS, or None for torch's layers."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(100, 6, bias=False),
            nn.BatchNorm1d(6),
            nn.ReLU(),
            nn.Linear(6, 4),
        )
    return convert(net, **KINDS[kind]) if kind else net


def loader(n=4, dtype=torch.float32):
    """24 images whose mean and scale move, and their classes, in batches of n; the same at each call."""
    random = torch.Generator().manual_seed(7)
    moving = torch.arange(24).view(-1, 1, 1, 1) / 4
    images = torch.randn(24, 3, 7, 7, generator=random) * (1 + 0.2 * moving) + 0.3 * moving
    return DataLoader(TensorDataset(images.to(dtype), torch.randint(4, (24,), generator=random)), batch_size=n)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(model, data=None, optimizer=None):
    """The loop of the README."""
    optimizer = optimizer or sgd(model)
    model.train()
    for images, labels in data or loader():
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if remembers_in_second(model):
            second_forward(model, images)
    return model


def train_accumulating(model):
    """The same with the gradients of two batches added up."""
    optimizer = sgd(model)
    for i, (images, labels) in enumerate(loader()):
        (F.cross_entropy(model(images), labels) / 2).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
            second_forward(model, images)
    return model


def remembers_in_second(model):
    return any(layer.forwards == 2 for layer in norm_layers(model))


def differences(a, b):
    """The largest difference of each state, and 0 where two networks are the same to the bit."""
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    return max(0.0 if torch.equal(a[k], b[k]) else float((a[k].double() - b[k].double()).abs().max()) for k in a)
