"""Hold a model's batch norms still: statistics and affine part, also under `model.train()`."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from torch import nn

from steadynorm.models.changes import Change, Changes
from steadynorm.models.convert import OURS_ALONE, adopt
from steadynorm.models.layers import Norm, describe, named, recognize, require_module
from steadynorm.statistics import Frozen, Policy

Model = TypeVar("Model", bound=nn.Module)
MEMORY = "before_freeze"


class BeforeFreeze(NamedTuple):
    """What `unfreeze` puts back: the class, the policy, and which parameters were trained."""

    kind: type[nn.Module]
    policy: Policy | None
    trained: dict[str, bool]


def freeze(model: Model, *, affine: bool = True) -> tuple[Model, Changes]:
    """Freezes every batch norm: it normalizes with its running statistics and never updates them.

        y = weight·(x - running_mean)/√(running_var + eps) + bias

    in training as in inference, with `weight` and `bias` held still too. Unlike `model.eval()` and
    `requires_grad = False`, it survives `model.train()` and covers both halves. It changes the
    model itself, since an optimizer may hold its parameters already: every layer and parameter
    stays the same object, and torch's batch norms become ours with `statistics=Frozen()`.

    Left and named: layers without running statistics, lazy ones that have not seen an input, and
    classes with a forward of their own. `unfreeze` puts everything back exactly.

    Arguments:
        affine: also freeze weight and bias.

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
        if norm is None or hasattr(module, MEMORY):
            continue
        before = describe(module)
        if reason := _why_not(module, norm):
            changes.append(Change("left", name, before, before, reason))
            continue
        trained = {key: p.requires_grad for key, p in module._parameters.items() if p is not None}
        held = [key for key, needs in trained.items() if affine and needs]
        if norm.frozen and (norm.kind == "other" or not held):
            continue
        memory = BeforeFreeze(type(module), getattr(module, "statistics", None), trained)
        adopt(module, norm, Frozen(), getattr(module, "synchronize", False))
        setattr(module, MEMORY, memory)
        for key in held:
            getattr(module, key).requires_grad_(False)
        parts = ", ".join([*(["statistics"] if not norm.frozen else []), *held])
        after = f"{describe(module)}, Frozen()"
        changes.append(Change("frozen", name, before, after, parts))
    return model, changes


def unfreeze(model: Model) -> tuple[Model, Changes]:
    """Undoes `freeze` exactly: classes, policies, and which parameters are trained.

    Changes the model itself. Layers that `freeze` did not freeze stay as they are, such as those
    built with `statistics=Frozen()`. Returns the model and the changes.

    >>> print(unfreeze(nn.BatchNorm1d(3))[1])
    nothing to do
    """
    require_module(model, "unfreeze")
    changes = Changes()
    for name, module in named(model):
        memory: BeforeFreeze | None = getattr(module, MEMORY, None)
        if memory is None:
            continue
        before = f"{describe(module)}, Frozen()"
        if memory.policy is None:
            for attribute in OURS_ALONE:
                vars(module).pop(attribute, None)
            module.__class__ = memory.kind
        else:
            module.statistics = memory.policy  # type: ignore[assignment]
        for key, trained in memory.trained.items():
            getattr(module, key).requires_grad_(trained)
        delattr(module, MEMORY)
        changes.append(Change("unfrozen", name, before, describe(module), "as before freeze"))
    return model, changes


def _why_not(module: nn.Module, norm: Norm) -> str | None:
    if norm.kind == "other" and not norm.frozen:
        return f"{type(module).__name__} has its own forward; convert the model first"
    if isinstance(module.running_mean, nn.parameter.UninitializedBuffer):
        return "it is lazy and has not seen an input yet"
    if norm.running_mean is None:
        return "it keeps no running statistics to hold still"
    return None
