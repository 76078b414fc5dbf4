"""The arguments of the compiled kernels: one structure, declared here and nowhere else.

A caller fills a field by its name (`arguments.scale = tensor.data_ptr()`); a kernel, whose only
argument is the structure's address, reads it as `args[at.scale]`. An address of 0 means absent.
"""

from __future__ import annotations

import ctypes
import struct
from collections import namedtuple
from collections.abc import Callable
from typing import Any

PASSES = 6
"""The most passes of a call."""

_SHAPE = (
    # Geometry (see loops.py) and how the work is cut.
    "rows", "channels", "length", "block", "blocks", "parts", "rows_per_strip", "planes", "streams",
    # Set by the kernel where a pivot lay too far from its mean, and the reduction is repeated.
    "pivot_moved",
    # The address of the system's sched_yield.
    "sched_yield",
    # Boolean, (N, *).
    "mask",
)  # fmt: skip
# Of `Steady`: `share` is k, `momentum` the weight a, `rate` that of its memory; else `share` is 1.
_FLOATS = ("count", "rate", "eps", "momentum", "share")
ROWS = (
    # What a forward measures and maps by, and leaves for the backward.
    "center", "center_low", "var", "scale", "shift", "rho", "constant_factor", "mean_gap",
    "batch_var",
    # The backward's own: a sum, and the map's share by way of the statistics.
    "sum_grad_x", "slope", "constant",
)  # fmt: skip
"""Addresses of (C,) that may be the rows of one tensor."""
FORWARD = (
    # Of x's size, and the sums of a reduction in parts, in float64.
    "x", "residual", "y", "signs", "partial",
    # Per channel: parameters and running statistics.
    "weight", "bias", "running_mean", "running_var", "num_batches_tracked", *ROWS,
)  # fmt: skip
BACKWARD = (
    "grad", "dx", "dresidual", "sum_grad", "grad_weight",
    # The memory of the gradient, (2, C): what it was, and where to leave what it is now.
    "memory", "memory_after",
)  # fmt: skip


class Arguments(ctypes.Structure):
    """One call's arguments, zero where nothing was set; every field begins on 8 bytes."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _SHAPE),
        *((name, ctypes.c_double) for name in _FLOATS),
        *((name, ctypes.c_int64) for name in FORWARD + BACKWARD),
        # For each pass: what it does (0 ends the list), how many chunks are taken, and are done.
        *((name, ctypes.c_int64 * PASSES) for name in ("passes", "taken", "done")),
    )


_names = [field[0] for field in Arguments._fields_]
at: Any = namedtuple("at", _names)(*(getattr(Arguments, name).offset // 8 for name in _names))
"""Where each field begins, in steps of 8 bytes."""


def writer(*names: str) -> tuple[Callable[..., None], int]:
    """Fills adjacent fields in one step: call `fill(arguments, offset, *values)`.

    25 fields one by one cost 2 µs, a tenth of a small call. `names` say in which order the values
    come; fields that are not adjacent in that order are refused.
    """
    first = _names.index(names[0])
    if tuple(_names[first : first + len(names)]) != names:
        raise ValueError(f"`names` must be adjacent in the structure; got {', '.join(names)}.")
    kinds = {field[0]: field[1] for field in Arguments._fields_}
    form = "".join("d" if kinds[name] is ctypes.c_double else "q" for name in names)
    return struct.Struct(form).pack_into, getattr(Arguments, names[0]).offset
