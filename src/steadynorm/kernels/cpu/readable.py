"""Which tensors are nothing but memory that a kernel can read and write by its address."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steadynorm.kernels.spec import Call

CPU = torch.device("cpu")
TENSORS = (
    "x", "weight", "bias", "residual", "mask", "running_mean", "running_var", "num_batches_tracked",
)  # fmt: skip
"""The names of a call's tensors."""
PLAIN: frozenset[Any] = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer})
STRIDED = torch.strided


def name_of(dtype: torch.dtype) -> str:
    """`float32` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def readable(t: Tensor) -> bool:
    """Whether it is sure to be: a plain strided tensor in this machine's memory."""
    return (
        t.__class__ in PLAIN
        and t.is_cpu
        and t.layout is STRIDED
        and not t.is_neg()
        and not t._is_zerotensor()
    )


def why_unreadable(t: Tensor, device: torch.device = CPU) -> str | None:
    """Why a kernel on the device cannot use a tensor by its address; None if it can."""
    if type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # as of a DTensor
        return f"is a {type(t).__name__}"
    if t.layout is not STRIDED:
        return f"has layout {t.layout}"
    if t.device != device:
        return f"is on {t.device}, not on {device}"
    return "is a view whose values are not in memory" if t.is_neg() or t._is_zerotensor() else None


def unreadable_argument(call: Call, device: torch.device = CPU) -> str | None:
    """Which tensor of a call a kernel on the device cannot use by its address, and why."""
    for name in TENSORS:
        t = getattr(call, name)
        if t is not None:
            why = why_unreadable(t, device)
            if why is not None:
                return f"`{name}` {why}"
    return None
