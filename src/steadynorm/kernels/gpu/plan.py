"""How the work on one input is cut into programs: shapes, layouts and groups to grids and tiles.

Fixed configurations, nothing tuned at run time: another tile would give other bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steadynorm.kernels.reference import Groups

TILE, WARPS, WIDE, NARROW = 2048, 8, 1024, 64
"""Values of a tile, warps that share it; its most columns channels-first, and channels-last."""
SMALL = 32 << 20
"""Bytes of a tensor up to which channels-last tiles are half as narrow: half as many parts."""
WHOLE, STRIP, HELD = 8192, 16, 512
"""Values of a channel (of a strip of channels, channels-last) that registers hold; a warp's."""
GATHER = 512
"""Values of a kind that the last program reads at a time of what the others left."""
WAVES, MAP_WAVES = 2, 3
"""Programs for each multiprocessor that a reduction, and a map, should have at least."""
GRID = 65535
"""The most programs along the second and third axis of a grid."""


class Plan(NamedTuple):
    """One input's geometry; the names are those of the kernels' arguments (see tiles.py)."""

    last: bool
    rows: int  # samples, or positions channels-last
    channels: int
    columns: int  # positions of a plane, or channels channels-last
    groups: Groups  # rows of each
    tile_rows: int
    tile_columns: int
    VEC: int
    row_splits: int
    column_splits: int
    blocks: int
    row_blocks: int  # row blocks of the longest group
    four: bool
    big: bool
    whole: bool
    """Whether one program holds all of its channels, and does both stages of a direction."""
    warps: int
    maps: int
    """What row_splits is for the maps, whose programs leave nothing behind to gather."""

    @property
    def grid(self) -> tuple[int, int, int]:
        """Programs over channels, parts of a channel, groups."""
        return self.blocks, self.parts, len(self.groups or (0,))

    def for_maps(self) -> Plan:
        """The plan of the maps: over more programs."""
        return self._replace(row_splits=self.maps)

    @property
    def parts(self) -> int:
        """Programs that share a channel of one group."""
        return self.row_splits * self.column_splits

    @property
    def alone(self) -> bool:
        """Whether no two programs share a channel."""
        return self.parts * self.grid[2] == 1

    @property
    def sign_bytes(self) -> int:
        """Memory for one bit for each place of each tile."""
        bits = self.tile_rows * self.tile_columns
        tiles = len(self.groups or (0,)) * self.row_blocks * self.blocks * self.column_splits
        return tiles * bits // 8

    def tile(self, *, bits: bool = False) -> dict[str, Any]:
        """The constants that every kernel takes; with `bits` those of the sign bits, too."""
        width = self.tile_columns if self.last else 1
        named: dict[str, Any] = {
            "TILE_ROWS": self.tile_rows, "TILE_COLUMNS": self.tile_columns, "WIDTH": width,
            "VEC": self.VEC, "LAST": self.last, "BIG": self.big, "num_warps": self.warps,
            "enable_fp_fusion": False,
        }  # fmt: skip
        return named | {"FOUR": self.four} if bits else named

    def reduction(self, itemsize: int, *, light: bool) -> dict[str, Any]:
        """The constants that a reduction has besides `tile`'s.

        A `light` loop takes several turns at once, and a limit of registers: with one of its own,
        ptxas spills beside the loop, or requests half as many bytes before the first use.
        PARTS_AT_ONCE: how many programs' partials the last one reads at a time.
        """
        named: dict[str, Any] = {"UNROLL": (2 if itemsize >= 4 else 4) if light else 1}
        named["PARTS_AT_ONCE"] = min(
            _power(self.parts), max(1, GATHER // self.tile_columns) if self.last else 256
        )
        if light and torch.version.hip is None:
            named["maxnreg"] = 96 if self.last else 72
        return named

    def held(self) -> dict[str, Any]:
        """The constants that the forward of a channel held in registers has besides `tile`'s.

        A limit of registers: without one ptxas spills for sm_100, with it for no target.
        """
        return {"maxnreg": 200} if torch.version.hip is None else {}

    def sizes(self) -> tuple[int, int, int, int, int]:
        """N, C, vectors of a row, row_splits and column_splits."""
        vectors = self.columns // self.VEC
        return self.rows, self.channels, vectors, self.row_splits, self.column_splits


def _power(n: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(0, n - 1).bit_length()


def layout_of(shape: torch.Size, strides: tuple[int, ...]) -> bool | None:
    """Whether memory is channels-last; None if neither that nor channels-first."""
    if len(shape) < 2:
        return None
    like = torch.empty_strided(shape, strides, device="meta")
    if len(shape) == 2 or math.prod(shape[2:]) == 1:
        return True if like.is_contiguous() else None
    if like.is_contiguous():
        return False
    return True if like.movedim(1, -1).is_contiguous() else None


@lru_cache(maxsize=4096)
def plan(
    shape: torch.Size,
    strides: tuple[int, ...],
    itemsize: int,
    groups: Groups,
    multiprocessors: int,
    tile: tuple[int, int] | None = None,
    split: int | None = None,
) -> Plan | str:
    """The plan for such inputs, or why there is none; `tile` and `split` are for tests."""
    last = layout_of(shape, strides)
    if last is None:
        return "the input is contiguous neither channels-first nor channels-last"
    samples, channels, length = shape[0], shape[1], math.prod(shape[2:])
    columns = channels if last else length
    by_row = length if last else 1
    rows = samples * by_row
    spans = None if groups is None else tuple(size * by_row for size in groups)
    longest = rows if spans is None else max(spans)
    narrow = NARROW // 2 if math.prod(shape) * itemsize <= SMALL else NARROW
    tile_columns = max(8, min(_power(columns), narrow if last else WIDE))
    tile_rows = max(2, min(TILE // tile_columns, _power(longest)))
    whole = _power(rows) * (min(tile_columns, STRIP) if last else _power(columns)) <= WHOLE
    whole = whole and groups is None and tile is None and split is None
    if whole:
        tile_rows = max(2, _power(rows))
        tile_columns = max(8, min(tile_columns, STRIP) if last else _power(columns))
    tile_rows, tile_columns = tile or (tile_rows, tile_columns)
    warps = max(1, min(8, tile_rows * tile_columns // HELD)) if whole else WARPS
    across, down = -(-columns // tile_columns), -(-longest // tile_rows)
    column_splits = 1 if last else across
    blocks = across if last else channels
    many = blocks * column_splits * len(spans or (0,))
    row_splits, maps = (
        split or max(1, min(down, -(-waves * multiprocessors // many), 256))
        for waves in (WAVES, MAP_WAVES)
    )
    if (
        max(row_splits, maps) * column_splits > GRID
        or len(spans or (0,)) > GRID
        or rows >= 2**31
        or blocks >= 2**31
    ):
        return f"{rows} rows of {columns} columns need a larger grid than a device has"
    return Plan(
        last, rows, channels, columns, spans, tile_rows, tile_columns,
        min(columns & -columns, 16 // itemsize), row_splits, column_splits, blocks, down,
        itemsize >= 4, math.prod(shape) >= 2**31, whole, warps, maps,
    )  # fmt: skip


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """How many there are; 1 where no device is asked."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=256)
def starts(groups: Groups, device: torch.device) -> Tensor | None:
    """Where each group's rows begin, and where the last one's end."""
    if groups is None:
        return None
    at = [0]
    for rows in groups:
        at.append(at[-1] + rows)
    with torch.inference_mode(False):  # kept: must serve outside of it, too
        return torch.tensor(at, dtype=torch.int32, device=device)


# As Triton asks for it; `torch.cuda.current_stream` makes an object for it, ten times as slowly.
raw_stream: Callable[[int], int] = getattr(
    torch._C,
    "_cuda_getCurrentRawStream",
    lambda device: torch.cuda.current_stream(device).cuda_stream,
)


class Workspace(NamedTuple):
    """Memory that programs of one launch share, and no later launch reads."""

    tickets: Tensor
    """int32 zeros, and zeros again after every launch."""
    partials: Tensor
    """float32, uninitialized: what the programs of a reduction leave for the last one."""
    sizes: tuple[int, int]
    addresses: tuple[int, int]


MOST_TICKETS = 4096
_workspaces: dict[tuple[torch.device, int], Workspace] = {}


def workspace(x: Tensor, stream: int, tickets: int, partials: int) -> Workspace:
    """Of at least these sizes; one for each stream of a device, whose launches follow one another.

    In a graph capture a fresh one: the graph may later run beside the stream it was captured on.
    """
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return _made(x.device, tickets, partials)
    key = x.device, stream
    found = _workspaces.get(key)
    if found is None or found.sizes[0] < tickets or found.sizes[1] < partials:
        before = (MOST_TICKETS, 0) if found is None else found.sizes
        with torch.inference_mode(False):  # kept: must serve outside of it, too
            found = _made(x.device, max(tickets, before[0]), max(partials, before[1]))
        _workspaces[key] = found
    return found


def _made(device: torch.device, tickets: int, partials: int) -> Workspace:
    zeros = torch.zeros(tickets, dtype=torch.int32, device=device)
    fresh = torch.empty(partials, dtype=torch.float32, device=device)
    return Workspace(zeros, fresh, (tickets, partials), (zeros.data_ptr(), fresh.data_ptr()))


def stream_of(x: Tensor) -> int:
    """The current stream of x's device; 0 where there is no device."""
    return raw_stream(x.get_device()) if x.is_cuda else 0


def laid_out_as(t: Tensor, x: Tensor) -> Tensor:
    """`t`, of x's shape, in x's type and layout; itself if it has both."""
    if t.dtype is x.dtype and t.stride() == x.stride() and not t.is_neg():
        return t
    return torch.empty_like(x).copy_(t)
