"""The compiled CPU kernel of the backward direction: `reduce_grad`, `apply_grad`, and both in one."""

from __future__ import annotations

from typing import Any

import numpy as np

from .cpu_activations import activate, gradient
from .cpu_loops import (
    CENTER, CHUNKS, CONSTANT, CONSTANT_FACTOR, DRESIDUAL, DX, FLUSH, GRAD, MAP, MASK, MEAN_GAP,
    MEAN_LOW, MERGE, MODE, REDUCE, RESIDUAL, SCALE, SHIFT, SLOPE, SLOPE_FACTOR, STORED, SUM_GRAD,
    SUM_GRAD_X, SUMS, X, Y, chunk_at, clear, compiled, fold, gather, put_aside, spread, spread_mask,
    strip_start, strip_width,
)  # fmt: skip
from .cpu_memory import like, narrow, pointer, scratch, take, widen


@compiled  # type: ignore[untyped-decorator]
def write_sums(chunk: Any, sums_1: Any, sums_2: Any, total: Any, moved: Any) -> None:
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


def backward(SCALAR: Any, REAL: Any, ACT: int, REBUILT: bool, ADD: bool, WANT: bool, MASKED: bool) -> Any:
    """Build the kernel for one stored type, the type computed in, activation, and options.

    REBUILT: the activation's gradient is taken at z rebuilt from x, and from a residual if ADD;
    else at the output y, if there is an activation. WANT: the residual's gradient is written.
    """

    def kernel(args: Any) -> None:
        grad, x = pointer(args[GRAD], SCALAR), pointer(args[X], SCALAR)
        y, residual = pointer(args[Y], SCALAR), pointer(args[RESIDUAL], SCALAR)
        dx, dresidual = pointer(args[DX], SCALAR), pointer(args[DRESIDUAL], SCALAR)
        mask = pointer(args[MASK], np.uint8)
        center, scale, shift = (
            pointer(args[CENTER], REAL), pointer(args[SCALE], REAL), pointer(args[SHIFT], REAL),
        )  # fmt: skip
        slope, constant = pointer(args[SLOPE], REAL), pointer(args[CONSTANT], REAL)
        partial = pointer(args[SUMS], np.float64)
        valid = scratch(np.uint8)
        wide_center, wide_scale, wide_shift = scratch(REAL), scratch(REAL), scratch(REAL)
        wide_1, wide_2 = scratch(REAL), scratch(REAL)
        sums_1, sums_2 = scratch(np.float64), scratch(np.float64)
        mode = args[MODE]

        while True:
            index = take(args)
            if index >= args[CHUNKS]:
                return
            chunk = chunk_at(args, index)
            spread(center, chunk.first, chunk, wide_center)
            if REBUILT:
                spread(scale, chunk.first, chunk, wide_scale)
                spread(shift, chunk.first, chunk, wide_shift)
            if mode & REDUCE:
                clear(sums_1, chunk.here)
                clear(sums_2, chunk.here)
                clear(wide_1, chunk.copies * chunk.here * chunk.piece)
                clear(wide_2, chunk.copies * chunk.here * chunk.piece)
                held = 0
                for row in range(chunk.top, chunk.bottom, chunk.together):
                    several = min(chunk.together, chunk.bottom - row)
                    for j in range(chunk.pieces):
                        start = strip_start(chunk, row, j)
                        for i in range(strip_width(chunk, several, j)):
                            d = widen(x[start + i]) - wide_center[i]
                            g = widen(grad[start + i])
                            if REBUILT:
                                z = d * wide_scale[i] + wide_shift[i]
                                if ADD:
                                    z += widen(residual[start + i])
                                g = gradient(g, z, ACT)
                            elif ACT != 0:
                                g = gradient(g, widen(y[start + i]), ACT)
                            wide_1[i] += g
                            wide_2[i] += g * d
                        held += 1
                        if held == FLUSH:
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
                    chunk, sums_1, sums_2, pointer(args[SUM_GRAD], REAL), pointer(args[SUM_GRAD_X], REAL)
                )
                if args[SLOPE_FACTOR] != 0:
                    write_map(
                        chunk, sums_1, sums_2, pointer(args[SLOPE_FACTOR], REAL),
                        pointer(args[CONSTANT_FACTOR], REAL), pointer(args[MEAN_LOW], REAL),
                        pointer(args[MEAN_GAP], REAL), slope, constant,
                    )  # fmt: skip
            if mode & MAP:
                spread(scale, chunk.first, chunk, wide_scale)
                spread(slope, chunk.first, chunk, wide_1)
                spread(constant, chunk.first, chunk, wide_2)
                for row in range(chunk.top, chunk.bottom, chunk.together):
                    several = min(chunk.together, chunk.bottom - row)
                    for j in range(chunk.pieces):
                        start = strip_start(chunk, row, j)
                        if MASKED:
                            spread_mask(mask, chunk, row, several, j, valid)
                        for i in range(strip_width(chunk, several, j)):
                            d = widen(x[start + i]) - wide_center[i]
                            g = widen(grad[start + i])
                            if REBUILT:
                                z = d * wide_scale[i] + wide_shift[i]
                                if ADD:
                                    z += widen(residual[start + i])
                                g = gradient(g, z, ACT)
                            elif ACT != 0:
                                g = gradient(g, widen(y[start + i]), ACT)
                            if WANT:
                                dresidual[start + i] = narrow(g, SCALAR)
                            through = wide_1[i] * d + wide_2[i]
                            if MASKED:
                                through = through if valid[i] != 0 else like(0.0, through)
                            dx[start + i] = narrow(wide_scale[i] * g + through, SCALAR)

    return kernel
