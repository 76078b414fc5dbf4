"""How a call of the CPU kernels is cut into work, and handed over: layout, plan, arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from steadynorm.kernels.reference import Groups
from steadynorm.kernels.spec import statistics_dtype

from . import loops
from .arguments import PASSES, Arguments
from .pointers import LANES, LINE, MAX_WIDTH, WIDTH
from .readable import readable, why_unreadable
from .runtime import Kernel

MOMENTS = (loops.REDUCE, loops.MERGE, loops.REDUCE | loops.PIVOTED, loops.MERGE | loops.PIVOTED)
"""Measure; and once more about the means, if a pivot lay too far from its channel's."""

PARALLEL_FROM = 1 << 15  # elements; in smaller inputs, waking a thread costs what it saves
VISIT_UP_TO = 4 << 20  # bytes of x in a block, which must stay in the cache for the second read
PLANES_FROM = 128  # values; shorter planes are taken in strips: few would be added at a time
SHORTEST_PLANE = 32  # values; a map alone takes shorter planes in strips
BLOCK_OF_PLANES = 1 << 14  # values in each sample of the adjacent planes that a reduction takes
BLOCK_OF_MAP = 1 << 16  # values of a row that a map alone takes at a time
STREAM_FROM = 6 << 20  # bytes of x from which results are written by non-temporal stores
STREAM_VISITS_FROM = 3 << 20  # likewise in visits, where results would evict the block
STREAM_MAPS_FROM = 32 << 20  # likewise of a map alone, as in inference: the next layer reads them
PARTS = 4  # chunks for each thread, so that a late thread does not hold up the others


_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Shape(NamedTuple):
    """x in memory: `samples` x `repeats` rows of `channels` x `length` values."""

    samples: int
    repeats: int
    channels: int
    length: int


def shape_of(x: Tensor) -> Shape | None:
    """How x, which is not empty, lies in memory, if contiguous, channels first or last; or None."""
    sizes = x.shape
    positions = x.numel() // (sizes[0] * sizes[1])
    if x.is_contiguous():
        return Shape(sizes[0], 1, sizes[1], positions)
    kind = _LAST.get(len(sizes))
    last = x.is_contiguous(memory_format=kind) if kind else x.movedim(1, -1).is_contiguous()
    return Shape(sizes[0], positions, sizes[1], 1) if last else None


def laid_out_as(t: Tensor, x: Tensor, name: str) -> Tensor:
    """t in x's type and laid out in memory as x is: t itself if it is so already."""
    if t.shape != x.shape:
        raise ValueError(f"`{name}` must have x's shape {tuple(x.shape)}; got {tuple(t.shape)}.")
    if (
        t.dtype is x.dtype
        and (t.stride() == x.stride() or (t.is_contiguous() and x.is_contiguous()))
        and (readable(t) or why_unreadable(t) is None)
    ):
        return t
    return torch.empty_like(x).copy_(t)


def residual_laid_out_as(residual: Tensor | None, x: Tensor) -> Tensor | None:
    """The residual laid out as x is, if there is one."""
    return None if residual is None else laid_out_as(residual, x, "residual")


def per_channel(t: Tensor, x: Tensor, groups: Groups = None) -> Tensor:
    """A per-channel argument as the kernels read it."""
    if t.numel() != x.shape[1] * (1 if groups is None else len(groups)):
        rows = "(C,)" if groups is None else "(G, C)"
        raise ValueError(
            f"an argument per channel must have shape {rows}, C = {x.shape[1]}; "
            f"got {tuple(t.shape)}."
        )
    if t.dtype is statistics_dtype(x) and t.is_contiguous() and why_unreadable(t) is None:
        return t
    return torch.empty(t.shape, dtype=statistics_dtype(x), device="cpu").copy_(t)


def checked_output(out: Tensor, x: Tensor) -> Tensor:
    """A caller's memory for a result, which has to be laid out as x is."""
    if laid_out_as(out, x, "out") is not out:
        raise ValueError(
            f"`out` must have x's type and strides, {x.dtype} and {x.stride()}; "
            f"got {out.dtype} and {out.stride()}."
        )
    return out


class Cut(NamedTuple):
    """How the work is cut: blocks of channels, parts of the rows, rows together in a strip.

    `visit`: a block's values stay in the cache from the reduction to the map, and there is a block
    for every thread, so that both may be done in one visit.
    """

    block: int
    blocks: int
    rows_per_strip: int
    parts: int
    threads: int
    visit: bool
    planes: bool

    def begins_lines(self, shape: Shape, itemsize: int) -> bool:
        """Whether every plane or strip begins at a cache line, so that non-temporal stores pay.

        Else each piece ends within a line, of which both parts are ordinary stores beside
        non-temporal ones: maps of 28 x 28 values in bfloat16 took 1.4 to 1.9 times as long.
        """
        row = self.rows_per_strip * shape.channels * shape.length
        step = shape.length if self.planes else math.gcd(row, self.block * shape.length)
        return step * itemsize % LINE == 0

    def forward(self, decide: int) -> tuple[int, ...]:
        """`moments`, what `decide` asks for per channel, and `apply`; in one visit if that pays."""
        if self.visit:
            return (loops.REDUCE | decide | loops.MAP,)
        # The map from the end: what the reduction read last is still in the cache.
        return (*MOMENTS, decide, loops.MAP | loops.BACKWARDS)

    def backward(self) -> tuple[int, ...]:
        """`reduce_grad` and `apply_grad`; in one visit if that pays."""
        if self.visit:
            return (loops.REDUCE | loops.MAP,)
        return (loops.REDUCE, loops.MERGE, loops.MAP | loops.BACKWARDS)


@lru_cache(maxsize=4096)
def cut(rows: int, channels: int, length: int, itemsize: int, threads: int) -> Cut:
    """Cut for the cache and the threads; see loops.py for planes and strips."""
    row = channels * length
    block, rows_per_strip, planes = 1, 1, 2 * row > WIDTH and length >= PLANES_FROM
    if 2 * row <= WIDTH:
        block, rows_per_strip = channels, min(rows, WIDTH // row)
    elif not planes:
        widest = MAX_WIDTH if length == 1 and channels <= MAX_WIDTH else WIDTH
        block = min(channels, widest // length)
        if block < channels:
            aligned = LANES // math.gcd(LANES, length)  # strips then start where cache lines do
            block = block // aligned * aligned or block
    else:
        fits = VISIT_UP_TO // (rows * length * itemsize)
        block = max(1, min(BLOCK_OF_PLANES // length, channels // (PARTS * threads), fits))
    blocks = -(-channels // block)
    if rows * row < PARALLEL_FROM:
        threads = 1
    strips = -(-rows // rows_per_strip)
    parts = 1 if blocks >= PARTS * threads else min(strips, -(-PARTS * threads // blocks))
    visit = rows * block * length * itemsize <= VISIT_UP_TO and blocks >= threads
    return Cut(block, blocks, rows_per_strip, parts, threads, visit, planes)


@lru_cache(maxsize=4096)
def cut_to_map(rows: int, channels: int, length: int, itemsize: int, threads: int) -> Cut:
    """Cut for a map alone: it follows memory, a reduction follows channels from row to row."""
    usual = cut(rows, channels, length, itemsize, threads)
    if length < SHORTEST_PLANE:
        return usual
    block = max(1, min(channels, BLOCK_OF_MAP // length))
    return usual._replace(block=block, blocks=-(-channels // block), parts=rows, planes=True)


def padded(passes: tuple[int, ...]) -> tuple[int, ...]:
    """Passes, and zeros that end the list."""
    return (*passes, *(0,) * (PASSES - len(passes)))


class Slab:
    """One group of samples: where it lies, how its work is cut, and the kernel's arguments."""

    def __init__(
        self,
        shape: Shape,
        itemsize: int,
        address: int = 0,
        group: int = 0,
        first: int = 0,
        rows: int | None = None,
        words_before: int = 0,
        only_maps: bool = False,
    ) -> None:
        rows = shape.samples * shape.repeats if rows is None else rows
        self.group, self.first, self.rows = group, first, rows
        self.channels, self.length = shape.channels, shape.length
        self.count = rows * shape.length
        how = cut_to_map if only_maps else cut
        self.cut = how(rows, shape.channels, shape.length, itemsize, torch.get_num_threads())
        self._words_before = words_before
        self._skip = first * shape.channels * shape.length * itemsize
        stream_from = STREAM_VISITS_FROM if self.cut.visit else STREAM_FROM
        stream_from = STREAM_MAPS_FROM if only_maps else stream_from
        large = math.prod(shape) * itemsize >= stream_from
        self.arguments = Arguments(
            rows=rows, channels=shape.channels, length=shape.length, block=self.cut.block,
            blocks=self.cut.blocks, parts=self.cut.parts, rows_per_strip=self.cut.rows_per_strip,
            planes=self.cut.planes, streams=large and self.cut.begins_lines(shape, itemsize),
            x=address + self._skip,
        )  # fmt: skip

    def values(self, **tensors: Tensor | None) -> None:
        """Hand over this group's part of x-sized tensors, by the names of their arguments."""
        for name, t in tensors.items():
            if t is not None:
                setattr(self.arguments, name, t.data_ptr() + self._skip)

    def by_channel(self, **tensors: Tensor) -> None:
        """Hand over this group's row of per-channel tensors, (C,) or (G, C)."""
        for name, t in tensors.items():
            row = self.group * self.channels * t.element_size()
            setattr(self.arguments, name, t.data_ptr() + row)

    def shared(self, **tensors: Tensor | None) -> None:
        """Hand over tensors that all groups share."""
        for name, t in tensors.items():
            if t is not None:
                setattr(self.arguments, name, t.data_ptr())

    @property
    def runs(self) -> tuple[int, int]:
        """How many strips or planes there are, whose signs begin with a new word, and of what size.

        The last block's count in full, as if it had all channels.
        """
        block, blocks, rows_per_strip, *_ = self.cut
        strips = -(-self.rows // rows_per_strip) * blocks
        if self.cut.planes:
            return strips * block, self.length
        return strips, rows_per_strip * block * self.length

    @property
    def words(self) -> int:
        """How many words the signs of its values take."""
        runs, size = self.runs
        return runs * -(-size // LANES)

    def signs(self, t: Tensor | None) -> None:
        """Hand over this group's part of the signs of all."""
        if t is not None:
            self.arguments.signs = t.data_ptr() + self._words_before * t.element_size()

    def run(self, kernel: Kernel, *passes: int) -> None:
        """Go through the passes, each over all chunks; room is made for sums that are in parts."""
        a = self.arguments
        a.passes = padded(passes)
        a.taken = a.done = padded(())
        a.pivot_moved = 0
        if loops.MERGE in passes:
            partial = torch.empty(self.sums, dtype=torch.float64, device="cpu")
            a.partial = partial.data_ptr()
        kernel(a, self.cut.threads)

    @property
    def sums(self) -> int:
        """How many float64 a reduction in parts leaves."""
        return 2 * self.cut.parts * self.channels


def slabs(x: Tensor, groups: Groups) -> Iterator[Slab]:
    """The groups of a call one by one; without groups the whole of x."""
    shape = shape_of(x)
    if shape is None:
        raise ValueError(
            "`x` must be contiguous, channels first or channels last; got shape "
            f"{tuple(x.shape)} with strides {x.stride()}. Ask `unsupported` first: the reference "
            "takes any strides."
        )
    sizes = groups or (shape.samples,)
    if sum(sizes) != shape.samples:
        raise ValueError(f"`groups` must sum to {shape.samples}, x's samples; got {sizes}.")
    starts = accumulate(sizes, initial=0)
    words = 0
    for group, (start, size) in enumerate(zip(starts, sizes, strict=False)):
        slab = Slab(
            shape, x.element_size(), x.data_ptr(), group, start * shape.repeats,
            size * shape.repeats, words,
        )  # fmt: skip
        words += slab.words
        yield slab
