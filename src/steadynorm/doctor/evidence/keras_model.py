"""Evidence of a live Keras model, on any backend; nothing of it is run. Imports no framework."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from steadynorm.doctor.evidence.records import PARTS, Evidence, NormEvidence, NormState

NAMES = dict(zip(PARTS, ("gamma", "beta", "moving_mean", "moving_variance"), strict=True))


def is_keras(target: Any) -> bool:
    """Whether it is a Keras model or layer."""
    return any(kind.__module__.startswith("keras.") for kind in type(target).__mro__)


def keras_norms(model: Any) -> Iterator[tuple[str, Any]]:
    """The batch norms of a model, wherever they are nested, by their paths."""
    for layer in model._flatten_layers():
        if "BatchNormalization" in type(layer).__name__ and hasattr(layer, "moving_mean"):
            yield layer.path, layer


def probe_keras(model: Any) -> Evidence:
    """Evidence of its layers. Raises ValueError for a model that is not built yet."""
    layers = tuple(
        NormEvidence(name, type(layer).__name__, _state(layer))
        for name, layer in keras_norms(model)
    )
    return Evidence(str(model.name), layers)


def _state(layer: Any) -> NormState:
    if not layer.built:
        raise ValueError(
            f"diagnose: `target` must be built; {layer.path!r} has no weights yet. Call the model "
            f"on one batch first."
        )
    variables = {part: getattr(layer, name, None) for part, name in NAMES.items()}
    found = {part: variable for part, variable in variables.items() if variable is not None}
    arrays = {part: np.asarray(v.numpy()).astype(np.float64) for part, v in found.items()}
    return NormState(
        num_features=len(arrays["running_mean"]),
        framework="keras",
        eps=float(layer.epsilon),
        momentum=float(layer.momentum),
        **{part: arrays.get(part) for part in PARTS},
        dtypes={part: str(variable.dtype) for part, variable in found.items()},
        num_batches_tracked=None,
    )
