"""Activations that run inside the layer, each defined once, for every array library and compiler.

A definition takes a namespace `m` of elementwise mathematics and returns two functions of it:
`forward(z)`, and `gradient(g, t)`, g times the derivative, with t the output y or the input z as
`source` says. `m` has `exp`, `expm1` (asked for z at most 0), `tanh`, `sigmoid`, `normal_cdf` (the
standard normal distribution), `where` and `const(number, like)`, a number in the type of `like`:
compiled float32 code would else compute in float64. A module `own` in it, such as
torch.nn.functional, brings forwards of the activations' names, which exporters and compilers know.

Comparisons are written so that a NaN in t lets the gradient through, as torch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Array = Any
Functions = tuple[Callable[[Array], Array], Callable[[Array, Array], Array]]

LEAKY_SLOPE = 0.01  # torch.nn.LeakyReLU's default


def normal_cdf_by(erf: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """`normal_cdf` of an array library from its error function."""

    def normal_cdf(z: Array) -> Array:
        return 0.5 * (1.0 + erf(z * math.sqrt(0.5)))

    return normal_cdf


def _relu(m: Any) -> Functions:
    def forward(z: Array) -> Array:
        return m.where(z <= m.const(0.0, z), m.const(0.0, z), z)

    def gradient(g: Array, y: Array) -> Array:
        return m.where(y <= m.const(0.0, y), m.const(0.0, g), g)

    return forward, gradient


def _relu6(m: Any) -> Functions:
    def forward(z: Array) -> Array:
        above = m.where(z <= m.const(0.0, z), m.const(0.0, z), z)
        return m.where(above >= m.const(6.0, z), m.const(6.0, z), above)

    def gradient(g: Array, y: Array) -> Array:
        above = m.where(y <= m.const(0.0, y), m.const(0.0, g), g)
        return m.where(y >= m.const(6.0, y), m.const(0.0, g), above)

    return forward, gradient


def _leaky_relu(m: Any) -> Functions:
    def forward(z: Array) -> Array:
        return m.where(z > m.const(0.0, z), z, z * m.const(LEAKY_SLOPE, z))

    def gradient(g: Array, y: Array) -> Array:
        return m.where(y > m.const(0.0, y), g, g * m.const(LEAKY_SLOPE, g))

    return forward, gradient


def _silu(m: Any) -> Functions:
    def forward(z: Array) -> Array:
        return z * m.sigmoid(z)

    def gradient(g: Array, z: Array) -> Array:
        gate = m.sigmoid(z)
        return g * gate * (m.const(1.0, z) + z * (m.const(1.0, z) - gate))

    return forward, gradient


def _gelu(m: Any) -> Functions:
    height = 1 / math.sqrt(2 * math.pi)  # of the normal density

    def forward(z: Array) -> Array:
        return z * m.normal_cdf(z)

    def gradient(g: Array, z: Array) -> Array:
        density = m.const(height, z) * m.exp(m.const(-0.5, z) * z * z)
        return g * (m.normal_cdf(z) + z * density)

    return forward, gradient


def _hardswish(m: Any) -> Functions:
    def forward(z: Array) -> Array:
        gate = z + m.const(3.0, z)
        gate = m.where(gate <= m.const(0.0, z), m.const(0.0, z), gate)
        gate = m.where(gate >= m.const(6.0, z), m.const(6.0, z), gate)
        return z * (gate * m.const(1 / 6, z))

    def gradient(g: Array, z: Array) -> Array:
        between = g * (z * m.const(1 / 3, z) + m.const(0.5, z))
        rising = m.where(z <= m.const(-3.0, z), m.const(0.0, g), between)
        return m.where(z >= m.const(3.0, z), g, rising)

    return forward, gradient


def _elu(m: Any) -> Functions:
    def forward(z: Array) -> Array:
        below = m.where(z > m.const(0.0, z), m.const(0.0, z), z)
        return m.where(z > m.const(0.0, z), z, m.expm1(below))

    def gradient(g: Array, y: Array) -> Array:
        return m.where(y > m.const(0.0, y), g, g * (y + m.const(1.0, y)))

    return forward, gradient


def _sigmoid(m: Any) -> Functions:
    def forward(z: Array) -> Array:
        return m.sigmoid(z)

    def gradient(g: Array, y: Array) -> Array:
        return g * y * (m.const(1.0, y) - y)

    return forward, gradient


def _tanh(m: Any) -> Functions:
    def forward(z: Array) -> Array:
        return m.tanh(z)

    def gradient(g: Array, y: Array) -> Array:
        return g * (m.const(1.0, y) - y * y)

    return forward, gradient


def _mish(m: Any) -> Functions:
    # z·tanh(softplus(z)); tanh(ln(1 + e)) = n/(n + 2) with n = e·(e + 2), 1 to all digits past 20.
    def forward(z: Array) -> Array:
        e = m.exp(m.where(z > m.const(20.0, z), m.const(20.0, z), z))
        n = e * (e + m.const(2.0, z))
        return z * (n / (n + m.const(2.0, z)))

    def gradient(g: Array, z: Array) -> Array:
        e = m.exp(m.where(z > m.const(20.0, z), m.const(20.0, z), z))
        n = e * (e + m.const(2.0, z))
        t = n / (n + m.const(2.0, z))
        return g * (t + z * m.sigmoid(z) * (m.const(1.0, z) - t * t))

    return forward, gradient


class Activation(NamedTuple):
    """One row of the table.

    `source`: whether the derivative is taken from the "output", needs the "input" z, or can be had
    from "either" at the cost of a comparison. `module`: the class in `torch.nn` that it stands for,
    with its default arguments. `gate`: for a derivative of 1 inside an interval of outputs and 0
    outside, that interval: one bit for each output then tells all. `heavy`: computing it takes
    longer than memory does.
    """

    define: Callable[[Any], Functions]
    source: Literal["output", "input", "either"]
    module: str
    gate: tuple[float, float] | None = None
    heavy: bool = False


ActivationName = Literal[
    "relu", "relu6", "leaky_relu", "silu", "gelu", "hardswish", "elu", "sigmoid", "tanh", "mish"
]  # fmt: skip
"""The keys of the table below, for type checkers."""

ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(_relu, "either", "ReLU", gate=(0.0, math.inf)),
    "relu6": Activation(_relu6, "either", "ReLU6", gate=(0.0, 6.0)),
    "leaky_relu": Activation(_leaky_relu, "either", "LeakyReLU"),
    "silu": Activation(_silu, "input", "SiLU", heavy=True),
    "gelu": Activation(_gelu, "input", "GELU", heavy=True),
    "hardswish": Activation(_hardswish, "input", "Hardswish"),
    "elu": Activation(_elu, "output", "ELU", heavy=True),
    "sigmoid": Activation(_sigmoid, "output", "Sigmoid", heavy=True),
    "tanh": Activation(_tanh, "output", "Tanh", heavy=True),
    "mish": Activation(_mish, "input", "Mish", heavy=True),
}


def functions(activation: str, m: Any) -> Functions:
    """`forward(z)` and `gradient(g, t)` of one activation over the namespace `m`."""
    forward, gradient = ACTIVATIONS[activation].define(m)
    return getattr(getattr(m, "own", None), activation, forward), gradient
