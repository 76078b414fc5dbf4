"""Evidence, gathered once and read-only: nothing of a model or of the random state changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from steadynorm.calibration.layers import unwrapped
from steadynorm.checkpoints import read
from steadynorm.checkpoints.convert import NAMES, SEPARATORS, find_layers
from steadynorm.doctor.evidence import Evidence, Layer, Model, Place, State
from steadynorm.statistics import Policy
from steadynorm.surgery.layers import Norm, named, recognize


def probe_state(checkpoint: str | Path | Mapping[str, Any]) -> Evidence:
    """Evidence of a checkpoint alone: a file, or arrays by name."""
    target = "state" if isinstance(checkpoint, Mapping) else str(checkpoint)
    weights = checkpoint if isinstance(checkpoint, Mapping) else read(checkpoint)
    layers = []
    for framework in NAMES:
        for prefix in find_layers(weights, framework):
            keys = [f"{prefix}{SEPARATORS[framework]}{n}".lstrip("./") for n in NAMES[framework]]
            held = [weights.get(key) for key in keys]
            layers.append(Layer(prefix, "BatchNorm", _stored(framework, *held)))
    return Evidence(target, tuple(layers))


def _stored(framework: str, weight: Any, bias: Any, mean: Any, var: Any, batches: Any) -> State:
    arrays = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
    held = {name: _array(value) for name, value in arrays.items()}
    return State(
        num_features=np.size(mean),
        framework=framework,
        eps=None,
        momentum=None,
        **held,
        dtypes={n: _dtype(value) for n, value in arrays.items() if value is not None},
        num_batches_tracked=None if batches is None else int(batches),
    )


def probe_model(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    loss: Any = None,
    forward: Any = None,
    against: Iterable[Any] | None = None,
    max_batches: int | None = None,
    optimizer: Any = None,
    exporting: bool = False,
    target: str = "",
) -> Evidence:
    """Evidence of a model: its layers' state and place, and with batches what they show."""
    inner = unwrapped(model)
    layers = []
    for name, module in named(inner):
        norm = recognize(module)
        if norm is not None:
            layers.append(
                Layer(
                    "" if name == "(model)" else name,
                    type(module).__name__,
                    _state(module, norm),
                    _place(module, norm),
                )
            )
    parameters = list(inner.parameters())
    facts = Model(
        kind=type(inner).__name__,
        training=inner.training,
        parameters=sum(p.numel() for p in parameters),
        trained_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        optimizer="" if optimizer is None else type(optimizer).__name__,
        exporting=exporting,
    )
    shown = None
    if batches is not None:
        from steadynorm.doctor.measure import measure

        shown = measure(
            inner, batches, loss=loss, forward=forward, against=against, max_batches=max_batches
        )
        layers = [replace(layer, data=shown.layers.get(layer.name)) for layer in layers]
    return Evidence(
        target or type(inner).__name__, tuple(layers), facts, None if shown is None else shown.model
    )


def _state(module: nn.Module, norm: Norm) -> State:
    tensors = {
        "weight": norm.weight,
        "bias": norm.bias,
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
    }
    held = {name: _array(tensor) for name, tensor in tensors.items()}
    sizes = [len(array) for array in held.values() if array is not None]
    batches = getattr(module, "num_batches_tracked", None)
    return State(
        num_features=sizes[0] if sizes else int(getattr(module, "num_features", 0)),
        framework="torch",
        eps=float(norm.eps),
        momentum=getattr(module, "momentum", None),
        **held,
        dtypes={n: _dtype(tensor) for n, tensor in tensors.items() if tensor is not None},
        num_batches_tracked=None if batches is None else int(batches),
    )


def _place(module: nn.Module, norm: Norm) -> Place:
    policy = getattr(module, "statistics", None)
    name = "Frozen" if norm.frozen else "Batch"
    if isinstance(policy, Policy):
        name = type(policy).__name__
    tracked = bool(getattr(module, "track_running_stats", True))
    return Place(
        training=module.training,
        policy=name,
        moves=tracked and norm.running_mean is not None and not norm.frozen,
        trained={
            key: parameter.requires_grad
            for key, parameter in module._parameters.items()
            if parameter is not None
        },
        track_running_stats=tracked and norm.running_mean is not None,
    )


def _array(value: Any) -> np.ndarray | None:
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        value = value.detach().to("cpu", torch.float64, copy=True).numpy()
    return np.asarray(value, np.float64)


def _dtype(value: Any) -> str:
    return str(getattr(value, "dtype", "float64")).removeprefix("torch.")
