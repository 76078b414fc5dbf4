"""Which tensors are nothing but memory that a kernel can read and write by its address."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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


def unreadable(*tensors: Tensor | None) -> tuple[int, str] | None:
    """The first that a kernel cannot use by its address: its index, and why; None if it can all."""
    for index, t in enumerate(tensors):
        if t is not None and not readable(t):
            why = _why(t)
            if why is not None:
                return index, why
    return None


def _why(t: Tensor) -> str | None:
    if type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # as of a DTensor
        return f"is a {type(t).__name__}"
    if t.layout is not torch.strided:
        return f"has layout {t.layout}"
    if not t.is_cpu:
        return f"is on {t.device.type}"
    return "is a view whose values are not in memory" if t.is_neg() or t._is_zerotensor() else None
