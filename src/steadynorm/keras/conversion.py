"""A Keras model with our layers in the place of Keras's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import keras

from steadynorm.keras.batchnorm import BatchNormalization
from steadynorm.statistics import Policy, PolicyName


def convert(
    model: Any,
    *,
    statistics: Policy | PolicyName | Mapping[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """A copy of a Keras model whose batch normalization layers are `BatchNormalization`.

    Weights, configuration, names and sharing are carried over; so are nested models. The model
    itself is left as it is. The copy is not compiled.

    Args:
        model: functional or sequential.
        statistics: the policy of every layer; None keeps what a layer has, `Batch` for Keras's.
        settings: further arguments of every `BatchNormalization`, such as `nonfinite="skip"`.

    Raises:
        ValueError: a subclassed model, which Keras cannot clone.

    Warns of batch normalization layers that stay: subclasses of Keras's layer by others, and those
    inside layers that are not models (`TimeDistributed`, your own).

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
    >>> convert(model, statistics="steady").layers[0].statistics
    Steady(prior=16, horizon=640, window=16)
    """
    if statistics is not None:
        settings = {**settings, "statistics": statistics}
    kinds = keras.layers.BatchNormalization, BatchNormalization

    def clone(layer: Any) -> Any:
        config = layer.get_config()
        if type(layer) in kinds:
            return BatchNormalization.from_config({**config, **settings})
        return type(layer).from_config(config)

    converted = keras.models.clone_model(model, clone_function=clone, recursive=True)
    converted.set_weights(model.get_weights())
    left = []
    for old, new in zip(_layers(model), _layers(converted), strict=True):
        count = getattr(old, "num_batches_tracked", None)
        if count is not None and getattr(new, "num_batches_tracked", None) is not None:
            new.num_batches_tracked.assign(count.value)
        if isinstance(new, kinds[0]) and type(new) is not kinds[1]:
            left.append(new.path or new.name)
    if left:
        warnings.warn(
            f"convert: left as they are: {', '.join(left)}. Layers inside other layers, and "
            f"subclasses of BatchNormalization, must be replaced where they are made.",
            stacklevel=2,
        )
    return converted


def _layers(model: Any) -> list[Any]:
    return list(model._flatten_layers(include_self=False))
