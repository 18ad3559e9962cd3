"""The residual networks for CIFAR of He et al. 2016, section 4.2."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .init import he_fan_out


class Shortcut(nn.Module):
    """Option A: every second pixel, and zero channels on both sides. No parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.before == self.after == 0:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    def __init__(self, layers: Any, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = layers.conv(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = layers.norm(out_channels)
        self.act1 = layers.act()
        self.conv2 = layers.conv(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = layers.norm(out_channels)
        self.shortcut = Shortcut(in_channels, out_channels, stride)
        self.act2 = layers.act()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.act2(y + self.shortcut(x))


class ResNet(nn.Module):
    """6n + 2 layers: a 3x3 convolution, three stages of n blocks at 16, 32 and 64 channels, mean pool, linear."""

    def __init__(self, layers: Any, classes: int, n: int) -> None:
        super().__init__()
        self.conv1 = layers.conv(3, 16, 3, padding=1, bias=False)
        self.bn1 = layers.norm(16)
        self.act1 = layers.act()
        in_channels = 16
        stages = []
        for stage, channels in enumerate((16, 32, 64), 1):
            blocks = []
            for i in range(n):
                stride = 2 if stage > 1 and i == 0 else 1
                blocks.append(BasicBlock(layers, in_channels, channels, stride))
                in_channels = channels
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(64, classes)
        he_fan_out(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        # Not AdaptiveAvgPool2d, whose backward pass on a GPU is not deterministic.
        return self.fc(x.mean((2, 3)))


def resnet20(layers: Any, classes: int) -> ResNet:
    return ResNet(layers, classes, n=3)


def resnet56(layers: Any, classes: int) -> ResNet:
    return ResNet(layers, classes, n=9)
