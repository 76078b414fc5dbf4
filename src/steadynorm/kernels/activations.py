"""Activations that run inside the layer, each defined once for every array library and kernel.

A definition takes a math namespace `m`, which offers, for numbers or arrays:

    like(number, z)            the number in z's type; array libraries may return it as it is
    where(condition, a, b)     a where the condition holds, else b
    sigmoid(z) tanh(z) erf(z) exp(z) expm1(z)

Definitions are written so that NaN passes through: `where(z <= 0, 0, z)` instead of a maximum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

Array = Any  # a number, or an array of any library
Math = Any

LEAKY_SLOPE = 0.01  # torch.nn.LeakyReLU's default


class Activation(NamedTuple):
    """`forward(z, m)`, and `gradient(g, t, m)` with t the output y if `from_output`, else z."""

    forward: Callable[[Array, Math], Array]
    gradient: Callable[[Array, Array, Math], Array]
    from_output: bool


def _relu(z: Array, m: Math) -> Array:
    zero = m.like(0.0, z)
    return m.where(z <= zero, zero, z)


def _relu_gradient(g: Array, y: Array, m: Math) -> Array:
    return m.where(y <= m.like(0.0, y), m.like(0.0, g), g)


def _relu6(z: Array, m: Math) -> Array:
    six = m.like(6.0, z)
    return m.where(z >= six, six, _relu(z, m))


def _relu6_gradient(g: Array, y: Array, m: Math) -> Array:
    outside = (y <= m.like(0.0, y)) | (y >= m.like(6.0, y))
    return m.where(outside, m.like(0.0, g), g)


def _leaky_relu(z: Array, m: Math) -> Array:
    return m.where(z > m.like(0.0, z), z, z * m.like(LEAKY_SLOPE, z))


def _leaky_relu_gradient(g: Array, y: Array, m: Math) -> Array:
    return m.where(y > m.like(0.0, y), g, g * m.like(LEAKY_SLOPE, g))


def _silu(z: Array, m: Math) -> Array:
    return z * m.sigmoid(z)


def _silu_gradient(g: Array, z: Array, m: Math) -> Array:
    one, gate = m.like(1.0, z), m.sigmoid(z)
    return g * gate * (one + z * (one - gate))


def _normal_cdf(z: Array, m: Math) -> Array:
    return m.like(0.5, z) * (m.like(1.0, z) + m.erf(z * m.like(math.sqrt(0.5), z)))


def _gelu(z: Array, m: Math) -> Array:
    return z * _normal_cdf(z, m)


def _gelu_gradient(g: Array, z: Array, m: Math) -> Array:
    density = m.exp(m.like(-0.5, z) * z * z) * m.like(1 / math.sqrt(2 * math.pi), z)
    return g * (_normal_cdf(z, m) + z * density)


def _hardswish(z: Array, m: Math) -> Array:
    three = m.like(3.0, z)
    inside = m.where(z < three, z * (z + three) * m.like(1 / 6, z), z)
    return m.where(z <= -three, m.like(0.0, z), inside)


def _hardswish_gradient(g: Array, z: Array, m: Math) -> Array:
    three = m.like(3.0, z)
    inside = m.where(z < three, g * (z * m.like(1 / 3, z) + m.like(0.5, z)), g)
    return m.where(z <= -three, m.like(0.0, g), inside)


def _elu(z: Array, m: Math) -> Array:
    zero = m.like(0.0, z)
    # The inner `where` keeps expm1 from overflowing where it is not used, in derivatives too.
    return m.where(z > zero, z, m.expm1(m.where(z > zero, zero, z)))


def _elu_gradient(g: Array, y: Array, m: Math) -> Array:
    return m.where(y > m.like(0.0, y), g, g * (y + m.like(1.0, y)))


def _sigmoid(z: Array, m: Math) -> Array:
    return m.sigmoid(z)


def _sigmoid_gradient(g: Array, y: Array, m: Math) -> Array:
    return g * y * (m.like(1.0, y) - y)


def _tanh(z: Array, m: Math) -> Array:
    return m.tanh(z)


def _tanh_gradient(g: Array, y: Array, m: Math) -> Array:
    return g * (m.like(1.0, y) - y * y)


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(_relu, _relu_gradient, from_output=True),
    "relu6": Activation(_relu6, _relu6_gradient, from_output=True),
    "leaky_relu": Activation(_leaky_relu, _leaky_relu_gradient, from_output=True),
    "silu": Activation(_silu, _silu_gradient, from_output=False),
    "gelu": Activation(_gelu, _gelu_gradient, from_output=False),
    "hardswish": Activation(_hardswish, _hardswish_gradient, from_output=False),
    "elu": Activation(_elu, _elu_gradient, from_output=True),
    "sigmoid": Activation(_sigmoid, _sigmoid_gradient, from_output=True),
    "tanh": Activation(_tanh, _tanh_gradient, from_output=True),
}

REBUILT = frozenset({"relu", "relu6", "leaky_relu"})
"""Activations whose derivative a compiled kernel takes from z rebuilt from x, where z has no
residual: comparisons cost nothing, and to read the output twice costs 2 of 7 tensors' traffic."""


def kept_for_backward(
    activation: str | None,
    y: Array,
    residual: Array | None,
    signs: Array | None = None,
    *,
    rebuilds: bool,
) -> tuple[Array | None, Array | None]:
    """The output if the derivative is taken from it, and the residual if z is rebuilt with it."""
    if activation is None or signs is not None:
        return None, None
    if not ACTIVATIONS[activation].from_output:
        return None, residual
    return (None if rebuilds and residual is None and activation in REBUILT else y), None
