"""The arguments of the compiled kernels: one structure, declared here and nowhere else.

A caller fills a field by its name (`arguments.scale = tensor.data_ptr()`); a kernel, whose only
argument is the structure's address, reads it as `args[at.scale]`. An address of 0 means absent.
"""

from __future__ import annotations

import ctypes
from collections import namedtuple
from typing import Any

PASSES = 6
"""The most passes of a call."""

_INTEGERS = (
    # Geometry (see loops.py) and how the work is cut.
    "rows", "channels", "length", "block", "blocks", "parts", "together", "planes", "streams",
    # Set by the kernel where a pivot lay too far from its mean, and the reduction is repeated.
    "pivot_moved",
    # The address of the system's sched_yield.
    "sched_yield",
)  # fmt: skip
_FLOATS = ("count", "eps", "momentum")
_ADDRESSES = (
    # Of x's size.
    "x", "residual", "y", "signs", "mask", "grad", "dx", "dresidual",
    # Per channel: parameters and running statistics.
    "weight", "bias", "running_mean", "running_var", "num_batches_tracked",
    # Per channel: what a forward measures and maps by, and leaves for the backward.
    "center", "center_low", "var", "scale", "shift", "rho", "slope_factor", "constant_factor",
    # Per channel: sums of the backward reduction, and the map's share by way of the statistics.
    "sum_grad", "sum_grad_x", "slope", "constant", "mean_low", "mean_gap", "grad_weight",
    # Sums of a reduction in parts, in float64.
    "partial",
)  # fmt: skip


class Arguments(ctypes.Structure):
    """One call's arguments, zero where nothing was set; every field begins on 8 bytes."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_double) for name in _FLOATS),
        *((name, ctypes.c_int64) for name in _ADDRESSES),
        # For each pass: what it does (0 ends the list), how many chunks are taken, and are done.
        *((name, ctypes.c_int64 * PASSES) for name in ("passes", "taken", "done")),
    )


_names = [field[0] for field in Arguments._fields_]
at: Any = namedtuple("at", _names)(*(getattr(Arguments, name).offset // 8 for name in _names))
"""Where each field begins, in steps of 8 bytes."""
