"""The compiled CPU kernels by type, activation and options: built on first use, or ahead of it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from llvmlite import binding as llvm
from numba.core import config

from steadynorm.kernels.spec import Keep

from .activations import CODES
from .backward import backward
from .forward import forward
from .readable import name_of
from .runtime import Kernel, compile_kernel


def converts_float16() -> bool:
    """Whether the processor that Numba compiles for has instructions from and to float16.

    Without them LLVM would call functions of a library that the process does not have.
    """
    if platform.machine().lower() in ("aarch64", "arm64"):
        return True
    if config.CPU_FEATURES is not None:
        return "+f16c" in config.CPU_FEATURES
    return bool(llvm.get_host_cpu_features().get("f16c"))


# How values are held, half precision by its bits, and what they are computed in.
SCALARS = {
    torch.float32: (np.float32, np.float32),
    torch.float64: (np.float64, np.float64),
    torch.bfloat16: (np.uint16, np.float32),
}
if converts_float16():
    SCALARS[torch.float16] = np.int16, np.float32


@cache
def forward_kernel(
    dtype: torch.dtype, activation: str | None = None, *, add: bool = False, masked: bool = False
) -> Kernel:
    """The kernel of the forward direction for these options, compiled once a process."""
    function = forward(*SCALARS[dtype], CODES[activation], add, masked)
    return compile_kernel(function, _title("forward", dtype, activation, add=add, masked=masked))


def _title(direction: str, dtype: torch.dtype, activation: str | None, **options: bool) -> str:
    chosen = (name for name, on in options.items() if on)
    return "-".join((direction, name_of(dtype), activation or "identity", *chosen))


@cache
def backward_kernel(
    dtype: torch.dtype,
    activation: str | None = None,
    *,
    signed: bool = False,
    rebuilt: bool = False,
    add: bool = False,
    want: bool = False,
    masked: bool = False,
) -> Kernel:
    """The kernel of the backward direction for these options, compiled once a process."""
    options = {"signed": signed, "rebuilt": rebuilt, "add": add, "want": want, "masked": masked}
    return compile_kernel(
        backward(*SCALARS[dtype], CODES[activation], *options.values()),
        _title("backward", dtype, activation, **options),
    )


def gradient_options(kept: Keep, *, residual: bool) -> dict[str, bool]:
    """Which kernel a backward is, by what the forward has kept."""
    rebuilt = kept is Keep.REBUILT
    return {"signed": kept is Keep.SIGNS, "rebuilt": rebuilt, "add": rebuilt and residual}


def warmup(
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    activations: Sequence[str | None] = (None, "relu"),
) -> dict[str, Kernel]:
    """Compile ahead, or load, the kernels of these types and activations, for any shape and layout.

    With and without a residual, without masks; by their names. `Kernel.cached` tells which of them
    were on the disk.
    """
    done = {}
    for dtype in dtypes:
        for activation in activations:
            name = f"{activation or 'identity'} {name_of(dtype)}"
            for add in (False, True):
                end = f"{name} with residual" if add else name
                done[f"forward {end}"] = forward_kernel(dtype, activation, add=add)
                if activation is None and add:
                    continue  # the residual's gradient is the gradient itself
                kept = Keep.needed(activation, residual=add, compiled=True)
                how = gradient_options(kept, residual=add)
                done[f"backward {end}"] = backward_kernel(dtype, activation, want=add, **how)
    return done
