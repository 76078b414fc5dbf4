"""Memory for large results on CPU, used again when they die.

glibc gives allocations above 32 MB back to the system at once, and every new one faults in page by
page: to write 100 MB of fresh memory costs 3 to 7 copies of it, more than all that batch
normalization does with it (benchmarks/fresh_memory.py); below, it does so at the end of its heap.
So large results come from blocks that return here when the last tensor on them is gone, and serve
again at no cost. Whenever another block has to be made, what waits here is marked as free to the
system (MADV_FREE), which takes it back without a word when memory gets tight. Not earlier: to mark
a block that is about to serve again costs as much as to write 5 MB.

Linux only; elsewhere, and for small results, PyTorch's own allocator serves.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

POOLED_FROM = 1 << 20  # bytes; below, glibc keeps memory by itself
HUGE_PAGE = 1 << 21  # bytes; a block begins on its boundary and is a multiple of it long
MADV_FREE, MADV_HUGEPAGE = 8, 14  # <sys/mman.h>; the mmap module lacks the first before 3.13


def empty_like(x: Tensor) -> Tensor:
    """An uninitialized tensor of x's shape, strides and type, on recycled memory if it is large."""
    size = x.numel() * x.element_size()
    if size < POOLED_FROM or _madvise() is None:
        return torch.empty_like(x)
    flat = torch.frombuffer(_pool.take(size), dtype=x.dtype, count=x.numel())
    # Not a view of `flat`: autograd forbids to change in place what a function returned as a view.
    y = torch.empty(0, dtype=x.dtype)
    y.set_(flat, 0, x.shape, x.stride())  # type: ignore[call-overload]
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if filling and torch.are_deterministic_algorithms_enabled():
        y.fill_(float("nan"))
    return y


def empty_cache() -> int:
    """Give the memory that waits to be used again back to the system; returns how many bytes.

    >>> empty_cache() >= 0
    True
    """
    return _pool.clear()


class _Block:
    """A stretch of memory, given back to the system when the pool drops it."""

    def __init__(self, size: int) -> None:
        self.size = size
        # Not shared, as mmap would have it: a forked child must not write to its parent's tensors,
        # and neither advice holds for shared memory.
        self._map = mmap.mmap(-1, size + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        first = ctypes.c_char.from_buffer(self._map)
        address = ctypes.addressof(first)
        del first  # an exported buffer would keep the map from closing
        self._start = -address % HUGE_PAGE
        self._address = address + self._start
        self.advise(MADV_HUGEPAGE)

    def view(self) -> memoryview:
        return memoryview(self._map)[self._start : self._start + self.size]

    def advise(self, how: int) -> None:
        """Advice that the system does not know does no harm."""
        if (madvise := _madvise()) is not None:
            madvise(ctypes.c_void_p(self._address), ctypes.c_size_t(self.size), how)


class _Pool:
    """Blocks by size. Without a lock, and so without counters: a block may return from any thread
    and amid any other step here (where garbage is collected), so a step is one operation on a list
    or a dict.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, list[_Block]] = {}
        self._used: dict[int, tuple[weakref.ref[memoryview], int]] = {}

    def take(self, size: int) -> memoryview:
        """At least `size` bytes, until the view is gone."""
        size = -(-size // HUGE_PAGE) * HUGE_PAGE
        try:
            block = self._waiting.setdefault(size, []).pop()  # the last to come: warmest in cache
        except IndexError:
            self._make_room(size)
            block = _Block(size)
        view = block.view()
        key = id(view)

        def end(_: Any) -> None:
            self._used.pop(key, None)
            self._waiting.setdefault(size, []).append(block)

        self._used[key] = weakref.ref(view, end), size
        return view

    def _make_room(self, size: int) -> None:
        """What waits is at most what is in use, or a quarter of the machine's memory.

        The rest of it the system may take if it has to.
        """
        most = max(sum(used for _, used in list(self._used.values())), _memory() // 4)
        waiting = [(size * len(blocks), blocks) for size, blocks in list(self._waiting.items())]
        excess = size + sum(total for total, _ in waiting) - most
        for _, blocks in sorted(waiting, key=lambda pair: -pair[0]):
            while excess > 0 and blocks:
                excess -= blocks.pop(0).size
            for block in list(blocks):
                block.advise(MADV_FREE)

    def clear(self) -> int:
        """Drop all that waits; returns how many bytes."""
        freed = 0
        for blocks in list(self._waiting.values()):
            while blocks:
                freed += blocks.pop().size
        return freed


_pool = _Pool()


@cache
def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@cache
def _madvise() -> Callable[[ctypes.c_void_p, ctypes.c_size_t, int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        advise: Callable[[ctypes.c_void_p, ctypes.c_size_t, int], int] = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    return advise
