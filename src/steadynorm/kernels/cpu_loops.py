"""Geometry and sums shared by the compiled CPU kernels of both directions.

x is seen as `rows` x `channels` x `length`, contiguous: N x C x L for channels-first, (N·L) x C x 1
for channels-last, N x C x 1 for (N, C). Work is cut into chunks: a block of channels times a range of
rows. Within a chunk the loops run over strips of at most WIDTH contiguous elements:

    length > WIDTH           pieces of one plane; a block is one channel
    length <= WIDTH          one row's planes of a block of channels
    channels·length small    whole rows, `together` at once

Whatever the shape, a strip is added, element by element, to accumulators as wide as itself, and
per-channel arguments are spread out to the same width. So the inner loops are maps without a carried
sum: they vectorize without leave to reorder floating-point operations, nothing is padded, and small
planes cost no remainder loops. Every FLUSH strips the accumulators are added to sums in float64.

A kernel's one argument is the address of SIZE int64, laid out by the constants below.
"""

from __future__ import annotations

import math
from collections import namedtuple
from typing import Any

from numba import njit

from .cpu_memory import WIDTH, like, widen

FLUSH = 64
SAMPLE = 32

REDUCE, MAP, MERGE, PIVOTED, BACKWARDS = 1, 2, 4, 8, 16  # bits of MODE

(
    COUNTER, CHUNKS, MODE, ROWS, CHANNELS, LENGTH, BLOCK, BLOCKS, PARTS, TOGETHER, STORED, AGAIN,
    SUMS, X, RESIDUAL, Y, MASK, CENTER, SCALE, SHIFT,
    COUNT, EPS, LOW, VAR, WEIGHT, BIAS,
    GRAD, DX, DRESIDUAL, SUM_GRAD, SUM_GRAD_X, SLOPE, CONSTANT,
    SLOPE_FACTOR, CONSTANT_FACTOR, MEAN_LOW, MEAN_GAP, SIZE,
) = range(38)  # fmt: skip

Chunk = namedtuple(
    "Chunk",
    "rows channels length part first here top bottom columns piece pieces together copies",
)

compiled = njit(forceinline=True, error_model="numpy")


@compiled  # type: ignore[untyped-decorator]
def chunk_at(args: Any, index: Any) -> Any:
    """The block of channels and the range of rows that chunk `index` stands for."""
    rows, channels, length = args[ROWS], args[CHANNELS], args[LENGTH]
    if args[MODE] & BACKWARDS:
        index = args[CHUNKS] - 1 - index
    part, block = index // args[BLOCKS], index % args[BLOCKS]
    first = block * args[BLOCK]
    here = min(channels - first, args[BLOCK])
    top, bottom = rows * part // args[PARTS], rows * (part + 1) // args[PARTS]
    piece = min(length, WIDTH)
    pieces = (length + WIDTH - 1) // WIDTH
    together = args[TOGETHER]
    return Chunk(
        rows, channels, length, part, first, here, top, bottom, here * length,
        piece, pieces, together, min(together, bottom - top),
    )  # fmt: skip


@compiled  # type: ignore[untyped-decorator]
def strip_start(chunk: Any, row: Any, j: Any) -> Any:
    return (row * chunk.channels + chunk.first) * chunk.length + j * WIDTH


@compiled  # type: ignore[untyped-decorator]
def strip_width(chunk: Any, several: Any, j: Any) -> Any:
    return several * min(WIDTH, chunk.columns - j * WIDTH)


@compiled  # type: ignore[untyped-decorator]
def spread(values: Any, offset: Any, chunk: Any, wide: Any) -> None:
    """Write each channel's value wherever a strip holds that channel."""
    at = 0
    for _ in range(chunk.copies):
        if chunk.piece == 1:
            for c in range(chunk.here):
                wide[at + c] = values[offset + c]
        else:
            for c in range(chunk.here):
                v = values[offset + c]
                for i in range(chunk.piece):
                    wide[at + c * chunk.piece + i] = v
        at += chunk.here * chunk.piece


@compiled  # type: ignore[untyped-decorator]
def spread_mask(mask: Any, chunk: Any, row: Any, several: Any, j: Any, valid: Any) -> None:
    """Which elements of a strip are valid: each row's piece of the mask, once per channel."""
    piece = min(chunk.piece, chunk.length - j * WIDTH)
    at = 0
    for r in range(row, row + several):
        start = r * chunk.length + j * WIDTH
        for _ in range(chunk.here):
            for i in range(piece):
                valid[at + i] = mask[start + i]
            at += piece


@compiled  # type: ignore[untyped-decorator]
def clear(values: Any, count: Any) -> None:
    for i in range(count):
        values[i] = like(0.0, values[i])


@njit(forceinline=True, error_model="numpy", fastmath={"reassoc"})  # type: ignore[untyped-decorator]
def fold(wide: Any, chunk: Any, sums: Any) -> None:
    """Add the accumulators to their channels' sums and clear them. A plain sum: free to reorder."""
    at = 0
    for _ in range(chunk.copies):
        if chunk.piece == 1:
            for c in range(chunk.here):
                sums[c] += wide[at + c]
        else:
            for c in range(chunk.here):
                total = 0.0
                for i in range(chunk.piece):
                    total += wide[at + c * chunk.piece + i]
                sums[c] += total
        at += chunk.here * chunk.piece
    clear(wide, at)


@compiled  # type: ignore[untyped-decorator]
def sample(x: Any, chunk: Any, pivots: Any) -> None:
    """A pivot per channel: the mean of values evenly spread over all positions.

    Evenly spread, since neighbours resemble one another: the first values of an image are its border.
    """
    total = chunk.rows * chunk.length
    few = min(total, SAMPLE)
    for c in range(chunk.here):
        seen = 0.0
        for k in range(few):
            at = k * total // few
            row, i = at // chunk.length, at % chunk.length
            seen += widen(x[(row * chunk.channels + chunk.first + c) * chunk.length + i])
        seen /= few
        pivots[c] = like(seen if math.isfinite(seen) else 0.0, pivots[c])


@compiled  # type: ignore[untyped-decorator]
def reduce_moments(
    x: Any, mask: Any, valid: Any, chunk: Any, pivot: Any, wide_1: Any, wide_2: Any,
    sums_1: Any, sums_2: Any,
) -> None:  # fmt: skip
    """Σ(x - pivot) and Σ(x - pivot)² of every channel of the chunk, over valid positions."""
    clear(sums_1, chunk.here)
    clear(sums_2, chunk.here)
    clear(wide_1, chunk.copies * chunk.here * chunk.piece)
    clear(wide_2, chunk.copies * chunk.here * chunk.piece)
    held = 0
    for row in range(chunk.top, chunk.bottom, chunk.together):
        several = min(chunk.together, chunk.bottom - row)
        for j in range(chunk.pieces):
            start = strip_start(chunk, row, j)
            if mask is not None:
                spread_mask(mask, chunk, row, several, j, valid)
            for i in range(strip_width(chunk, several, j)):
                d = widen(x[start + i]) - pivot[i]
                if mask is not None:
                    d = d if valid[i] != 0 else like(0.0, d)
                wide_1[i] += d
                wide_2[i] += d * d
            held += 1
            if held == FLUSH:
                fold(wide_1, chunk, sums_1)
                fold(wide_2, chunk, sums_2)
                held = 0
    fold(wide_1, chunk, sums_1)
    fold(wide_2, chunk, sums_2)


@compiled  # type: ignore[untyped-decorator]
def put_aside(partial: Any, chunk: Any, sums_1: Any, sums_2: Any) -> None:
    """Leave this part's sums for the merging to come."""
    place = 2 * chunk.part * chunk.channels + chunk.first
    for c in range(chunk.here):
        partial[place + c] = sums_1[c]
        partial[place + chunk.channels + c] = sums_2[c]


@compiled  # type: ignore[untyped-decorator]
def gather(partial: Any, parts: Any, chunk: Any, sums_1: Any, sums_2: Any) -> None:
    """Add up what the parts have put aside."""
    clear(sums_1, chunk.here)
    clear(sums_2, chunk.here)
    for part in range(parts):
        place = 2 * part * chunk.channels + chunk.first
        for c in range(chunk.here):
            sums_1[c] += partial[place + c]
            sums_2[c] += partial[place + chunk.channels + c]


@compiled  # type: ignore[untyped-decorator]
def settle(
    chunk: Any, sums_1: Any, sums_2: Any, pivots: Any, count: Any, mean: Any, low: Any, var: Any
) -> Any:
    """Write mean (rounded, and what that lost) and biased variance; say if a pivot lay too far.

    With the pivot within one standard deviation of the mean, the subtraction below loses at most
    one bit. Farther off, the caller moves the pivot to the mean and reduces again.
    """
    far = False
    for c in range(chunk.here):
        step = sums_1[c] / count
        spread_about = sums_2[c] / count - step * step
        far = far or step * step > spread_about
        k = chunk.first + c
        mean[k] = like(pivots[c] + step, mean[k])
        rest = (pivots[c] - mean[k]) + step
        low[k] = like(rest if math.isfinite(rest) else 0.0, low[k])
        var[k] = like(0.0 if spread_about < 0.0 else spread_about, var[k])
    return far
