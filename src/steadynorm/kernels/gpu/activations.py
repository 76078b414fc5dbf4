"""The table of kernels/activations.py as Triton functions, written out from its definitions.

A definition runs once over a namespace that notes each operation as a line of source; all lines of
all activations make two functions, of which a kernel names the branch by a constant. Triton keys
its cache of compiled kernels by the source of what they call, and so by the definitions.
"""

from __future__ import annotations

import linecache
from typing import Any

import triton
import triton.language as tl

from steadynorm.kernels.activations import ACTIVATIONS

from .elementary import expm1, normal_cdf, sigmoid, tanh


class _Value:
    """The name of one line's result; operators add a line."""

    def __init__(self, name: str, lines: list[str]) -> None:
        self.name, self.lines = name, lines

    def new(self, expression: str) -> _Value:
        """One line more."""
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        return _Value(name, self.lines)

    def __add__(self, other: Any) -> _Value:
        return self.new(f"{self} + {other}")

    def __sub__(self, other: Any) -> _Value:
        return self.new(f"{self} - {other}")

    def __rsub__(self, other: Any) -> _Value:
        return self.new(f"{other} - {self}")

    def __mul__(self, other: Any) -> _Value:
        return self.new(f"{self} * {other}")

    def __truediv__(self, other: Any) -> _Value:
        return self.new(f"tl.div_rn({self}, {other})")

    def __le__(self, other: Any) -> _Value:
        return self.new(f"{self} <= {other}")

    def __ge__(self, other: Any) -> _Value:
        return self.new(f"{self} >= {other}")

    def __gt__(self, other: Any) -> _Value:
        return self.new(f"{self} > {other}")

    __radd__, __rmul__ = __add__, __mul__

    def __str__(self) -> str:
        return self.name


class _Source:
    """The namespace that a definition runs over."""

    @staticmethod
    def const(number: float, like: _Value) -> float:
        """Triton takes a number in the type of the tensor beside it."""
        return number

    @staticmethod
    def where(condition: _Value, a: Any, b: Any) -> _Value:
        """A choice, place by place."""
        return condition.new(f"tl.where({condition}, {a}, {b})")

    def __getattr__(self, name: str) -> Any:
        module = "tl." if name == "exp" else ""
        return lambda z: z.new(f"{module}{name}({z})")


def _branches(which: int, arguments: tuple[str, ...]) -> str:
    text = ""
    for name, row in ACTIVATIONS.items():
        lines: list[str] = []
        result = row.define(_Source())[which](*(_Value(a, lines) for a in arguments))
        text += f"    {'el' if text else ''}if ACT == {name!r}:\n"
        text += "".join(f"        {line}\n" for line in (*lines, f"result = {result}"))
    return f"{text}    else:\n        result = {arguments[0]}\n    return result\n"


def _compiled(name: str, which: int, *arguments: str) -> Any:
    source = f"def {name}({', '.join(arguments)}, ACT: tl.constexpr):\n"
    source += _branches(which, arguments)
    file = f"<steadynorm {name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope = dict(tl=tl, expm1=expm1, normal_cdf=normal_cdf, sigmoid=sigmoid, tanh=tanh)
    scope["__name__"] = __name__
    exec(compile(source, file, "exec"), scope)
    return triton.jit(scope[name])


activated = _compiled("activated", 0, "z")
"""The activation ACT of z; z itself for None."""
through = _compiled("through", 1, "g", "t")
"""g times the derivative of ACT, from the output or z, t, as its row says; g itself for None."""
