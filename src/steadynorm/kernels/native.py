"""PyTorch's own batch normalization operator, about a pivot: cheapest where overhead rules.

On CPU that operator computes `x·a + b`, which at mean 1e6 and standard deviation 1 is off by 2.6.
Subtracting first one value per channel that lies in the data makes the same operator exact to
float32 rounding: the difference of two floats within a factor of two of one another is exact.
A Python autograd node would cost 12 µs a step more (measured at input (2, 16, 4, 4)).

Half precision goes without: what float32 loses inside is below what half keeps of such data.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def normalize_by_batch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """Normalize by the batch's moments about its first sample's first value; update in place."""
    pivot = None
    if x.dtype not in _HALF:
        pivot = x.detach().as_strided((x.shape[1],), (x.stride(1),))
        x = x - pivot.view(_beside(x))
    if running_mean is None or running_var is None:
        return torch.batch_norm(x, weight, bias, None, None, True, momentum, eps, True)
    # `.data` aliases have version counters of their own: PyTorch saves these two for backward,
    # though it ignores them there, and would refuse after any later update of the buffers.
    y = torch.batch_norm(
        x, weight, bias, running_mean.data, running_var.data, True, momentum, eps, True
    )
    if pivot is not None:
        running_mean.data.add_(pivot, alpha=momentum)
    return y


def normalize_by_running(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> Tensor:
    """Normalize by running statistics, which stay as they are."""
    if x.dtype not in _HALF:
        x, running_mean = x - running_mean.view(_beside(x)), torch.zeros_like(running_mean)
    else:
        running_mean = running_mean.clone()
    # Copies, since PyTorch's backward reads them and the buffers may have moved by then.
    return torch.batch_norm(
        x, weight, bias, running_mean, running_var.clone(), False, 0.0, eps, True
    )


def _beside(x: Tensor) -> tuple[int, ...]:
    """The shape in which a channel array broadcasts against x."""
    return (-1,) + (1,) * (x.ndim - 2)
