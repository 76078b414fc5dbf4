"""The compiled CPU kernel of the forward direction: `moments`, `apply`, and both in one visit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .activations import activate, by_activation
from .loops import (
    AGAIN,
    BATCHES,
    BIAS,
    BLOCKS,
    CENTER,
    COMPILED,
    CONSTANT_FACTOR,
    COUNT,
    DONE,
    EPS,
    LOW,
    MAP,
    MASK,
    MERGE,
    MOMENTUM,
    PARTS,
    PASS,
    PASSES,
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
    SIGNS,
    SLOPE_FACTOR,
    STREAM,
    SUMS,
    TAKEN,
    VAR,
    WEIGHT,
    X,
    Y,
    called,
    chunk_at,
    compiled,
    gather,
    moments_of_planes,
    moments_of_strips,
    parts_in,
    pivot_at,
    put_aside,
    sample,
    send,
    settle,
    signs_of,
    spread,
    start_of,
    wait_for,
)  # fmt: skip
from .pointers import (
    LANES,
    STAGE,
    WIDTH,
    apart,
    as_float,
    beyond,
    bring,
    like,
    narrow,
    pointer,
    scratch,
    take,
    widen,
)
from .signs import GATES, write_signs


@called  # type: ignore[untyped-decorator]
def write_map(args: Any, chunk: Any, var: Any, scale: Any, shift: Any) -> None:
    """`(x - mean - low)·ρ·γ + β` as `(x - mean)·scale + shift`."""
    apart()
    low, weight, bias = bring(args[LOW], var), bring(args[WEIGHT], var), bring(args[BIAS], var)
    eps = as_float(args[EPS])
    for c in range(chunk.first, chunk.first + chunk.here):
        gain = (weight[c] if args[WEIGHT] != 0 else like(1.0, var[c])) / math.sqrt(var[c] + eps)
        scale[c] = like(gain, scale[c])
        offset = -low[c] * gain if args[LOW] != 0 else 0.0 * gain
        shift[c] = like(offset + bias[c] if args[BIAS] != 0 else offset, shift[c])


@called  # type: ignore[untyped-decorator]
def record(args: Any, chunk: Any, mean: Any, var: Any, scale: Any) -> None:
    """What a training step of policy `Batch` leaves: the backward's factors, running statistics."""
    apart()
    rho, low = bring(args[RHO], var), bring(args[LOW], var)
    slope, constant = bring(args[SLOPE_FACTOR], var), bring(args[CONSTANT_FACTOR], var)
    eps, count, weight = as_float(args[EPS]), as_float(args[COUNT]), as_float(args[MOMENTUM])
    unbiased = count / (count - 1.0) if count > 1.0 else 1.0
    if args[BATCHES] != 0 and chunk.first == 0:
        pointer(args[BATCHES], np.int64)[0] += 1
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
        moments_of_planes(x, mask, chunk, pivots, sums_1, sums_2)
    else:
        spread(pivots, chunk, wide_1)
        moments_of_strips(x, mask, valid, chunk, wide_1, wide_2, wide_3, sums_1, sums_2)


@by_activation(**COMPILED)
def map_chunk(ACT: int) -> Any:
    """`activation((x - mean)·scale + shift + residual)`; its signs to `open_`, if there is room."""

    def write(
        args: Any, x: Any, residual: Any, y: Any, open_: Any, staged: Any, chunk: Any, mean: Any,
        scale: Any, shift: Any, wide_1: Any, wide_2: Any, wide_3: Any, code: Any,
    ) -> None:  # fmt: skip
        streams, signed = args[STREAM] != 0, open_ is not None and args[SIGNS] != 0
        if chunk.planes:
            piece = STAGE if streams else WIDTH if signed else chunk.length
            for row in range(chunk.top, chunk.bottom):
                for c in range(chunk.here):
                    k = chunk.first + c
                    m, s, t = mean[k], scale[k], shift[k]
                    for begin in range(0, chunk.length, piece):
                        offset = c * chunk.length + begin
                        start = start_of(chunk, row) + offset
                        several = min(piece, chunk.length - begin)
                        target = staged if streams else beyond(y, start)
                        for i in range(several):
                            z = (widen(x[start + i]) - m) * s + t
                            if residual is not None:
                                z += widen(residual[start + i])
                            target[i] = narrow(activate(z, ACT), y)
                        if open_ is not None and signed:
                            words = signs_of(chunk, row) + offset // LANES
                            write_signs(target, several, beyond(open_, words), ACT)
                        if streams:
                            send(staged, beyond(y, start), several)
        else:
            spread(beyond(mean, chunk.first), chunk, wide_1)
            spread(beyond(scale, chunk.first), chunk, wide_2)
            spread(beyond(shift, chunk.first), chunk, wide_3)
            piece = STAGE if streams else WIDTH
            for row in range(chunk.top, chunk.bottom, chunk.together):
                width = min(chunk.together, chunk.bottom - row) * chunk.here * chunk.length
                for begin in range(0, width, piece):
                    start, several = start_of(chunk, row) + begin, min(piece, width - begin)
                    target = staged if streams else beyond(y, start)
                    for i in range(several):
                        k = begin + i
                        z = (widen(x[start + i]) - wide_1[k]) * wide_2[k] + wide_3[k]
                        if residual is not None:
                            z += widen(residual[start + i])
                        target[i] = narrow(activate(z, ACT), y)
                    if open_ is not None and signed:
                        words = signs_of(chunk, row) + begin // LANES
                        write_signs(target, several, beyond(open_, words), ACT)
                    if streams:
                        send(staged, beyond(y, start), several)

    return write


def forward(SCALAR: Any, REAL: Any, ACT: int, ADD: bool, MASKED: bool) -> Any:
    """Build the kernel for one stored type, the type computed in, activation, and options."""
    SIGNED = ADD and ACT in GATES

    def kernel(args: Any) -> None:
        x, y = pointer(args[X], SCALAR), pointer(args[Y], SCALAR)
        residual = pointer(args[RESIDUAL], SCALAR) if ADD else None
        mean, scale, shift = (
            pointer(args[CENTER], REAL), pointer(args[SCALE], REAL), pointer(args[SHIFT], REAL),
        )  # fmt: skip
        low, var = pointer(args[LOW], REAL), pointer(args[VAR], REAL)
        partial = pointer(args[SUMS], np.float64)
        mask = pointer(args[MASK], np.uint8) if MASKED else None
        valid = scratch(np.uint8)
        pivots, wide_1, wide_2, wide_3 = scratch(REAL), scratch(REAL), scratch(REAL), scratch(REAL)
        sums_1, sums_2 = scratch(np.float64), scratch(np.float64)
        count, staged = as_float(args[COUNT]), scratch(SCALAR)
        open_ = pointer(args[SIGNS], np.uint16) if SIGNED else None

        for step in range(PASSES):
            mode = args[PASS + step]
            if mode == 0:
                return
            if mode & PIVOTED and args[AGAIN] == 0:
                continue
            chunks = parts_in(args, mode) * args[BLOCKS]
            index, moved = take(args, TAKEN + step), False
            while index < chunks:
                chunk = chunk_at(args, mode, index)
                if mode & (REDUCE | MERGE):
                    if moved or mode & PIVOTED:
                        pivot_at(mean, chunk, pivots)
                    else:
                        sample(x, mask, chunk, pivots)
                    if mode & MERGE:
                        gather(partial, args[PARTS], chunk, sums_1, sums_2)
                    else:
                        reduce(
                            x, mask, valid, chunk, pivots, wide_1, wide_2, wide_3, sums_1, sums_2
                        )
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
                if mode & MAP:
                    map_chunk(
                        args, x, residual, y, open_, staged, chunk, mean, scale, shift,
                        wide_1, wide_2, wide_3, ACT,
                    )  # fmt: skip
                take(args, DONE + step)
                index, moved = take(args, TAKEN + step), False
            wait_for(args, DONE + step, chunks)

    return kernel
