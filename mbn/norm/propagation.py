"""Normalisation propagation: convolutions and linear maps with unit-norm rows, and a ReLU of mean 0 and variance 1."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The factor by which Arpit et al. start gamma, from a bound on the singular values of the layer's Jacobian. It is their
# printed constant; sqrt(1 - 1/pi), which it is near, is not used.
JACOBIAN = 1.21

# The mean and standard deviation of relu(u) for u ~ N(0, 1): E = 1/sqrt(2 pi), Var = 1/2 - 1/(2 pi).
RELU_MEAN = math.sqrt(1 / (2 * math.pi))
RELU_STD = math.sqrt((1 - 1 / math.pi) / 2)


class _Unit(nn.Module):
    r"""A linear map whose rows are divided by their norms: u_i = gamma_i * (W_i * x) / ||W_i||_2 + beta_i.

    The norm of row i runs over all of its input, (C_in, kh, kw) for a convolution, and gradients flow through it. For
    x ~ N(0, 1) and gamma = 1, u has variance 1 whatever W. gamma (`gain`) starts at 1/1.21, beta (`shift`) at 0, both
    (C_out,). No batch statistics: training and evaluation are the same. `project_` puts the rows back to norm 1.

    Arguments and shapes are those of the torch layer it derives from. `bias` must stay False: beta is the bias.

    Source: Arpit et al., "Normalization Propagation", ICML 2016.
    """

    weight: Tensor

    def _init_unit(self, rows: int) -> None:
        self.gain = nn.Parameter(torch.full((rows,), 1 / JACOBIAN))
        self.shift = nn.Parameter(torch.zeros(rows))

    def unit_weight(self) -> Tensor:
        """gamma_i * W_i / ||W_i||, differentiable in both."""
        norm = self.weight.flatten(1).norm(dim=1)
        return self.weight * (self.gain / norm).view(-1, *(1,) * (self.weight.dim() - 1))

    @torch.no_grad()
    def project_(self) -> None:
        """Scale each row of W to norm 1, in place; the layer's output stays what it is."""
        norm = self.weight.flatten(1).norm(dim=1)
        self.weight.div_(norm.view(-1, *(1,) * (self.weight.dim() - 1)))


def _refuse_bias(bias: bool) -> None:
    if bias:
        raise ValueError("a unit-norm layer has its own shift: bias must be False")


class UnitConv1d(_Unit, nn.Conv1d):
    __doc__ = _Unit.__doc__ or ""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=False, **kwargs):
        _refuse_bias(bias)
        nn.Conv1d.__init__(self, in_channels, out_channels, kernel_size, stride, padding, bias=False, **kwargs)
        self._init_unit(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.unit_weight(), self.shift)


class UnitConv2d(_Unit, nn.Conv2d):
    __doc__ = _Unit.__doc__ or ""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=False, **kwargs):
        _refuse_bias(bias)
        nn.Conv2d.__init__(self, in_channels, out_channels, kernel_size, stride, padding, bias=False, **kwargs)
        self._init_unit(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.unit_weight(), self.shift)


class UnitConv3d(_Unit, nn.Conv3d):
    __doc__ = _Unit.__doc__ or ""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=False, **kwargs):
        _refuse_bias(bias)
        nn.Conv3d.__init__(self, in_channels, out_channels, kernel_size, stride, padding, bias=False, **kwargs)
        self._init_unit(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.unit_weight(), self.shift)


class StandardReLU(nn.Module):
    r"""o = (relu(u) - sqrt(1 / (2 pi))) / sqrt((1 - 1/pi) / 2): mean 0 and variance 1 for u ~ N(0, 1).

    Any shape. Source: Arpit et al., "Normalization Propagation", ICML 2016.
    """

    def forward(self, u: Tensor) -> Tensor:
        return (F.relu(u) - RELU_MEAN) / RELU_STD


def unit_layers(module: nn.Module) -> list[_Unit]:
    """All unit-norm layers inside module."""
    return [layer for layer in module.modules() if isinstance(layer, _Unit)]


def project_unit_rows(module: nn.Module) -> None:
    """Scale each row of every unit-norm layer inside module to norm 1: to be called after each optimiser step."""
    for layer in unit_layers(module):
        layer.project_()
