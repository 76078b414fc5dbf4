"""Sums and gathers over the replicas of a process group: collectives that the compiler sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def all_reduce(sums: Tensor, group: str, owner: str) -> Tensor:
    """The sums of all replicas, added."""
    reduce = torch.ops._c10d_functional.all_reduce
    return _finished(reduce, sums.contiguous(), "sum", group, owner=owner)


def all_gather(row: Tensor, size: int, group: str, owner: str) -> Tensor:
    """The rows of all `size` replicas, one after the other."""
    gather = torch.ops._c10d_functional.all_gather_into_tensor
    return _finished(gather, row, size, group, owner=owner)


def _finished(collective: Any, *arguments: Any, owner: str) -> Tensor:
    """The result of a collective, or an error that explains."""
    try:
        result: Tensor = torch.ops._c10d_functional.wait_tensor(collective(*arguments))
    except RuntimeError as error:
        raise RuntimeError(
            f"{owner}: `synchronize`: the exchange of statistics with the other replicas "
            f"failed: another replica stopped, or did not reach this layer in time. Look at "
            f"the first replica that ended; all replicas must call the layer equally often. "
            f"({error})"
        ) from error
    return result
