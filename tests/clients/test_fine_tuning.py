"""Fine-tuning of trained networks at batch 4 after convert: what the memory begins with, measured."""

import copy

import pytest
import torch
import torch.nn.functional as F
from little import remembers_in_second
from sklearn.datasets import load_digits
from torch import nn

from mbn import convert, second_forward

pytestmark = pytest.mark.clients("torch")


def perceptron():
    norm = lambda: (nn.BatchNorm1d(64), nn.ReLU())  # noqa: E731
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), *norm(), nn.Linear(64, 64), *norm(), nn.Linear(64, 10))


def convolutions():
    def block(before, after, stride):
        return nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()

    blocks = (*block(1, 16, 1), *block(16, 32, 2), *block(32, 32, 2))
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@pytest.mark.parametrize("make", [perceptron, convolutions], ids=lambda make: make.__name__)
def test_the_test_error_does_not_jump_when_fine_tuning_begins(make, figure):
    """On scikit-learn's digits, batch 4; the mean of three seeds."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    when = (0, 1, 2, 5, 10, 20, 40)

    def iterate(model, count, size, rate):
        """Yield after each iteration."""
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
        for _ in range(count):
            drawn = torch.randint(1400, (size,))
            F.cross_entropy(model(images[drawn]), labels[drawn]).backward()
            optimizer.step()
            optimizer.zero_grad()
            if remembers_in_second(model):
                second_forward(model, images[drawn])
            yield

    @torch.no_grad()
    def error(model):
        wrong = copy.deepcopy(model).eval()(images[1400:]).argmax(1) != labels[1400:]
        return 100 * float(wrong.float().mean())

    errors = {"nn.BatchNorm": [], "MBN": [], "MBN, pretrained_batches=0": []}
    for seed in range(3):
        torch.manual_seed(seed)
        trained = make()
        list(iterate(trained, 300, 64, 0.01))
        for name, curves in errors.items():
            torch.manual_seed(seed)
            model = copy.deepcopy(trained)
            if name != "nn.BatchNorm":
                convert(model, pretrained_batches=0 if "0" in name else 10)
            curve = [error(model)]
            curve += [error(model) for i, _ in enumerate(iterate(model, when[-1], 4, 0.001), 1) if i in when]
            curves.append(curve)
    mean = {name: torch.tensor(curves).mean(0).tolist() for name, curves in errors.items()}
    table = "; ".join(f"{name} {' '.join(f'{x:.1f}' for x in curve)}" for name, curve in mean.items())
    figure(f"% after {', '.join(map(str, when))} iterations: {table}")
    assert mean["MBN"][1] < mean["MBN"][0] + 2 < mean["MBN, pretrained_batches=0"][1]
