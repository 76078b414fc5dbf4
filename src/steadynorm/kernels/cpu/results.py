"""Memory for large results, in huge pages where the system gives them to those who ask.

glibc takes a large block from the system and gives it back at once, so that every result pays a
page fault for each 4 KiB: 103 MB of fresh memory cost 4 times what a copy into them does. In pages
of 2 MiB they cost half a copy (`python benchmarks/fresh_memory.py`). Linux gives these to every
program, to none, or, as most distributions have it, to those that ask by `madvise`.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

LARGE = 4 << 20
"""Bytes from which on a result may hold a huge page whole."""
SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")


@cache
def _huge_pages() -> tuple[Callable[..., int], int] | None:
    """The system's `madvise`, and the size of a huge page; None where asking changes nothing."""
    if sys.platform != "linux":
        return None
    try:
        if "[madvise]" not in (SETTINGS / "enabled").read_text():
            return None
        size = int((SETTINGS / "hpage_pmd_size").read_text())
        advise = ctypes.CDLL(None).madvise
    except (OSError, ValueError, AttributeError):
        return None
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise, size


def large_like(x: Tensor) -> Tensor:
    """Uninitialized memory laid out as x is, which is of `LARGE` bytes or more."""
    made = torch.empty_like(x)
    found = _huge_pages()
    if found is not None:
        advise, size = found
        first = made.data_ptr()
        start, end = -(-first // size) * size, (first + made.nbytes) // size * size
        if end > start:
            advise(start, end - start, mmap.MADV_HUGEPAGE)  # advice: if refused, nothing is lost
    return made


def prototype(dtype: torch.dtype, *sizes: int) -> Tensor:
    """What `torch.empty_like` makes memory of this type and size from; itself a single value.

    On CPU whatever the default device, and 1.4 µs faster than naming size, type and device.
    """
    return torch.empty(1, dtype=dtype, device="cpu").expand(sizes)


def empty_like(x: Tensor) -> Tensor:
    """Uninitialized memory laid out as x is."""
    return large_like(x) if x.nbytes >= LARGE else torch.empty_like(x)
