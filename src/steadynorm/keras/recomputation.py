"""Rematerialization (`keras.RematScope`) on the torch backend: a forward that runs twice.

The second run, in the backward pass, must normalize as the first did and move nothing. TensorFlow
and JAX refuse a layer with moving statistics inside it themselves.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import keras
from keras import ops

from steadynorm.statistics import Moments, Normalizer
from steadynorm.statistics.first_runs import FirstRuns

CURE = "Take the layer out of rematerialization, or use statistics='batch'."


def first_runs() -> FirstRuns:
    """A layer's runs that may be recomputed."""
    return FirstRuns(_equal, CURE)


def remember(runs: FirstRuns, batch: Moments, normalizer: Normalizer) -> None:
    """Keep what normalized this batch; a region is known by its hook."""
    hooks = _saved_hooks()
    runs.remember(batch, normalizer, hooks[0] if isinstance(hooks, tuple) else None)


def recall(runs: FirstRuns, batch: Moments) -> Normalizer:
    """What normalized a batch of the same moments in its first run.

    Raises RuntimeError where that is not known: the moving statistics are others by now.
    """
    found = runs.recall(batch, "BatchNormalization")
    if found is None:
        raise RuntimeError(
            f"BatchNormalization: this forward runs inside a backward pass, and no first run of "
            f"the same batch is known, whose moving statistics it would have to normalize by. "
            f"{CURE}"
        )
    return found


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
    return _saved_hooks() is not None


def _saved_hooks() -> Any:
    """The innermost pair of hooks on saved tensors, or None. torch 2.7 cannot be asked: perhaps."""
    torch = _torch()
    ask = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)
    return ask(True)


def _torch() -> Any:
    backend = keras.config.backend()
    return import_module(backend) if backend == "torch" else None


def _equal(a: Any, b: Any) -> bool:
    return ops.shape(a) == ops.shape(b) and bool(ops.all(ops.equal(a, b)))
