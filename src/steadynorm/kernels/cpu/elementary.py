"""The namespace of kernels/activations.py for compiled code, with functions that vectorize.

In float32 they are polynomials, in float64 the C library's.

The C library's functions are called value by value, 5 to 40 times slower. The polynomials are those
of Cephes' expf, erff and erfcf (Moshier 1989), right to about 1e-7; a NaN goes through. Compiled
apart from the sums around them: reordering would undo the two-step subtraction of n·ln 2.
"""

from __future__ import annotations

import math
from typing import Any

from numba.core import types
from numba.core.extending import overload, register_jitable

from .pointers import bits, from_bits, like

strictly = register_jitable(forceinline=True, error_model="numpy", fastmath={"contract"})

ROUNDER = 12582912.0  # 1.5·2²³: adding it leaves the nearest integer in the lowest bits
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
       5.0000001201e-1)  # fmt: skip
ERF = (7.853861353153693e-5, -8.010193625184903e-4, 5.188327685732524e-3, -2.685381193529856e-2,
       1.128358514861418e-1, -3.761262582423300e-1, 1.128379165726710)  # fmt: skip
ERFC_NEAR = (2.326819970068386e-2, -1.387039388740657e-1, 3.687424674597105e-1,
             -5.824733027278666e-1, 6.210004621745983e-1, -4.944515323274145e-1,
             3.404879937665872e-1, -2.741127028184656e-1, 5.638259427386472e-1)  # fmt: skip
ERFC_FAR = (-1.047766399936249e1, 1.297719955372516e1, -7.495518717768503, 2.921019019210786,
            -1.015265279202700, 4.218463358204948e-1, -2.820767439740514e-1,
            5.641895067754075e-1)  # fmt: skip


@strictly  # type: ignore[untyped-decorator]
def _polynomial(coefficients: Any, x: Any) -> Any:
    total = like(coefficients[0], x)
    for k in range(1, len(coefficients)):
        total = total * x + like(coefficients[k], x)
    return total


@strictly  # type: ignore[untyped-decorator]
def _power_of_two(n: Any) -> Any:
    return from_bits((n + 127) << 23)


@strictly  # type: ignore[untyped-decorator]
def _split(x: Any) -> Any:
    """n, exp(r) - 1 with x = n·ln 2 + r, |r| at most ln 2 / 2."""
    x = like(-104.0, x) if x < like(-104.0, x) else x
    x = like(89.0, x) if x > like(89.0, x) else x
    shifted = x * like(1 / math.log(2), x) + like(ROUNDER, x)
    n = bits(shifted) - bits(like(ROUNDER, x))
    whole = shifted - like(ROUNDER, x)
    r = (x - whole * like(0.693359375, x)) - whole * like(-2.12194440e-4, x)
    return n, _polynomial(EXP, r) * (r * r) + r


@strictly  # type: ignore[untyped-decorator]
def _exp(x: Any) -> Any:
    n, above = _split(x)
    half = n >> 1  # in two steps: 2ⁿ itself may be above or below what float32 holds
    return (above + like(1.0, x)) * _power_of_two(half) * _power_of_two(n - half)


@strictly  # type: ignore[untyped-decorator]
def _expm1_below_zero(x: Any) -> Any:
    x = like(-40.0, x) if x < like(-40.0, x) else x
    n, above = _split(x)
    power = _power_of_two(n)
    return power * above + (power - like(1.0, x))


@strictly  # type: ignore[untyped-decorator]
def _tanh(x: Any) -> Any:
    size = abs(x)
    below = _expm1_below_zero(like(-2.0, x) * size)
    value = -below / (below + like(2.0, x))
    return -value if x < like(0.0, x) else value


@strictly  # type: ignore[untyped-decorator]
def _erf(x: Any) -> Any:
    size = abs(x)
    near = x * _polynomial(ERF, x * x)
    inverse = like(1.0, x) / (like(1.0, x) if size < like(1.0, x) else size)
    square = inverse * inverse
    tail = _polynomial(ERFC_NEAR, square) if size < like(2.0, x) else _polynomial(ERFC_FAR, square)
    far = like(1.0, x) - _exp(-size * size) * inverse * tail
    far = -far if x < like(0.0, x) else far
    return near if size < like(1.0, x) else far


def exp(x: Any) -> Any:
    """e to the x."""
    return math.exp(x)


def expm1(x: Any) -> Any:
    """e to the x minus 1, for x at most 0, exact near 0."""
    return math.expm1(x)


def tanh(x: Any) -> Any:
    """The hyperbolic tangent."""
    return math.tanh(x)


def erf(x: Any) -> Any:
    """The error function."""
    return math.erf(x)


const = like


@strictly  # type: ignore[untyped-decorator]
def sigmoid(x: Any) -> Any:
    """The logistic function."""
    return like(1.0, x) / (like(1.0, x) + exp(-x))


@strictly  # type: ignore[untyped-decorator]
def where(condition: Any, a: Any, b: Any) -> Any:
    """a where the condition holds, else b."""
    return a if condition else b


def _by_type(function: Any, single: Any) -> None:
    """In compiled code: the polynomial for float32, else what Python's function stands for."""

    @overload(function)  # type: ignore[untyped-decorator]
    def choose(x: Any) -> Any:
        chosen = single if x == types.float32 else getattr(math, function.__name__)

        def computed(x: Any) -> Any:
            return chosen(x)

        return computed


for _function, _single in (
    (exp, _exp),
    (expm1, _expm1_below_zero),
    (tanh, _tanh),
    (erf, _erf),
):
    _by_type(_function, _single)
