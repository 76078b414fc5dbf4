"""Geometry and sums shared by the compiled CPU kernels of both directions.

x is seen as `rows` x `channels` x `length`, contiguous: N x C x L for channels-first,
(N·L) x C x 1 for channels-last, N x C x 1 for (N, C). Work is cut into chunks: a block of channels
times a range of rows. There are two ways through a chunk:

    planes    length >= PLANES_FROM: the loops run along planes, of several channels one after the
              other, since long stretches are read faster; in a map alone also shorter planes
    strips    shorter: one row's planes of a block of channels, at most WIDTH elements (in
              channels-last rows MAX_WIDTH), are one strip; where a row has less than half of that,
              `rows_per_strip` rows are one

A call is a list of passes over all chunks, such as: reduce, merge, map. Threads take chunks one by
one, and wait for one another between passes.

A strip is added, element by element, to accumulators as wide as itself, and per-channel arguments
are spread out to the same width. So the inner loops are maps without a carried sum: nothing is
padded, small planes cost no remainder loops. Every FLUSH strips go from float32 to float64 sums.

A kernel's one argument is the address of the structure in arguments.py.
"""

from __future__ import annotations

import math
from collections import namedtuple
from typing import Any

from numba import njit

from .arguments import at
from .pointers import (
    LANES,
    call_sched_yield,
    like,
    load_atomic,
    noinline,
    pause,
    stream,
    to_boundary,
    widen,
)

SUM_LENGTH = 4096  # elements of a plane that are summed in float32; these sums, in float64
FLUSH = 64  # strips that are summed in float32, likewise
SAMPLE = 16  # values of each channel whose mean is its pivot

# Bits of a pass.
REDUCE, MAP, MERGE, PIVOTED, BACKWARDS, DECIDE, RECORD, BLEND = 1, 2, 4, 8, 16, 32, 64, 128
RUNNING = 256  # the running statistics normalize, and stay

Chunk = namedtuple(
    "Chunk",
    "rows channels length part block blocks first in_block top bottom rows_per_strip copies "
    "planes words",
)

COMPILED = {"forceinline": True, "error_model": "numpy", "fastmath": {"contract"}}
compiled = njit(**COMPILED)
"""All flags are given: a function that leaves one out takes its caller's `fastmath`."""
called = njit(forceinline=False, error_model="numpy", fastmath={"contract"})
"""For functions that run once a chunk or strip: not inlined, each is compiled once in a kernel."""
SUMMED = {"forceinline": True, "error_model": "numpy", "fastmath": {"reassoc", "contract"}}
summed = njit(**SUMMED)
added = njit(forceinline=False, error_model="numpy", fastmath={"reassoc", "contract"})
"""For sums: reassociation lets the compiler vectorize them. NaN and infinity keep their meaning."""


@compiled  # type: ignore[untyped-decorator]
def parts_in(args: Any, mode: Any) -> Any:
    """How many ranges of rows a pass has: 1 in a visit, whose map needs the sums over all rows."""
    reduces, maps = mode & REDUCE, mode & MAP
    return args[at.parts] if (reduces != 0) != (maps != 0) else 1


@compiled  # type: ignore[untyped-decorator]
def wait_for(args: Any, slot: Any, wanted: Any) -> None:
    """Spin until all chunks of a pass are done, whichever threads took them."""
    spins = 0
    while load_atomic(args, slot) < wanted:
        spins += 1
        if spins % 1024 == 0 and args[at.sched_yield] != 0:
            call_sched_yield(args[at.sched_yield])
        else:
            pause()


@compiled  # type: ignore[untyped-decorator]
def words_of(count: Any) -> Any:
    """How many words hold the signs of `count` values."""
    return (count + LANES - 1) // LANES


@compiled  # type: ignore[untyped-decorator]
def chunk_at(args: Any, mode: Any, index: Any) -> Any:
    """The block of channels and the range of rows that chunk `index` of a pass stands for."""
    rows, channels, length = args[at.rows], args[at.channels], args[at.length]
    parts, rows_per_strip = parts_in(args, mode), args[at.rows_per_strip]
    if mode & BACKWARDS:
        index = parts * args[at.blocks] - 1 - index
    part, block = index // args[at.blocks], index % args[at.blocks]
    first = block * args[at.block]
    in_block = min(channels - first, args[at.block])
    strips = (rows + rows_per_strip - 1) // rows_per_strip
    top = strips * part // parts * rows_per_strip
    bottom = min(strips * (part + 1) // parts * rows_per_strip, rows)
    copies = min(rows_per_strip, bottom - top)
    return Chunk(
        rows,
        channels,
        length,
        part,
        block,
        args[at.blocks],
        first,
        in_block,
        top,
        bottom,
        rows_per_strip,
        copies,
        args[at.planes] != 0,
        args[at.block] * words_of(length)
        if args[at.planes] != 0
        else words_of(rows_per_strip * args[at.block] * length),
    )


@compiled  # type: ignore[untyped-decorator]
def start_of(chunk: Any, row: Any) -> Any:
    """Where the chunk's first channel begins in this row."""
    return (row * chunk.channels + chunk.first) * chunk.length


@compiled  # type: ignore[untyped-decorator]
def signs_of(chunk: Any, row: Any, plane: Any, begin: Any) -> Any:
    """Where the signs lie of what begins at value `begin` of a strip, or of the block's `plane`."""
    first = (row // chunk.rows_per_strip * chunk.blocks + chunk.block) * chunk.words
    return first + plane * words_of(chunk.length) + begin // LANES


@compiled  # type: ignore[untyped-decorator]
def minus(a: Any, b: Any) -> Any:
    """a - b, compiled without reassociation, which the sums around it allow."""
    return a - b


@called  # type: ignore[untyped-decorator]
def spread(values: Any, chunk: Any, wide: Any) -> None:
    """Broadcast one value per channel to the elements of a strip."""
    noinline()
    at = 0
    for _ in range(chunk.copies):
        if chunk.length == 1:
            for c in range(chunk.in_block):
                wide[at + c] = values[c]
        else:
            for c in range(chunk.in_block):
                v = values[c]
                for i in range(chunk.length):
                    wide[at + c * chunk.length + i] = v
        at += chunk.in_block * chunk.length


@called  # type: ignore[untyped-decorator]
def spread_mask(mask: Any, chunk: Any, row: Any, several: Any, valid: Any) -> None:
    """Broadcast the mask of `several` rows to the elements of a strip."""
    noinline()
    at = 0
    for r in range(row, row + several):
        for _ in range(chunk.in_block):
            for i in range(chunk.length):
                valid[at + i] = mask[r * chunk.length + i]
            at += chunk.length


@called  # type: ignore[untyped-decorator]
def copy_past_caches(source: Any, target: Any, count: Any) -> None:
    """Copy `count` values by non-temporal stores; by ordinary ones what fills no cache line.

    An ordinary store reads the cache line before it writes it: 1 of 3 passes over memory for a
    tensor that has left the caches. `fetch_add` drains pending stores, so that other threads may
    read the values after the next one.
    """
    noinline()
    ahead = min(count, to_boundary(target))
    whole = (count - ahead) // LANES * LANES
    for i in range(ahead):
        target[i] = source[i]
    for i in range(ahead, ahead + whole, LANES):
        stream(source, target, i)
    for i in range(ahead + whole, count):
        target[i] = source[i]


@called  # type: ignore[untyped-decorator]
def clear(values: Any, count: Any) -> None:
    """Set the first `count` values to 0."""
    noinline()
    for i in range(count):
        values[i] = like(0.0, values[i])


@added  # type: ignore[untyped-decorator]
def flush(wide: Any, chunk: Any, sums: Any) -> None:
    """Add the strip's accumulators to their channels' sums in float64, and clear them."""
    noinline()
    at = 0
    for _ in range(chunk.copies):
        if chunk.length == 1:
            for c in range(chunk.in_block):
                sums[c] += wide[at + c]
        else:
            for c in range(chunk.in_block):
                total = 0.0
                for i in range(chunk.length):
                    total += wide[at + c * chunk.length + i]
                sums[c] += total
        at += chunk.in_block * chunk.length
    clear(wide, at)


@called  # type: ignore[untyped-decorator]
def sample(x: Any, mask: Any, chunk: Any, pivots: Any) -> None:
    """A pivot per channel: the mean of up to `SAMPLE` valid values, evenly spread over positions.

    Evenly spread, since neighbouring values are alike: an image begins with its border.
    """
    noinline()
    total = chunk.rows * chunk.length
    few = min(total, SAMPLE)
    seen = 0
    clear(pivots, chunk.in_block)
    for k in range(few):
        at = k * total // few
        if mask is not None and mask[at] == 0:
            continue
        seen += 1
        row, i = at // chunk.length, at % chunk.length
        start = (row * chunk.channels + chunk.first) * chunk.length + i
        if chunk.length == 1:
            for c in range(chunk.in_block):
                pivots[c] += widen(x[start + c])
        else:
            for c in range(chunk.in_block):
                pivots[c] += widen(x[start + c * chunk.length])
    for c in range(chunk.in_block):
        pivot = pivots[c] / like(max(seen, 1), pivots[c])
        pivots[c] = pivot if math.isfinite(pivot) else like(0.0, pivot)


@called  # type: ignore[untyped-decorator]
def pivot_at(mean: Any, chunk: Any, pivots: Any) -> None:
    """Take the means as pivots."""
    noinline()
    for c in range(chunk.in_block):
        m = mean[chunk.first + c]
        pivots[c] = m if math.isfinite(m) else like(0.0, m)


@summed  # type: ignore[untyped-decorator]
def moments_of_planes(x: Any, mask: Any, chunk: Any, pivots: Any, sums_1: Any, sums_2: Any) -> None:
    """Σ(x - pivot) and Σ(x - pivot)² of every channel of the chunk, over valid positions."""
    clear(sums_1, chunk.in_block)
    clear(sums_2, chunk.in_block)
    for row in range(chunk.top, chunk.bottom):
        for c in range(chunk.in_block):
            pivot = pivots[c]
            total_1, total_2 = 0.0, 0.0
            for begin in range(0, chunk.length, SUM_LENGTH):
                start = start_of(chunk, row) + c * chunk.length + begin
                part_1, part_2 = like(0.0, pivot), like(0.0, pivot)
                for i in range(min(SUM_LENGTH, chunk.length - begin)):
                    d = minus(widen(x[start + i]), pivot)
                    if mask is not None:
                        d = d if mask[row * chunk.length + begin + i] != 0 else like(0.0, d)
                    part_1 += d
                    part_2 += d * d
                total_1 += part_1
                total_2 += part_2
            sums_1[c] += total_1
            sums_2[c] += total_2


@compiled  # type: ignore[untyped-decorator]
def moments_of_strips(
    x: Any, mask: Any, valid: Any, chunk: Any, pivot: Any, wide_1: Any, wide_2: Any,
    sums_1: Any, sums_2: Any,
) -> None:  # fmt: skip
    """Σ(x - pivot) and Σ(x - pivot)² of every channel of the chunk, over valid positions."""
    clear(sums_1, chunk.in_block)
    clear(sums_2, chunk.in_block)
    columns = chunk.in_block * chunk.length
    clear(wide_1, chunk.copies * columns)
    clear(wide_2, chunk.copies * columns)
    held = 0
    for row in range(chunk.top, chunk.bottom, chunk.rows_per_strip):
        start = start_of(chunk, row)
        several = min(chunk.rows_per_strip, chunk.bottom - row)
        if mask is not None:
            spread_mask(mask, chunk, row, several, valid)
        for i in range(several * columns):
            d = widen(x[start + i]) - pivot[i]
            if mask is not None:
                d = d if valid[i] != 0 else like(0.0, d)
            wide_1[i] += d
            wide_2[i] += d * d
        held += 1
        if held >= FLUSH:
            flush(wide_1, chunk, sums_1)
            flush(wide_2, chunk, sums_2)
            held = 0
    flush(wide_1, chunk, sums_1)
    flush(wide_2, chunk, sums_2)


@called  # type: ignore[untyped-decorator]
def store_partial(partial: Any, chunk: Any, sums_1: Any, sums_2: Any) -> None:
    """Write this part's sums, for the pass that merges."""
    noinline()
    start = 2 * chunk.part * chunk.channels + chunk.first
    for c in range(chunk.in_block):
        partial[start + c] = sums_1[c]
        partial[start + chunk.channels + c] = sums_2[c]


@called  # type: ignore[untyped-decorator]
def add_partials(partial: Any, parts: Any, chunk: Any, sums_1: Any, sums_2: Any) -> None:
    """Add the sums of all parts."""
    noinline()
    clear(sums_1, chunk.in_block)
    clear(sums_2, chunk.in_block)
    for part in range(parts):
        start = 2 * part * chunk.channels + chunk.first
        for c in range(chunk.in_block):
            sums_1[c] += partial[start + c]
            sums_2[c] += partial[start + chunk.channels + c]


@called  # type: ignore[untyped-decorator]
def write_moments(
    chunk: Any, sums_1: Any, sums_2: Any, pivots: Any, count: Any, mean: Any, low: Any, var: Any
) -> Any:
    """Write the mean, its rounding error and the biased variance; True if a pivot was too far off.

    With the pivot within one standard deviation of the mean, the subtraction below loses at most
    one bit. Farther off, the caller takes the mean as pivot and reduces again.
    """
    noinline()
    far = False
    for c in range(chunk.in_block):
        step = sums_1[c] / count
        spread_about = sums_2[c] / count - step * step
        far = far or step * step > spread_about
        k = chunk.first + c
        mean[k] = like(pivots[c] + step, mean[k])
        lost = (pivots[c] - mean[k]) + step
        low[k] = like(lost if math.isfinite(lost) else 0.0, low[k])
        var[k] = like(0.0 if spread_about < 0.0 else spread_about, var[k])
    return far
