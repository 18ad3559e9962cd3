"""Initial weights."""

from torch import nn


def he_fan_out(module: nn.Module) -> None:
    """He et al. 2015, fan-out: every convolution's and linear map's weights from N(0, 2 / fan_out), biases 0."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
