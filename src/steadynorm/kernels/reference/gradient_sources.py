"""What compiled stages compute the gradient before the activation from: the same on CPU and GPU.

cpu/stages.py and gpu/stages.py have what is each backend's own: how its kernels are launched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypedDict

from torch import Tensor

from steadynorm.kernels.activations import ACTIVATIONS
from steadynorm.kernels.reference import Groups
from steadynorm.kernels.spec import Keep

LayOut = Callable[[Tensor, Tensor, str], Tensor]
"""A tensor in x's type and layout, given x and the tensor's name: itself if it has both."""


class Kept(TypedDict, total=False):
    """What `reduce_grad`, `apply_grad` and `normalize_grad` take besides grad, x and the map."""

    y: Tensor | None
    residual: Tensor | None
    signs: Tensor | None
    activation: str | None
    groups: Groups


class GradientSources(NamedTuple):
    """What the gradient before the activation is computed from, laid out as x is.

    The activation's derivative is taken from `signs` if there are any, from z if the activation
    needs it or no y is given, else from y. Of y and the residual there is what serves.
    """

    keep: Keep
    grad: Tensor
    y: Tensor | None
    residual: Tensor | None
    signs: Tensor | None
    activation: str | None
    groups: Groups

    @classmethod
    def of(
        cls,
        laid_out_as: LayOut,
        grad: Tensor,
        x: Tensor,
        *,
        y: Tensor | None = None,
        residual: Tensor | None = None,
        signs: Tensor | None = None,
        activation: str | None = None,
        groups: Groups = None,
    ) -> GradientSources:
        """From what a forward kept; what is laid out otherwise than x is copied."""
        keep = derivative_from(activation, y, signs)
        return cls(
            keep,
            laid_out_as(grad, x, "grad"),
            laid_out_as(y, x, "y") if y is not None and keep is Keep.OUTPUT else None,
            laid_out_as(residual, x, "residual")
            if residual is not None and keep is Keep.REBUILT
            else None,
            signs,
            activation,
            groups,
        )

    def is_written(self, want_residual: bool) -> bool:
        """Whether a kernel writes the residual's gradient; without an activation it is `grad`."""
        return want_residual and self.activation is not None


def derivative_from(activation: str | None, y: Tensor | None, signs: Tensor | None) -> Keep:
    """What a backward takes the activation's derivative from."""
    if activation is None:
        return Keep.NOTHING
    if signs is not None:
        return Keep.SIGNS
    source = ACTIVATIONS[activation].source
    if y is None and source == "output":
        raise ValueError(
            f"`y` must be the output, for the gradient of {activation} is taken from it; got None."
        )
    return Keep.REBUILT if source == "input" or y is None else Keep.OUTPUT
