"""Refuses arguments that cannot work, before anything changes."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from steadynorm.kernels.activations import ACTIVATIONS
from steadynorm.statistics import Ghost, Policy, Renorm

NONFINITE = ("propagate", "skip")


def activation_name(activation: object, owner: str) -> None:
    """`activation` is None or the name of one that runs inside the layer."""
    if activation is None or (isinstance(activation, str) and activation in ACTIVATIONS):
        return
    kind = ValueError if isinstance(activation, str) else TypeError
    raise kind(
        f"{owner}: `activation` must be None or one of {', '.join(ACTIVATIONS)}; "
        f"got {activation!r}. Apply any other activation after the layer."
    )


def nonfinite_name(nonfinite: object, owner: str) -> None:
    """`nonfinite` is "propagate" or "skip"."""
    if nonfinite not in NONFINITE:
        raise ValueError(f"{owner}: `nonfinite` must be 'propagate' or 'skip'; got {nonfinite!r}.")


def epsilon(eps: float, training: bool, owner: str) -> None:
    """`eps` is positive where the batch normalizes, else at least 0."""
    if eps < 0 or training:
        raise ValueError(
            f"{owner}: `eps` must be above 0 in training and at least 0 in inference; got {eps!r}."
        )


def channels_and_types(
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
    for name, given in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if given is not None and given.shape[0] != channels:
            raise ValueError(
                f"{owner}: `input` must have {given.shape[0]} channels on axis 1, as `{name}` "
                f"has; got shape {tuple(input.shape)}."
            )
    parameter = weight if weight is not None else bias
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
    """`residual` has input's shape."""
    if not isinstance(residual, Tensor):
        raise TypeError(f"{owner}: `residual` must be a tensor; got {type(residual).__name__}.")
    if residual.shape != input.shape:
        raise ValueError(
            f"{owner}: `residual` must have the shape of `input`, {tuple(input.shape)}; "
            f"got {tuple(residual.shape)}."
        )


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


def values_per_channel(input: Tensor, count: int, policy: Policy, owner: str) -> None:
    """Refuse one value per channel where the policy would have nothing to normalize with."""
    if count != 1:
        return
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


def smallest_group(input: Tensor, groups: tuple[int, ...] | None) -> int:
    """Values per channel in the batch, or in its smallest group."""
    samples = input.shape[0] if groups is None else min(groups, default=0)
    for size in input.shape[2:]:
        samples = samples * size
    return samples
