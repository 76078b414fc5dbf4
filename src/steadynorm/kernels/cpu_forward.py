"""The compiled CPU kernel of the forward direction: `moments`, `apply`, and both in one visit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .cpu_activations import activate
from .cpu_loops import (
    AGAIN, BIAS, CENTER, CHUNKS, COUNT, EPS, LOW, MAP, MASK, MERGE, MODE, PIVOTED, REDUCE, RESIDUAL,
    SCALE, SHIFT, STORED, SUMS, VAR, WEIGHT, X, Y, chunk_at, compiled, gather, put_aside,
    reduce_moments, sample, settle, spread, strip_start, strip_width,
)  # fmt: skip
from .cpu_memory import as_float, like, narrow, pointer, scratch, take, widen


@compiled  # type: ignore[untyped-decorator]
def write_map(
    chunk: Any, low: Any, var: Any, weight: Any, weighted: Any, bias: Any, biased: Any, eps: Any,
    scale: Any, shift: Any,
) -> None:  # fmt: skip
    """`(x - mean - low)·ρ·γ + β` as `(x - mean)·scale + shift`."""
    for c in range(chunk.first, chunk.first + chunk.here):
        gain = (weight[c] if weighted else like(1.0, var[c])) / math.sqrt(var[c] + eps)
        scale[c] = like(gain, scale[c])
        offset = -low[c] * gain
        shift[c] = like(offset + bias[c] if biased else offset, shift[c])


def forward(SCALAR: Any, REAL: Any, ACT: int, ADD: bool, MASKED: bool) -> Any:
    """Build the kernel for one stored type, the type computed in, activation, and options."""

    def kernel(args: Any) -> None:
        x, y = pointer(args[X], SCALAR), pointer(args[Y], SCALAR)
        residual = pointer(args[RESIDUAL], SCALAR)
        mean, scale, shift = (
            pointer(args[CENTER], REAL), pointer(args[SCALE], REAL), pointer(args[SHIFT], REAL),
        )  # fmt: skip
        low, var = pointer(args[LOW], REAL), pointer(args[VAR], REAL)
        partial = pointer(args[SUMS], np.float64)
        if MASKED:
            mask = pointer(args[MASK], np.uint8)
        else:
            mask = None
        valid = scratch(np.uint8)
        pivots, wide_1, wide_2, wide_3 = scratch(REAL), scratch(REAL), scratch(REAL), scratch(REAL)
        sums_1, sums_2 = scratch(np.float64), scratch(np.float64)
        mode, count = args[MODE], as_float(args[COUNT])

        while True:
            index = take(args)
            if index >= args[CHUNKS]:
                return
            chunk = chunk_at(args, index)
            if mode & (REDUCE | MERGE):
                if mode & PIVOTED:
                    for c in range(chunk.here):
                        pivots[c] = mean[chunk.first + c]
                else:
                    sample(x, chunk, pivots)
                for again in range(2):
                    if mode & MERGE:
                        gather(partial, args[STORED], chunk, sums_1, sums_2)
                    else:
                        spread(pivots, 0, chunk, wide_1)
                        reduce_moments(
                            x, mask, valid, chunk, wide_1, wide_2, wide_3, sums_1, sums_2
                        )
                    if not mode & (MAP | MERGE):
                        put_aside(partial, chunk, sums_1, sums_2)
                        break
                    far = settle(chunk, sums_1, sums_2, pivots, count, mean, low, var)
                    if mode & MERGE:
                        if far:
                            args[AGAIN] = 1
                        break
                    if not far or again == 1:
                        break
                    for c in range(chunk.here):
                        middle = mean[chunk.first + c]
                        pivots[c] = middle if math.isfinite(middle) else like(0.0, middle)
                if mode & (MAP | MERGE) and args[SCALE] != 0:
                    write_map(
                        chunk, low, var, pointer(args[WEIGHT], REAL), args[WEIGHT] != 0,
                        pointer(args[BIAS], REAL), args[BIAS] != 0, as_float(args[EPS]), scale, shift,
                    )  # fmt: skip
            if mode & MAP:
                spread(mean, chunk.first, chunk, wide_1)
                spread(scale, chunk.first, chunk, wide_2)
                spread(shift, chunk.first, chunk, wide_3)
                for row in range(chunk.top, chunk.bottom, chunk.together):
                    several = min(chunk.together, chunk.bottom - row)
                    for j in range(chunk.pieces):
                        start = strip_start(chunk, row, j)
                        for i in range(strip_width(chunk, several, j)):
                            z = (widen(x[start + i]) - wide_1[i]) * wide_2[i] + wide_3[i]
                            if ADD:
                                z += widen(residual[start + i])
                            y[start + i] = narrow(activate(z, ACT), SCALAR)

    return kernel
