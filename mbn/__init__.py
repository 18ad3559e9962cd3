"""Memorized batch normalisation with double forward propagation (Guo et al., AAAI 2018) for PyTorch.

from mbn import convert, second_forward
model = convert(model)                      # every nn.BatchNorm becomes memorized
loss.backward(); optimizer.step(); optimizer.zero_grad()
second_forward(model, images)               # refreshes the memory with the updated weights
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Loaded at first use (PEP 562): the configuration, which lives beside the layers, is checked before torch is imported.
_HOME = {
    "BatchNorm1d": "batch",
    "BatchNorm2d": "batch",
    "BatchNorm3d": "batch",
    "BatchRenorm1d": "renorm",
    "BatchRenorm2d": "renorm",
    "BatchRenorm3d": "renorm",
    "BatchStatisticsNorm": "base",
    "MemorizedBatchNorm1d": "memorized",
    "MemorizedBatchNorm2d": "memorized",
    "MemorizedBatchNorm3d": "memorized",
    "StandardReLU": "normprop",
    "UnitConv2d": "normprop",
    "convert": "convert",
    "freeze": "freeze",
    "held": "second_forward",
    "norm_layers": "base",
    "project_unit_rows": "normprop",
    "second_forward": "second_forward",
    "set_lambda": "memorized",
    "set_precise_statistics": "precise_statistics",
    "set_renorm": "renorm",
    "to_batch_norm": "convert",
    "unfreeze": "freeze",
}
# Written out: type checkers do not read an expression here.
__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "BatchStatisticsNorm",
    "MemorizedBatchNorm1d",
    "MemorizedBatchNorm2d",
    "MemorizedBatchNorm3d",
    "StandardReLU",
    "UnitConv2d",
    "convert",
    "freeze",
    "held",
    "norm_layers",
    "project_unit_rows",
    "second_forward",
    "set_lambda",
    "set_precise_statistics",
    "set_renorm",
    "to_batch_norm",
    "unfreeze",
]

if TYPE_CHECKING:
    from .norm.base import BatchStatisticsNorm as BatchStatisticsNorm
    from .norm.base import norm_layers as norm_layers
    from .norm.batch import BatchNorm1d as BatchNorm1d
    from .norm.batch import BatchNorm2d as BatchNorm2d
    from .norm.batch import BatchNorm3d as BatchNorm3d
    from .norm.convert import convert as convert
    from .norm.convert import to_batch_norm as to_batch_norm
    from .norm.freeze import freeze as freeze
    from .norm.freeze import unfreeze as unfreeze
    from .norm.memorized import MemorizedBatchNorm1d as MemorizedBatchNorm1d
    from .norm.memorized import MemorizedBatchNorm2d as MemorizedBatchNorm2d
    from .norm.memorized import MemorizedBatchNorm3d as MemorizedBatchNorm3d
    from .norm.memorized import set_lambda as set_lambda
    from .norm.normprop import StandardReLU as StandardReLU
    from .norm.normprop import UnitConv2d as UnitConv2d
    from .norm.normprop import project_unit_rows as project_unit_rows
    from .norm.precise_statistics import set_precise_statistics as set_precise_statistics
    from .norm.renorm import BatchRenorm1d as BatchRenorm1d
    from .norm.renorm import BatchRenorm2d as BatchRenorm2d
    from .norm.renorm import BatchRenorm3d as BatchRenorm3d
    from .norm.renorm import set_renorm as set_renorm
    from .norm.second_forward import held as held
    from .norm.second_forward import second_forward as second_forward
else:  # else every misspelt name would have a type

    def __getattr__(name: str) -> object:
        if name in _HOME:
            value = getattr(importlib.import_module(f".norm.{_HOME[name]}", __name__), name)
            globals()[name] = value
            return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
