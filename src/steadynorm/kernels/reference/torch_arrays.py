"""PyTorch as the array namespace of the reference and of the activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from steadynorm.kernels import compat
from steadynorm.kernels.activations import functions, normal_cdf_by
from steadynorm.kernels.reference import Reference
from steadynorm.statistics import Moments


def _may_overwrite() -> bool:
    """Whether a fresh intermediate may be reused: nobody differentiates or transforms this call."""
    return not (
        torch.is_grad_enabled() or compat.is_transforming() or torch.compiler.is_compiling()
    )


class TorchArrays:
    """The functions that `ArrayNamespace` asks for, over tensors."""

    int32 = torch.int32
    where = staticmethod(torch.where)
    square = staticmethod(torch.square)
    reshape = staticmethod(torch.reshape)
    expand_dims = staticmethod(torch.unsqueeze)
    concatenate = staticmethod(torch.cat)
    promote_types = staticmethod(torch.promote_types)
    stop_gradient = staticmethod(torch.detach)
    sigmoid = staticmethod(torch.sigmoid)
    tanh = staticmethod(torch.tanh)
    normal_cdf = staticmethod(normal_cdf_by(torch.erf))
    exp = staticmethod(torch.exp)
    expm1 = staticmethod(torch.expm1)
    own = F  # one pass and one tensor saved, and exporters know them

    @staticmethod
    def const(number: float, like: Tensor) -> float:
        """Beside a plain number, torch's operators keep the tensor's type."""
        return number

    @staticmethod
    def statistics_dtype(x: Tensor) -> torch.dtype:
        """float64 for float64, else float32."""
        return torch.float64 if x.dtype == torch.float64 else torch.float32

    @staticmethod
    def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype)

    @staticmethod
    def isfinite(x: Tensor) -> Tensor:
        return x - x == 0  # two launches; torch.isfinite has four

    @staticmethod
    def widened(x: Tensor, dtype: torch.dtype) -> Tensor:
        """Half precision stays: beside float32, operators widen it as they read."""
        return x if x.dtype in (torch.float16, torch.bfloat16) else x.to(dtype)

    @staticmethod
    def gated(g: Tensor, y: Tensor, low: float, high: float) -> Tensor:
        """g where y lies between, or is NaN; else 0."""
        if high == math.inf:
            return torch.ops.aten.threshold_backward(g, y, low)  # type: ignore[no-any-return]
        return torch.ops.aten.hardtanh_backward(g, y, low, high)  # type: ignore[no-any-return]

    @staticmethod
    def constant(numbers: Sequence[int], like: Tensor) -> Tensor:
        return torch.tensor(numbers, dtype=like.dtype, device=like.device)

    @staticmethod
    def shape(x: Tensor) -> torch.Size:
        return x.shape

    @staticmethod
    def size(x: Tensor, axes: tuple[int, ...]) -> int:
        size = 1
        for axis in axes:
            size = size * x.shape[axis]
        return size

    @staticmethod
    def sum(x: Tensor, axes: tuple[int, ...]) -> Tensor:
        half = x.dtype in (torch.float16, torch.bfloat16)
        return x.sum(axes, keepdim=True, dtype=torch.float32 if half else None)

    @staticmethod
    def mean(x: Tensor, axes: tuple[int, ...]) -> Tensor:
        # An empty batch is summed too: replicas then meet in its backward.
        mean = x.mean if x.numel() else x.sum
        return mean(axes, keepdim=True, dtype=TorchArrays.statistics_dtype(x))

    @staticmethod
    def mean_and_variance(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        if not x.numel():
            return TorchArrays.mean(x, axes), TorchArrays.mean(x * x, axes)
        var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)  # reads x once
        return mean, var

    @staticmethod
    def add(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        return torch.add(a, b, out=out) if _may_overwrite() else a + b

    @staticmethod
    def addcmul(a: Tensor, b: Tensor, c: Tensor, *, out: Tensor) -> Tensor:
        return torch.addcmul(a, b, c, out=out if _may_overwrite() else None)


def moments_at_once(x: Tensor) -> Moments:
    """`reference.moments` in one pass over x, without a pivot: with the error of the device's sums.

    The mean's gradient flows through `mean_low`, which is 0, as in the stage.
    """
    axes = tuple(i for i in range(x.ndim) if i != 1)
    wide = x.to(TorchArrays.statistics_dtype(x))
    var, mean = torch.var_mean(wide, axes, correction=0)
    high = mean.detach()
    low = torch.where(TorchArrays.isfinite(high), mean - high, 0)  # else NaN
    return Moments(TorchArrays.size(x, axes), high, var, low)


def in_type(dtype: torch.dtype, *tensors: Tensor | None) -> Any:
    """The tensors in one type, for operators of other runtimes, which take no other.

    What has the type already stays, so that an exported graph shows no conversion.
    """
    return (t if t is None or t.dtype is dtype else t.to(dtype) for t in tensors)


def valid_samples(mask: Tensor) -> Tensor:
    """How many samples have a position that the mask leaves valid."""
    return (mask if mask.ndim == 1 else mask.flatten(1).any(1)).sum()


def misread(x: Tensor, weight: Tensor | None) -> bool:
    """Whether the backward of PyTorch's operator may read memory wrongly (torch 2.13.0, on CPU).

    Over (N, C) it reads a weight as if it had no gaps. And an axis of length 1 has no say in a
    memory format, but its stride has in PyTorch's choice of one: a gradient of shape (1, 5, 3, 4)
    and strides (5, 1, 20, 5) is channels_last and is read as contiguous.
    """
    if weight is not None and not weight.is_contiguous():
        return True
    planes = x.shape[0] * x.shape[1]
    return x.ndim > 3 and 1 in x.shape and x.numel() > planes


IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "relu6": partial(F.relu6, inplace=True),
    "leaky_relu": partial(F.leaky_relu, inplace=True),
    "elu": partial(F.elu, inplace=True),
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
}
"""Activations that autograd differentiates from the output, in their argument's memory."""

xp = TorchArrays()
reference = Reference(xp)


def finished(y: Tensor, call: Any, *, fresh: bool = False) -> Tensor:
    """`activation(y + residual)` in the type that a call returns.

    It takes y's memory if that is `fresh` and autograd does not need what stands there.
    """
    dtype, residual, activation = call.x.dtype, call.residual, call.activation
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
        fits = fresh and torch.promote_types(y.dtype, residual.dtype) is y.dtype
        y = y.add_(residual) if fits else y + residual
    if activation is not None:
        in_place = IN_PLACE.get(activation) if fresh else None
        y = (in_place or functions(activation, xp)[0])(y)
    return y if y.dtype is dtype else y.to(dtype)
