"""Activation checkpointing runs a forward twice; statistics must move once.

The second run happens inside the backward pass, of a layer that has run under checkpointing before:
that is how it is told apart. A policy that leans on running statistics must also meet them as they
were the first time: what normalized the first run is remembered per running mean, and found again
by the batch's own moments. Where these leave a choice, the call is refused.

The compiler, too, may compute again in the backward what it did not keep, and then reads running
statistics that have moved (pytorch#197039); `snapshot` keeps what was read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from steadynorm.kernels import compat
from steadynorm.statistics import Moments, Normalizer
from steadynorm.statistics.first_runs import REMEMBERED, FirstRuns

CURE = "Use use_reentrant=False and one backward for each forward, or sn.Batch()."
_first_runs: Any = WeakIdKeyDictionary()


def is_recomputation(running_mean: Tensor | None = None) -> bool:
    """Whether this forward repeats one of the layer's; the compiler recomputes by its own means.

    Without a running mean to tell the layer by: whether it runs in a backward pass.
    """
    if compat.is_compiling() or compat.graph_task() == -1:
        return False
    return running_mean is None or _owner_of(running_mean) in _first_runs


def _owner_of(running_mean: Tensor) -> Tensor:
    """The tensor that lives as long as the layer: a view may be made anew for each call."""
    return running_mean if running_mean._base is None else running_mean._base


def may_be_recomputed() -> bool:
    """Whether this forward looks like the first run of a checkpointed region.

    Reentrant checkpointing runs it without gradient, the other kind under saved-tensor hooks.
    """
    if torch.compiler.is_compiling():
        return False
    if not torch.is_grad_enabled():
        return True
    return compat.saved_hooks(True) is not None


def expect(running_mean: Tensor) -> None:
    """A forward of this layer in a backward pass, from now on, repeats an earlier one."""
    key = _owner_of(running_mean)
    if key not in _first_runs:
        _first_runs[key] = FirstRuns(_equal, CURE)


def remember(running_mean: Tensor, batch: Moments, normalizer: Normalizer) -> None:
    """Keep what normalized this batch, in case it is recomputed; a region is known by its hook."""
    hooks = compat.saved_hooks(True)
    region = hooks[0] if isinstance(hooks, tuple) else None
    _first_runs[_owner_of(running_mean)].remember(batch, normalizer, region)


def recall(running_mean: Tensor, batch: Moments, owner: str) -> Normalizer:
    """What normalized a batch of the same moments in its first run."""
    found: Normalizer | None = _first_runs[_owner_of(running_mean)].recall(batch, owner)
    if found is None:
        raise RuntimeError(
            f"{owner}: this forward runs in a backward pass, as activation checkpointing repeats "
            f"one, and none of the {REMEMBERED} forwards that are remembered saw this batch. Let "
            f"at most {REMEMBERED} forwards of a layer wait for their backward, run no other "
            f"forward of it there, or use sn.Batch()."
        )
    return found


def _equal(one: Any, other: Any) -> bool:
    device = next((t.device for t in (one, other) if isinstance(t, Tensor)), "cpu")
    return torch.equal(*(torch.as_tensor(t, device=device) for t in (one, other)))


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
