"""Network in network (Lin et al. 2014) for CIFAR, with normalisation and activation after every convolution."""

from typing import Any

from torch import Tensor, nn

from .init import he_fan_out


class NIN(nn.Module):
    """Three blocks of a spatial and two 1x1 convolutions; the last gives the classes, averaged over 8x8 pixels."""

    def __init__(self, layers: Any, classes: int, dropout: float = 0.5) -> None:
        super().__init__()

        def conv(in_channels: int, out_channels: int, size: int) -> list[nn.Module]:
            convolution = layers.conv(in_channels, out_channels, size, padding=size // 2, bias=False)
            return [convolution, layers.norm(out_channels), layers.act()]

        self.features = nn.Sequential(
            *conv(3, 192, 5),
            *conv(192, 160, 1),
            *conv(160, 96, 1),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            nn.Dropout(dropout),
            *conv(96, 192, 5),
            *conv(192, 192, 1),
            *conv(192, 192, 1),
            nn.AvgPool2d(3, stride=2, ceil_mode=True),
            nn.Dropout(dropout),
            *conv(192, 192, 3),
            *conv(192, 192, 1),
            *conv(192, classes, 1),
            nn.AvgPool2d(8),
        )
        he_fan_out(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).flatten(1)
