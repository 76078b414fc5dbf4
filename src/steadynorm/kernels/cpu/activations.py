"""Activations and their gradients, inside the compiled CPU kernels.

Written with comparisons that let a NaN through (`0 if z <= 0 else z`). A kernel names its
activation by a literal integer, so that only the one asked for is compiled.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from numba.core import types
from numba.core.extending import overload

from .elementary import erf, exp, expm1_below_zero, strictly, tanh
from .pointers import like, widen

IDENTITY, RELU, RELU6, LEAKY_RELU, SILU, GELU, HARDSWISH, ELU, SIGMOID, TANH = range(10)
CODES = {
    None: IDENTITY,
    "relu": RELU,
    "relu6": RELU6,
    "leaky_relu": LEAKY_RELU,
    "silu": SILU,
    "gelu": GELU,
    "hardswish": HARDSWISH,
    "elu": ELU,
    "sigmoid": SIGMOID,
    "tanh": TANH,
}
FROM_INPUT = frozenset({SILU, GELU, HARDSWISH})
"""The activations whose derivative the output does not determine: they need z."""

BY_EITHER = frozenset({RELU, RELU6, LEAKY_RELU})
"""Those whose derivative z and the output determine alike."""

LEAKY_SLOPE = 0.01
ROOT_HALF = math.sqrt(0.5)
DENSITY = 1 / math.sqrt(2 * math.pi)


def _identity(z: Any) -> Any:
    return z


def _relu(z: Any) -> Any:
    return like(0.0, z) if z <= like(0.0, z) else z


def _relu6(z: Any) -> Any:
    low = like(0.0, z) if z <= like(0.0, z) else z
    return like(6.0, z) if low >= like(6.0, z) else low


def _leaky_relu(z: Any) -> Any:
    return z if z > like(0.0, z) else z * like(LEAKY_SLOPE, z)


@strictly  # type: ignore[untyped-decorator]
def _logistic(z: Any) -> Any:
    return like(1.0, z) / (like(1.0, z) + exp(-z))


def _silu(z: Any) -> Any:
    return z * _logistic(z)


def _gelu(z: Any) -> Any:
    return z * like(0.5, z) * (like(1.0, z) + erf(z * like(ROOT_HALF, z)))


def _hardswish(z: Any) -> Any:
    gate = z + like(3.0, z)
    gate = like(0.0, z) if gate <= like(0.0, z) else gate
    gate = like(6.0, z) if gate >= like(6.0, z) else gate
    return z * (gate * like(1 / 6, z))


def _elu(z: Any) -> Any:
    low = like(0.0, z) if z > like(0.0, z) else z
    return z if z > like(0.0, z) else expm1_below_zero(low)


def _sigmoid(z: Any) -> Any:
    return _logistic(z)


def _tanh(z: Any) -> Any:
    return tanh(z)


def _identity_grad(g: Any, y: Any) -> Any:
    return g


def _relu_grad(g: Any, y: Any) -> Any:
    return like(0.0, g) if y <= like(0.0, y) else g


def _relu6_grad(g: Any, y: Any) -> Any:
    rising = like(0.0, g) if y <= like(0.0, y) else g
    return like(0.0, g) if y >= like(6.0, y) else rising


def _leaky_relu_grad(g: Any, y: Any) -> Any:
    return g if y > like(0.0, y) else g * like(LEAKY_SLOPE, g)


def _silu_grad(g: Any, z: Any) -> Any:
    gate = _logistic(z)
    return g * gate * (like(1.0, z) + z * (like(1.0, z) - gate))


def _gelu_grad(g: Any, z: Any) -> Any:
    below = like(0.5, z) * (like(1.0, z) + erf(z * like(ROOT_HALF, z)))
    return g * (below + z * like(DENSITY, z) * exp(like(-0.5, z) * z * z))


def _hardswish_grad(g: Any, z: Any) -> Any:
    between = g * (z * like(1 / 3, z) + like(0.5, z))
    rising = like(0.0, g) if z <= like(-3.0, z) else between
    return g if z >= like(3.0, z) else rising


def _elu_grad(g: Any, y: Any) -> Any:
    return g if y > like(0.0, y) else g * (y + like(1.0, y))


def _sigmoid_grad(g: Any, y: Any) -> Any:
    return g * y * (like(1.0, y) - y)


def _tanh_grad(g: Any, y: Any) -> Any:
    return g * (like(1.0, y) - y * y)


FORWARD = (
    _identity,
    _relu,
    _relu6,
    _leaky_relu,
    _silu,
    _gelu,
    _hardswish,
    _elu,
    _sigmoid,
    _tanh,
)
GRADIENT = (
    _identity_grad,
    _relu_grad,
    _relu6_grad,
    _leaky_relu_grad,
    _silu_grad,
    _gelu_grad,
    _hardswish_grad,
    _elu_grad,
    _sigmoid_grad,
    _tanh_grad,
)


def by_activation(**options: Any) -> Callable[[Callable[[int], Any]], Any]:
    """Turn `build(ACT)`, which returns a function, into a function for use in compiled code.

    Its last argument is the activation's code, which has to be a literal there: so the one function
    that `build` returns for this code is all that gets compiled. `options` are `numba.njit`'s.
    """

    def decorate(build: Callable[[int], Any]) -> Any:
        def choose(*arguments: Any) -> Any:
            code = arguments[-1]
            return build(code.literal_value) if isinstance(code, types.IntegerLiteral) else None

        choose.__signature__ = inspect.signature(build(IDENTITY))  # type: ignore[attr-defined]
        overload(build, prefer_literal=True, jit_options=options)(choose)
        return build

    return decorate


@by_activation(forceinline=True, error_model="numpy", fastmath={"contract"})
def activate(ACT: int) -> Any:
    """The activation of z."""
    chosen = strictly(FORWARD[ACT])

    def activated(z: Any, code: Any) -> Any:
        return chosen(z)

    return activated


@by_activation(forceinline=True, error_model="numpy", fastmath={"contract"})
def gradient_at(ACT: int) -> Any:
    """g times the activation's derivative, by the output y at `place`, or by z if y is None.

    z = moved·scale + shift + residual, with moved = x - center; a residual of None is left out.
    """
    chosen = strictly(GRADIENT[ACT])

    def gradient(
        g: Any, moved: Any, scale: Any, shift: Any, y: Any, residual: Any, place: Any, code: Any
    ) -> Any:
        if ACT == IDENTITY:
            return g
        if y is not None:
            return chosen(g, widen(y[place]))
        if residual is not None:
            return chosen(g, moved * scale + shift + widen(residual[place]))
        return chosen(g, moved * scale + shift)

    return gradient
