"""Activations that run inside the layer, each defined once, for every array library and compiler.

A definition takes a namespace `m` of elementwise mathematics and returns two functions of it:
`forward(z)`, and `gradient(g, t)`, g times the derivative, with t the output y or the input z as
`source` says. `m` has `exp`, `expm1` (asked for z at most 0), `tanh`, `sigmoid`, `erf`, `where` and
`const(number, like)`, a number in the type of `like`: compiled float32 code would else compute in
float64. `Elementwise` makes one of an array library; the compiled CPU kernels bring their own.

Comparisons are written so that a NaN in t lets the gradient through, as torch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Array = Any
Functions = tuple[Callable[[Array], Array], Callable[[Array, Array], Array]]

LEAKY_SLOPE = 0.01  # torch.nn.LeakyReLU's default


class Elementwise:
    """The namespace over an array library such as `torch`, `jax.numpy` or `keras.ops`.

    `own`: a module whose functions of the activations' names serve as their forward, where such
    exist; exporters and compilers know them.
    """

    def __init__(self, xp: Any, *, sigmoid: Any = None, erf: Any = None, own: Any = None) -> None:
        self.exp, self.expm1, self.tanh, self.where = xp.exp, xp.expm1, xp.tanh, xp.where
        self.sigmoid = xp.sigmoid if sigmoid is None else sigmoid
        self.erf = xp.erf if erf is None else erf
        self.own = own

    @staticmethod
    def const(number: float, like: Array) -> float:
        """The number: array libraries take a Python number in the type of the array beside it."""
        return number


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
    root_half, density = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)

    def forward(z: Array) -> Array:
        return z * m.const(0.5, z) * (m.const(1.0, z) + m.erf(z * m.const(root_half, z)))

    def gradient(g: Array, z: Array) -> Array:
        cdf = m.const(0.5, z) * (m.const(1.0, z) + m.erf(z * m.const(root_half, z)))
        return g * (cdf + z * m.const(density, z) * m.exp(m.const(-0.5, z) * z * z))

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
    outside, that interval: one bit for each output then tells all.
    """

    define: Callable[[Any], Functions]
    source: Literal["output", "input", "either"]
    module: str
    gate: tuple[float, float] | None = None


ActivationName = Literal[
    "relu", "relu6", "leaky_relu", "silu", "gelu", "hardswish", "elu", "sigmoid", "tanh", "mish"
]  # fmt: skip
"""The keys of the table below, for type checkers."""

ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(_relu, "either", "ReLU", gate=(0.0, math.inf)),
    "relu6": Activation(_relu6, "either", "ReLU6", gate=(0.0, 6.0)),
    "leaky_relu": Activation(_leaky_relu, "either", "LeakyReLU"),
    "silu": Activation(_silu, "input", "SiLU"),
    "gelu": Activation(_gelu, "input", "GELU"),
    "hardswish": Activation(_hardswish, "input", "Hardswish"),
    "elu": Activation(_elu, "output", "ELU"),
    "sigmoid": Activation(_sigmoid, "output", "Sigmoid"),
    "tanh": Activation(_tanh, "output", "Tanh"),
    "mish": Activation(_mish, "input", "Mish"),
}


def functions(activation: str, m: Any) -> Functions:
    """`forward(z)` and `gradient(g, t)` of one activation over the namespace `m`."""
    forward, gradient = ACTIVATIONS[activation].define(m)
    return getattr(getattr(m, "own", None), activation, forward), gradient
