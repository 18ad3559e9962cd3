"""VGG-16 (Simonyan and Zisserman 2015, configuration D) with normalisation after every convolution."""

from typing import Any

import torch
from torch import Tensor, nn

from .init import he_fan_out

# Output channels of the 3x3 convolutions; "M" is a 2x2 max pool.
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def features(layers: Any, bias: bool) -> nn.Sequential:
    modules: list[nn.Module] = []
    in_channels = 3
    for channels in VGG16:
        if isinstance(channels, str):
            modules.append(nn.MaxPool2d(2))
            continue
        conv = layers.conv(in_channels, channels, 3, padding=1, bias=bias)
        modules += [conv, layers.norm(channels), layers.act()]
        in_channels = channels
    return nn.Sequential(*modules)


class VGG16CIFAR(nn.Module):
    """For 32x32 images: the convolutions leave one pixel of 512 channels, and one linear map follows. No dropout."""

    def __init__(self, layers: Any, classes: int) -> None:
        super().__init__()
        self.features = features(layers, bias=False)
        self.classifier = nn.Linear(512, classes)
        he_fan_out(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class VGG16ImageNet(nn.Module):
    """For 224x224 images, with the parameter names, shapes and initial weights of torchvision's vgg16_bn."""

    def __init__(self, layers: Any, classes: int, dropout: float = 0.5) -> None:
        super().__init__()
        # torchvision keeps the convolutions' biases although a normalisation follows.
        self.features = features(layers, bias=True)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            layers.act(),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            layers.act(),
            nn.Dropout(dropout),
            nn.Linear(4096, classes),
        )
        he_fan_out(self.features)
        for layer in self.classifier:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0, 0.01)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        if x.shape[2:] != (7, 7):  # else it changes nothing, and on a GPU its gradient would not be deterministic
            x = self.avgpool(x)
        return self.classifier(torch.flatten(x, 1))
