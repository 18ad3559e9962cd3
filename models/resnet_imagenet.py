"""ResNet-18, 34 and 50 for ImageNet, with the parameter names, shapes and initial weights of torchvision's."""

from typing import Any

from torch import Tensor, nn

from .init import he_fan_out


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, layers: Any, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = layers.conv(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = layers.norm(channels)
        self.act1 = layers.act()
        self.conv2 = layers.conv(channels, channels, 3, padding=1, bias=False)
        self.bn2 = layers.norm(channels)
        self.downsample = downsample(layers, in_channels, channels, stride)
        self.act2 = layers.act()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.act2(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """The 3x3 convolution has the stride, as in torchvision."""

    expansion = 4

    def __init__(self, layers: Any, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = layers.conv(in_channels, channels, 1, bias=False)
        self.bn1 = layers.norm(channels)
        self.act1 = layers.act()
        self.conv2 = layers.conv(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = layers.norm(channels)
        self.act2 = layers.act()
        self.conv3 = layers.conv(channels, out_channels, 1, bias=False)
        self.bn3 = layers.norm(out_channels)
        self.downsample = downsample(layers, in_channels, out_channels, stride)
        self.act3 = layers.act()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.act2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.act3(y + (x if self.downsample is None else self.downsample(x)))


def downsample(layers: Any, in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """Option B: a 1x1 convolution where the shape changes."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        layers.conv(in_channels, out_channels, 1, stride=stride, bias=False), layers.norm(out_channels)
    )


class ResNet(nn.Module):
    def __init__(self, layers: Any, classes: int, block: type[BasicBlock | Bottleneck], blocks: tuple[int, ...]):
        super().__init__()
        self.conv1 = layers.conv(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = layers.norm(64)
        self.act1 = layers.act()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        in_channels = 64
        stages = []
        for stage, n in enumerate(blocks, 1):
            channels = 64 * 2 ** (stage - 1)
            modules = []
            for i in range(n):
                modules.append(block(layers, in_channels, channels, 2 if stage > 1 and i == 0 else 1))
                in_channels = channels * block.expansion
            stages.append(nn.Sequential(*modules))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(in_channels, classes)
        he_fan_out(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        # Not AdaptiveAvgPool2d, whose backward pass on a GPU is not deterministic.
        return self.fc(x.mean((2, 3)))


def resnet18(layers: Any, classes: int) -> ResNet:
    return ResNet(layers, classes, BasicBlock, (2, 2, 2, 2))


def resnet34(layers: Any, classes: int) -> ResNet:
    return ResNet(layers, classes, BasicBlock, (3, 4, 6, 3))


def resnet50(layers: Any, classes: int) -> ResNet:
    return ResNet(layers, classes, Bottleneck, (3, 4, 6, 3))
