"""Evidence of a model, gathered once; nothing of the model or of the random states changes."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from steadynorm.doctor.evidence.batches import measure
from steadynorm.doctor.evidence.checkpoint import entry_of, norms_in, with_weights
from steadynorm.doctor.evidence.graph import graph_facts, has_values
from steadynorm.doctor.evidence.passes import Forwards, feeding
from steadynorm.doctor.evidence.records import (
    PARTS,
    Evidence,
    ModelFacts,
    NormEvidence,
    NormState,
    NormUsage,
)
from steadynorm.models.batches import moved
from steadynorm.models.formats import Entry, array_of
from steadynorm.models.layers import Norm, batch_norms, recognize, unwrapped
from steadynorm.models.untouched import untouched
from steadynorm.statistics import Policy

__all__ = ["probe_model"]


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
    forwards: Forwards | None = None,
) -> Evidence:
    """Evidence of a model: its layers' state and usage, and with batches what they show.

    Parameters, gradients, buffers, modes, hooks and random states are restored, on exceptions too.
    """
    inner = unwrapped(model)
    norms = {
        name: (module, norm)
        for name, module in inner.named_modules()
        if (norm := recognize(module)) is not None
    }
    facts = _model_facts(model, inner, optimizer, exporting)
    target = target or facts.kind
    if not norms and (evidence := _state_alone(inner, target, facts, batches)) is not None:
        return evidence
    example = None
    if batches is not None:
        batch_norms(inner, "diagnose")  # refuses a model that its first batch would change
        _refuse_meta(inner)
    data: tuple[Any, Any] = ({}, None)
    with untouched(inner) as original, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of gradients that this run does not want, and the like
        forwards = forwards or Forwards()
        if batches is not None:
            example, batches = _first(inner, batches, forward, max_batches, forwards)
            original.restore_random()
        modules = [module for module, _ in norms.values()]
        forwards.expect(2 * bool(norms and batches is not None))  # the graph of either mode
        usage, remarks = graph_facts(inner, modules, example) if norms else ({}, ())
        if batches is not None:
            data = measure(
                inner, original, batches, loss=loss, forward=forward, against=against,
                max_batches=max_batches, forwards=forwards,
            )  # fmt: skip
    of_batches = {
        "loss": loss, "forward": forward, "against": against, "max_batches": max_batches
    }  # fmt: skip
    unused = [f"`{name}`" for name, value in of_batches.items() if value is not None]
    if batches is None and unused:
        remarks = (*remarks, f"No batches were given, so not used: {', '.join(unused)}.")
    empty = [name for name, (module, _) in norms.items() if not _filled(module)]
    if empty:
        named = ", ".join(map(repr, empty[:3])) + " and others" * (len(empty) > 3)
        remarks = (*remarks, f"Lazy or on the meta device, so without values to judge: {named}.")
    decay = _decay(optimizer)
    left_out = _left_out(inner, decay)
    layers = tuple(
        NormEvidence(
            name, type(module).__name__, _state(module, norm),
            _usage(module, norm, usage[module], decay, left_out), data[0].get(name),
        )
        for name, (module, norm) in norms.items()
    )  # fmt: skip
    return Evidence(target, with_weights(layers, _stored(inner)), facts, data[1], remarks)


def _state_alone(model: nn.Module, target: str, facts: ModelFacts, batches: Any) -> Evidence | None:
    """Evidence of a model without layers that can be recognized, but whose state dict holds some,
    such as a TorchScript or an exported one; None for others.
    """
    layers = norms_in(_stored(model))
    if not layers:
        return None
    remark = f"The layers of {facts.kind} cannot be examined or run: its state alone was judged."
    if batches is not None:
        remark += " The batches were not read."
    return Evidence(target, layers, None, None, (remark,))


def _stored(model: nn.Module) -> dict[str, Entry]:
    return {n: entry_of(t) for n, t in model.state_dict().items() if has_values(t)}


def _refuse_meta(model: nn.Module) -> None:
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    meta = next((name for name, tensor in named if tensor.is_meta), None)
    if meta is not None:
        raise ValueError(
            f"diagnose: `model` must hold values to be run on batches; {meta!r} is on the meta "
            f"device. Load its weights first (model.to_empty(device='cpu'), load_state_dict)."
        )


def _first(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None,
    max_batches: int | None,
    forwards: Forwards,
) -> tuple[Callable[[nn.Module], Any], Iterable[Any]]:
    """How to call a model on the first batch, and all batches, the first included."""
    feed = feeding(batches, model, forward, max_batches, forwards)
    stream = iter(batches)
    try:
        first = next(stream)
    except StopIteration:
        raise ValueError("diagnose: `batches` must hold at least one batch; got none.") from None
    if stream is batches:  # can be read only once
        batches = itertools.chain([first], stream)
    batch = moved(first, feed.device)
    return lambda model: feed.forward(model, batch), batches


def _filled(module: nn.Module) -> bool:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return all(tensor is None or has_values(tensor) for tensor in tensors)


def _state(module: nn.Module, norm: Norm) -> NormState:
    tensors = {part: getattr(norm, part) for part in PARTS}
    stored = {part: tensor for part, tensor in tensors.items() if has_values(tensor)}
    arrays = {part: array_of(tensor).astype(np.float64) for part, tensor in stored.items()}
    sizes = [len(array) for array in arrays.values()]
    batches = getattr(module, "num_batches_tracked", None)
    momentum = getattr(module, "momentum", None)
    return NormState(
        num_features=sizes[0] if sizes else int(vars(module).get("num_features", 0)),
        framework="torch",
        eps=float(norm.eps),
        momentum=None if momentum is None else float(momentum),
        **{part: arrays.get(part) for part in PARTS},
        dtypes={part: str(tensor.dtype).removeprefix("torch.") for part, tensor in stored.items()},
        num_batches_tracked=None if batches is None or batches.is_meta else int(batches),
    )


def _usage(
    module: nn.Module, norm: Norm, graph: Mapping[str, Any], decay: Mapping[int, float],
    left_out: set[int],
) -> NormUsage:  # fmt: skip
    policy = getattr(module, "statistics", None)
    kept = norm.running_mean is not None or module._buffers.get("running_mean") is not None
    tracked = kept and bool(getattr(module, "track_running_stats", True))
    affine = {n: p for n, p in module._parameters.items() if p is not None and n in PARTS}
    synchronize: Any = getattr(module, "synchronize", False)
    trains_with = type(policy).__name__ if isinstance(policy, Policy) else "Batch"
    return NormUsage(
        training=module.training,
        policy="Frozen" if norm.frozen else trains_with,
        moves=tracked and norm.running_mean is not None and not norm.frozen,
        trained={name: parameter.requires_grad for name, parameter in affine.items()},
        track_running_stats=tracked,
        synchronized=isinstance(module, nn.SyncBatchNorm) or synchronize is not False,
        ours=norm.kind == "ours",
        decay={n: decay[id(p)] for n, p in affine.items() if decay.get(id(p))},
        left_out=bool(affine) and all(id(p) in left_out for p in affine.values()),
        **graph,
    )


def optimizers(argument: Any) -> list[Any]:
    """The optimizers of an argument: one, several, or inside a wrapper such as Accelerate's.

    Raises TypeError for what is none.
    """
    if argument is None:
        return []
    if isinstance(argument, Sequence) and not isinstance(argument, str):
        return [optimizer for part in argument for optimizer in optimizers(part)]
    if not isinstance(getattr(argument, "param_groups", None), list):
        raise TypeError(
            f"diagnose: `optimizer` must be a torch.optim.Optimizer or several of them; got "
            f"{type(argument).__name__}."
        )
    inner = getattr(argument, "optimizer", None)
    return optimizers(inner) if hasattr(inner, "param_groups") else [argument]


def _decay(optimizer: Any) -> dict[int, float]:
    """Weight decay by a parameter's id."""
    return {
        id(parameter): float(group.get("weight_decay") or 0)
        for part in optimizers(optimizer)
        for group in part.param_groups
        for parameter in group["params"]
    }


def _left_out(model: nn.Module, decay: Mapping[int, float]) -> set[int]:
    """Parameters that no optimizer holds, by id; none if the optimizers hold nothing of the model,
    and so train another.
    """
    ids = {id(parameter) for parameter in model.parameters()}
    return ids - decay.keys() if ids & decay.keys() else set()


def _model_facts(model: nn.Module, inner: nn.Module, optimizer: Any, exporting: bool) -> ModelFacts:
    wrapper, replicas = "", 1
    outer: Any = model
    while outer is not inner:
        if isinstance(outer, nn.parallel.DistributedDataParallel):
            wrapper = "DistributedDataParallel"
            replicas = torch.distributed.get_world_size(outer.process_group)
        elif isinstance(outer, nn.DataParallel):
            wrapper, replicas = "DataParallel", max(1, len(outer.device_ids))
        outer = outer._orig_mod if hasattr(outer, "_orig_mod") else outer.module
    sizes = [
        (p.numel(), p.requires_grad) for p in inner.parameters() if not nn.parameter.is_lazy(p)
    ]
    names = dict.fromkeys(type(part).__name__ for part in optimizers(optimizer))
    return ModelFacts(
        kind=type(inner).__name__,
        training=inner.training,
        parameters=sum(size for size, _ in sizes),
        trained_parameters=sum(size for size, trained in sizes if trained),
        wrapper=wrapper,
        replicas=replicas,
        optimizer=" and ".join(names),
        exporting=exporting,
        averaged=max(map(_averaged, inner.modules())),
    )


def _averaged(module: nn.Module) -> int:
    """How many models torch's AveragedModel averages, its buffers left out; 0 for other modules."""
    if not isinstance(module, AveragedModel) or module.use_buffers:
        return 0
    return int(module.n_averaged)
