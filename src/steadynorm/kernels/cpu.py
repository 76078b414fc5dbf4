"""The stages on CPU, compiled by Numba: float32, float64 and bfloat16, channels first or last.

The same names and arguments as in `eager.py`, plus `normalize` and `normalize_grad`, which do both
stages of a direction while a block of channels is still in the cache. `takes` says what runs here.
"""

from __future__ import annotations

import ctypes
import math
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from steadynorm.statistics.moments import Moments

from . import cpu_loops as at
from .cpu_activations import CODES, FROM_INPUT
from .cpu_backward import backward
from .cpu_forward import forward
from .cpu_memory import WIDTH
from .cpu_runtime import Arguments, Kernel, compile_kernel

Groups = tuple[int, ...] | None

calls: Counter[str] = Counter()
"""How often each stage has run here, by name."""

_SCALARS = {
    torch.float32: (np.float32, np.float32),
    torch.float64: (np.float64, np.float64),
    torch.bfloat16: (np.uint16, np.float32),
}
_PARALLEL_FROM = 1 << 15  # elements
_VISIT_UP_TO = 4 << 20  # bytes of one tensor in a block: what a visit reads twice stays in the cache
_HUGE_PAGES_FROM = 4 << 20  # bytes


def takes(
    x: Tensor, *, residual: Tensor | None = None, mask: Tensor | None = None
) -> str | None:
    """None if these kernels can run on the input, else the reason why not."""
    if x.device.type != "cpu":
        return f"the input is on {x.device.type}"
    if x.dtype not in _SCALARS:
        return f"the input is {_name(x.dtype)}, not float32, float64 or bfloat16"
    if x.numel() == 0:
        return "the input is empty"
    if x.layout is not torch.strided or x.is_neg() or _shape(x) is None:
        return "the input is contiguous neither channels-first nor channels-last"
    if residual is not None and (residual.dtype != x.dtype or residual.shape != x.shape):
        return f"the residual is {_name(residual.dtype)}, the input {_name(x.dtype)}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Shape(NamedTuple):
    """x in memory: `samples` x `repeats` rows of `channels` x `length` values."""

    samples: int
    repeats: int
    channels: int
    length: int


def _shape(x: Tensor) -> _Shape | None:
    shape = x.shape
    positions = x.numel() // (shape[0] * shape[1])
    if x.is_contiguous():
        return _Shape(shape[0], 1, shape[1], positions)
    if x.ndim > 2 and x.movedim(1, -1).is_contiguous():
        return _Shape(shape[0], positions, shape[1], 1)
    return None


def _known_shape(x: Tensor) -> _Shape:
    shape = _shape(x)
    if shape is None:
        raise ValueError(
            "`x` must be contiguous, channels first or channels last; got shape "
            f"{tuple(x.shape)} with strides {x.stride()}. Ask `takes` first, or use the eager kernels."
        )
    return shape


def _like(t: Tensor, x: Tensor) -> Tensor:
    """t laid out in memory as x is, in its type; t itself if it already is."""
    if t.dtype == x.dtype and (
        t.stride() == x.stride() or (t.is_contiguous() and x.is_contiguous())
    ):
        return t
    return torch.empty_like(x).copy_(t)


@cache
def _advise() -> Any:
    try:
        return ctypes.CDLL(None).madvise if sys.platform == "linux" else None
    except (OSError, AttributeError):
        return None


def _fresh(x: Tensor) -> Tensor:
    """Memory for a result, in huge pages where it is large: a page fault every 2 MiB, not every 4 KiB.

    Fresh memory of 100 MB costs 7.2 copies of it to write, and 1.3 so.
    """
    y = torch.empty_like(x)
    size = y.numel() * y.element_size()
    if size >= _HUGE_PAGES_FROM and (advise := _advise()) is not None:
        start = -(-y.data_ptr() // 4096) * 4096
        huge_pages = 14
        advise(ctypes.c_void_p(start), ctypes.c_size_t((y.data_ptr() + size - start) & -4096), huge_pages)
    return y


@cache
def _forward_kernel(dtype: torch.dtype, activation: str | None, add: bool, masked: bool) -> Kernel:
    return compile_kernel(forward(*_SCALARS[dtype], CODES[activation], add, masked))


@cache
def _backward_kernel(
    dtype: torch.dtype, activation: str | None, rebuilt: bool, add: bool, want: bool, keep: bool, masked: bool
) -> Kernel:
    code = CODES[activation]
    return compile_kernel(backward(*_SCALARS[dtype], code, rebuilt, add, want, keep, masked))


def warmup(
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    activations: Sequence[str | None] = (None, "relu"),
) -> dict[str, bool]:
    """Compile ahead what networks use, any shape and layout; says of each kernel if it was on disk.

    Layouts need no kernels of their own.
    """
    done = {}
    for dtype in dtypes:
        for activation in activations:
            rebuilt = CODES[activation] in FROM_INPUT
            for add in (False, True):
                name = f"{_name(dtype)} {'add ' * add}{activation or 'identity'}"
                done[f"forward {name}"] = _forward_kernel(dtype, activation, add, False).cached
                want = add and activation is not None
                kernel = _backward_kernel(
                    dtype, activation, rebuilt, add and rebuilt, want, False, False
                )
                done[f"backward {name}"] = kernel.cached
    return done


class _Plan(NamedTuple):
    """How work is cut: blocks of channels, parts of the rows, rows together in a strip."""

    block: int
    blocks: int
    together: int
    parts: int
    threads: int
    visit: bool


@cache
def _plan(rows: int, channels: int, length: int, itemsize: int, threads: int) -> _Plan:
    row = channels * length
    block, together = 1, 1
    if 2 * row <= WIDTH:
        block, together = channels, min(rows, WIDTH // row)
    elif 2 * length <= WIDTH:
        block = min(channels, WIDTH // length)
        aligned = 16 // math.gcd(16, length)  # strips then start where cache lines do
        block = block // aligned * aligned or block
    blocks = -(-channels // block)
    if rows * row < _PARALLEL_FROM:
        threads = 1
    visit = rows * block * length * itemsize <= _VISIT_UP_TO and blocks >= threads
    strips = -(-rows // together)
    parts = 1 if blocks >= 4 * threads else min(strips, -(-4 * threads // blocks))
    return _Plan(block, blocks, together, parts, threads, visit)


def _bits(value: float) -> int:
    return int(struct.unpack("q", struct.pack("d", value))[0])


def _arguments(plan: _Plan, rows: int, shape: _Shape) -> Any:
    a = Arguments()
    a[at.ROWS], a[at.CHANNELS], a[at.LENGTH] = rows, shape.channels, shape.length
    a[at.BLOCK], a[at.BLOCKS], a[at.TOGETHER] = plan.block, plan.blocks, plan.together
    return a


def _launch(kernel: Kernel, a: Any, mode: int, plan: _Plan, parts: int) -> None:
    a[at.MODE] = mode
    a[at.PARTS] = parts
    a[at.CHUNKS] = plan.blocks * parts
    kernel(a, plan.threads)


def _slabs(shape: _Shape, groups: Groups) -> Iterator[tuple[int, int, int]]:
    """Group, first row and number of rows of each group."""
    if groups is None:
        yield 0, 0, shape.samples * shape.repeats
        return
    starts = accumulate(groups, initial=0)
    for group, (start, size) in enumerate(zip(starts, groups, strict=False)):
        yield group, start * shape.repeats, size * shape.repeats


def _real(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_channel(t: Tensor, real: torch.dtype) -> Tensor:
    return t if t.dtype == real and t.is_contiguous() else t.to(real).contiguous()


def _partials(plan: _Plan, channels: int) -> Tensor:
    return torch.empty(2 * plan.parts * channels, dtype=torch.float64)


def _reduce(kernel: Kernel, a: Any, plan: _Plan, sums: Tensor) -> None:
    """Both steps of a reduction that is not part of a visit, again about the mean where needed."""
    a[at.SUMS], a[at.STORED] = sums.data_ptr(), plan.parts
    merging = plan._replace(threads=1)
    for pivoted in (0, at.PIVOTED):
        a[at.AGAIN] = 0
        _launch(kernel, a, at.REDUCE | pivoted, plan, plan.parts)
        _launch(kernel, a, at.MERGE | pivoted, merging, 1)
        if not a[at.AGAIN]:
            break


def moments(x: Tensor, *, mask: Tensor | None = None, groups: Groups = None) -> Moments:
    """Count, mean and biased variance per channel, over valid positions where a mask is given."""
    calls["moments"] += 1
    shape, real = _known_shape(x), _real(x)
    if mask is not None:
        mask = mask.contiguous()
    kernel = _forward_kernel(x.dtype, None, False, mask is not None)
    results = torch.empty(3, len(groups) if groups else 1, shape.channels, dtype=real)
    counts = []
    for group, first, rows in _slabs(shape, groups):
        plan = _plan(rows, shape.channels, shape.length, x.element_size(), torch.get_num_threads())
        a = _arguments(plan, rows, shape)
        a[at.X] = x.data_ptr() + first * shape.channels * shape.length * x.element_size()
        count = rows * shape.length
        if mask is not None:
            valid = mask.view(-1).narrow(0, first * shape.length, count)
            a[at.MASK] = valid.data_ptr()
            count = int(torch.count_nonzero(valid))
        counts.append(count)
        if count == 0:
            results[:, group] = 0
            continue
        a[at.COUNT] = _bits(count)
        base = results.data_ptr() + group * results.stride(1) * results.element_size()
        step = results.stride(0) * results.element_size()
        a[at.CENTER], a[at.LOW], a[at.VAR] = base, base + step, base + 2 * step
        _reduce(kernel, a, plan, _partials(plan, shape.channels))
    known: Any = counts[0]
    if groups is not None or mask is not None:
        known = torch.tensor(counts, dtype=real)
        known = known[:, None] if groups is not None else known
    mean, low, var = results.unbind() if groups is not None else results[:, 0].unbind()
    return Moments(known, mean, var, low)


def apply(
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    groups: Groups = None,
    out: Tensor | None = None,
) -> Tensor:
    """`activation((x - center)·scale + shift + residual)`."""
    calls["apply"] += 1
    shape, real = _known_shape(x), _real(x)
    y = _fresh(x) if out is None else out
    center, scale, shift = (_per_channel(t, real) for t in (center, scale, shift))
    residual = None if residual is None else _like(residual, x)
    kernel = _forward_kernel(x.dtype, activation, residual is not None, False)
    for group, first, rows in _slabs(shape, groups):
        plan = _plan(rows, shape.channels, shape.length, x.element_size(), torch.get_num_threads())
        a = _arguments(plan, rows, shape)
        place = first * shape.channels * shape.length * x.element_size()
        channel = group * shape.channels * center.element_size()
        a[at.X], a[at.Y] = x.data_ptr() + place, y.data_ptr() + place
        if residual is not None:
            a[at.RESIDUAL] = residual.data_ptr() + place
        a[at.CENTER] = center.data_ptr() + channel
        a[at.SCALE] = scale.data_ptr() + channel
        a[at.SHIFT] = shift.data_ptr() + channel
        _launch(kernel, a, at.MAP, plan, plan.parts)
    return y


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    groups: Groups = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Moments]:
    """`moments` and `apply` by these moments, in one visit of each block of channels.

    y = activation((x - mean)/√(var + eps)·weight + bias + residual)
    """
    calls["normalize"] += 1
    shape, real = _known_shape(x), _real(x)
    y = _fresh(x) if out is None else out
    weight = None if weight is None else _per_channel(weight, real)
    bias = None if bias is None else _per_channel(bias, real)
    residual = None if residual is None else _like(residual, x)
    kernel = _forward_kernel(x.dtype, activation, residual is not None, False)
    results = torch.empty(5, len(groups) if groups else 1, shape.channels, dtype=real)
    counts = []
    for group, first, rows in _slabs(shape, groups):
        plan = _plan(rows, shape.channels, shape.length, x.element_size(), torch.get_num_threads())
        a = _arguments(plan, rows, shape)
        place = first * shape.channels * shape.length * x.element_size()
        a[at.X], a[at.Y] = x.data_ptr() + place, y.data_ptr() + place
        if residual is not None:
            a[at.RESIDUAL] = residual.data_ptr() + place
        if weight is not None:
            a[at.WEIGHT] = weight.data_ptr()
        if bias is not None:
            a[at.BIAS] = bias.data_ptr()
        counts.append(rows * shape.length)
        a[at.COUNT], a[at.EPS] = _bits(rows * shape.length), _bits(eps)
        base = results.data_ptr() + group * results.stride(1) * results.element_size()
        step = results.stride(0) * results.element_size()
        a[at.CENTER], a[at.LOW], a[at.VAR] = base, base + step, base + 2 * step
        a[at.SCALE], a[at.SHIFT] = base + 3 * step, base + 4 * step
        if plan.visit:
            _launch(kernel, a, at.REDUCE | at.MAP, plan, 1)
        else:
            _reduce(kernel, a, plan, _partials(plan, shape.channels))
            _launch(kernel, a, at.MAP | at.BACKWARDS, plan, plan.parts)
    if groups is not None:
        known: Any = torch.tensor(counts, dtype=real)[:, None]
        return y, Moments(known, results[0], results[2], results[1])
    return y, Moments(counts[0], results[0, 0], results[2, 0], results[1, 0])


class _Gradient(NamedTuple):
    """The x-sized arguments of a backward kernel, and how to get the kernel for them."""

    kernel: Callable[[bool, bool, bool], Kernel]
    grad: Tensor
    y: Tensor | None
    residual: Tensor | None
    scale: Tensor
    center: Tensor
    shift: Tensor

    def arguments(self, plan: _Plan, group: int, first: int, rows: int, x: Tensor, shape: _Shape) -> Any:
        a = _arguments(plan, rows, shape)
        place = first * shape.channels * shape.length * x.element_size()
        channel = group * shape.channels * self.center.element_size()
        a[at.GRAD], a[at.X] = self.grad.data_ptr() + place, x.data_ptr() + place
        if self.y is not None:
            a[at.Y] = self.y.data_ptr() + place
        if self.residual is not None:
            a[at.RESIDUAL] = self.residual.data_ptr() + place
        a[at.CENTER] = self.center.data_ptr() + channel
        a[at.SCALE] = self.scale.data_ptr() + channel
        a[at.SHIFT] = self.shift.data_ptr() + channel
        return a


def _gradient(
    grad: Tensor, x: Tensor, center: Tensor, scale: Tensor, shift: Tensor, *, y: Tensor | None,
    residual: Tensor | None, activation: str | None,
) -> _Gradient:  # fmt: skip
    real = _real(x)
    rebuilt = activation is not None and (CODES[activation] in FROM_INPUT or y is None)
    add = rebuilt and residual is not None
    if rebuilt and CODES[activation] not in FROM_INPUT:
        raise ValueError(f"`y`, the output, is required for the gradient of {activation}; got None.")
    return _Gradient(
        partial(_backward_kernel, x.dtype, activation, rebuilt, add),
        _like(grad, x),
        None if y is None or rebuilt or activation is None else _like(y, x),
        _like(residual, x) if add and residual is not None else None,
        _per_channel(scale, real),
        _per_channel(center, real),
        _per_channel(shift, real),
    )


def reduce_grad(
    grad: Tensor,
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    y: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    groups: Groups = None,
) -> tuple[Tensor, Tensor]:
    """`Σg` and `Σg·(x - center)` over all positions, with g the gradient before the activation."""
    calls["reduce_grad"] += 1
    shape = _known_shape(x)
    inputs = _gradient(
        grad, x, center, scale, shift, y=y, residual=residual, activation=activation
    )  # fmt: skip
    sums = torch.empty((2, *center.shape), dtype=_real(x))
    for group, first, rows in _slabs(shape, groups):
        plan = _plan(rows, shape.channels, shape.length, x.element_size(), torch.get_num_threads())
        a = inputs.arguments(plan, group, first, rows, x, shape)
        base = sums.data_ptr() + group * shape.channels * sums.element_size()
        a[at.SUM_GRAD], a[at.SUM_GRAD_X] = base, base + sums.stride(0) * sums.element_size()
        _reduce(inputs.kernel(False, False, False), a, plan, _partials(plan, shape.channels))
    return sums[0], sums[1]


def apply_grad(
    grad: Tensor,
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    shift: Tensor,
    slope: Tensor,
    constant: Tensor,
    *,
    y: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
    groups: Groups = None,
    want_residual: bool = False,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`dx = scale·g + [valid]·(slope·(x - center) + constant)`, and g itself if wanted."""
    calls["apply_grad"] += 1
    shape, real = _known_shape(x), _real(x)
    want = want_residual and activation is not None
    inputs = _gradient(
        grad, x, center, scale, shift, y=y, residual=residual, activation=activation
    )  # fmt: skip
    dx, dresidual = out if out is not None else (_fresh(x), _fresh(x) if want else None)
    slope, constant = _per_channel(slope, real), _per_channel(constant, real)
    mask = None if mask is None else mask.contiguous()
    for group, first, rows in _slabs(shape, groups):
        plan = _plan(rows, shape.channels, shape.length, x.element_size(), torch.get_num_threads())
        a = inputs.arguments(plan, group, first, rows, x, shape)
        place = first * shape.channels * shape.length * x.element_size()
        channel = group * shape.channels * slope.element_size()
        a[at.DX] = dx.data_ptr() + place
        if want and dresidual is not None:
            a[at.DRESIDUAL] = dresidual.data_ptr() + place
        if mask is not None:
            a[at.MASK] = mask.data_ptr() + first * shape.length
        a[at.SLOPE], a[at.CONSTANT] = slope.data_ptr() + channel, constant.data_ptr() + channel
        _launch(inputs.kernel(want, False, mask is not None), a, at.MAP, plan, plan.parts)
    return dx, dresidual if want else (grad if want_residual else None)


def _survives_storing(x: Tensor, activation: str | None) -> bool:
    """Whether g is as exact when read back from the residual's gradient."""
    return x.dtype != torch.bfloat16 or activation in ("relu", "relu6")


def normalize_grad(
    grad: Tensor,
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    shift: Tensor,
    slope_factor: Tensor,
    constant_factor: Tensor,
    mean_low: Tensor,
    mean_gap: Tensor,
    *,
    y: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    groups: Groups = None,
    want_residual: bool = False,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """`reduce_grad` and `apply_grad` by its sums, in one visit of each block of channels.

    With S₁ = Σg and S₂ = Σg·(x - center) - mean_low·S₁:

        dx = scale·g - constant_factor·S₁ - slope_factor·S₂·((x - center) - mean_gap)

    Returns dx, dresidual or None, Σg, Σg·(x - center).
    """
    calls["normalize_grad"] += 1
    shape, real = _known_shape(x), _real(x)
    want = want_residual and activation is not None
    inputs = _gradient(
        grad, x, center, scale, shift, y=y, residual=residual, activation=activation
    )  # fmt: skip
    dx, dresidual = out if out is not None else (_fresh(x), _fresh(x) if want else None)
    factors = [_per_channel(t, real) for t in (slope_factor, constant_factor, mean_low, mean_gap)]
    results = torch.empty((4, *center.shape), dtype=real)
    step = results.stride(0) * results.element_size()
    for group, first, rows in _slabs(shape, groups):
        plan = _plan(rows, shape.channels, shape.length, x.element_size(), torch.get_num_threads())
        a = inputs.arguments(plan, group, first, rows, x, shape)
        place = first * shape.channels * shape.length * x.element_size()
        channel = group * shape.channels * results.element_size()
        a[at.DX] = dx.data_ptr() + place
        if want and dresidual is not None:
            a[at.DRESIDUAL] = dresidual.data_ptr() + place
        base = results.data_ptr() + channel
        a[at.SUM_GRAD], a[at.SUM_GRAD_X] = base, base + step
        a[at.SLOPE], a[at.CONSTANT] = base + 2 * step, base + 3 * step
        a[at.SLOPE_FACTOR] = factors[0].data_ptr() + channel
        a[at.CONSTANT_FACTOR] = factors[1].data_ptr() + channel
        a[at.MEAN_LOW] = factors[2].data_ptr() + channel
        a[at.MEAN_GAP] = factors[3].data_ptr() + channel
        if plan.visit:
            _launch(inputs.kernel(want, False, False), a, at.REDUCE | at.MAP, plan, 1)
        elif want and dresidual is not None and _survives_storing(x, activation):
            # 6 passes over memory beside dx: grad, x, y and dresidual, then dresidual and x again.
            _reduce(inputs.kernel(False, True, False), a, plan, _partials(plan, shape.channels))
            a[at.GRAD] = a[at.DRESIDUAL]
            plain = _backward_kernel(x.dtype, None, False, False, False, False, False)
            _launch(plain, a, at.MAP | at.BACKWARDS, plan, plan.parts)
        else:
            _reduce(inputs.kernel(False, False, False), a, plan, _partials(plan, shape.channels))
            _launch(inputs.kernel(want, False, False), a, at.MAP | at.BACKWARDS, plan, plan.parts)
    dresidual = dresidual if want else (grad if want_residual else None)
    return dx, dresidual, results[0], results[1]
