"""Turn every batch norm of a model into ours, or back into torch's."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from steadynorm.models.surgery import fuse as fusion
from steadynorm.models.surgery.adoption import adopt, release, why_not_ours
from steadynorm.models.surgery.changes import Change, Changes
from steadynorm.models.surgery.copying import copied
from steadynorm.models.surgery.layers import Norm, describe, named, recognize
from steadynorm.models.surgery.verification import answers, compare
from steadynorm.nn.batchnorm import SteadyNorm
from steadynorm.nn.synchronize import Synchronize
from steadynorm.statistics import Batch, Frozen, Policy, policy_from

Model = TypeVar("Model", bound=nn.Module)
HALF = (torch.float16, torch.bfloat16)


def convert(
    model: Model,
    statistics: Policy | str | None = None,
    fuse: bool = True,
    synchronize: Synchronize | None = None,
    *,
    to: str = "steadynorm",
    example_inputs: Any = None,
    inplace: bool = False,
) -> tuple[Model, Changes]:
    """Turns every batch norm of a model into ours; with `to="torch"`, ours back into torch's.

    Known are torch's (`BatchNorm1d`, `2d`, `3d`, lazy ones, `SyncBatchNorm`), subclasses of them,
    and look-alikes: classes named like a batch norm, made of the same parts, that also compute the
    same on a probe (torchvision's, detectron2's, DETR's `FrozenBatchNorm2d`, timm's
    `BatchNormAct2d` and `FrozenBatchNormAct2d`, mmcv's synchronized one). Each module stays the
    same object and changes its class, so weights, buffers, eps, momentum, mode, type, device,
    hooks, sharing and `state_dict` keys stay. Frozen look-alikes become `statistics=Frozen()`;
    their weight and bias become parameters that need no gradient, and they gain
    `num_batches_tracked`. Running statistics in half precision become float32.

    With `fuse`, the activation after a batch norm, and the residual added between the two, move
    into the layer, where one visit to memory does all three. See
    `steadynorm.models.surgery.fuse` for what
    counts as safe; what looked fusible and is not is left and named. Training, inference,
    gradients, buffers and `state_dict` keys stay the same.

    Arguments:
        statistics: policy for every batch norm, or its lower-case name; None keeps each as it is:
            `Batch()`, or `Frozen()` for frozen ones, which stay frozen in any case.
        fuse: also take in activations and residuals.
        synchronize: True or a process group for every layer, False for none; None keeps each as it
            is, so that `SyncBatchNorm` pools over its own group.
        to: "steadynorm", or "torch" for the way back: undoes fusing too, and names in the changes
            what torch's layers cannot hold (policies, `nonfinite`). An activation that `convert`
            did not put inside a layer keeps that layer ours.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; the model is
            run on them before and after, and the answers in inference are compared. Where
            `torch.fx` cannot follow the model, fusing also goes by what is seen in such a run.
        inplace: change the model given instead of a copy. A copy has parameters of its own: build
            the optimizer from it.

    Returns the model and the changes; a layer that is as it should be is not listed.

    Raises ValueError or TypeError for unknown arguments, RuntimeError if the answers changed.

    >>> import steadynorm as sn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> model, changes = convert(model, statistics=sn.Steady())
    >>> print(changes)
    what       where  before          after           why
    converted  1      BatchNorm2d(8)  BatchNorm2d(8)  Steady(prior=4.0, horizon=640)
    fused      1      relu after it   inside it       2 is an identity now
    >>> model[1].activation
    'relu'

    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` loses what a subclass added.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: `model` must be a torch.nn.Module; got {type(model).__name__}.")
    if to not in ("steadynorm", "torch"):
        raise ValueError(f"convert: `to` must be 'steadynorm' or 'torch'; got {to!r}.")
    policy = None if statistics is None else policy_from(statistics)
    expected = None if example_inputs is None else answers(model, example_inputs, training=False)
    result: Any = model if inplace else copied(model, "convert")
    changes = Changes()
    if to == "torch":
        result = fusion.unfuse(result, changes)
    for name, module in named(result):
        norm = recognize(module)
        if norm is None:
            continue
        if to == "torch":
            change = _to_torch(name, module)
        else:
            change = _to_ours(name, module, norm, policy, synchronize)
        if change is not None:
            changes.append(change)
    if fuse and to == "steadynorm":
        result = fusion.fuse(result, changes, example_inputs)
    if expected is not None:
        compare(expected, answers(result, example_inputs, training=False), "convert")
    return result, changes


def _to_ours(
    name: str, module: Any, norm: Norm, policy: Policy | None, synchronize: Synchronize | None
) -> Change | None:
    before = describe(module)
    if reason := why_not_ours(module, norm):
        return Change("left", name, before, before, reason)
    notes: list[str] = []
    current: Policy = module.statistics if isinstance(module, SteadyNorm) else Batch()
    chosen = Frozen() if norm.frozen else policy or current
    if norm.frozen and policy is not None and not isinstance(policy, Frozen):
        notes.append("stays frozen")
    if chosen.needs_running and not getattr(module, "track_running_stats", True):
        notes.append(f"{chosen!r} needs running statistics, which it does not keep")
        chosen = Batch()
    pooled = _synchronizes(module) if synchronize is None else synchronize
    settled = norm.kind == "ours" and (module.statistics, module.synchronize) == (chosen, pooled)
    if settled:
        return None
    notes += adopt(module, norm, chosen, pooled)
    mean = module.running_mean
    if isinstance(mean, torch.Tensor) and mean.dtype in HALF:
        module._widen_statistics()
        notes.append("running statistics are float32 now")
    notes.insert(0, repr(chosen) + ("" if pooled is False else ", synchronized"))
    return Change("converted", name, before, describe(module), "; ".join(notes))


def _synchronizes(module: nn.Module) -> Synchronize:
    """What a layer does about replicas now."""
    if isinstance(module, SteadyNorm):
        return module.synchronize
    if not (isinstance(module, nn.SyncBatchNorm) or "SyncBatchNorm" in type(module).__name__):
        return False
    group = getattr(module, "process_group", getattr(module, "group", None))
    return True if group is None or isinstance(group, int) else group


def _to_torch(name: str, module: nn.Module) -> Change | None:
    if not isinstance(module, SteadyNorm):
        return None
    before = describe(module)
    if module.activation is not None:
        why = f"torch's layer has no place for its activation, {module.activation}"
        return Change("left", name, before, before, why)
    notes = release(module)
    return Change("converted", name, before, describe(module), "; ".join(notes) or "nothing lost")
