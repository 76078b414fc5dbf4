"""Evidence of a checkpoint alone; see `model.py` for that of a model. Imports no framework."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np

from steadynorm.doctor.evidence.records import PARTS, Evidence, NormEvidence, NormState
from steadynorm.models.checkpoints import NAMES, find_layers, join
from steadynorm.models.files import entries, keras_settings
from steadynorm.models.formats import Entry, array_of, tensor_entry, unnested

WIDE = 10.0  # variances of layers fed by normalized values rarely are


def probe_state(checkpoint: str | PathLike[str] | Mapping[str, Any]) -> Evidence:
    """Evidence of a checkpoint alone: a file, or arrays or tensors by name.

    Layers are found by the names that torch, Keras and flax give a running mean and variance. Only
    their arrays are read. Raises ValueError for a file that cannot be read or holds no such layer.
    """
    if isinstance(checkpoint, Mapping):
        owner, layers = "state dict", norms_in(unnested(checkpoint))
    else:
        owner = fspath(checkpoint)
        with entries(checkpoint) as stored:
            layers = _norms(stored, _settings(Path(checkpoint)))
    if not layers:
        where = "the state dict" if isinstance(checkpoint, Mapping) else owner
        raise ValueError(
            f"{where} holds no batch normalization layer: no array is named as torch's "
            f"running_mean and running_var, Keras's moving_mean and moving_variance, or flax's "
            f"mean and var."
        )
    return Evidence(owner, layers)


def norms_in(state: Mapping[str, Any]) -> tuple[NormEvidence, ...]:
    """The batch norms in arrays or tensors by name; none for a state dict without any."""
    named = state.items()
    return _norms({str(n): entry_of(v) for n, v in named if hasattr(v, "shape")}, {})


def entry_of(value: Any) -> Entry:
    """An array or tensor as an entry of a file."""
    if isinstance(value, Entry):
        return value
    torch = sys.modules.get("torch")  # where it is not imported, there is no tensor of its
    if torch is not None and isinstance(value, torch.Tensor):
        return tensor_entry(value)
    array = np.asarray(value)
    return Entry(array.shape, array.dtype.name, lambda: array)


def _norms(stored: Mapping[str, Entry], settings: Mapping[str, float]) -> tuple[NormEvidence, ...]:
    shapes = {name: np.broadcast_to(np.int8(0), entry.shape) for name, entry in stored.items()}
    for framework, names in NAMES.items():
        layers = []
        for prefix in find_layers(shapes, framework):
            found = {
                part: stored[key]
                for part, name in zip((*PARTS, "batches"), names, strict=True)
                if (key := join(prefix, name, framework)) in stored
            }
            if _is_norm(found, framework):
                layers.append(
                    NormEvidence(prefix, "BatchNorm", _stored(found, framework, settings))
                )
        if layers:
            return with_weights(layers, stored)
    return ()


def with_weights(
    layers: Sequence[NormEvidence], stored: Mapping[str, Entry]
) -> tuple[NormEvidence, ...]:
    """The layers with `weight_square` of torch's, where most of their variances are wide."""
    variances = [layer.state.running_var for layer in layers]
    wide = sum(v is not None and 2 * int(np.sum(v > WIDE)) > v.size for v in variances)
    if layers and layers[0].state.framework == "torch" and 2 * wide > len(layers):
        return tuple(replace(layer, state=_with_weight(layer, stored)) for layer in layers)
    return tuple(layers)


def _with_weight(layer: NormEvidence, stored: Mapping[str, Entry]) -> NormState:
    """Of the last matrix or kernel before it that makes as many channels."""
    square = None
    for name, entry in stored.items():
        if name == join(layer.name, "running_var", "torch"):
            break
        if len(entry.shape) > 1 and entry.shape[0] == layer.state.num_features:
            square = entry
    if square is None:
        return layer.state
    weight = array_of(square.load()).astype(np.float64).reshape(layer.state.num_features, -1)
    return replace(layer.state, weight_square=np.sum(weight**2, axis=1))


def _is_norm(found: Mapping[str, Entry], framework: str) -> bool:
    """One number per channel in each; a mean and a var alone may be anybody's, not only flax's."""
    vectors = {found[part].shape for part in PARTS if part in found}
    named = framework != "flax" or "weight" in found or "bias" in found
    return named and len(vectors) == 1 and len(vectors.pop()) == 1


def _stored(found: Mapping[str, Entry], framework: str, settings: Mapping[str, float]) -> NormState:
    with np.errstate(invalid="ignore"):  # a damaged file may hold signalling NaNs
        arrays = {p: array_of(found[p].load()).astype(np.float64) for p in PARTS if p in found}
    batches = found.get("batches")
    return NormState(
        num_features=len(arrays["running_mean"]),
        framework=framework,
        eps=settings.get("epsilon"),
        momentum=settings.get("momentum"),
        **{part: arrays.get(part) for part in PARTS},
        dtypes={part: found[part].dtype for part in arrays},
        num_batches_tracked=None if batches is None else _count(array_of(batches.load())),
    )


def _count(value: Any) -> int | None:
    """A count of batches, None where it is none: a damaged file may hold anything."""
    array = np.asarray(value)
    number = array.size == 1 and array.dtype.kind in "iuf" and np.isfinite(array).all()
    return int(array.item()) if number else None


def _settings(path: Path) -> dict[str, float]:
    """`momentum` and `epsilon` of a Keras model, where all its layers agree.

    The file numbers its layers by another order than its configuration lists them.
    """
    settings = keras_settings(path)
    agreed = {}
    for name in ("momentum", "epsilon"):
        values = {layer.get(name) for layer in settings}
        value = values.pop() if len(values) == 1 else None
        if isinstance(value, int | float):
            agreed[name] = float(value)
    return agreed
