"""Normalisation propagation: a convolution with filters of unit norm, and a ReLU of mean 0 and variance 1."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Arpit et al. start gamma at 1/1.21, from a bound on the singular values of the layer's Jacobian. This is the constant
# that they print; 1/sqrt(1 - 1/pi) = 1.2112, which is near it, is not used.
JACOBIAN = 1.21

# The mean and standard deviation of relu(u) for u ~ N(0, 1): E = 1/sqrt(2 pi), Var = 1/2 - 1/(2 pi).
RELU_MEAN = math.sqrt(1 / (2 * math.pi))
RELU_STD = math.sqrt((1 - 1 / math.pi) / 2)


class UnitConv2d(nn.Conv2d):
    r"""A convolution whose filters are divided by their norms: u_i = gamma_i * (W_i * x) / ||W_i||_2 + beta_i.

    The norm of row i of W is taken over (C_in, kh, kw), and gradients flow through it. For x ~ N(0, 1)
    and gamma = 1, u has variance 1 whatever W is. gamma (`gain`) starts at 1/1.21, beta (`shift`) at 0, both (C_out,).
    Training and evaluation are the same: there are no batch statistics. `project_` scales the rows to norm 1.

    Arguments and shapes: those of `nn.Conv2d`, from dilation on by name. `bias` must be False: beta is the bias.

    Errors: ValueError for bias=True.

    Source: Arpit et al., "Normalization Propagation", ICML 2016.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        *,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if bias:
            raise ValueError("a unit-norm convolution has its own shift: bias must be False")
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False, padding_mode), **like
        )
        self.gain = nn.Parameter(torch.full((out_channels,), 1 / JACOBIAN, **like))
        self.shift = nn.Parameter(torch.zeros(out_channels, **like))

    def reset_parameters(self) -> None:
        """Back to the start: weight as nn.Conv2d's, gamma 1/1.21, beta 0."""
        super().reset_parameters()
        if "gain" in self._parameters:  # not in nn.Conv2d's __init__
            nn.init.constant_(self.gain, 1 / JACOBIAN)
            nn.init.zeros_(self.shift)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.unit_weight(), self.shift)

    def unit_weight(self) -> Tensor:
        """gamma_i * W_i / ||W_i||, differentiable in both."""
        return self.weight * (self.gain / self._norms()).view(-1, 1, 1, 1)

    @torch.no_grad()
    def project_(self) -> None:
        """Scale each row of W to norm 1, in place; the layer's output stays the same."""
        self.weight.div_(self._norms().view(-1, 1, 1, 1))

    def _norms(self) -> Tensor:
        """1 for a filter that is zero: it stays so, and its output is beta."""
        norms = self.weight.flatten(1).norm(dim=1)
        return torch.where(norms == 0, 1, norms)


class StandardReLU(nn.Module):
    r"""o = (relu(u) - sqrt(1 / (2 pi))) / sqrt((1 - 1/pi) / 2): mean 0 and variance 1 for u ~ N(0, 1).

    Any shape. Source: Arpit et al., "Normalization Propagation", ICML 2016.
    """

    def forward(self, u: Tensor) -> Tensor:
        return (F.relu(u) - RELU_MEAN) / RELU_STD


def unit_layers(module: nn.Module) -> list[UnitConv2d]:
    """All unit-norm convolutions inside module."""
    return [layer for layer in module.modules() if isinstance(layer, UnitConv2d)]


def project_unit_rows(module: nn.Module) -> None:
    """Scale each row of every UnitConv2d inside module to norm 1, in place: ||W_i||_2 = 1. Outputs stay the same.

    Call it before the first step of the optimiser and after each: how far a step turns a row depends on its norm. This
    is our decision, the source leaves it open. Does nothing where module has no such layer.
    """
    for layer in unit_layers(module):
        layer.project_()
