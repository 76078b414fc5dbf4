"""Copy a model with what torch alone would not copy."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from steadynorm.models.surgery.graph import tensors

_uninitialized: Any = nn.UninitializedBuffer


def copied(model: nn.Module, owner: str) -> Any:
    """A deep copy; sharing inside the model is kept.

    Activations that a model keeps from its last forward are copied without their graph, which torch
    refuses to copy, and buffers of lazy layers stay uninitialized.

    Raises ValueError where something in the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for buffer in module._buffers.values():
            if isinstance(buffer, nn.UninitializedBuffer):
                memo[id(buffer)] = _uninitialized(device=buffer.device, dtype=buffer.dtype)
        memo |= {id(t): t.detach().clone() for t in tensors(vars(module)) if not t.is_leaf}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"{owner}: `model` must be one that copy.deepcopy can copy ({error}). "
            "Pass inplace=True to change the model itself."
        ) from error
