"""The namespace of kernels/activations.py for compiled code, with functions that vectorize.

In float32 they are polynomials, in float64 the C library's.

The C library's functions are called value by value, 5 to 40 times slower. The polynomial of exp is
that of Cephes' expf (Moshier 1989); that of the normal distribution was fitted here: at -a it is
exp(-a²/2) times a smooth function (Mills' ratio) of a/(a + 1/0.35), which a polynomial follows to
3e-8. All are right to about 1e-7, but that exp is 0 below -87.7 and infinite from 88.4 on; a NaN
goes through. Compiled apart from the sums around them: reordering would undo the two-step
subtraction of n·ln 2.
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
MILLS_PACE = 0.35
MILLS = (2.787414745e-2, -1.133278167e-1, 1.448685692e-1, -4.031301011e-2, 4.395196431e-2,
         -1.654628947e-1, -1.586631526e-1, 9.009036656e-1, -1.139833205, 0.5)  # fmt: skip


@strictly  # type: ignore[untyped-decorator]
def _polynomial(coefficients: Any, x: Any) -> Any:
    total = like(coefficients[0], x)
    for k in range(1, len(coefficients)):
        total = total * x + like(coefficients[k], x)
    return total


@strictly  # type: ignore[untyped-decorator]
def _power_of_two(n: Any) -> Any:
    """For n from -127, which gives 0, to 128, which gives infinity."""
    return from_bits((n + 127) << 23)


@strictly  # type: ignore[untyped-decorator]
def _split(x: Any) -> Any:
    """n, exp(r) - 1 with x = n·ln 2 + r, |r| at most ln 2 / 2."""
    x = like(-88.0, x) if x < like(-88.0, x) else x
    x = like(89.0, x) if x > like(89.0, x) else x
    shifted = x * like(1 / math.log(2), x) + like(ROUNDER, x)
    n = bits(shifted) - bits(like(ROUNDER, x))
    whole = shifted - like(ROUNDER, x)
    r = (x - whole * like(0.693359375, x)) - whole * like(-2.12194440e-4, x)
    return n, _polynomial(EXP, r) * (r * r) + r


@strictly  # type: ignore[untyped-decorator]
def _exp(x: Any) -> Any:
    n, above = _split(x)
    return (above + like(1.0, x)) * _power_of_two(n)


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
def _normal_cdf(z: Any) -> Any:
    size = abs(z)
    size = like(15.0, z) if size > like(15.0, z) else size  # beyond, exp(-z²/2) is 0
    part = like(MILLS_PACE, z) * size
    part = part / (like(1.0, z) + part)
    tail = _exp(like(-0.5, z) * z * z) * _polynomial(MILLS, part)
    return like(1.0, z) - tail if z > like(0.0, z) else tail


@strictly  # type: ignore[untyped-decorator]
def _normal_cdf_64(z: Any) -> Any:
    return 0.5 * math.erfc(z * -math.sqrt(0.5))


def exp(x: Any) -> Any:
    """e to the x."""
    return math.exp(x)


def expm1(x: Any) -> Any:
    """e to the x minus 1, for x at most 0, exact near 0."""
    return math.expm1(x)


def tanh(x: Any) -> Any:
    """The hyperbolic tangent."""
    return math.tanh(x)


def normal_cdf(x: Any) -> Any:
    """The standard normal distribution."""
    return _normal_cdf_64(x)


const = like


@strictly  # type: ignore[untyped-decorator]
def sigmoid(x: Any) -> Any:
    """The logistic function."""
    return like(1.0, x) / (like(1.0, x) + exp(-x))


@strictly  # type: ignore[untyped-decorator]
def where(condition: Any, a: Any, b: Any) -> Any:
    """a where the condition holds, else b."""
    return a if condition else b


def _by_type(function: Any, single: Any, double: Any) -> None:
    """In compiled code: `single` for float32, else `double`."""

    @overload(function)  # type: ignore[untyped-decorator]
    def choose(x: Any) -> Any:
        chosen = single if x == types.float32 else double

        def computed(x: Any) -> Any:
            return chosen(x)

        return computed


for _function, _single, _double in (
    (exp, _exp, math.exp),
    (expm1, _expm1_below_zero, math.expm1),
    (tanh, _tanh, math.tanh),
    (normal_cdf, _normal_cdf, _normal_cdf_64),
):
    _by_type(_function, _single, _double)
