"""PyTorch's own batch normalization operator, about a pivot on CPU: cheapest where overhead rules.

On CPU that operator computes `x·a + b`, which at mean 1e6 and standard deviation 1 is off by 2.6.
Subtracting one value of each channel first makes it exact to float32 rounding: the difference of
two floats within a factor of two of one another is exact. A Python autograd node would cost 12 µs a
step more (measured at input (2, 16, 4, 4)).

Half precision on CPU is widened first: the operator would sum its gradients in half precision over
some layouts (off by 0.03 at 16 rows), and a constant channel of 1e6 came out as 14.

Accelerators go without a pivot, which would add 2 passes over x to the operator's 3. At large
means numerics are then the device's own; `numerics="exact"` keeps the call from here.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from steadynorm.kernels.reference.differentiable import refuse_third_derivatives
from steadynorm.kernels.reference.torch_arrays import finished, in_type, misread
from steadynorm.kernels.spec import HALF, Backend, Call, Packed, statistics_dtype

# Values on CPU up to which it beats a Python autograd node; see benchmarks/small_calls.py.
LIMIT = 1 << 13

# Number of axes -> the shape in which a channel array broadcasts.
CHANNEL_SHAPE = {n: (-1,) + (1,) * (n - 2) for n in range(2, 65)}

# Beside a number, which becomes a tensor in every call, adding costs 0.5 µs more.
ONE = torch.tensor(1, device="cpu")


class Aten(Backend):
    """The backend of basic calls; PyTorch differentiates it."""

    name = "aten"

    def supports(self, call: Call) -> str | None:
        """A basic call, on few values or on an accelerator, of types that the operator takes."""
        x, mean, on_cpu = call.x, call.running_mean, call.x.is_cpu
        if not call.basic:
            return "more is asked than PyTorch's operator does"
        values = x.numel()
        if on_cpu and values > LIMIT:  # most calls leave here
            return f"more than {LIMIT} values"
        if call.exact:
            return 'numerics="exact" asks for our own stages'
        if x.__class__ is not Tensor:
            return f"the input is a {x.__class__.__name__}"
        if not values:
            return "the input is empty"
        # PyTorch sums planes of contiguous (N, C, *) in float64; rows of (N, C) or channels_last
        # one by one in float32: off by 9e-7 at 64 rows and mean 1e6, 3e-6 at 256, 3e-5 at 16384.
        if on_cpu and not (
            call.by_running
            or values <= 64 * x.shape[1]
            or (x.is_contiguous() and x.stride()[1] > 1)
        ):
            return "more rows than PyTorch's operator sums precisely"
        wide = torch.float32 if x.dtype in HALF else x.dtype
        dtype = wide if call.weight is None else call.weight.dtype
        if dtype is not wide and (on_cpu or dtype is not x.dtype):
            return "types of input and parameters that its operator refuses"
        if on_cpu and torch.is_grad_enabled() and misread(x, call.weight):
            return "what its operator's backward may misread: gaps in a weight, an axis of length 1"
        if mean is not None and not mean.dtype is call.running_var.dtype in (wide, dtype):  # type: ignore[union-attr]
            return "a type of the running statistics that its operator refuses"
        return None

    def forward(self, call: Call) -> tuple[Tensor, Packed]:
        """y; a training call moves the running statistics."""
        y = _by_running(call) if call.by_running else _by_batch(call)
        plain = call.activation is None and call.residual is None and y.dtype is call.x.dtype
        return y if plain else finished(y, call, fresh=True), ((), None)


def _by_batch(call: Call) -> Tensor:
    """About the first value of each channel."""
    mean, var, momentum = call.running_mean, call.running_var, call.momentum or 0.0
    x, pivot = call.x, None
    if x.is_cpu:
        x = x.float() if x.dtype in HALF else x
        source = x.detach() if x.requires_grad else x
        pivot = source.as_strided((x.shape[1],), (x.stride()[1],))
        x = x - pivot.view(*CHANNEL_SHAPE[x.ndim])  # a tuple would cost 0.5 µs more
    if mean is not None and var is not None:
        # `.data` aliases have version counters of their own: PyTorch saves these two for backward,
        # though it ignores them there, and would refuse after any later update of the buffers.
        mean, var = mean.data, var.data
    weight, bias = call.weight, call.bias
    if weight is not None and mean is not None and weight.dtype is not mean.dtype:
        weight, bias = in_type(mean.dtype, weight, bias)  # float32: the model is in half precision
    y = torch.batch_norm(x, weight, bias, mean, var, True, momentum, call.eps, True)
    refuse_third_derivatives(y, x, weight)
    if pivot is not None and mean is not None:
        mean.data.add_(pivot, alpha=momentum)  # an alias again: PyTorch has saved `mean`
    if call.num_batches_tracked is not None:
        call.num_batches_tracked.add_(ONE)
    return y


def _by_running(call: Call) -> Tensor:
    """About the running mean."""
    x, mean, var = call.x, call.running_mean, call.running_var
    assert mean is not None
    assert var is not None
    backward = torch.is_grad_enabled()  # which reads copies: the buffers may have moved by then
    if x.is_cpu:
        x = x.float() if x.dtype in HALF else x
        x, mean = x - mean.view(*CHANNEL_SHAPE[x.ndim]), _zeros(mean.numel(), x.dtype)
        var = var.clone() if backward else var
    elif backward:
        mean, var = torch.stack((mean, var)).unbind()  # both in one launch
    weight, bias = call.weight, call.bias
    if weight is not None and weight.dtype is not mean.dtype:
        weight, bias = in_type(mean.dtype, weight, bias)  # float32: the model is in half precision
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, call.eps, True)


def is_one_operator(call: Call) -> bool:
    """Whether a call can be exported as PyTorch's operator; in training it moves the statistics."""
    moves = call.running_mean is not None and call.running_mean.dtype is statistics_dtype(call.x)
    return call.by_running or (call.basic and moves and not call.exact)


def one_operator(call: Call) -> Tensor:
    """The single operator that other runtimes fold, and switch to inference; for export."""
    training = not call.by_running
    tensors = (call.x, call.weight, call.bias, call.running_mean, call.running_var)
    x, weight, bias, mean, var = in_type(statistics_dtype(call.x), *tensors)
    if training and call.num_batches_tracked is not None:
        call.num_batches_tracked.add_(1)  # first, as torch's layers do
    momentum = call.momentum or 0.0
    y = torch.batch_norm(x, weight, bias, mean, var, training, momentum, call.eps, True)
    return finished(y, call)


@lru_cache(maxsize=256)
def _zeros(channels: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # kept ones must serve where a backward follows, too
        return torch.zeros(channels, dtype=dtype, device="cpu")


ATEN = Aten()
