"""The plain call on CPU as an autograd node of its own: where the general one costs too much.

Policy `Batch` in training and the running statistics in inference, without mask and replicas. The
same kernels as in `cpu.py`, which here also do what the layer keeps per channel: running
statistics, the factors of the backward, the parameters' gradients. Some forty small tensor
operations a step drop out. They take 100 µs when the caches hold their code, and three times that
after a kernel has streamed through 30 MB: as much as normalizing 10 MB. For the same reason all
that follows from shape, layout and type is prepared once, and a call fills in addresses.

What is asked rarely (second derivatives, an input that needs no gradient, gradients in inference)
is the general node's.
"""

from __future__ import annotations

import struct
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steadynorm.kernels import operators
from steadynorm.kernels.cpu import loops as at
from steadynorm.kernels.cpu import slabs as cpu_slabs
from steadynorm.kernels.cpu import stages as cpu
from steadynorm.kernels.cpu.allocator import empty_like
from steadynorm.kernels.cpu.kernels import (
    SCALARS,
    backward_kernel,
    forward_kernel,
    gradient_options,
)
from steadynorm.kernels.cpu.runtime import Arguments
from steadynorm.statistics import Moments, Normalizer, coefficients

# Rows of what a training step leaves for its backward, (KEPT, C); the last three are the backward's
# own. The kernels' arguments have them in this order, and all that a call fills in is adjacent.
MEAN, LOW, VAR, SCALE, SHIFT, RHO, SLOPE_FACTOR, CONSTANT_FACTOR, MOVED, SLOPE, CONSTANT, KEPT = (
    range(12)
)
_fill = struct.Struct(f"=10q2d{KEPT}q7q").pack_into
_FROM = 8 * at.BATCHES


class Prepared:
    """The plain calls with inputs of one shape, layout and type, and one activation.

    A training step leaves one tensor for its backward, in int16: the rows named above in the type
    that is computed in, then the signs of the output where they serve instead of it.
    """

    def __init__(
        self, shape: cpu_slabs.Shape, dtype: torch.dtype, activation: str | None, adds: bool
    ) -> None:
        slab = cpu_slabs.Slab(shape, dtype.itemsize)
        slab.numbers((at.COUNT,), (slab.count,))
        mapping = cpu_slabs.Slab(shape, dtype.itemsize, only_maps=True)
        self.real = torch.float64 if dtype == torch.float64 else torch.float32
        self.dtype, self.channels, self.activation = dtype, shape.channels, activation
        self.step = shape.channels * self.real.itemsize
        self.threads = slab.plan.threads
        self.sums = 0 if slab.plan.visit else slab.sums
        how = gradient_options(activation, adds=adds)
        self.signed, self.needs_residual = how["signed"], how["add"]
        self.needs_output = not (activation is None or how["rebuilt"] or self.signed)
        self.rows = KEPT * self.step // 2
        self.kept = self.rows + (slab.words if self.signed else 0)
        self._backward = tuple(
            partial(backward_kernel, dtype, activation, want=wants, **how)
            for wants in (False, True)
        )
        self._forward = forward_kernel(dtype, activation, add=adds)
        self._arguments = (
            _template(slab, *slab.plan.forward(at.SETTLE | at.RECORD)),
            _template(slab, *slab.plan.backward()),
            _template(mapping, at.SETTLE, at.MAP),
        )

    def takes(self, *per_channel: Tensor | None) -> bool:
        """Whether parameters and running statistics are as these kernels read and write them."""
        for t in per_channel:
            if t is not None and not (
                t.dtype is self.real
                and t.numel() == self.channels
                and t.is_contiguous()
                and t.is_cpu
            ):
                return False
        return True

    def train(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        residual: Tensor | None,
        activation: str | None,
        batches: Tensor | None,
    ) -> Tensor:
        """A plain training call; moves the statistics. (The activation is the prepared one.)"""
        if batches is not None and not (batches.dtype is torch.int64 and batches.is_cpu):
            batches.add_(1)
            batches = None
        buffers = (running_mean, running_var, batches, momentum, eps)
        if operators.needs_gradient(x, weight, bias, residual):
            y: Tensor = _apply(  # type: ignore[no-untyped-call]
                x, weight, bias, residual, self, buffers
            )
            return y
        return self.normalize(x, weight, bias, residual, *buffers)[0]

    def infer(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        residual: Tensor | None,
        activation: str | None,
    ) -> Tensor:
        """Inference; nothing moves."""
        around = (running_mean, running_var, eps, residual)
        if operators.needs_gradient(x, weight, bias, residual):
            return operators.normalize_by_running(x, weight, bias, *around, self.activation)
        return self.normalize_by_running(x, weight, bias, *around)

    def normalize(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        batches: Tensor | None,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """Normalize by the batch, move the buffers; returns y and what a backward needs."""
        cpu.calls["train"] += 1
        residual = cpu_slabs.residual_alike(residual, x)
        y = empty_like(x)
        kept = torch.empty(self.kept, dtype=torch.int16)
        sums = torch.empty(self.sums, dtype=torch.float64) if self.sums else None
        arguments = Arguments.from_buffer_copy(self._arguments[0])
        first = kept.data_ptr()
        end = first + KEPT * self.step
        _fill(
            arguments, _FROM, _at(batches), x.data_ptr(), _at(residual), y.data_ptr(),
            end if self.signed else 0, _at(sums), _at(weight), _at(bias), _at(running_mean),
            _at(running_var), eps, momentum, *range(first, end, self.step), 0, 0, 0, 0, 0, 0, 0,
        )  # fmt: skip
        self._forward(arguments, self.threads)
        return y, kept

    def gradients(
        self,
        grad: Tensor,
        x: Tensor,
        kept: Tensor,
        y: Tensor | None,
        residual: Tensor | None,
        want_residual: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """dx, dresidual, dweight, dbias."""
        cpu.calls["train_grad"] += 1
        residual = cpu_slabs.residual_alike(residual, x)
        grad = cpu_slabs.alike(grad, x, "grad")
        wants = want_residual and self.activation is not None
        dx = empty_like(x)
        dresidual = empty_like(x) if wants else None
        dweight = torch.empty(self.channels, dtype=self.real)
        dbias = torch.empty(self.channels, dtype=self.real)
        sums = torch.empty(self.sums, dtype=torch.float64) if self.sums else None
        arguments = Arguments.from_buffer_copy(self._arguments[1])
        first = kept.data_ptr()
        low, end = first + LOW * self.step, first + KEPT * self.step
        _fill(
            arguments, _FROM, 0, x.data_ptr(), _at(residual), _at(y), end, _at(sums),
            0, 0, 0, 0, 0.0, 0.0, *range(first, end, self.step), low, low, grad.data_ptr(),
            dx.data_ptr(), _at(dresidual), dbias.data_ptr(), dweight.data_ptr(),
        )  # fmt: skip
        self._backward[wants]()(arguments, self.threads)
        if want_residual and not wants:
            dresidual = grad
        return dx, dresidual, dweight, dbias

    def normalize_by_running(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        residual: Tensor | None,
    ) -> Tensor:
        """Normalize by the running statistics; nothing moves."""
        cpu.calls["infer"] += 1
        residual = cpu_slabs.residual_alike(residual, x)
        y = empty_like(x)
        between = torch.empty((2, self.channels), dtype=self.real)
        arguments = Arguments.from_buffer_copy(self._arguments[2])
        scale = between.data_ptr()
        _fill(
            arguments, _FROM, 0, x.data_ptr(), _at(residual), y.data_ptr(), 0, 0,
            _at(weight), _at(bias), 0, 0, eps, 0.0,
            running_mean.data_ptr(), 0, running_var.data_ptr(), scale, scale + self.step,
            *(0,) * (KEPT - 5 + 7),
        )  # fmt: skip
        self._forward(arguments, self.threads)
        return y


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _template(slab: cpu_slabs.Slab, *passes: int) -> bytes:
    slab.passes(*passes)
    return bytes(slab.arguments)


@lru_cache(maxsize=4096)
def prepared(
    sizes: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    activation: str | None,
    adds: bool,
    threads: int,
) -> Prepared | None:
    """The kernels and arguments for such inputs; None where the CPU kernels do not take them."""
    like = torch.empty_strided(sizes, strides, dtype=dtype, device="meta")
    shape = cpu_slabs.shape_of(like) if like.numel() and dtype in SCALARS else None
    return None if shape is None else Prepared(shape, dtype, activation, adds)


def prepare(
    x: Tensor, residual: Tensor | None, activation: str | None, *per_channel: Tensor | None
) -> Prepared | None:
    """What serves a call with these arguments; None if the general node has to."""
    if x.layout is not torch.strided or x.is_neg():
        return None
    if residual is not None and residual.dtype is not x.dtype:
        return None
    threads = torch.get_num_threads()
    found = prepared(x.shape, x.stride(), x.dtype, activation, residual is not None, threads)
    return found if found is not None and found.takes(*per_channel) else None


class _Plain(torch.autograd.Function):
    """Keeps what the general node keeps: input, output or residual or signs, per-channel rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: Prepared,
        buffers: tuple[Tensor | None, Tensor | None, Tensor | None, float, float],
    ) -> Tensor:
        y, kept = call.normalize(x, weight, bias, residual, *buffers)
        ctx.prepared, ctx.eps = call, buffers[-1]
        ctx.save_for_backward(
            x,
            kept,
            y if call.needs_output else None,
            residual if call.needs_residual else None,
            weight,
            bias,
        )
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() or not need_x:
            return _general(ctx, grad)
        x, kept, y, residual, _, _ = ctx.saved_tensors
        dx, dresidual, dweight, dbias = ctx.prepared.gradients(
            grad, x, kept, y, residual, need_residual
        )
        return (
            dx,
            dweight if need_weight else None,
            dbias if need_bias else None,
            dresidual,
            None,
            None,
        )


# Past `Function.apply`, which looks for transforms once more: the caller has made sure of them.
_apply = super(torch.autograd.Function, _Plain).apply


class _Saved(NamedTuple):
    """The general node's context, filled from the plain node's."""

    saved_tensors: tuple[Tensor | None, ...]
    needs_input_grad: tuple[bool, ...]
    settled: operators.Settled
    call: operators.Call
    residual_dtype: torch.dtype


def _general(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The general node's backward, on what this forward has kept."""
    x, kept, y, residual, weight, bias = ctx.saved_tensors
    call: Prepared = ctx.prepared
    rows = kept[: call.rows].view(call.real).view(KEPT, call.channels)
    mean, low, var = rows[MEAN], rows[LOW], rows[VAR]
    batch = Moments(x.numel() // call.channels, mean, var, low)
    normalizer = Normalizer(mean, low, var, 1, 0, 1)
    known = coefficients(normalizer, weight, bias, ctx.eps)
    signs = kept[call.rows :] if call.signed else None
    gradients: tuple[Tensor | None, ...] = operators.Normalize.backward(
        _Saved(
            (x, weight, bias, residual, None, y, signs),
            ctx.needs_input_grad,
            operators.Settled(batch, normalizer, known),
            operators.Call(ctx.eps, activation=call.activation),
            call.dtype,
        ),
        grad,
    )
    return gradients
