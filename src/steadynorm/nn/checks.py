"""Refuses arguments that cannot work, before anything changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from steadynorm.kernels import checks
from steadynorm.kernels.reference import Groups
from steadynorm.nn.synchronize import synchronize_setting
from steadynorm.statistics import Ghost, Policy, Renorm, policy_from


def epsilon(eps: Any, owner: str, *, positive: bool = False) -> Any:
    """`eps`, if it is above 0 where the batch normalizes, else at least 0."""
    if not (eps > 0 if positive else eps >= 0):  # also refuses NaN
        raise ValueError(
            f"{owner}: `eps` must be above 0 in training and at least 0 in inference; got {eps!r}."
        )
    return eps


SETTINGS: dict[str, Callable[[Any, str], Any]] = {
    "statistics": lambda value, owner: policy_from(value),
    "activation": checks.activation_name,
    "synchronize": synchronize_setting,
    "nonfinite": checks.nonfinite_name,
    "numerics": checks.numerics_name,
    "eps": epsilon,
}
"""A layer's constants: what to make of a value, or an error."""


def tensors(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    owner: str,
) -> None:
    """Per-channel tensors have one value per channel and a type that goes with input's."""
    if input.ndim < 2:
        raise ValueError(
            f"{owner}: `input` must have at least 2 axes (N, C, ...); "
            f"got shape {tuple(input.shape)}."
        )
    channels = input.shape[1]
    if (  # written out: a loop costs a small call 0.7 µs, size(0) instead of numel() 0.9
        (running_mean is not None and running_mean.numel() != channels)
        or (running_var is not None and running_var.numel() != channels)
        or (weight is not None and weight.numel() != channels)
        or (bias is not None and bias.numel() != channels)
    ):
        named = {"running_mean": running_mean, "running_var": running_var, "weight": weight}
        for name, t in {**named, "bias": bias}.items():
            if t is not None and t.numel() != channels:
                raise ValueError(
                    f"{owner}: `input` must have {t.numel()} channels on axis 1, as `{name}` "
                    f"has; got shape {tuple(input.shape)}."
                )
    parameter = bias if weight is None else weight
    if parameter is not None and parameter.dtype is not input.dtype:
        _types_go_together(input, parameter, owner)
    elif not input.dtype.is_floating_point:
        raise RuntimeError(f"{owner}: `input` must be of a floating-point type; got {input.dtype}.")
    if (running_mean is None) is not (running_var is None):
        raise ValueError(
            f"{owner}: `running_mean` and `running_var` go together; got "
            f"{'only running_var' if running_mean is None else 'only running_mean'}."
        )


def _types_go_together(input: Tensor, parameter: Tensor, owner: str) -> None:
    # RuntimeError, not TypeError: what torch raises, and callers may catch.
    half = input.dtype in (torch.float16, torch.bfloat16)
    if not (half and parameter.dtype == torch.float32):
        raise RuntimeError(
            f"{owner}: `input` of type {input.dtype} does not go with parameters of type "
            f"{parameter.dtype}: they must be of one type, or input float16 or bfloat16 and the "
            f"parameters float32. Convert the one or the other."
        )


def residual_shape(residual: Tensor, input: Tensor, owner: str) -> None:
    """`residual` is a tensor of input's shape."""
    if not isinstance(residual, Tensor):
        raise TypeError(f"{owner}: `residual` must be a tensor; got {type(residual).__name__}.")
    if residual.shape != input.shape:
        checks.residual_shape(tuple(residual.shape), tuple(input.shape), "input", owner)


def expanded_mask(mask: Tensor, input: Tensor, owner: str) -> Tensor:
    """`mask` as (N, *), input's shape without the channel axis."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{owner}: `mask` must be a boolean tensor, True where valid; got {came}. "
            f"Use mask.bool()."
        )
    target = (input.shape[0], *input.shape[2:])
    try:
        return mask.expand(target)
    except RuntimeError:
        raise ValueError(
            f"{owner}: `mask` must broadcast against `input` without its channel axis, {target}; "
            f"got {tuple(mask.shape)}."
        ) from None


def values_per_channel(input: Tensor, groups: Groups, policy: Policy, owner: str) -> None:
    """Refuse one value per channel, in any group, if the policy cannot normalize it."""
    values, channels = input.numel(), input.size(1)
    if groups is not None and values:
        values = values // input.size(0) * min(groups)
    if values == channels > 0:
        one_value(input, policy, owner)


def one_value(input: Tensor, policy: Policy, owner: str) -> None:
    """Refuse it, or warn of it."""
    if policy.batch_alone:
        group = f" in a group of {policy!r}" if isinstance(policy, Ghost) else ""
        raise ValueError(
            f"{owner}: training needs more than one value per channel{group}; got input of shape "
            f"{tuple(input.shape)}. Use a larger batch, or statistics=sn.Steady(), sn.Running() or "
            f"sn.Frozen(), which work with one value."
        )
    if isinstance(policy, Renorm) and not torch.compiler.is_compiling():
        _warn_of_no_gradient(policy, owner)


@cache
def _warn_of_no_gradient(policy: Renorm, owner: str) -> None:
    """Once for a kind of layer and a policy, also where a filter says "always"."""
    warnings.warn(
        f"{owner}: one value per channel under {policy!r}: x - mean is 0, so no gradient reaches "
        f"the input. Use sn.Steady().",
        stacklevel=5,
    )
