"""Activations inside the compiled CPU kernels: the table of kernels/activations.py, compiled.

A kernel names its activation by a literal integer, so that only the one asked for is compiled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from numba.core import types
from numba.core.extending import intrinsic, overload

from steadynorm.kernels.activations import ACTIVATIONS, functions

from . import elementary
from .elementary import strictly
from .pointers import widen

IDENTITY = 0
NAMES = (None, *ACTIVATIONS)
"""Activations by code."""
CODES = {name: code for code, name in enumerate(NAMES)}


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


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def vectors_for(typing: Any, code: Any) -> Any:
    """Called in a function's body: vectors of 512 bits there for an activation that is `heavy`.

    LLVM by itself takes 256 on processors that lower their clock for 512, and rightly where memory
    decides. The function itself must ask, since its loops are vectorized before it is inlined.
    """
    name = NAMES[code.literal_value]
    heavy = name is not None and ACTIVATIONS[name].heavy

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if heavy:
            attribute = '"prefer-vector-width"="512"'
            set.add(builder.function.attributes, attribute)  # llvmlite's `add` takes names alone
        return context.get_dummy_value()

    return types.void(code), generate


def _compiled(code: int, which: int) -> Any:
    name = NAMES[code]
    return None if name is None else strictly(functions(name, elementary)[which])


@by_activation(forceinline=True, error_model="numpy", fastmath={"contract"})
def activate(ACT: int) -> Any:
    """The activation of z."""
    chosen = _compiled(ACT, 0)

    def activated(z: Any, code: Any) -> Any:
        return z if ACT == IDENTITY else chosen(z)

    return activated


@by_activation(forceinline=True, error_model="numpy", fastmath={"contract"})
def gradient_at(ACT: int) -> Any:
    """g times the activation's derivative, by the output `y[index]`, or by z if y is None.

    z = centered·scale + shift + residual, with centered = x - center; a residual of None is left
    out.
    """
    chosen = _compiled(ACT, 1)

    def gradient(
        g: Any, centered: Any, scale: Any, shift: Any, y: Any, residual: Any, index: Any, code: Any
    ) -> Any:
        if ACT == IDENTITY:
            return g
        if y is not None:
            return chosen(g, widen(y[index]))
        if residual is not None:
            return chosen(g, centered * scale + shift + widen(residual[index]))
        return chosen(g, centered * scale + shift)

    return gradient
