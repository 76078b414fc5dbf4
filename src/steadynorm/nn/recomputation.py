"""Activation checkpointing runs a forward twice; statistics must move once.

The second run happens inside the backward pass, which is how it is told apart. A policy that leans
on running statistics must also meet them as they were the first time: what normalized the first
run is remembered per running mean, and found again by the batch's own moments.

The compiler, too, may compute again in the backward what it did not keep, and then reads running
statistics that have moved (pytorch#197039); `snapshot` keeps what was read.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from steadynorm.kernels import compat
from steadynorm.statistics import Moments, Normalizer

# Forwards of one layer that may wait for their recomputation at a time; channel-sized each.
REMEMBERED = 64
_first_runs: Any = WeakIdKeyDictionary()


def is_recomputation() -> bool:
    """Whether this forward runs in a backward pass; the compiler recomputes by its own means."""
    return not compat.is_compiling() and compat.graph_task() != -1


def may_be_recomputed() -> bool:
    """Whether this forward looks like the first run of a checkpointed region.

    Reentrant checkpointing runs it without gradient, the other kind under saved-tensor hooks.
    """
    if torch.compiler.is_compiling():
        return False
    if not torch.is_grad_enabled():
        return True
    return compat.has_saved_tensor_hooks()


def remember(running_mean: Tensor, batch: Moments, normalizer: Normalizer) -> None:
    """Keep what normalized this batch, in case it is recomputed."""
    _first_runs.setdefault(running_mean, deque(maxlen=REMEMBERED)).append((batch, normalizer))


def recall(running_mean: Tensor, batch: Moments) -> Normalizer | None:
    """What normalized a batch of the same moments in its first run, if that is remembered."""
    for known, normalizer in reversed(_first_runs.get(running_mean, ())):
        if torch.equal(known.mean, batch.mean) and torch.equal(known.var, batch.var):
            found: Normalizer = normalizer
            return found
    return None


REFUSED = (
    "activation checkpointing {} would normalize anew by running statistics that have moved since, "
    "under every policy that normalizes by them. Take the layer out of the compiler "
    "(layer.forward = torch.compiler.disable(layer.forward)) or of the checkpointed region, or use "
    "sn.Batch()."
)


@torch.library.custom_op(
    "steadynorm::snapshot", mutates_args=(), schema="(Tensor[] tensors, bool decide) -> Tensor[]"
)
def snapshot(tensors: list[Tensor], decide: bool) -> list[Tensor]:
    """Copies that compiled code keeps for its backward: it recomputes no operator it cannot see.

    But for activation checkpointing, in the compiled graph or around it: it copies the statistics
    anew there, when they have moved. Where they `decide` what normalizes, that would be another map
    than the forward's: refused, when the graph is made or when it runs in a backward pass.
    """
    if decide and compat.graph_task() != -1:
        raise NotImplementedError(REFUSED.format("around a compiled module"))
    return [tensor.clone() for tensor in tensors]


@snapshot.register_fake
def _(tensors: list[Tensor], decide: bool) -> list[Tensor]:
    if decide and compat.is_recomputed_when_compiled():
        raise NotImplementedError(REFUSED.format("inside a compiled graph"))
    return [torch.empty_like(tensor) for tensor in tensors]
