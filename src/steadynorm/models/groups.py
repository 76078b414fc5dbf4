"""Split a model's parameters into those that weight decay suits and those it does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from steadynorm.models.layers import recognize, require_module

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: weights that decay; biases, γ and β that do not.

    A batch norm undoes the scale of the weights before it, so decaying those only tunes the step
    size, but decaying its own γ and β pulls the outputs themselves towards zero.

    Without decay: every parameter of a normalization layer, and every parameter whose name begins
    with "bias" or ends in "_bias". With decay: all others. A parameter shared by several layers
    comes once, and without decay if any of them asks for that; parameters that need no gradient are
    left out.

    Arguments:
        weight_decay: of the first group, per step, as the optimizer understands it; at least 0.

    Returns a list of dicts with the keys `params` and `weight_decay`, the decaying ones first, each
    in the order of the model; an empty group is left out.

    Raises ValueError for a negative `weight_decay`, TypeError for what is no number or no model.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> [(len(g["params"]), g["weight_decay"]) for g in parameter_groups(model, weight_decay=0.1)]
    [(1, 0.1), (3, 0.0)]

    Source: He et al. 2019, "Bag of Tricks for Image Classification", section 3.1 (no bias decay).
    """
    require_module(model, "parameter_groups")
    if not isinstance(weight_decay, int | float):
        raise TypeError(f"parameter_groups: `weight_decay` must be a number; got {weight_decay!r}.")
    if not weight_decay >= 0:
        raise ValueError(
            f"parameter_groups: `weight_decay` must be at least 0; got {weight_decay!r}."
        )
    spared = {
        id(parameter)
        for module in model.modules()
        for name, parameter in _own_parameters(module)
        if _is_bias(name) or _normalizes(module)
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in spared], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in spared], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's parameters, and those that a parametrization computes one from, by its name."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    if parametrize.is_parametrized(module):
        for name, made in module.parametrizations.items():  # type: ignore[union-attr, operator]
            yield from ((name, parameter) for parameter in made.parameters())


def _is_bias(name: str) -> bool:
    """By its name: `bias`, `bias_ih_l0`, attention's `bias_k` and `in_proj_bias`."""
    return name.startswith("bias") or name.endswith("_bias")


def _normalizes(module: nn.Module) -> bool:
    return (
        isinstance(module, NORMS)
        or recognize(module) is not None
        or type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
    )
