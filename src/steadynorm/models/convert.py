"""Turn every batch norm of a model into ours, or back into torch's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from steadynorm.kernels.spec import HALF
from steadynorm.models.changes import Change, Changes
from steadynorm.models.equivalence import (
    answers,
    compare,
    copied,
    in_double,
    largest_difference,
    training_step,
)
from steadynorm.models.fuse import fuse as fuse_calls
from steadynorm.models.fuse import unfuse, unfused
from steadynorm.models.layers import (
    OURS,
    REPLACED,
    Norm,
    activation_name,
    describe,
    named,
    recognize,
    require_module,
    require_values,
)
from steadynorm.models.probe import behaves
from steadynorm.nn import batchnorm as ours
from steadynorm.nn.batchnorm import SteadyNorm
from steadynorm.nn.steps import TimeStep
from steadynorm.nn.synchronize import Synchronize
from steadynorm.statistics import (
    Batch,
    Frozen,
    Policy,
    PolicyName,
    RunningStatistics,
    Steady,
    batches_seen,
    policy_from,
)

Model = TypeVar("Model", bound=nn.Module)
FUSED_TOLERANCE = 1e-7  # float64: two thousand times what rounding made of any network tried


def convert(
    model: Model,
    statistics: Policy | PolicyName | None = None,
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
    same on a probe, in training and in inference (torchvision's, detectron2's, DETR's
    `FrozenBatchNorm2d`, timm's `BatchNormAct2d` and `FrozenBatchNormAct2d`, mmcv's synchronized
    one, which is tried in inference alone). Each module stays the
    same object and changes its class, so weights, buffers, eps, momentum, mode, type, device,
    hooks, sharing and `state_dict` keys stay. Frozen look-alikes become `statistics=Frozen()`;
    their weight and bias become parameters that need no gradient, and they gain
    `num_batches_tracked`. Running statistics in half precision become float32.

    With `fuse`, blocks that call a batch norm, and then an activation or a sum and an activation,
    make one call of them, which takes one visit to memory; see `steadynorm.models.fuse`. The layers
    themselves stay as they are, so that tools that replace, hook, slice or fold them find what they
    expect.

    Arguments:
        statistics: policy for every batch norm, or its lower-case name; None keeps each as it is:
            `Batch()`, or `Frozen()` for frozen ones, which stay frozen in any case.
        fuse: also merge the calls of batch norms, sums and activations.
        synchronize: True or a process group for every layer, False for none; None keeps each as it
            is, so that `SyncBatchNorm` pools over its own group.
        to: "steadynorm", or "torch" for the way back: undoes fusing too, and names in the changes
            what torch's layers cannot hold (policies, `nonfinite`). A layer with an activation
            inside stays ours.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; the model is
            run on them before and after, and the answers in inference are compared. A step in
            training with merged calls is compared with one without, in double precision: outputs,
            gradients and buffers.
        inplace: change the model given instead of a copy. A copy has parameters of its own: build
            the optimizer from it.

    Returns the model and the changes; a layer that is as it should be is not listed.

    Raises ValueError or TypeError for unknown arguments, RuntimeError if the answers changed.

    >>> import steadynorm as sn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> model, changes = convert(model, statistics=sn.Steady())
    >>> print(changes)
    what       where  before          after           why
    converted  1      BatchNorm2d(8)  BatchNorm2d(8)  Steady(prior=16, horizon=640, window=16)
    fused      1      relu after it   one call        by (model)

    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` makes torch's layers of ours, and so loses their
    policy: for replicas use `synchronize=True`.
    """
    require_module(model, "convert")
    if example_inputs is not None:
        require_values(model, "convert")
    if to not in ("steadynorm", "torch"):
        raise ValueError(f"convert: `to` must be 'steadynorm' or 'torch'; got {to!r}.")
    policy = None if statistics is None else policy_from(statistics)
    expected = None if example_inputs is None else answers(model, example_inputs, training=False)
    result: Any = model if inplace else copied(model, "convert")
    changes = Changes()
    if to == "torch":
        unfuse(result, changes)
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
        fusing = Changes()
        fuse_calls(result, fusing)
        if example_inputs is not None:
            fusing = _verified(result, example_inputs, fusing)
        changes.extend(fusing)
    if expected is not None:
        compare(expected, answers(result, example_inputs, training=False), "convert")
    return result, changes


def _verified(model: nn.Module, example_inputs: Any, fusing: Changes) -> Changes:
    """What was fused, if one step in training gives the same; else all of it is undone.

    Compared in double precision on a copy: outputs, gradients and buffers. A model that cannot
    train on the example inputs is compared in inference alone.
    """
    wide, inputs = copied(model, "convert").double(), in_double(example_inputs)
    try:
        with unfused(wide):
            expected = training_step(wide, inputs)
    except Exception:  # noqa: BLE001  whatever a model raises
        return fusing
    try:
        off = largest_difference(expected, training_step(wide, inputs))
        why = None if off <= FUSED_TOLERANCE else f"a step in training differed by {off:.2g}"
    except Exception as error:  # noqa: BLE001
        why = f"a step in training failed ({error})"
    if why is None:
        return fusing
    unfuse(model)
    return Changes(
        replace(row, what="left", after=row.before, why=why) if row.what == "fused" else row
        for row in fusing
    )


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
        frozen_by = "sn.unfreeze first" if hasattr(module, BEFORE_FREEZE) else "set `statistics`"
        notes.append(f"stays frozen; to change that, {frozen_by}")
    if chosen.needs_running and not getattr(module, "track_running_stats", True):
        notes.append(f"{chosen!r} needs running statistics, which it does not keep")
        chosen = Batch()
    pooled = _synchronizes(module) if synchronize is None else synchronize
    if isinstance(module, TimeStep) and pooled is not False and pooled is not module.synchronize:
        notes.append("not synchronized: replicas may differ in their number of time steps")
        pooled = module.synchronize
    unchanged = norm.kind == "ours" and (module.statistics, module.synchronize) == (chosen, pooled)
    if unchanged:
        return Change("left", name, before, before, "; ".join(notes)) if notes else None
    if isinstance(chosen, Steady) and getattr(module, "momentum", 0.1) != 0.1:
        notes.append(f"its momentum, {module.momentum}, is not used: the horizon takes its place")
    notes += adopt(module, norm, chosen, pooled)
    mean = module.running_mean
    if isinstance(mean, torch.Tensor) and mean.dtype in HALF:
        module._widen_statistics()
        notes.append("running statistics are float32 now")
    if chosen.counts_batches and _lost_count(module):
        notes.append("num_batches_tracked is 0 beside trained statistics: read as many batches")
    notes.insert(0, repr(chosen) + ("" if pooled is False else ", synchronized"))
    return Change("converted", name, before, describe(module), "; ".join(notes))


def _lost_count(module: Any) -> bool:
    """Whether its statistics were trained and nothing says on how many batches."""
    running = RunningStatistics(module.running_mean, module.running_var, module.num_batches_tracked)
    if not all(isinstance(t, Tensor) and not t.is_meta and not is_lazy(t) for t in running):
        return False
    return bool(batches_seen(running, xp=torch) != running.batches)


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
    if isinstance(module, TimeStep):
        why = "a time step of a batch-normalized LSTM, which torch does not have"
        return Change("left", name, before, before, why)
    if parametrize.is_parametrized(module):
        return Change("left", name, before, before, PARAMETRIZED)
    if module.activation is not None:
        why = f"torch's layer has no place for its activation, {module.activation}"
        return Change("left", name, before, before, why)
    notes = release(module)
    return Change("converted", name, before, describe(module), "; ".join(notes) or "nothing lost")


# --- one layer

OURS_ALONE = (
    "statistics", "activation", "synchronize", "nonfinite", "numerics", "_settings",
    "_memory_is_new",
)  # fmt: skip
"""Attributes that torch's layers do not have."""

PARAMETRIZED = "its weights are parametrized"
"""Why a layer cannot change its class: torch.nn.utils.parametrize has put properties there."""

BEFORE_FREEZE = "before_freeze"
"""The attribute of a layer that `freeze` froze, with what `unfreeze` puts back."""


class BatchNorm(ours.SteadyNorm):
    """Batch normalization of (N, C) and (N, C, *): what `torch.nn.SyncBatchNorm` converts to.

    That layer takes any number of axes and does not say which, so neither does this one.
    """

    _axes = {2: "(N, C)", 3: "(N, C, L)", 4: "(N, C, H, W)", 5: "(N, C, D, H, W)"}

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(
                f"BatchNorm: `input` must have at least 2 axes (N, C, ...); "
                f"got shape {tuple(input.shape)}."
            )


# Lazy classes first: they are subclasses of the plain ones.
PAIRS: tuple[tuple[type[nn.Module], type[ours.SteadyNorm]], ...] = (
    (nn.LazyBatchNorm1d, ours.LazyBatchNorm1d),
    (nn.LazyBatchNorm2d, ours.LazyBatchNorm2d),
    (nn.LazyBatchNorm3d, ours.LazyBatchNorm3d),
    *OURS.items(),
)


def why_not_ours(module: nn.Module, norm: Norm) -> str | None:
    """Why a batch norm cannot become ours, None where it can."""
    if norm.kind != "ours" and parametrize.is_parametrized(module):
        return PARAMETRIZED
    if norm.kind == "torch" and "forward" in vars(module):
        return REPLACED
    if norm.kind in ("ours", "torch"):
        return None
    name = type(module).__name__
    if not behaves(module, norm):
        return f"{name} has its own forward, and it is not a batch norm's"
    if norm.activation is not None and activation_name(norm.activation) is None:
        return f"{name} applies {norm.activation}, which is not one of our activations"
    for part, child in module.named_children():
        if child is not norm.activation and not isinstance(child, nn.Identity):
            return f"{name} also applies its `{part}`, {child}"
    if isinstance(norm.bias, nn.Parameter) and not isinstance(norm.weight, nn.Parameter):
        return f"{name} learns a bias without a weight"
    if _synchronizes(module) is False and not behaves(module, norm, training=True):
        return f"{name} has its own forward, and in training it is not a batch norm's"
    return None


def adopt(module: Any, norm: Norm, policy: Policy, synchronize: Synchronize) -> list[str]:
    """Makes a batch norm ours; returns what about it is no longer what it was."""
    notes: list[str] = []
    if norm.kind == "ours":
        module.statistics, module.synchronize = policy, synchronize
        return notes
    kind: type[nn.Module] = _class_for(module)
    if norm.kind == "other":
        notes += _restructure(module, norm)
    module.__class__ = kind
    for name in ("num_features", "eps"):
        setattr(module, name, vars(module)[name])
    module.statistics = policy
    module.activation = None if norm.activation is None else activation_name(norm.activation)
    module.synchronize = synchronize
    module.nonfinite, module.numerics = "propagate", "device"
    return notes


def _class_for(module: nn.Module) -> type[ours.SteadyNorm]:
    for theirs, mine in PAIRS:
        if isinstance(module, theirs):
            return mine
    by_rank = (mine for mine in OURS.values() if mine.__name__[-2:] in type(module).__name__)
    return next(by_rank, BatchNorm)


def _restructure(module: Any, norm: Norm) -> list[str]:
    """Gives a look-alike the parameters, buffers and attributes of a batch norm."""
    notes = []
    assert norm.running_mean is not None
    module.num_features = len(norm.running_mean)
    module.eps = norm.eps
    module.momentum = getattr(module, "momentum", 0.1)
    moved = [n for n in ("weight", "bias") if isinstance(module._buffers.get(n), Tensor)]
    for name in moved:
        value = module._buffers.pop(name)
        assert value is not None
        module._parameters[name] = nn.Parameter(value.detach(), requires_grad=False)
    if moved:
        notes.append(f"{' and '.join(moved)} became parameters without gradient")
    for name in ("weight", "bias"):
        if name not in module._parameters:
            module.register_parameter(name, None)
    module.affine = module.weight is not None
    module.track_running_stats = True
    if "num_batches_tracked" not in module._buffers:
        zero = torch.tensor(0, dtype=torch.long, device=norm.running_mean.device)
        module.register_buffer("num_batches_tracked", zero)
        notes.append("gained num_batches_tracked")
    for name in ("act", "drop"):  # inner modules of timm's; the activation is ours to apply now
        module._modules.pop(name, None)
    return notes


def release(module: Any) -> list[str]:
    """Makes one of ours torch's again; returns what torch's layer cannot hold."""
    notes = []
    if not isinstance(module.statistics, Batch):
        notes.append(f"{module.statistics!r} is lost: torch normalizes with the batch")
    if isinstance(module.statistics, Frozen):
        notes[-1] = "Frozen() is lost: torch will update the statistics in training"
    if module.nonfinite != "propagate":
        notes.append(f"nonfinite={module.nonfinite!r} is lost")
    if module.numerics != "device":
        notes.append(f"numerics={module.numerics!r} is lost")
    group: Any = None if isinstance(module.synchronize, bool) else module.synchronize
    synchronized = module.synchronize is not False
    kind = next((theirs for theirs, mine in PAIRS if isinstance(module, mine)), nn.SyncBatchNorm)
    lazy = kind in (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
    if synchronized and not lazy:
        kind = nn.SyncBatchNorm
    for name in OURS_ALONE:
        vars(module).pop(name, None)
    module.__class__ = kind
    if kind is nn.SyncBatchNorm:
        module.process_group = group
    return notes
