"""The compiled CPU kernel of the backward direction: `reduce_grad`, `apply_grad`, and both."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .activations import IDENTITY, by_activation, gradient_at, vectors_for
from .arguments import PASSES, at
from .loops import (
    COMPILED,
    FLUSH,
    MAP,
    MERGE,
    REDUCE,
    SUM_LENGTH,
    SUMMED,
    add_partials,
    called,
    chunk_at,
    clear,
    compiled,
    copy_past_caches,
    flush,
    minus,
    parts_in,
    signs_of,
    spread,
    spread_mask,
    start_of,
    store_partial,
    wait_for,
)  # fmt: skip
from .pointers import (
    STAGE,
    WIDTH,
    as_float,
    fetch_add,
    like,
    narrow,
    noinline,
    pointer,
    pointer_like,
    scratch,
    shifted,
    widen,
)
from .signs import through_gates


@called  # type: ignore[untyped-decorator]
def remember(args: Any, chunk: Any, sums_1: Any, sums_2: Any, slope: Any, constant: Any) -> None:
    """`statistics.remember` for the chunk's channels, and the map less what it takes off.

    A loop of its own, for vectors: called for each of 2,048 channels it took 47 µs, not 18.
    """
    noinline()
    constant_factor = pointer_like(args[at.constant_factor], slope)
    memory, after = pointer_like(args[at.memory], slope), pointer_like(args[at.memory_after], slope)
    low, gap = pointer_like(args[at.center_low], slope), pointer_like(args[at.mean_gap], slope)
    rho, batch_var = pointer_like(args[at.rho], slope), pointer_like(args[at.batch_var], slope)
    scale = pointer_like(args[at.scale], slope)
    share, rate = as_float(args[at.share]), as_float(args[at.rate])
    each, old, channels = 1.0 / as_float(args[at.count]), 1.0 - rate, args[at.channels]
    moves = args[at.memory_after] != 0
    for c in range(chunk.in_block):
        k = chunk.first + c
        r = like(rho[k], share)
        mean, var = (like(gap[k], share) - low[k]) * r, r * r * batch_var[k]
        exact = sums_2[c] - low[k] * sums_1[c]
        grad, grad_xhat = sums_1[c] * each, r * exact * each
        before, before_slope = like(memory[k], share), like(memory[channels + k], share)
        kept = old * before + rate * (1.0 - share) * grad
        kept_slope = old * before_slope + rate * (
            grad_xhat - share * (var * grad_xhat + mean * grad)
        )
        kept_slope = (kept_slope - rate * mean * kept) / (
            old * (1.0 + rate * mean * mean) + rate * var
        )
        kept = kept - rate * mean * kept_slope
        if not (math.isfinite(kept) and math.isfinite(kept_slope)):
            kept, kept_slope = before, before_slope
        if moves:
            after[k] = like(kept, after[k])
            after[channels + k] = like(kept_slope, after[k])
        tilt, down = -constant_factor[k] * (r * r * exact), scale[k] * r * kept_slope
        level = -constant_factor[k] * sums_1[c] - tilt * gap[k]
        slope[k] = like(tilt - down, slope[k])
        constant[k] = like(level + down * low[k] - scale[k] * kept, constant[k])


@called  # type: ignore[untyped-decorator]
def write_sums(args: Any, chunk: Any, sums_1: Any, sums_2: Any, slope: Any, constant: Any) -> None:
    """Write the sums, and what flows back through the statistics: `slope·(x - center) + constant`.

    The latter only if its factors are given, and less what the memory of the gradient takes off if
    there is one; the weight's gradient only if it has an address.
    """
    noinline()
    sum_grad = pointer_like(args[at.sum_grad], slope)
    sum_grad_x = pointer_like(args[at.sum_grad_x], slope)
    constant_factor = pointer_like(args[at.constant_factor], slope)
    low, mean_gap = pointer_like(args[at.center_low], slope), pointer_like(args[at.mean_gap], slope)
    rho, grad_weight = pointer_like(args[at.rho], slope), pointer_like(args[at.grad_weight], slope)
    for c in range(chunk.in_block):
        k = chunk.first + c
        sum_grad[k] = like(sums_1[c], sum_grad[k])
        sum_grad_x[k] = like(sums_2[c], sum_grad_x[k])
        exact = sums_2[c]
        if args[at.center_low] != 0:
            exact -= low[k] * sums_1[c]
        if args[at.grad_weight] != 0:
            grad_weight[k] = like(rho[k] * exact, grad_weight[k])
        if args[at.constant_factor] != 0 and args[at.memory] == 0:
            r = like(rho[k], exact)
            tilt = -constant_factor[k] * (r * r * exact)
            slope[k] = like(tilt, slope[k])
            constant[k] = like(-constant_factor[k] * sums_1[c] - tilt * mean_gap[k], constant[k])
    if args[at.constant_factor] != 0 and args[at.memory] != 0:
        remember(args, chunk, sums_1, sums_2, slope, constant)


@compiled  # type: ignore[untyped-decorator]
def gated_from(
    grad: Any,
    start: Any,
    count: Any,
    signs: Any,
    chunk: Any,
    row: Any,
    plane: Any,
    begin: Any,
    gated: Any,
) -> Any:
    """Where `count` gradients lie: in `grad` from `start` on, or gated by the sign bits, if any."""
    if signs is None:
        return shifted(grad, start)
    words = signs_of(chunk, row, plane, begin)
    through_gates(shifted(grad, start), count, shifted(signs, words), gated)
    return gated


@by_activation(**SUMMED)
def sums_of_planes(ACT: int) -> Any:
    """Σg and Σg·(x - center) of every channel of the chunk."""

    def reduce(
        grad: Any, x: Any, y: Any, residual: Any, signs: Any, gated: Any, chunk: Any,
        center: Any, scale: Any, shift: Any, sums_1: Any, sums_2: Any, code: Any,
    ) -> None:  # fmt: skip
        vectors_for(code)
        clear(sums_1, chunk.in_block)
        clear(sums_2, chunk.in_block)
        piece = SUM_LENGTH if signs is None else WIDTH
        for row in range(chunk.top, chunk.bottom):
            for c in range(chunk.in_block):
                k = chunk.first + c
                m, s, t = center[k], scale[k], shift[k]
                total_1, total_2 = 0.0, 0.0
                for begin in range(0, chunk.length, piece):
                    offset, several = c * chunk.length + begin, min(piece, chunk.length - begin)
                    start = start_of(chunk, row) + offset
                    source = gated_from(grad, start, several, signs, chunk, row, c, begin, gated)
                    part_1, part_2 = like(0.0, m), like(0.0, m)
                    for i in range(several):
                        d = minus(widen(x[start + i]), m)
                        g = gradient_at(widen(source[i]), d, s, t, y, residual, start + i, ACT)
                        part_1 += g
                        part_2 += g * d
                    total_1 += part_1
                    total_2 += part_2
                sums_1[c] += total_1
                sums_2[c] += total_2

    return reduce


@by_activation(**COMPILED)
def sums_of_strips(ACT: int) -> Any:
    """Σg and Σg·(x - center) of every channel of the chunk."""

    def reduce(
        grad: Any, x: Any, y: Any, residual: Any, signs: Any, gated: Any, chunk: Any,
        m: Any, s: Any, t: Any, wide_1: Any, wide_2: Any, sums_1: Any, sums_2: Any, code: Any,
    ) -> None:  # fmt: skip
        vectors_for(code)
        clear(sums_1, chunk.in_block)
        clear(sums_2, chunk.in_block)
        columns = chunk.in_block * chunk.length
        clear(wide_1, chunk.copies * columns)
        clear(wide_2, chunk.copies * columns)
        held = 0
        for row in range(chunk.top, chunk.bottom, chunk.rows_per_strip):
            start = start_of(chunk, row)
            several = min(chunk.rows_per_strip, chunk.bottom - row) * columns
            source = gated_from(grad, start, several, signs, chunk, row, 0, 0, gated)
            for i in range(several):
                d = widen(x[start + i]) - m[i]
                g = gradient_at(widen(source[i]), d, s[i], t[i], y, residual, start + i, ACT)
                wide_1[i] += g
                wide_2[i] += g * d
            held += 1
            if held >= FLUSH:
                flush(wide_1, chunk, sums_1)
                flush(wide_2, chunk, sums_2)
                held = 0
        flush(wide_1, chunk, sums_1)
        flush(wide_2, chunk, sums_2)

    return reduce


@by_activation(**COMPILED)
def map_planes(ACT: int) -> Any:
    """dx of every channel of the chunk; g, the residual's gradient, to `wanted` unless None."""

    def write(
        args: Any, grad: Any, x: Any, y: Any, residual: Any, signs: Any, gated: Any, staged: Any,
        mask: Any, dx: Any, wanted: Any, chunk: Any, center: Any, scale: Any, shift: Any,
        slopes: Any, constants: Any, code: Any,
    ) -> None:  # fmt: skip
        vectors_for(code)
        streams = args[at.streams] != 0
        piece = STAGE if streams else chunk.length if signs is None else WIDTH
        for row in range(chunk.top, chunk.bottom):
            for c in range(chunk.in_block):
                k = chunk.first + c
                m, s, t, slope, constant = center[k], scale[k], shift[k], slopes[k], constants[k]
                for begin in range(0, chunk.length, piece):
                    offset, several = c * chunk.length + begin, min(piece, chunk.length - begin)
                    start, from_mask = start_of(chunk, row) + offset, row * chunk.length + begin
                    g_to = gated if streams or wanted is None else shifted(wanted, start)
                    source = gated_from(grad, start, several, signs, chunk, row, c, begin, g_to)
                    target = staged if streams else shifted(dx, start)
                    for i in range(several):
                        d = widen(x[start + i]) - m
                        g = gradient_at(widen(source[i]), d, s, t, y, residual, start + i, ACT)
                        if wanted is not None and signs is None:
                            g_to[i] = narrow(g, wanted)
                        through = slope * d + constant
                        if mask is not None:
                            through = through if mask[from_mask + i] != 0 else like(0.0, through)
                        target[i] = narrow(s * g + through, dx)
                    if streams:
                        copy_past_caches(staged, shifted(dx, start), several)
                        if wanted is not None:
                            copy_past_caches(gated, shifted(wanted, start), several)

    return write


@by_activation(**COMPILED)
def map_strips(ACT: int) -> Any:
    """dx of every channel of the chunk; g, the residual's gradient, to `wanted` unless None."""

    def write(
        args: Any, grad: Any, x: Any, y: Any, residual: Any, signs: Any, gated: Any, staged: Any,
        mask: Any, valid: Any, dx: Any, wanted: Any, chunk: Any, m: Any, s: Any, t: Any,
        slope: Any, constant: Any, code: Any,
    ) -> None:  # fmt: skip
        vectors_for(code)
        streams = args[at.streams] != 0
        piece = STAGE if streams else WIDTH
        for row in range(chunk.top, chunk.bottom, chunk.rows_per_strip):
            rows = min(chunk.rows_per_strip, chunk.bottom - row)
            width = rows * chunk.in_block * chunk.length
            if mask is not None:
                spread_mask(mask, chunk, row, rows, valid)
            for begin in range(0, width, piece):
                start, several = start_of(chunk, row) + begin, min(piece, width - begin)
                g_to = gated if streams or wanted is None else shifted(wanted, start)
                source = gated_from(grad, start, several, signs, chunk, row, 0, begin, g_to)
                target = staged if streams else shifted(dx, start)
                for i in range(several):
                    k = begin + i
                    d = widen(x[start + i]) - m[k]
                    g = gradient_at(widen(source[i]), d, s[k], t[k], y, residual, start + i, ACT)
                    if wanted is not None and signs is None:
                        g_to[i] = narrow(g, wanted)
                    through = slope[k] * d + constant[k]
                    if mask is not None:
                        through = through if valid[k] != 0 else like(0.0, through)
                    target[i] = narrow(s[k] * g + through, dx)
                if streams:
                    copy_past_caches(staged, shifted(dx, start), several)
                    if wanted is not None:
                        copy_past_caches(gated, shifted(wanted, start), several)

    return write


def backward(
    SCALAR: Any, REAL: Any, ACT: int, SIGNED: bool, REBUILT: bool, ADD: bool, WANT: bool,
    MASKED: bool,
) -> Any:  # fmt: skip
    """Build the kernel for one stored type, the type computed in, activation, and options.

    The activation's gradient is taken by the signs that the forward left if SIGNED, at z rebuilt
    from x if REBUILT (and from a residual if ADD), else at the output y. WANT: the map writes the
    residual's gradient.
    """
    GRADIENT = IDENTITY if SIGNED else ACT

    def kernel(args: Any) -> None:
        x, grad = pointer(args[at.x], SCALAR), pointer(args[at.grad], SCALAR)
        dx = pointer(args[at.dx], SCALAR)
        y = None if REBUILT or SIGNED else pointer(args[at.y], SCALAR)
        residual = pointer(args[at.residual], SCALAR) if ADD else None
        wanted = pointer(args[at.dresidual], SCALAR) if WANT else None
        signs = pointer(args[at.signs], np.uint16) if SIGNED else None
        gated, staged = scratch(SCALAR), scratch(SCALAR)
        mask = pointer(args[at.mask], np.uint8) if MASKED else None
        center = pointer(args[at.center], REAL)
        scale, shift = pointer(args[at.scale], REAL), pointer(args[at.shift], REAL)
        slope, constant = pointer(args[at.slope], REAL), pointer(args[at.constant], REAL)
        partial = pointer(args[at.partial], np.float64)
        valid = scratch(np.uint8)
        wide_m, wide_s, wide_t = scratch(REAL), scratch(REAL), scratch(REAL)
        wide_1, wide_2 = scratch(REAL), scratch(REAL)
        sums_1, sums_2 = scratch(np.float64), scratch(np.float64)

        for step in range(PASSES):
            mode = args[at.passes + step]
            if mode == 0:
                return
            chunks = parts_in(args, mode) * args[at.blocks]
            while True:
                index = fetch_add(args, at.taken + step)
                if index >= chunks:
                    break
                chunk = chunk_at(args, mode, index)
                if not chunk.planes and mode & (REDUCE | MAP):
                    spread(shifted(center, chunk.first), chunk, wide_m)
                    spread(shifted(scale, chunk.first), chunk, wide_s)
                    spread(shifted(shift, chunk.first), chunk, wide_t)

                if mode & REDUCE and chunk.planes:
                    sums_of_planes(
                        grad, x, y, residual, signs, gated, chunk, center, scale, shift,
                        sums_1, sums_2, GRADIENT,
                    )  # fmt: skip
                elif mode & REDUCE:
                    sums_of_strips(
                        grad, x, y, residual, signs, gated, chunk, wide_m, wide_s, wide_t,
                        wide_1, wide_2, sums_1, sums_2, GRADIENT,
                    )  # fmt: skip
                if mode & MERGE:
                    add_partials(partial, args[at.parts], chunk, sums_1, sums_2)
                if mode & REDUCE and not mode & MAP:
                    store_partial(partial, chunk, sums_1, sums_2)
                elif mode & (REDUCE | MERGE):
                    write_sums(args, chunk, sums_1, sums_2, slope, constant)

                if mode & MAP and chunk.planes:
                    map_planes(
                        args, grad, x, y, residual, signs, gated, staged, mask, dx, wanted, chunk,
                        center, scale, shift, slope, constant, GRADIENT,
                    )  # fmt: skip
                elif mode & MAP:
                    spread(shifted(slope, chunk.first), chunk, wide_1)
                    spread(shifted(constant, chunk.first), chunk, wide_2)
                    map_strips(
                        args, grad, x, y, residual, signs, gated, staged, mask, valid, dx, wanted,
                        chunk, wide_m, wide_s, wide_t, wide_1, wide_2, GRADIENT,
                    )  # fmt: skip
                fetch_add(args, at.done + step)
            wait_for(args, at.done + step, chunks)

    return kernel
