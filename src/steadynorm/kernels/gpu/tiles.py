"""Where the values of a tile lie, the sign bits beside them, and which program comes last.

One tile is A rows by B columns. Channels-first, rows are samples and columns run along a plane: the
tile belongs to one channel. Channels-last (LAST), rows are positions and columns are channels.
Program (block, part, group): `block` is a channel, or B of them; part s is (s // SQ, s % SQ) and
takes the row blocks s // SQ, s // SQ + SR, ... of one column block. LV is the number of columns
divided by VEC, so that the compiler knows that strides are multiples of a vector.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def span_of(starts, N, g):
    """First row and number of rows of a group."""
    if starts is None:
        return 0, N
    else:
        begin = tl.load(starts + g)
        return begin, tl.load(starts + g + 1) - begin


@triton.jit
def columns_of(block, part, SQ, B: tl.constexpr, LAST: tl.constexpr):
    """The columns of this program's tiles."""
    if LAST:
        return block * B + tl.arange(0, B)
    else:
        return (part % SQ) * B + tl.arange(0, B)


@triton.jit
def channels_of(block, WIDTH: tl.constexpr):
    """The channels of this program: one, or one a column."""
    return block * WIDTH + tl.arange(0, WIDTH)


@triton.jit
def turns_of(length, part, SR, SQ, A: tl.constexpr):
    """How many tiles this program visits."""
    return tl.maximum(tl.cdiv(length - (part // SQ) * A, SR * A), 0)


@triton.jit
def tile_at(begin, length, r, columns, block, C, LV, VEC: tl.constexpr, LAST: tl.constexpr,
            BIG: tl.constexpr):  # fmt: skip
    """Offsets of a tile's values, its rows from the first of all on, and which places are real."""
    n = begin + r
    if BIG:
        n = n.to(tl.int64)
    ok = (r < length)[:, None] & (columns < LV * VEC)[None, :]
    if LAST:
        start = n * LV * VEC
    else:
        start = (n * C + block) * LV * VEC
    return start[:, None] + columns[None, :], n, ok


@triton.jit
def valid_at(mask, n, columns, ok, within, LV, VEC: tl.constexpr, LAST: tl.constexpr):
    """Which places of a tile the mask leaves valid; `within`: which rows are real."""
    if LAST:
        return ok & (tl.load(mask + n, mask=within, other=0) != 0)[:, None]
    else:
        at = (n * LV * VEC)[:, None] + columns[None, :]
        return ok & (tl.load(mask + at, mask=ok, other=0) != 0)


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
def pack_bits(gate, A: tl.constexpr, B: tl.constexpr, FOUR: tl.constexpr):
    """One byte for eight values of a tile."""
    if FOUR:
        bits = tl.reshape(gate.to(tl.int32), (2, A // 2, B // 4, 4))
        place = 4 * tl.arange(0, 2)[:, None, None, None] + tl.arange(0, 4)[None, None, None, :]
        return tl.sum(tl.sum(bits << place, 3), 0).to(tl.uint8)
    else:
        bits = tl.reshape(gate.to(tl.int32), (A, B // 8, 8))
        return tl.sum(bits << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@triton.jit
def spread_bits(packed, A: tl.constexpr, B: tl.constexpr, FOUR: tl.constexpr):
    """The inverse."""
    if FOUR:
        place = 4 * tl.arange(0, 2)[:, None, None, None] + tl.arange(0, 4)[None, None, None, :]
        wide = packed.to(tl.int32)[None, :, :, None] >> place
    else:
        wide = packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]
    return tl.reshape(wide & 1, (A, B)) != 0


@triton.jit
def bits_at(signs, row_block, block, blocks, part, g, RB, SQ, A: tl.constexpr, B: tl.constexpr,
            FOUR: tl.constexpr):  # fmt: skip
    """Addresses of the bytes of one tile; a group has RB row blocks."""
    if FOUR:
        ROW: tl.constexpr = B // 4
        LINES: tl.constexpr = A // 2
    else:
        ROW: tl.constexpr = B // 8
        LINES: tl.constexpr = A
    tile = ((g * RB + row_block).to(tl.int64) * blocks + block) * SQ + part % SQ
    inside = tl.arange(0, LINES)[:, None] * ROW + tl.arange(0, ROW)[None, :]
    return signs + tile * (A * B // 8) + inside
