"""Hold a model's batch norms still: statistics and affine part, also under `model.train()`."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from steadynorm.models.changes import Change, Changes
from steadynorm.models.convert import BEFORE_FREEZE, OURS_ALONE, PARAMETRIZED, adopt
from steadynorm.models.layers import (
    REPLACED,
    Norm,
    describe,
    named,
    recognize,
    require_module,
)
from steadynorm.nn.steps import StepNorm
from steadynorm.statistics import Frozen, Policy

Model = TypeVar("Model", bound=nn.Module)


class BeforeFreeze(NamedTuple):
    """What `unfreeze` puts back: the class, the policy, and the parameters that `freeze` held."""

    kind: type[nn.Module]
    policy: Policy | None
    trained: dict[str, bool]


def freeze(model: Model, *, affine: bool = True) -> tuple[Model, Changes]:
    """Freezes every batch norm: it normalizes with its running statistics and never updates them.

        y = weight·(x - running_mean)/√(running_var + eps) + bias

    in training as in inference, with `weight` and `bias` held still too. Unlike `model.eval()` and
    `requires_grad = False`, it survives `model.train()` and covers both halves. It changes the
    model itself, since an optimizer may hold its parameters already: every layer and parameter
    stays the same object, and torch's batch norms become ours with `statistics=Frozen()`. Gradients
    that the held parameters have are dropped, since an optimizer would still step by them.

    Left and named: layers without running statistics, lazy ones that have not seen an input, and
    classes with a forward of their own. `unfreeze` puts everything back exactly. Inside a
    `BatchNormLSTM` the statistics of every time step are frozen, and the γ and β that all steps of
    a normalization share; the gates' bias is trained on.

    Arguments:
        affine: also freeze weight and bias, of layers whose statistics are frozen already too.

    Returns the model and the changes; a layer that was frozen already is not listed.

    >>> model, changes = freeze(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    >>> print(changes)
    what    where  before          after                     why
    frozen  1      BatchNorm1d(3)  BatchNorm1d(3), Frozen()  statistics, weight, bias
    >>> model, changes = unfreeze(model)
    >>> type(model[1]) is nn.BatchNorm1d, model[1].weight.requires_grad
    (True, True)

    torchvision's and detectron2's `FrozenBatchNorm2d` do the same by another class without a way
    back; Keras's `trainable = False` freezes both halves, flax's `use_running_average` statistics.
    """
    require_module(model, "freeze")
    changes = Changes()
    for name, module in named(model):
        norm = recognize(module)
        if norm is None and not isinstance(module, StepNorm):
            continue
        before = _described(module)
        if norm is not None and (reason := _why_not(module, norm)):
            changes.append(Change("left", name, before, before, reason))
            continue
        parameters = {key: p for key, p in module._parameters.items() if p is not None}
        held = {key: True for key, p in parameters.items() if affine and p.requires_grad}
        still = norm is None or norm.frozen
        if still and (not held or (norm is not None and norm.kind == "other")):
            continue
        memory: BeforeFreeze | None = vars(module).get(BEFORE_FREEZE)
        if memory is None or not still:
            policy = getattr(module, "statistics", None)
            kind = type(module) if memory is None else memory.kind
            memory = BeforeFreeze(kind, policy, {} if memory is None else memory.trained)
        memory = memory._replace(trained=memory.trained | held)
        if norm is not None:
            adopt(module, norm, Frozen(), getattr(module, "synchronize", False))
        setattr(module, BEFORE_FREEZE, memory)
        for key in held:
            parameters[key].requires_grad_(False)
            parameters[key].grad = None  # an optimizer skips what has none, its momentum too
        parts = ", ".join([*([] if still else ["statistics"]), *held])
        after = before if norm is None else f"{describe(module)}, Frozen()"
        changes.append(Change("frozen", name, before, after, parts))
    return model, changes


def unfreeze(model: Model) -> tuple[Model, Changes]:
    """Undoes `freeze` exactly: classes, policies, and which parameters are trained.

    A policy that was given to a layer since then is kept, and the changes say so; the layer then
    also stays ours. Changes the model itself. Layers that `freeze` did not freeze stay as they are,
    such as those built with `statistics=Frozen()`. Returns the model and the changes.

    >>> print(unfreeze(nn.BatchNorm1d(3))[1])
    nothing to do
    """
    require_module(model, "unfreeze")
    changes = Changes()
    for name, module in named(model):
        memory: BeforeFreeze | None = vars(module).get(BEFORE_FREEZE)
        if memory is None:
            continue
        before = _described(module)
        policy = getattr(module, "statistics", None)
        if policy is None:
            after, why = before, "as before freeze"  # a norm of time steps, whose steps have it
        elif not isinstance(policy, Frozen):
            after, why = f"{before}, {policy!r}", "keeps the policy set since freeze"
        else:
            before = f"{before}, Frozen()"
            _put_back(module, memory)
            after, why = describe(module), "as before freeze"
        for key, trained in memory.trained.items():
            if trained and getattr(module, key) is not None:
                getattr(module, key).requires_grad_(True)
        delattr(module, BEFORE_FREEZE)
        changes.append(Change("unfrozen", name, before, after, why))
    return model, changes


def _put_back(module: nn.Module, memory: BeforeFreeze) -> None:
    """The class and the policy that a layer had."""
    if memory.policy is not None:
        module.statistics = memory.policy  # type: ignore[assignment]
        return
    for attribute in OURS_ALONE:
        vars(module).pop(attribute, None)
    module.__class__ = memory.kind


def _described(module: nn.Module) -> str:
    if isinstance(module, StepNorm):
        return f"StepNorm({module.num_features})"
    return describe(module)


def _why_not(module: nn.Module, norm: Norm) -> str | None:
    if parametrize.is_parametrized(module):
        return PARAMETRIZED
    if "forward" in vars(module):
        return REPLACED
    if norm.kind == "other" and not norm.frozen:
        return f"{type(module).__name__} has its own forward; convert the model first"
    if isinstance(module.running_mean, nn.parameter.UninitializedBuffer):
        return "it is lazy and has not seen an input yet"
    if norm.running_mean is None:
        return "it keeps no running statistics to hold still"
    return None
