"""Activation checkpointing runs a forward twice; statistics must move once.

The second run happens inside the backward pass, of a layer that has run under checkpointing before:
that is how it is told apart. A policy that leans on running statistics must also meet them as they
were the first time: what normalized the first run is remembered per running mean, and found again
by the batch's own moments. Where these leave a choice, the call is refused.

The compiler, too, may compute again in the backward what it did not keep, and then reads running
statistics that have moved (pytorch#197039); `snapshot` keeps what was read.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from steadynorm.kernels import compat
from steadynorm.statistics import Moments, Normalizer

# Forwards of one layer that may wait for their recomputation at a time; channel-sized each.
REMEMBERED = 64
_first_runs: Any = WeakIdKeyDictionary()


@dataclass(eq=False, slots=True)
class _FirstRun:
    """A forward that may be repeated: its batch, what normalized it, and the region it lay in."""

    batch: Moments
    normalizer: Normalizer
    region: Any  # a weak reference to the region's hook; None where it is not known
    repeated: bool = False


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
        _first_runs[key] = deque(maxlen=REMEMBERED)


def remember(running_mean: Tensor, batch: Moments, normalizer: Normalizer) -> None:
    """Keep what normalized this batch, in case it is recomputed; forget what has been."""
    key = _owner_of(running_mean)
    waiting = [run for run in _first_runs[key] if not run.repeated]
    hooks = compat.saved_hooks(True)
    region = weakref.ref(hooks[0]) if isinstance(hooks, tuple) else None
    waiting.append(_FirstRun(batch, normalizer, region))
    _first_runs[key] = deque(waiting, maxlen=REMEMBERED)


def recall(running_mean: Tensor, batch: Moments, owner: str) -> Normalizer:
    """What normalized a batch of the same moments in its first run.

    Of several, the last that waits: a backward pass goes through regions in reverse order, but
    through one region from its beginning.
    """
    alike = [
        run
        for run in _first_runs[_owner_of(running_mean)]
        if torch.equal(run.batch.mean, batch.mean) and torch.equal(run.batch.var, batch.var)
    ]
    if not alike:
        raise RuntimeError(
            f"{owner}: this forward runs in a backward pass, as activation checkpointing repeats "
            f"one, and none of the {REMEMBERED} forwards that are remembered saw this batch. Let "
            f"at most {REMEMBERED} forwards of a layer wait for their backward, run no other "
            f"forward of it there, or use sn.Batch()."
        )
    waiting = [run for run in alike if not run.repeated] or alike
    run = waiting[-1]
    if not all(_equal(run.normalizer, other.normalizer) for other in waiting):
        if run.repeated or run.region is None:
            raise NotImplementedError(
                f"{owner}: activation checkpointing repeats one of {len(waiting)} forwards that "
                f"saw the same batch with other running statistics, and which one cannot be told. "
                f"Use use_reentrant=False and one backward for each forward, or sn.Batch()."
            )
        run = next(each for each in waiting if each.region == run.region)
    run.repeated = True
    found: Normalizer = run.normalizer
    return found


def _equal(one: Normalizer, other: Normalizer) -> bool:
    return all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one, other, strict=True)
    )


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
