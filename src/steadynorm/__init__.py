"""Batch normalization that stays steady: at any batch size, in training and in inference.

Importing this package loads no framework; the names below load what they need on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from steadynorm._extras import needed_by

if TYPE_CHECKING:
    from steadynorm import kernels
    from steadynorm.doctor import diagnose, monitor
    from steadynorm.models.bias import drop_redundant_bias
    from steadynorm.models.calibrate import adapt, calibrate
    from steadynorm.models.convert import convert
    from steadynorm.models.fold import fold
    from steadynorm.models.freeze import freeze, unfreeze
    from steadynorm.models.groups import parameter_groups
    from steadynorm.nn import (
        BatchNorm1d,
        BatchNorm2d,
        BatchNorm3d,
        BatchNormLSTM,
        BatchNormLSTMCell,
        LazyBatchNorm1d,
        LazyBatchNorm2d,
        LazyBatchNorm3d,
        functional,
    )
    from steadynorm.statistics import Batch, Frozen, Ghost, Renorm, Running, Steady

__version__ = "0.1.0"

_HOMES = {
    "steadynorm.doctor": ("diagnose", "monitor"),
    "steadynorm.nn": (
        "BatchNorm1d",
        "BatchNorm2d",
        "BatchNorm3d",
        "BatchNormLSTM",
        "BatchNormLSTMCell",
        "LazyBatchNorm1d",
        "LazyBatchNorm2d",
        "LazyBatchNorm3d",
        "functional",
    ),
    "steadynorm.statistics": ("Batch", "Frozen", "Ghost", "Renorm", "Running", "Steady"),
    "steadynorm.models.bias": ("drop_redundant_bias",),
    "steadynorm.models.calibrate": ("adapt", "calibrate"),
    "steadynorm.models.convert": ("convert",),
    "steadynorm.models.fold": ("fold",),
    "steadynorm.models.freeze": ("freeze", "unfreeze"),
    "steadynorm.models.groups": ("parameter_groups",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Batch",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormLSTM",
    "BatchNormLSTMCell",
    "Frozen",
    "Ghost",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Renorm",
    "Running",
    "Steady",
    "adapt",
    "calibrate",
    "convert",
    "diagnose",
    "drop_redundant_bias",
    "fold",
    "freeze",
    "functional",
    "kernels",
    "monitor",
    "parameter_groups",
    "unfreeze",
]


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return import_module("steadynorm.kernels")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'steadynorm' has no attribute {name!r}")
    with needed_by(f"steadynorm.{name}"):
        value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF, "kernels"})
