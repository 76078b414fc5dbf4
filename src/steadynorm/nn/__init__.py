"""Batch normalization for PyTorch.

All other names are those of `torch.nn`, so that a network written with `import torch.nn as nn`
changes in that line alone: `import steadynorm.nn as nn`. `from steadynorm.nn import *` gives the
names that are ours, and so can follow `from torch.nn import *`.
"""

from typing import Any

from steadynorm._extras import needed_by

with needed_by("steadynorm.nn"):
    import torch.nn

from steadynorm.nn import functional
from steadynorm.nn.batchnorm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
)
from steadynorm.nn.eager_quantization import register
from steadynorm.nn.recurrent import BatchNormLSTM, BatchNormLSTMCell

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormLSTM",
    "BatchNormLSTMCell",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "functional",
]

register(
    {
        torch.nn.BatchNorm1d: BatchNorm1d,
        torch.nn.BatchNorm2d: BatchNorm2d,
        torch.nn.BatchNorm3d: BatchNorm3d,
    }
)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module 'steadynorm.nn' has no attribute {name!r}")
    return getattr(torch.nn, name)


def __dir__() -> list[str]:
    """Ours and torch's, for completion; `from steadynorm.nn import *` gives ours alone."""
    return sorted({*globals(), *dir(torch.nn)})
