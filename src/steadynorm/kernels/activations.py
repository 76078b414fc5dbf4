"""Activations that run inside the layer: forward, and derivative from output or input."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LEAKY_SLOPE = 0.01  # torch.nn.LeakyReLU's default


class Activation(NamedTuple):
    """`forward(z)`, and `gradient(grad, t)` with t the output y if `from_output`, else z."""

    forward: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    from_output: bool


def _gelu_gradient(grad: Tensor, z: Tensor) -> Tensor:
    normal_cdf = 0.5 * (1 + torch.erf(z * 0.5**0.5))
    normal_pdf = torch.exp(-0.5 * z * z) * (2 * torch.pi) ** -0.5
    slope: Tensor = normal_cdf + z * normal_pdf
    return grad * slope


def _silu_gradient(grad: Tensor, z: Tensor) -> Tensor:
    gate = torch.sigmoid(z)
    return grad * gate * (1 + z * (1 - gate))


def _hardswish_gradient(grad: Tensor, z: Tensor) -> Tensor:
    between = torch.where(z < 3, grad * (z / 3 + 0.5), grad)
    return between.masked_fill(z <= -3, 0)


# Comparisons are written so that a NaN in the output lets the gradient through, as torch does.
ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(F.relu, lambda g, y: g.masked_fill(y <= 0, 0), True),
    "relu6": Activation(F.relu6, lambda g, y: g.masked_fill((y <= 0) | (y >= 6), 0), True),
    "leaky_relu": Activation(
        lambda z: F.leaky_relu(z, LEAKY_SLOPE),
        lambda g, y: torch.where(y > 0, g, g * LEAKY_SLOPE),
        True,
    ),
    "silu": Activation(F.silu, _silu_gradient, False),
    "gelu": Activation(F.gelu, _gelu_gradient, False),
    "hardswish": Activation(F.hardswish, _hardswish_gradient, False),
    "elu": Activation(F.elu, lambda g, y: torch.where(y > 0, g, g * (y + 1)), True),
    "sigmoid": Activation(torch.sigmoid, lambda g, y: g * y * (1 - y), True),
    "tanh": Activation(torch.tanh, lambda g, y: g * (1 - y * y), True),
}

REBUILT = frozenset({"relu", "relu6", "leaky_relu"})
"""Activations whose derivative a compiled kernel takes from z rebuilt from x, where z has no
residual: comparisons cost nothing, and to read the output twice costs 2 of 7 tensors' traffic."""


def kept_for_backward(
    activation: str | None,
    y: Tensor,
    residual: Tensor | None,
    signs: Tensor | None = None,
    *,
    rebuilds: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The output if the derivative is taken from it, and the residual if z is rebuilt with it."""
    if activation is None or signs is not None:
        return None, None
    if not ACTIVATIONS[activation].from_output:
        return None, residual
    return (None if rebuilds and residual is None and activation in REBUILT else y), None
