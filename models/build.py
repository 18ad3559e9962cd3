"""Names to networks."""

from collections.abc import Callable
from typing import Any

from torch import nn

from . import nin, resnet_cifar, resnet_imagenet, vgg

# `model=vgg16` is two architectures, by the size of the data set's images.
CIFAR: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet_cifar.resnet20,
    "resnet56": resnet_cifar.resnet56,
    "vgg16": vgg.vgg16_cifar,
    "nin": nin.nin,
}
IMAGENET: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet_imagenet.resnet18,
    "resnet34": resnet_imagenet.resnet34,
    "resnet50": resnet_imagenet.resnet50,
    "vgg16": vgg.vgg16_imagenet,
}


def build(name: str, image_size: int, layers: Any, classes: int, **settings: Any) -> nn.Module:
    """Build the network `name` for images of image_size x image_size pixels and that many classes.

    layers: a triple (conv, norm, act) of constructors: conv(in_channels, out_channels, kernel_size, stride=, padding=,
    bias=), norm(channels), act(). No network names a convolution, a normalisation or an activation of its own.
    settings: the network's own, such as dropout for nin. Input (N, 3, H, W), output (N, classes).

    Errors: KeyError for a network that does not exist at this image size.
    """
    return (CIFAR if image_size <= 64 else IMAGENET)[name](layers, classes, **settings)
