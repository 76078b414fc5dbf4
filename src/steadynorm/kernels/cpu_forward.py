"""The compiled CPU kernel of the forward direction: `moments`, `apply`, and both in one visit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .cpu_activations import activate
from .cpu_loops import (
    AGAIN,
    BIAS,
    CENTER,
    CHUNKS,
    CONSTANT_FACTOR,
    COUNT,
    EPS,
    LOW,
    MAP,
    MASK,
    MERGE,
    MODE,
    MOMENTUM,
    PIVOTED,
    RECORD,
    REDUCE,
    RESIDUAL,
    RHO,
    RUNNING_MEAN,
    RUNNING_VAR,
    SCALE,
    SETTLE,
    SHIFT,
    SLOPE_FACTOR,
    STORED,
    SUMS,
    VAR,
    WEIGHT,
    X,
    Y,
    chunk_at,
    compiled,
    gather,
    moments_of_planes,
    moments_of_strips,
    pivot_at,
    put_aside,
    sample,
    settle,
    spread,
    start_of,
)  # fmt: skip
from .cpu_memory import as_float, bring, like, narrow, pointer, scratch, take, widen


@compiled  # type: ignore[untyped-decorator]
def write_map(args: Any, chunk: Any, var: Any, scale: Any, shift: Any) -> None:
    """`(x - mean - low)·ρ·γ + β` as `(x - mean)·scale + shift`."""
    low, weight, bias = bring(args[LOW], var), bring(args[WEIGHT], var), bring(args[BIAS], var)
    eps = as_float(args[EPS])
    for c in range(chunk.first, chunk.first + chunk.here):
        gain = (weight[c] if args[WEIGHT] != 0 else like(1.0, var[c])) / math.sqrt(var[c] + eps)
        scale[c] = like(gain, scale[c])
        offset = -low[c] * gain if args[LOW] != 0 else 0.0 * gain
        shift[c] = like(offset + bias[c] if args[BIAS] != 0 else offset, shift[c])


@compiled  # type: ignore[untyped-decorator]
def record(args: Any, chunk: Any, mean: Any, var: Any, scale: Any) -> None:
    """What a training step of policy `Batch` leaves: the backward's factors, running statistics."""
    rho, low = bring(args[RHO], var), bring(args[LOW], var)
    slope, constant = bring(args[SLOPE_FACTOR], var), bring(args[CONSTANT_FACTOR], var)
    eps, count, weight = as_float(args[EPS]), as_float(args[COUNT]), as_float(args[MOMENTUM])
    unbiased = count / (count - 1.0) if count > 1.0 else 1.0
    old_mean, old_var = bring(args[RUNNING_MEAN], var), bring(args[RUNNING_VAR], var)
    for c in range(chunk.first, chunk.first + chunk.here):
        r = 1.0 / math.sqrt(var[c] + eps)
        rho[c] = like(r, rho[c])
        slope[c] = like(scale[c] * r * r / count, slope[c])
        constant[c] = like(scale[c] / count, constant[c])
        if args[RUNNING_MEAN] != 0:
            m, v = old_mean[c], old_var[c]
            old_mean[c] = like(m + weight * ((mean[c] - m) + low[c]), m)
            old_var[c] = like(v + weight * (var[c] * unbiased - v), v)


@compiled  # type: ignore[untyped-decorator]
def reduce(
    x: Any, mask: Any, valid: Any, chunk: Any, pivots: Any, wide_1: Any, wide_2: Any, wide_3: Any,
    sums_1: Any, sums_2: Any,
) -> None:  # fmt: skip
    """Σ(x - pivot) and Σ(x - pivot)² of every channel of the chunk."""
    if chunk.planes:
        moments_of_planes(x, mask, chunk, pivots[0], sums_1, sums_2)
    else:
        spread(pivots, 0, chunk, wide_1)
        moments_of_strips(x, mask, valid, chunk, wide_1, wide_2, wide_3, sums_1, sums_2)


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
        mask = pointer(args[MASK], np.uint8) if MASKED else None
        valid = scratch(np.uint8)
        pivots, wide_1, wide_2, wide_3 = scratch(REAL), scratch(REAL), scratch(REAL), scratch(REAL)
        sums_1, sums_2 = scratch(np.float64), scratch(np.float64)
        mode, count = args[MODE], as_float(args[COUNT])

        index, moved = take(args), False
        while index < args[CHUNKS]:
            chunk = chunk_at(args, index)
            if mode & (REDUCE | MERGE):
                if moved or mode & PIVOTED:
                    pivot_at(mean, chunk, pivots)
                else:
                    sample(x, mask, chunk, pivots)
                if mode & MERGE:
                    gather(partial, args[STORED], chunk, sums_1, sums_2)
                else:
                    reduce(x, mask, valid, chunk, pivots, wide_1, wide_2, wide_3, sums_1, sums_2)
                if not mode & (MAP | MERGE):
                    put_aside(partial, chunk, sums_1, sums_2)
                else:
                    far = settle(chunk, sums_1, sums_2, pivots, count, mean, low, var)
                    if far and mode & MERGE:
                        args[AGAIN] = 1
                    elif far and not moved:
                        moved = True
                        continue
            if mode & SETTLE:
                write_map(args, chunk, var, scale, shift)
            if mode & RECORD:
                record(args, chunk, mean, var, scale)
            if mode & MAP and chunk.planes:
                m, s, t = mean[chunk.first], scale[chunk.first], shift[chunk.first]
                for row in range(chunk.top, chunk.bottom):
                    start = start_of(chunk, row)
                    for i in range(start, start + chunk.length):
                        z = (widen(x[i]) - m) * s + t
                        if ADD:
                            z += widen(residual[i])
                        y[i] = narrow(activate(z, ACT), y)
            elif mode & MAP:
                spread(mean, chunk.first, chunk, wide_1)
                spread(scale, chunk.first, chunk, wide_2)
                spread(shift, chunk.first, chunk, wide_3)
                for row in range(chunk.top, chunk.bottom, chunk.together):
                    start = start_of(chunk, row)
                    for i in range(
                        min(chunk.together, chunk.bottom - row) * chunk.here * chunk.length
                    ):
                        z = (widen(x[start + i]) - wide_1[i]) * wide_2[i] + wide_3[i]
                        if ADD:
                            z += widen(residual[start + i])
                        y[start + i] = narrow(activate(z, ACT), y)
            index, moved = take(args), False

    return kernel
