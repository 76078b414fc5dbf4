"""Basic calls on CPU, prepared: where the general way by stages costs too much.

The kernels here also do what a training step keeps per channel: running statistics, the factors of
the backward, the parameters' gradients. That saves some forty small tensor operations a step, which
take 100 µs when the caches hold their code, and three times that after a kernel has streamed
through 30 MB: as much as normalizing 10 MB. All that follows from shape, layout and type is
prepared once, and a call fills in addresses.

Second derivatives, and the backward of an input that needs no gradient, are done by the stages.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from steadynorm.kernels.reference.closed_form import Planned
from steadynorm.kernels.reference.differentiable import as_saved
from steadynorm.kernels.spec import (
    Call,
    Gradients,
    Keep,
    Packed,
    Saved,
    coefficients_of,
)
from steadynorm.statistics import Moments, Normalizer
from steadynorm.statistics.moments import two_sum

from . import loops, slabs
from .arguments import BACKWARD, FORWARD, ROWS, Arguments, writer
from .kernels import backward_kernel, forward_kernel, gradient_options
from .readable import PLAIN, readable
from .results import LARGE, large_like, prototype
from .stages import unsupported

_fill_forward, _FORWARD = writer("eps", "momentum", "share", *FORWARD)
_fill_backward, _BACKWARD = writer("rate", "eps", "momentum", "share", *FORWARD, *BACKWARD)


class CpuPlan:
    """Calls of `Batch`, of `Steady` and in inference for one shape, layout, type and activation.

    A forward leaves one tensor for its backward, in int16: the rows that arguments.py names, in the
    type that statistics have, then the sign bits where they serve.
    """

    def __init__(
        self,
        sizes: torch.Size,
        strides: tuple[int, ...],
        dtype: torch.dtype,
        activation: str | None,
        residual: bool,
    ) -> None:
        shape = slabs.shape_of(torch.empty_strided(sizes, strides, dtype=dtype, device="meta"))
        assert shape is not None  # `unsupported` has looked
        self.sizes, self.strides = sizes, strides
        slab = slabs.Slab(shape, dtype.itemsize)
        slab.arguments.count = slab.count
        self.real = torch.float64 if dtype == torch.float64 else torch.float32
        self.dtype, self.channels, self.count = dtype, shape.channels, slab.count
        self.activation = activation
        self.kept = Keep.needed(activation, residual=residual, compiled=True)
        large = self.count * self.channels * dtype.itemsize >= LARGE
        self.empty_like = large_like if large else torch.empty_like
        self.threads = slab.cut.threads
        self.partial_sums = None if slab.cut.visit else prototype(torch.float64, slab.sums)
        self.per_channel = prototype(self.real, self.channels)
        self.scale_and_shift = prototype(self.real, 2, self.channels)
        self.step = shape.channels * self.real.itemsize
        self.rows_bytes = len(ROWS) * self.step
        self.signs = slab.words if self.kept is Keep.SIGNS else 0
        self.rows = prototype(torch.int16, self.rows_bytes // 2 + self.signs)
        self.options = gradient_options(self.kept, residual=residual)
        self._backward: list[Any] = [None, None]
        self._forward = forward_kernel(dtype, activation, add=residual)
        mapping = slabs.Slab(shape, dtype.itemsize, only_maps=True)
        training = loops.DECIDE | loops.RECORD
        self._training = _template(slab, *slab.cut.forward(training))
        self._blending = _template(slab, *slab.cut.forward(training | loops.BLEND))
        self._running = _template(slab, loops.RUNNING | loops.DECIDE | loops.RECORD, loops.MAP)
        self._gradients = _template(slab, *slab.cut.backward())
        self._gradient_of_x = _template(slab, loops.MAP)
        self._inference = _template(mapping, loops.DECIDE, loops.MAP)

    def fits(self, call: Call) -> bool:
        """Whether parameters and running statistics are as these kernels read and write them."""
        real = self.real
        for t in (call.weight, call.bias, call.running_mean, call.running_var):
            if t is not None and not (  # `readable` written out: calls cost 0.4 µs
                t.dtype is real and t.is_contiguous() and t.is_cpu
                and t.__class__ in PLAIN and not t.is_neg()
                and t.data_ptr()  # a zero tensor has none, and to a kernel 0 means no tensor
            ):  # fmt: skip
                return False
        batches, memory = call.num_batches_tracked, call.memory
        if batches is not None and not (batches.dtype is torch.int64 and readable(batches)):
            return False
        return memory is None or (
            memory.state.dtype is real and memory.state.is_contiguous() and readable(memory.state)
        )

    def forward(self, call: Call) -> tuple[Tensor, Packed]:
        """Normalize as the policy says and move the running statistics; or by these, unmoved."""
        if call.by_running and not call.gradient:
            return self._infer(call), ((), None)
        template, share, weight = self._training, 1.0, call.momentum
        if call.blends:
            template, (share, weight) = self._blending, call.weights(self.count)
        elif call.by_running:
            template, share, weight = self._running, 0.0, 0.0
        x, residual = call.x, call.residual
        if residual is not None:
            residual = slabs.laid_out_as(residual, x, "residual")
        y = self.empty_like(x)
        rows = torch.empty_like(self.rows)
        partial_sums = None if self.partial_sums is None else torch.empty_like(self.partial_sums)
        a = Arguments.from_buffer_copy(template)
        first = rows.data_ptr()
        end = first + self.rows_bytes
        gamma, beta = call.weight, call.bias
        mean, var, batches = call.running_mean, call.running_var, call.num_batches_tracked
        _fill_forward(  # `_address` written out: both ways its calls cost 1 µs
            a, _FORWARD, call.eps, weight, share, x.data_ptr(),
            0 if residual is None else residual.data_ptr(), y.data_ptr(),
            end if self.signs else 0,
            0 if partial_sums is None else partial_sums.data_ptr(),
            0 if gamma is None else gamma.data_ptr(), 0 if beta is None else beta.data_ptr(),
            0 if mean is None else mean.data_ptr(), 0 if var is None else var.data_ptr(),
            0 if batches is None else batches.data_ptr(), *range(first, end, self.step),
        )  # fmt: skip
        if mean is not None and var is not None and not call.by_running:
            written = (mean, var) if batches is None else (mean, var, batches)
            torch.autograd.graph.increment_version(written)
        self._forward(a, self.threads)
        tensors = (
            x, rows, y if self.kept is Keep.OUTPUT else None,
            residual if self.kept is Keep.REBUILT else None, gamma, beta,
        )  # fmt: skip
        return y, (tensors, Planned(self, call.eps, call.memory, share))

    def _infer(self, call: Call) -> Tensor:
        """Normalize by the running statistics, where no backward can follow."""
        x, residual = call.x, slabs.residual_laid_out_as(call.residual, call.x)
        y = self.empty_like(x)
        rows = torch.empty_like(self.scale_and_shift)
        a = Arguments.from_buffer_copy(self._inference)
        a.x, a.y, a.eps = x.data_ptr(), y.data_ptr(), call.eps
        a.residual, a.weight, a.bias = map(_address, (residual, call.weight, call.bias))
        a.center, a.var = _address(call.running_mean), _address(call.running_var)
        a.scale = rows.data_ptr()
        a.shift = a.scale + self.step
        self._forward(a, self.threads)
        return y

    def backward(self, tensors: Any, left: Planned, grad: Tensor, needs: Any) -> Gradients | None:
        """The gradients, that of x included; all per-channel work inside the kernel."""
        if not needs[0]:
            return None
        x, rows, y, residual = self._as_saved(*tensors[:4])
        grad = slabs.laid_out_as(grad, x, "grad")
        want = needs[3] and self.activation is not None
        dx = self.empty_like(x)
        dresidual = self.empty_like(x) if want else None
        template, dweight, dbias = self._gradient_of_x, None, None
        if left.share or needs[1] or needs[2]:
            template = self._gradients
            dweight = torch.empty_like(self.per_channel)
            dbias = torch.empty_like(self.per_channel)
        partial_sums = None if self.partial_sums is None else torch.empty_like(self.partial_sums)
        a = Arguments.from_buffer_copy(template)
        first = rows.data_ptr()
        end = first + self.rows_bytes
        memory, rate, before, after = left.memory, 0.0, None, None
        if memory is not None:
            rate = memory.rate
            before, after = memory.in_place()
        _fill_backward(
            a, _BACKWARD, rate, 0.0, 0.0, left.share, x.data_ptr(),
            0 if residual is None else residual.data_ptr(), 0 if y is None else y.data_ptr(), end,
            0 if partial_sums is None else partial_sums.data_ptr(), 0, 0, 0, 0, 0,
            *range(first, end, self.step), grad.data_ptr(), dx.data_ptr(),
            0 if dresidual is None else dresidual.data_ptr(),
            0 if dbias is None else dbias.data_ptr(), 0 if dweight is None else dweight.data_ptr(),
            0 if before is None else before.data_ptr(), 0 if after is None else after.data_ptr(),
        )  # fmt: skip
        if not left.share:  # the factor is 0: it serves as slope and constant, unmultiplied
            a.slope = a.constant = a.constant_factor
            a.constant_factor = 0
        kernel = self._backward[want] or self._load(want=want)
        kernel(a, self.threads)
        return (
            dx,
            dweight if needs[1] else None,
            dbias if needs[2] else None,
            dresidual if want else (grad if needs[3] else None),
        )

    def _as_saved(
        self, x: Tensor, rows: Tensor, y: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The forward's tensors in the layout that the kernels read."""
        strides = self.strides
        if not (x.is_cpu and rows.is_cpu and x.dtype is self.dtype):
            raise RuntimeError(
                f"hooks on saved tensors must give back what they took, {self.dtype} on cpu; "
                f"got {x.dtype} on {x.device}."
            )
        return (
            as_saved(x, strides),
            as_saved(rows, (1,)),
            y if y is None else as_saved(y, strides),
            residual if residual is None else as_saved(residual, strides),
        )

    def _load(self, *, want: bool) -> Any:
        """The kernel of the backward, at its first call: inference never compiles it."""
        kernel = backward_kernel(self.dtype, self.activation, want=want, **self.options)
        self._backward[want] = kernel
        return kernel

    def unpack(self, tensors: Any, left: Planned) -> Saved:
        """What a forward left, as the stages leave it."""
        x, rows, y, residual = self._as_saved(*tensors[:4])
        weight, bias = tensors[4:]
        words = self.rows_bytes // 2
        named = dict(zip(ROWS, rows[:words].view(self.real).view(len(ROWS), -1), strict=True))
        center, gap = named["center"], named["mean_gap"]
        normalizer = Normalizer(center, named["center_low"], named["var"], 1, 0, left.share)
        batch = None
        if left.share:
            mean, low = two_sum(center, gap)
            batch = Moments(self.count, mean, named["batch_var"], low)
        known = coefficients_of(normalizer, x, weight, bias, left.eps)
        signs = rows[words:] if self.signs else None
        return Saved(
            x, weight, bias, residual, None, y, signs, batch, normalizer, known, left.eps,
            self.activation, None, None, self.dtype, left.memory,
        )  # fmt: skip


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _template(slab: slabs.Slab, *passes: int) -> bytes:
    """Arguments of which a call has to fill in the addresses only."""
    slab.arguments.passes = slabs.padded(passes)
    return bytes(slab.arguments)


@lru_cache(maxsize=4096)
def prepared(
    sizes: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    residual: torch.dtype | None,
    activation: str | None,
    threads: int,
) -> CpuPlan | str:
    """The plan for such inputs, built once; or why the kernels do not take them."""
    why = unsupported(sizes, strides, dtype, residual)
    if why is not None:
        return why
    return CpuPlan(sizes, strides, dtype, activation, residual is not None)
