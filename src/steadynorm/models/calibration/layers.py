"""Which batch norms of a model can be calibrated, and why the others cannot."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from steadynorm import statistics
from steadynorm.models.surgery.layers import named, recognize
from steadynorm.statistics import Policy, RunningStatistics


class Layer(NamedTuple):
    """A batch norm of a model; `left` says why its statistics stay as they are, None if they move.

    `unbiased`: whether it keeps the unbiased variance.
    """

    name: str
    module: nn.Module
    left: str | None
    unbiased: bool

    @property
    def kept(self) -> RunningStatistics:
        """A copy of its running statistics in float64, on the CPU: not every device has it."""
        mean, var = (
            getattr(self.module, name).detach().to("cpu", torch.float64, copy=True)
            for name in ("running_mean", "running_var")
        )
        return RunningStatistics(mean, var, None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DataParallel's or DistributedDataParallel's wrapper.

    DistributedDataParallel would broadcast buffers in every forward: overwriting what is measured,
    and waiting for ever where replicas hold different numbers of batches.
    """
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        inner = model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def batch_norms(model: nn.Module, owner: str) -> list[Layer]:
    """Every batch norm once, in the order of the model.

    Raises ValueError for a model with parts that have not seen an input yet: the first batch would
    create parameters, which an interruption could not undo.
    """
    lazy = next((name for name, part in named(model) if _uninitialized(part)), None)
    if lazy is not None:
        raise ValueError(
            f"{owner}: every part of `model` must have its parameters; {lazy!r} is lazy and has "
            f"not seen an input yet. Run the model on one batch first."
        )
    found = []
    for name, module in named(model):
        norm = recognize(module)
        if norm is None:
            continue
        policy = getattr(module, "statistics", None)
        unbiased = policy.unbiased if isinstance(policy, Policy) else True
        frozen = norm.frozen or isinstance(policy, statistics.Frozen)
        found.append(Layer(name, module, _why_left(model, module, frozen), unbiased))
    return found


def _why_left(model: nn.Module, module: nn.Module, frozen: bool) -> str | None:
    if frozen:
        return "frozen"
    if not isinstance(module, _BatchNorm):
        return "no torch.nn batch norm; convert the model first"
    if module.running_mean is None or module.running_var is None:
        return "keeps no running statistics"
    if model.training and not module.training:
        return "held in inference mode while the model is in training mode"
    return None


def _uninitialized(module: nn.Module) -> bool:
    parts = [*module._parameters.values(), *module._buffers.values()]
    return any(part is not None and is_lazy(part) for part in parts)
