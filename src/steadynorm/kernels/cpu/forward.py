"""The compiled CPU kernel of the forward direction: `moments`, `apply`, and both in one visit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .activations import activate, by_activation, vectors_for
from .arguments import PASSES, at
from .loops import (
    BLEND,
    COMPILED,
    DECIDE,
    MAP,
    MERGE,
    PIVOTED,
    RECORD,
    REDUCE,
    RUNNING,
    add_partials,
    called,
    chunk_at,
    compiled,
    copy_past_caches,
    moments_of_planes,
    moments_of_strips,
    parts_in,
    pivot_at,
    sample,
    signs_of,
    spread,
    start_of,
    store_partial,
    wait_for,
    write_moments,
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
from .signs import GATES, write_signs


@called  # type: ignore[untyped-decorator]
def write_scale_and_shift(args: Any, chunk: Any, var: Any, scale: Any, shift: Any) -> None:
    """`(x - mean - low)·ρ·γ + β` as `(x - mean)·scale + shift`."""
    noinline()
    low, eps = pointer_like(args[at.center_low], var), as_float(args[at.eps])
    weight, bias = pointer_like(args[at.weight], var), pointer_like(args[at.bias], var)
    for c in range(chunk.first, chunk.first + chunk.in_block):
        gain = (weight[c] if args[at.weight] != 0 else like(1.0, var[c])) / math.sqrt(var[c] + eps)
        scale[c] = like(gain, scale[c])
        offset = -low[c] * gain if args[at.center_low] != 0 else 0.0 * gain
        shift[c] = like(offset + bias[c] if args[at.bias] != 0 else offset, shift[c])


@called  # type: ignore[untyped-decorator]
def blend(args: Any, chunk: Any, mean: Any, var: Any) -> None:
    """What `Steady` decides: `statistics.blend`, and `merge_average` of the running statistics.

    Overwrites the batch's moments with those that normalize.
    """
    noinline()
    low, gap = pointer_like(args[at.center_low], var), pointer_like(args[at.mean_gap], var)
    batch_var = pointer_like(args[at.batch_var], var)
    running_mean = pointer_like(args[at.running_mean], var)
    running_var = pointer_like(args[at.running_var], var)
    share, weight = as_float(args[at.share]), as_float(args[at.momentum])
    for c in range(chunk.first, chunk.first + chunk.in_block):
        old, batch = like(running_mean[c], share), like(mean[c], share)
        delta, v, old_var = (batch - old) + low[c], var[c], running_var[c]
        step = share * delta
        mean[c] = like(old + step, mean[c])
        gap[c] = like((batch - mean[c]) + low[c], gap[c])
        lost = (old - mean[c]) + step
        low[c] = like(lost if math.isfinite(lost) else 0.0, low[c])
        batch_var[c] = v
        spread_out = delta * delta
        rest = 1.0 - share
        var[c] = like(rest * old_var + share * (v + rest * spread_out), v)
        running_mean[c] = like(old + weight * delta, mean[c])
        rest = 1.0 - weight
        running_var[c] = like(rest * old_var + weight * (v + rest * spread_out), v)


@called  # type: ignore[untyped-decorator]
def move_running(args: Any, chunk: Any, mean: Any, var: Any) -> None:
    """`statistics.update_average`, by torch's rule."""
    noinline()
    low, gap = pointer_like(args[at.center_low], var), pointer_like(args[at.mean_gap], var)
    batch_var = pointer_like(args[at.batch_var], var)
    running_mean = pointer_like(args[at.running_mean], var)
    running_var = pointer_like(args[at.running_var], var)
    count, weight = as_float(args[at.count]), as_float(args[at.momentum])
    unbiased = count / (count - 1.0) if count > 1.0 else 1.0
    for c in range(chunk.first, chunk.first + chunk.in_block):
        gap[c], batch_var[c] = low[c], var[c]
        if args[at.running_mean] != 0:
            m, v = running_mean[c], running_var[c]
            running_mean[c] = like(m + weight * ((mean[c] - m) + low[c]), m)
            running_var[c] = like(v + weight * (var[c] * unbiased - v), v)


@called  # type: ignore[untyped-decorator]
def take_running(args: Any, chunk: Any, mean: Any, var: Any) -> None:
    """The running statistics as what normalizes, copied: they may move before the backward."""
    noinline()
    low = pointer_like(args[at.center_low], var)
    running_mean = pointer_like(args[at.running_mean], var)
    running_var = pointer_like(args[at.running_var], var)
    for c in range(chunk.first, chunk.first + chunk.in_block):
        mean[c], low[c], var[c] = running_mean[c], like(0.0, var[c]), running_var[c]


@called  # type: ignore[untyped-decorator]
def record_step(args: Any, chunk: Any, var: Any, scale: Any) -> None:
    """What a forward leaves for its backward, `statistics.gradient_factors`; counts the batch."""
    noinline()
    rho = pointer_like(args[at.rho], var)
    constant = pointer_like(args[at.constant_factor], var)
    eps, part = as_float(args[at.eps]), as_float(args[at.share]) / as_float(args[at.count])
    if args[at.num_batches_tracked] != 0 and chunk.first == 0:
        pointer(args[at.num_batches_tracked], np.int64)[0] += 1
    for c in range(chunk.first, chunk.first + chunk.in_block):
        r = 1.0 / math.sqrt(var[c] + eps)
        rho[c] = like(r, rho[c])
        constant[c] = like(scale[c] * part, constant[c])


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
    """`activation((x - mean)·scale + shift + residual)`; sign bits to `signs`, if that is given."""

    def write(
        args: Any, x: Any, residual: Any, y: Any, signs: Any, staged: Any, chunk: Any, mean: Any,
        scale: Any, shift: Any, wide_1: Any, wide_2: Any, wide_3: Any, code: Any,
    ) -> None:  # fmt: skip
        vectors_for(code)
        streams, signed = args[at.streams] != 0, signs is not None and args[at.signs] != 0
        if chunk.planes:
            piece = STAGE if streams else WIDTH if signed else chunk.length
            for row in range(chunk.top, chunk.bottom):
                for c in range(chunk.in_block):
                    k = chunk.first + c
                    m, s, t = mean[k], scale[k], shift[k]
                    for begin in range(0, chunk.length, piece):
                        offset = c * chunk.length + begin
                        start = start_of(chunk, row) + offset
                        several = min(piece, chunk.length - begin)
                        target = staged if streams else shifted(y, start)
                        for i in range(several):
                            z = (widen(x[start + i]) - m) * s + t
                            if residual is not None:
                                z += widen(residual[start + i])
                            target[i] = narrow(activate(z, ACT), y)
                        if signs is not None and signed:
                            words = signs_of(chunk, row, c, begin)
                            write_signs(target, several, shifted(signs, words), ACT)
                        if streams:
                            copy_past_caches(staged, shifted(y, start), several)
        else:
            spread(shifted(mean, chunk.first), chunk, wide_1)
            spread(shifted(scale, chunk.first), chunk, wide_2)
            spread(shifted(shift, chunk.first), chunk, wide_3)
            piece = STAGE if streams else WIDTH
            for row in range(chunk.top, chunk.bottom, chunk.rows_per_strip):
                rows = min(chunk.rows_per_strip, chunk.bottom - row)
                width = rows * chunk.in_block * chunk.length
                for begin in range(0, width, piece):
                    start, several = start_of(chunk, row) + begin, min(piece, width - begin)
                    target = staged if streams else shifted(y, start)
                    for i in range(several):
                        k = begin + i
                        z = (widen(x[start + i]) - wide_1[k]) * wide_2[k] + wide_3[k]
                        if residual is not None:
                            z += widen(residual[start + i])
                        target[i] = narrow(activate(z, ACT), y)
                    if signs is not None and signed:
                        words = signs_of(chunk, row, 0, begin)
                        write_signs(target, several, shifted(signs, words), ACT)
                    if streams:
                        copy_past_caches(staged, shifted(y, start), several)

    return write


def forward(SCALAR: Any, REAL: Any, ACT: int, ADD: bool, MASKED: bool) -> Any:
    """Build the kernel for one stored type, the type computed in, activation, and options."""
    SIGNED = ADD and ACT in GATES

    def kernel(args: Any) -> None:
        x, y = pointer(args[at.x], SCALAR), pointer(args[at.y], SCALAR)
        residual = pointer(args[at.residual], SCALAR) if ADD else None
        mean = pointer(args[at.center], REAL)
        scale, shift = pointer(args[at.scale], REAL), pointer(args[at.shift], REAL)
        low, var = pointer(args[at.center_low], REAL), pointer(args[at.var], REAL)
        partial = pointer(args[at.partial], np.float64)
        mask = pointer(args[at.mask], np.uint8) if MASKED else None
        valid = scratch(np.uint8)
        pivots, wide_1, wide_2, wide_3 = scratch(REAL), scratch(REAL), scratch(REAL), scratch(REAL)
        sums_1, sums_2 = scratch(np.float64), scratch(np.float64)
        count, staged = as_float(args[at.count]), scratch(SCALAR)
        signs = pointer(args[at.signs], np.uint16) if SIGNED else None

        for step in range(PASSES):
            mode = args[at.passes + step]
            if mode == 0:
                return
            if mode & PIVOTED and args[at.pivot_moved] == 0:
                continue
            chunks = parts_in(args, mode) * args[at.blocks]
            index, moved = fetch_add(args, at.taken + step), False
            while index < chunks:
                chunk = chunk_at(args, mode, index)
                if mode & (REDUCE | MERGE):
                    if moved or mode & PIVOTED:
                        pivot_at(mean, chunk, pivots)
                    else:
                        sample(x, mask, chunk, pivots)
                    if mode & MERGE:
                        add_partials(partial, args[at.parts], chunk, sums_1, sums_2)
                    else:
                        reduce(
                            x, mask, valid, chunk, pivots, wide_1, wide_2, wide_3, sums_1, sums_2
                        )
                    if not mode & (MAP | MERGE):
                        store_partial(partial, chunk, sums_1, sums_2)
                    else:
                        far = write_moments(chunk, sums_1, sums_2, pivots, count, mean, low, var)
                        if far and mode & MERGE:
                            args[at.pivot_moved] = 1
                        elif far and not moved:
                            moved = True
                            continue
                if mode & RUNNING:
                    take_running(args, chunk, mean, var)
                elif mode & BLEND:
                    blend(args, chunk, mean, var)
                elif mode & RECORD:
                    move_running(args, chunk, mean, var)
                if mode & DECIDE:
                    write_scale_and_shift(args, chunk, var, scale, shift)
                if mode & RECORD:
                    record_step(args, chunk, var, scale)
                if mode & MAP:
                    map_chunk(
                        args, x, residual, y, signs, staged, chunk, mean, scale, shift,
                        wide_1, wide_2, wide_3, ACT,
                    )  # fmt: skip
                fetch_add(args, at.done + step)
                index, moved = fetch_add(args, at.taken + step), False
            wait_for(args, at.done + step, chunks)

    return kernel
