"""The compiled CPU kernel of the backward direction: `reduce_grad`, `apply_grad`, and both."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.core import types
from numba.core.extending import overload

from .cpu_activations import gradient_at
from .cpu_loops import (
    CENTER,
    CHUNKS,
    CONSTANT,
    CONSTANT_FACTOR,
    DRESIDUAL,
    DX,
    FLUSH,
    GRAD,
    MAP,
    MASK,
    MEAN_GAP,
    MEAN_LOW,
    MERGE,
    MODE,
    PIECE,
    REDUCE,
    RESIDUAL,
    SCALE,
    SHIFT,
    SLOPE,
    SLOPE_FACTOR,
    STORED,
    SUM_GRAD,
    SUM_GRAD_X,
    SUMMED,
    SUMS,
    X,
    Y,
    chunk_at,
    clear,
    compiled,
    fold,
    gather,
    minus,
    put_aside,
    spread,
    spread_mask,
    start_of,
)  # fmt: skip
from .cpu_memory import like, narrow, pointer, scratch, take, widen


@compiled  # type: ignore[untyped-decorator]
def write_sums(chunk: Any, sums_1: Any, sums_2: Any, total: Any, moved: Any) -> None:
    """Write the two sums, which the weight's and the bias's gradients are made of."""
    for c in range(chunk.here):
        total[chunk.first + c] = like(sums_1[c], total[0])
        moved[chunk.first + c] = like(sums_2[c], moved[0])


@compiled  # type: ignore[untyped-decorator]
def write_map(
    chunk: Any, sums_1: Any, sums_2: Any, slope_factor: Any, constant_factor: Any, mean_low: Any,
    mean_gap: Any, slope: Any, constant: Any,
) -> None:  # fmt: skip
    """What flows back through the statistics, as `slope·(x - center) + constant`."""
    for c in range(chunk.here):
        k = chunk.first + c
        tilt = -slope_factor[k] * (sums_2[c] - mean_low[k] * sums_1[c])
        slope[k] = like(tilt, slope[k])
        constant[k] = like(-constant_factor[k] * sums_1[c] - tilt * mean_gap[k], constant[k])


def sums_of_planes(
    grad: Any,
    x: Any,
    m: Any,
    s: Any,
    t: Any,
    y: Any,
    residual: Any,
    kept: Any,
    chunk: Any,
    code: int,
) -> Any:
    """Σg and Σg·(x - center) of the chunk's one channel; g itself goes to `kept`, unless None."""
    raise NotImplementedError("only inside compiled kernels")


@overload(sums_of_planes, prefer_literal=True, jit_options=SUMMED)  # type: ignore[untyped-decorator]
def _sums_of_planes(
    grad: Any,
    x: Any,
    m: Any,
    s: Any,
    t: Any,
    y: Any,
    residual: Any,
    kept: Any,
    chunk: Any,
    code: Any,
) -> Any:
    if not isinstance(code, types.IntegerLiteral):
        return None
    ACT = code.literal_value

    def implementation(
        grad: Any,
        x: Any,
        m: Any,
        s: Any,
        t: Any,
        y: Any,
        residual: Any,
        kept: Any,
        chunk: Any,
        code: Any,
    ) -> Any:
        total_1, total_2 = 0.0, 0.0
        for row in range(chunk.top, chunk.bottom):
            for begin in range(0, chunk.length, PIECE):
                start = start_of(chunk, row) + begin
                part_1, part_2 = like(0.0, m), like(0.0, m)
                for i in range(start, start + min(PIECE, chunk.length - begin)):
                    d = minus(widen(x[i]), m)
                    g = gradient_at(widen(grad[i]), d, s, t, y, residual, i, ACT)
                    if kept is not None:
                        kept[i] = narrow(g, kept)
                    part_1 += g
                    part_2 += g * d
                total_1 += part_1
                total_2 += part_2
        return total_1, total_2

    return implementation


def backward(
    SCALAR: Any, REAL: Any, ACT: int, REBUILT: bool, ADD: bool, WANT: bool, KEEP: bool, MASKED: bool
) -> Any:
    """Build the kernel for one stored type, the type computed in, activation, and options.

    REBUILT: the activation's gradient is taken at z rebuilt from x, and from a residual if ADD;
    else at the output y, if there is an activation. WANT: the map writes the residual's gradient.
    KEEP: the reduction does, and the map is left to the plain kernel, which reads it as `grad`.
    """

    def kernel(args: Any) -> None:
        grad, x = pointer(args[GRAD], SCALAR), pointer(args[X], SCALAR)
        dx, dresidual = pointer(args[DX], SCALAR), pointer(args[DRESIDUAL], SCALAR)
        y = None if REBUILT else pointer(args[Y], SCALAR)
        residual = pointer(args[RESIDUAL], SCALAR) if ADD else None
        kept = dresidual if KEEP else None
        mask = pointer(args[MASK], np.uint8)
        center, scale, shift = (
            pointer(args[CENTER], REAL), pointer(args[SCALE], REAL), pointer(args[SHIFT], REAL),
        )  # fmt: skip
        slope, constant = pointer(args[SLOPE], REAL), pointer(args[CONSTANT], REAL)
        partial = pointer(args[SUMS], np.float64)
        valid = scratch(np.uint8)
        wide_m, wide_s, wide_t = scratch(REAL), scratch(REAL), scratch(REAL)
        wide_1, wide_2 = scratch(REAL), scratch(REAL)
        sums_1, sums_2 = scratch(np.float64), scratch(np.float64)
        mode = args[MODE]

        while True:
            index = take(args)
            if index >= args[CHUNKS]:
                return
            chunk = chunk_at(args, index)
            columns = chunk.here * chunk.length
            m, s, t = center[chunk.first], scale[chunk.first], shift[chunk.first]
            if not chunk.planes:
                spread(center, chunk.first, chunk, wide_m)
                spread(scale, chunk.first, chunk, wide_s)
                spread(shift, chunk.first, chunk, wide_t)

            if mode & REDUCE and chunk.planes:
                sums_1[0], sums_2[0] = sums_of_planes(
                    grad, x, m, s, t, y, residual, kept, chunk, ACT
                )
            elif mode & REDUCE:
                clear(sums_1, chunk.here)
                clear(sums_2, chunk.here)
                clear(wide_1, chunk.copies * columns)
                clear(wide_2, chunk.copies * columns)
                step = chunk.together * chunk.channels * chunk.length
                held = 0
                row = chunk.top
                while row < chunk.bottom:
                    a = start_of(chunk, row)
                    if not KEEP and row + 2 * chunk.together <= chunk.bottom:
                        # Two strips at once: fewer trips to the accumulators.
                        b = a + step
                        for i in range(chunk.together * columns):
                            d_0, d_1 = widen(x[a + i]) - wide_m[i], widen(x[b + i]) - wide_m[i]
                            g_0 = gradient_at(
                                widen(grad[a + i]),
                                d_0,
                                wide_s[i],
                                wide_t[i],
                                y,
                                residual,
                                a + i,
                                ACT,
                            )
                            g_1 = gradient_at(
                                widen(grad[b + i]),
                                d_1,
                                wide_s[i],
                                wide_t[i],
                                y,
                                residual,
                                b + i,
                                ACT,
                            )
                            wide_1[i] += g_0 + g_1
                            wide_2[i] += g_0 * d_0 + g_1 * d_1
                        row += 2 * chunk.together
                        held += 2
                    else:
                        several = min(chunk.together, chunk.bottom - row)
                        for i in range(several * columns):
                            d = widen(x[a + i]) - wide_m[i]
                            g = gradient_at(
                                widen(grad[a + i]), d, wide_s[i], wide_t[i], y, residual, a + i, ACT
                            )
                            if KEEP:
                                dresidual[a + i] = narrow(g, dresidual)
                            wide_1[i] += g
                            wide_2[i] += g * d
                        row += several
                        held += 1
                    if held >= FLUSH:
                        fold(wide_1, chunk, sums_1)
                        fold(wide_2, chunk, sums_2)
                        held = 0
                fold(wide_1, chunk, sums_1)
                fold(wide_2, chunk, sums_2)
            if mode & MERGE:
                gather(partial, args[STORED], chunk, sums_1, sums_2)
            if mode & REDUCE and not mode & MAP:
                put_aside(partial, chunk, sums_1, sums_2)
            elif mode & (REDUCE | MERGE):
                write_sums(
                    chunk,
                    sums_1,
                    sums_2,
                    pointer(args[SUM_GRAD], REAL),
                    pointer(args[SUM_GRAD_X], REAL),
                )
                if args[SLOPE_FACTOR] != 0:
                    write_map(
                        chunk, sums_1, sums_2, pointer(args[SLOPE_FACTOR], REAL),
                        pointer(args[CONSTANT_FACTOR], REAL), pointer(args[MEAN_LOW], REAL),
                        pointer(args[MEAN_GAP], REAL), slope, constant,
                    )  # fmt: skip

            if KEEP or not mode & MAP:
                continue
            if chunk.planes:
                u, v = slope[chunk.first], constant[chunk.first]
                for row in range(chunk.top, chunk.bottom):
                    start = start_of(chunk, row)
                    from_mask = row * chunk.length - start
                    for i in range(start, start + chunk.length):
                        d = widen(x[i]) - m
                        g = gradient_at(widen(grad[i]), d, s, t, y, residual, i, ACT)
                        if WANT:
                            dresidual[i] = narrow(g, dresidual)
                        through = u * d + v
                        if MASKED:
                            through = through if mask[from_mask + i] != 0 else like(0.0, through)
                        dx[i] = narrow(s * g + through, dx)
                continue
            spread(slope, chunk.first, chunk, wide_1)
            spread(constant, chunk.first, chunk, wide_2)
            for row in range(chunk.top, chunk.bottom, chunk.together):
                several = min(chunk.together, chunk.bottom - row)
                start = start_of(chunk, row)
                if MASKED:
                    spread_mask(mask, chunk, row, several, valid)
                for i in range(several * columns):
                    k = start + i
                    d = widen(x[k]) - wide_m[i]
                    g = gradient_at(widen(grad[k]), d, wide_s[i], wide_t[i], y, residual, k, ACT)
                    if WANT:
                        dresidual[k] = narrow(g, dresidual)
                    through = wide_1[i] * d + wide_2[i]
                    if MASKED:
                        through = through if valid[i] != 0 else like(0.0, through)
                    dx[k] = narrow(wide_s[i] * g + through, dx)

    return kernel
