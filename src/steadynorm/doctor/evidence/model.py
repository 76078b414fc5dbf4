"""Evidence, gathered once and read-only: nothing of a model or of the random state changes."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from steadynorm.doctor.evidence import Evidence, ModelFacts, NormEvidence, NormState, NormUsage
from steadynorm.doctor.evidence.batches import measure
from steadynorm.doctor.evidence.checkpoint import PARTS, probe_state
from steadynorm.doctor.evidence.graph import Standing, standings
from steadynorm.models.calibration import batches as feeding
from steadynorm.models.calibration.layers import batch_norms, unwrapped
from steadynorm.models.checkpoints.formats import array_of
from steadynorm.models.surgery.layers import Norm, recognize
from steadynorm.models.untouched import untouched
from steadynorm.statistics import Policy

__all__ = ["probe_model", "probe_state"]


def probe_model(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    loss: Any = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    against: Iterable[Any] | None = None,
    max_batches: int | None = None,
    optimizer: Any = None,
    exporting: bool = False,
    target: str = "",
) -> Evidence:
    """Evidence of a model: its layers' state and place, and with batches what they show.

    Parameters, gradients, buffers, modes, hooks and random state are put back, on exceptions too.
    """
    inner = unwrapped(model)
    norms = {
        name: (module, norm)
        for name, module in inner.named_modules()
        if (norm := recognize(module)) is not None
    }
    example = None
    if batches is not None:
        batch_norms(inner, "diagnose")  # refuses a model that its first batch would change
    with untouched(inner) as original, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of gradients that this run does not want, and the like
        if batches is not None:
            example, batches = _first(inner, batches, forward, max_batches)
            original.restore_random()
        modules = [module for module, _ in norms.values()]
        standing, remarks = standings(inner, modules, example) if norms else ({}, ())
        shown = None
        if batches is not None:
            shown = measure(
                inner, batches, loss=loss, forward=forward, against=against, max_batches=max_batches
            )
    empty = [name for name, (module, _) in norms.items() if not _filled(module)]
    if empty:
        some = ", ".join(map(repr, empty[:3])) + " and others" * (len(empty) > 3)
        remarks = (*remarks, f"Lazy or on the meta device, so without values to judge: {some}.")
    decay = _decay(optimizer)
    layers = (
        NormEvidence(name, type(module).__name__, _state(module, norm),
              _place(module, norm, standing[module], decay))
        for name, (module, norm) in norms.items()
    )  # fmt: skip
    facts = _facts(model, inner, optimizer, exporting)
    if shown is None:
        return Evidence(target or facts.kind, tuple(layers), facts, None, remarks)
    judged = tuple(replace(layer, data=shown.layers.get(layer.name)) for layer in layers)
    return Evidence(target or facts.kind, judged, facts, shown.model, remarks)


def _first(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None,
    max_batches: int | None,
) -> tuple[Callable[[nn.Module], Any], Iterable[Any]]:
    """How to call a model on the first batch, and all batches, the first included."""
    feed = feeding.checked(
        batches, forward, max_batches, None, again=False, model=model, owner="diagnose"
    )
    stream = iter(batches)
    try:
        first = next(stream)
    except StopIteration:
        raise ValueError("diagnose: `batches` must hold at least one batch; got none.") from None
    if stream is batches:  # can be read only once
        batches = itertools.chain([first], stream)
    moved = feeding.moved(first, feed.device)
    return lambda model: feed.forward(model, moved), batches


def _has_values(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and not nn.parameter.is_lazy(tensor) and not tensor.is_meta


def _filled(module: nn.Module) -> bool:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return all(tensor is None or _has_values(tensor) for tensor in tensors)


def _state(module: nn.Module, norm: Norm) -> NormState:
    tensors = {part: getattr(norm, part) for part in PARTS}
    held = {part: tensor for part, tensor in tensors.items() if _has_values(tensor)}
    arrays = {part: array_of(tensor).astype(np.float64) for part, tensor in held.items()}
    sizes = [len(array) for array in arrays.values()]
    batches = getattr(module, "num_batches_tracked", None)
    momentum = getattr(module, "momentum", None)
    return NormState(
        num_features=sizes[0] if sizes else int(getattr(module, "num_features", 0)),
        framework="torch",
        eps=float(norm.eps),
        momentum=None if momentum is None else float(momentum),
        **{part: arrays.get(part) for part in PARTS},
        dtypes={part: str(tensor.dtype).removeprefix("torch.") for part, tensor in held.items()},
        num_batches_tracked=None if batches is None or batches.is_meta else int(batches),
    )


def _place(
    module: nn.Module, norm: Norm, standing: Standing, decay: Mapping[int, float]
) -> NormUsage:
    policy = getattr(module, "statistics", None)
    tracked = norm.running_mean is not None and bool(getattr(module, "track_running_stats", True))
    affine = {n: p for n, p in module._parameters.items() if p is not None and n in PARTS}
    synchronize: Any = getattr(module, "synchronize", False)
    return NormUsage(
        training=module.training,
        policy="Frozen"
        if norm.frozen
        else type(policy).__name__
        if isinstance(policy, Policy)
        else "Batch",
        moves=tracked and not norm.frozen,
        trained={name: parameter.requires_grad for name, parameter in affine.items()},
        track_running_stats=tracked,
        synchronized=isinstance(module, nn.SyncBatchNorm) or synchronize is not False,
        ours=norm.kind == "ours",
        decay={n: decay[id(p)] for n, p in affine.items() if decay.get(id(p))},
        **vars(standing),
    )


def _decay(optimizer: Any) -> dict[int, float]:
    """Weight decay by a parameter's id."""
    if optimizer is None:
        return {}
    if not isinstance(getattr(optimizer, "param_groups", None), list):
        raise TypeError(
            f"diagnose: `optimizer` must be a torch.optim.Optimizer; got "
            f"{type(optimizer).__name__}."
        )
    return {
        id(parameter): float(group.get("weight_decay") or 0)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _facts(model: nn.Module, inner: nn.Module, optimizer: Any, exporting: bool) -> ModelFacts:
    wrapper, replicas = "", 1
    outer: Any = model
    while outer is not inner:
        if isinstance(outer, nn.parallel.DistributedDataParallel):
            wrapper = "DistributedDataParallel"
            replicas = torch.distributed.get_world_size(outer.process_group)
        elif isinstance(outer, nn.DataParallel):
            wrapper, replicas = "DataParallel", max(1, len(outer.device_ids))
        outer = outer._orig_mod if hasattr(outer, "_orig_mod") else outer.module
    parameters = list(inner.parameters())
    return ModelFacts(
        kind=type(inner).__name__,
        training=inner.training,
        parameters=sum(p.numel() for p in parameters if not nn.parameter.is_lazy(p)),
        trained_parameters=sum(
            p.numel() for p in parameters if p.requires_grad and not nn.parameter.is_lazy(p)
        ),
        wrapper=wrapper,
        replicas=replicas,
        optimizer="" if optimizer is None else type(optimizer).__name__,
        exporting=exporting,
    )
