"""Rematerialization (`keras.RematScope`) on the torch backend: a forward that runs twice.

The second run, in the backward pass, must normalize as the first did and move nothing. TensorFlow
and JAX refuse a layer with moving statistics inside it themselves.
"""

from __future__ import annotations

from collections import deque
from importlib import import_module
from typing import Any

import keras
from keras import ops

from steadynorm.statistics import Moments, Normalizer

# Forwards of one layer that may wait for their recomputation at a time; channel-sized each.
REMEMBERED = 64


class FirstRuns:
    """What normalized a layer's batches in runs that may be recomputed, by the batches' moments."""

    def __init__(self) -> None:
        self._runs: deque[tuple[Moments, Normalizer]] = deque(maxlen=REMEMBERED)

    def remember(self, batch: Moments, normalizer: Normalizer) -> None:
        """Keep what normalized this batch."""
        self._runs.append((batch, normalizer))

    def recall(self, batch: Moments) -> Normalizer:
        """What normalized a batch of the same moments in its first run.

        Raises RuntimeError where that is not known: the moving statistics are others by now.
        """
        for known, normalizer in reversed(self._runs):
            if _equal(known.mean, batch.mean) and _equal(known.var, batch.var):
                return normalizer
        raise RuntimeError(
            "BatchNormalization: this forward runs inside a backward pass, and no first run of the "
            "same batch is known, whose moving statistics it would have to normalize by. Take the "
            "layer out of rematerialization, or use statistics='batch'."
        )


def is_recomputation() -> bool:
    """Whether this forward runs in a backward pass."""
    torch = _torch()
    if torch is None or torch.compiler.is_compiling():
        return False
    recomputed: bool = torch._C._current_graph_task_id() != -1
    return recomputed


def may_be_recomputed() -> bool:
    """Whether this forward looks like the first run of a checkpointed region.

    Reentrant checkpointing runs it without gradient, the other kind under saved-tensor hooks.
    """
    torch = _torch()
    if torch is None or torch.compiler.is_compiling():
        return False
    if not torch.is_grad_enabled():
        return True
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)
    return hooks(True) is not None  # torch 2.7 cannot be asked: perhaps


def _torch() -> Any:
    backend = keras.config.backend()
    return import_module(backend) if backend == "torch" else None


def _equal(a: Any, b: Any) -> bool:
    return a.shape == b.shape and bool(ops.all(ops.equal(a, b)))
