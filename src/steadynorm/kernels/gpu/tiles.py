"""Where the values of a tile lie, the sign bits beside them, and which program comes last.

One tile is TILE_ROWS by TILE_COLUMNS. Channels-first, rows are samples and columns run along a
plane: the tile belongs to one channel. Channels-last (LAST), rows are positions and columns are
channels. Program (block, part, group): `block` is a channel, or TILE_COLUMNS of them. A channel's
rows are split `row_splits` times and its columns `column_splits` times: part s takes the row blocks
s // column_splits, that + row_splits, ... of the column block s % column_splits. `vectors` is the
number of columns divided by VEC, so that the compiler knows that strides are multiples of a vector.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def span_of(starts, N, group):
    """First row and number of rows of a group."""
    if starts is None:
        return 0, N
    else:
        begin = tl.load(starts + group)
        return begin, tl.load(starts + group + 1) - begin


@triton.jit
def columns_of(block, part, column_splits, TILE_COLUMNS: tl.constexpr, LAST: tl.constexpr):
    """The columns of this program's tiles."""
    if LAST:
        return block * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    else:
        return (part % column_splits) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)


@triton.jit
def channels_of(block, WIDTH: tl.constexpr):
    """The channels of this program: one, or one a column."""
    return block * WIDTH + tl.arange(0, WIDTH)


@triton.jit
def turns_of(length, part, row_splits, column_splits, TILE_ROWS: tl.constexpr):
    """How many tiles this program visits."""
    return tl.maximum(
        tl.cdiv(length - (part // column_splits) * TILE_ROWS, row_splits * TILE_ROWS), 0
    )


@triton.jit
def tile_at(begin, length, group_rows, columns, block, C, vectors, VEC: tl.constexpr,
            LAST: tl.constexpr, BIG: tl.constexpr):  # fmt: skip
    """Offsets of a tile's values, its rows from the first of all on, and which places are real."""
    all_rows = begin + group_rows
    if BIG:
        all_rows = all_rows.to(tl.int64)
    in_bounds = (group_rows < length)[:, None] & (columns < vectors * VEC)[None, :]
    if LAST:
        start = all_rows * vectors * VEC
    else:
        start = (all_rows * C + block) * vectors * VEC
    return start[:, None] + columns[None, :], all_rows, in_bounds


@triton.jit
def valid_at(mask, all_rows, columns, in_bounds, within, vectors, VEC: tl.constexpr,
             LAST: tl.constexpr):  # fmt: skip
    """Which places of a tile the mask leaves valid; `within`: which rows are real."""
    if LAST:
        return in_bounds & (tl.load(mask + all_rows, mask=within, other=0) != 0)[:, None]
    else:
        offsets = (all_rows * vectors * VEC)[:, None] + columns[None, :]
        return in_bounds & (tl.load(mask + offsets, mask=in_bounds, other=0) != 0)


@triton.jit
def to_channels(values, LAST: tl.constexpr):
    """A reduction's result as an array over this program's channels."""
    return values if LAST else values + tl.zeros((1,), tl.float32)


@triton.jit
def comes_last(ticket, others):
    """Whether this program is the last of `others` + 1 to come; sets the ticket back to 0 then.

    The barrier orders this program's stores before the atomic of its one thread, which releases
    them; the acquire makes those of all others visible to the loads after it.
    """
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == others
    if last:
        tl.atomic_xchg(ticket, 0, sem="relaxed", scope="gpu")
    tl.debug_barrier()
    return last


# Sign bits ----------------------------------------------------------------------------------------
# One byte holds eight values of one thread: eight neighbours along a row, or, where a load is four
# values wide (FOUR), four of a row and four of the row half a tile below. Every tile has its own
# bytes, whether or not it is full.


@triton.jit
def pack_bits(gate, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, FOUR: tl.constexpr):
    """One byte for eight values of a tile."""
    if FOUR:
        bits = tl.reshape(gate.to(tl.int32), (2, TILE_ROWS // 2, TILE_COLUMNS // 4, 4))
        place = 4 * tl.arange(0, 2)[:, None, None, None] + tl.arange(0, 4)[None, None, None, :]
        return tl.sum(tl.sum(bits << place, 3), 0).to(tl.uint8)
    else:
        bits = tl.reshape(gate.to(tl.int32), (TILE_ROWS, TILE_COLUMNS // 8, 8))
        return tl.sum(bits << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@triton.jit
def spread_bits(packed, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, FOUR: tl.constexpr):
    """The inverse."""
    if FOUR:
        place = 4 * tl.arange(0, 2)[:, None, None, None] + tl.arange(0, 4)[None, None, None, :]
        wide = packed.to(tl.int32)[None, :, :, None] >> place
    else:
        wide = packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]
    return tl.reshape(wide & 1, (TILE_ROWS, TILE_COLUMNS)) != 0


@triton.jit
def bits_at(signs, row_block, block, blocks, part, group, row_blocks, column_splits,
            TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, FOUR: tl.constexpr):  # fmt: skip
    """Addresses of the bytes of one tile; a group has `row_blocks` row blocks."""
    if FOUR:
        ROW: tl.constexpr = TILE_COLUMNS // 4
        LINES: tl.constexpr = TILE_ROWS // 2
    else:
        ROW: tl.constexpr = TILE_COLUMNS // 8
        LINES: tl.constexpr = TILE_ROWS
    tile = (
        (group * row_blocks + row_block).to(tl.int64) * blocks + block
    ) * column_splits + part % column_splits
    inside = tl.arange(0, LINES)[:, None] * ROW + tl.arange(0, ROW)[None, :]
    return signs + tile * (TILE_ROWS * TILE_COLUMNS // 8) + inside
