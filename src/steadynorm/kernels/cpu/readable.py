"""Which tensors are nothing but memory that a kernel can read and write by its address."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _is_memory(kind: type[Tensor]) -> bool:
    """Whether PyTorch dispatches tensors of this type to nobody else, as it does a DTensor."""
    functions: list[Any] = [
        getattr(function, "__func__", function)
        for function in (
            kind.__torch_function__,
            Tensor.__torch_function__,
            torch.nn.Parameter.__torch_function__,
        )
    ]
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__ and functions[0] in functions[1:]


def unreadable(t: Tensor) -> str | None:
    """Why a kernel cannot use the tensor by its address, in words; None if it can."""
    if not _is_memory(t.__class__):
        return f"is a {t.__class__.__name__}"
    if t.layout is not torch.strided:
        return f"has layout {t.layout}"
    if not t.is_cpu:
        return f"is on {t.device.type}"
    if t.is_neg() or t.is_conj() or t._is_zerotensor():
        return "is a view whose values are not in memory"
    return None
