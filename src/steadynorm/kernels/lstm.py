"""The elementwise part of a long short-term memory: what stands between its normalizations.

Differentiated, compiled and cast by PyTorch itself. `gates` is (N, 4H) in torch's order: input,
forget, candidate, output.
"""

from __future__ import annotations

import torch
from torch import Tensor


def update(gates: Tensor, memory: Tensor) -> Tensor:
    """The cell state after a step, `σ(f)·c + σ(i)·tanh(g)`."""
    new, forget, candidate, _ = gates.chunk(4, -1)
    return forget.sigmoid() * memory + new.sigmoid() * candidate.tanh()


def expose(gates: Tensor, squashed: Tensor) -> Tensor:
    """The hidden state of a step, `σ(o)·squashed`."""
    return gates.chunk(4, -1)[3].sigmoid() * squashed


def carry(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` for the samples that `mask` (N,) marks, `old` for the others."""
    return torch.where(mask.unsqueeze(-1), new, old)
