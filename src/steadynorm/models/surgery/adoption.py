"""Turn one batch norm of any make into ours, in place, and back.

The module stays the same object and only its class changes, so parameters, buffers, hooks, mode,
type, device, names and sharing are kept without copying anything.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.models.surgery.layers import Norm, activation_name, behaves
from steadynorm.nn import batchnorm as ours
from steadynorm.nn.synchronize import Synchronize
from steadynorm.statistics import Batch, Frozen, Policy

SETTINGS = ("statistics", "activation", "synchronize", "nonfinite")


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
    (nn.BatchNorm1d, ours.BatchNorm1d),
    (nn.BatchNorm2d, ours.BatchNorm2d),
    (nn.BatchNorm3d, ours.BatchNorm3d),
)
BY_RANK = {"1d": ours.BatchNorm1d, "2d": ours.BatchNorm2d, "3d": ours.BatchNorm3d}


def why_not_ours(module: nn.Module, norm: Norm) -> str | None:
    """Why a batch norm cannot become ours, None where it can."""
    if norm.kind in ("ours", "torch"):
        return None
    name = type(module).__name__
    if not behaves(module, norm):
        return f"{name} has its own forward, and it is not a batch norm's"
    if norm.activation is not None and activation_name(norm.activation) is None:
        return f"{name} applies {norm.activation}, which is not one of our activations"
    if isinstance(norm.bias, nn.Parameter) and not isinstance(norm.weight, nn.Parameter):
        return f"{name} learns a bias without a weight"
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
    module.statistics = policy
    module.activation = None if norm.activation is None else activation_name(norm.activation)
    module.synchronize = synchronize
    module.nonfinite = "propagate"
    return notes


def _class_for(module: nn.Module) -> type[ours.SteadyNorm]:
    for theirs, mine in PAIRS:
        if isinstance(module, theirs):
            return mine
    found = re.search(r"[123]d", type(module).__name__)
    return BY_RANK[found.group()] if found else BatchNorm


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
    group: Any = None if isinstance(module.synchronize, bool) else module.synchronize
    synchronized = module.synchronize is not False
    kind = next((theirs for theirs, mine in PAIRS if isinstance(module, mine)), nn.SyncBatchNorm)
    lazy = kind in (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
    if synchronized and not lazy:
        kind = nn.SyncBatchNorm
    for name in SETTINGS:
        delattr(module, name)
    module.__class__ = kind
    if kind is nn.SyncBatchNorm:
        module.process_group = group
    return notes
