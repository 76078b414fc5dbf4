"""The stages on CPU, compiled by Numba: float32, float64 and bfloat16, channels first or last.

The same names and arguments as in `eager.py`, plus `normalize` and `normalize_grad`, which do both
stages of a direction while a block of channels is still in the cache. `takes` says what runs here.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steadynorm.statistics.moments import Moments

from . import loops as at
from .activations import BY_EITHER, CODES, FROM_INPUT, IDENTITY
from .allocator import empty_like
from .kernels import SCALARS, backward_kernel, forward_kernel, name_of, warmup
from .signs import outputs_for, signs_for
from .slabs import (
    MOMENTS,
    Groups,
    Slab,
    alike,
    given,
    per_channel,
    real_type,
    residual_alike,
    shape_of,
    slabs,
)

__all__ = [
    "apply", "apply_grad", "backward_kernel", "calls", "forward_kernel", "moments", "normalize",
    "normalize_grad", "outputs_for", "reduce_grad", "signs_for", "takes", "warmup",
]  # fmt: skip

calls: Counter[str] = Counter()
"""How often each stage has run here, by name."""


def takes(x: Tensor, *, residual: Tensor | None = None) -> str | None:
    """None if these kernels can run on the input, else the reason why not."""
    if x.device.type != "cpu":
        return f"the input is on {x.device.type}"
    if x.dtype not in SCALARS:
        return f"the input is {name_of(x.dtype)}, not float32, float64 or bfloat16"
    if x.numel() == 0:
        return "the input is empty"
    if x.layout is not torch.strided or x.is_neg() or shape_of(x) is None:
        return "the input is contiguous neither channels-first nor channels-last"
    if residual is not None and residual.dtype != x.dtype:
        return f"the residual is {name_of(residual.dtype)}, the input {name_of(x.dtype)}"
    return None


def moments(x: Tensor, *, mask: Tensor | None = None, groups: Groups = None) -> Moments:
    """Count, mean and biased variance per channel, over valid positions where a mask is given."""
    calls["moments"] += 1
    mask = None if mask is None else mask.contiguous()
    kernel = forward_kernel(x.dtype, masked=mask is not None)
    mean, low, var = _per_channel_results(3, x, groups)
    counts = []
    for slab in slabs(x, groups):
        count = slab.count
        if mask is not None:
            valid = mask.view(-1).narrow(0, slab.first * slab.length, count)
            slab.shared(at.MASK, valid)
            count = int(torch.count_nonzero(valid))
        counts.append(count)
        slab.numbers((at.COUNT,), (max(count, 1),))
        slab.channel(at.CENTER, mean)
        slab.channel(at.LOW, low)
        slab.channel(at.VAR, var)
        slab.run(kernel, *MOMENTS)
        if count == 0:
            for t in (mean, low, var):
                t.view(-1, slab.channels)[slab.group] = 0
    return Moments(_counts(counts, x, groups, mask), mean, var, low)


def _per_channel_results(number: int, x: Tensor, groups: Groups) -> tuple[Tensor, ...]:
    sizes = (number, x.shape[1]) if groups is None else (number, len(groups), x.shape[1])
    return torch.empty(sizes, dtype=real_type(x)).unbind()


def _counts(counts: list[int], x: Tensor, groups: Groups, mask: Tensor | None) -> Any:
    """As `eager.moments` gives it: a number if all channels and groups have the same."""
    if groups is not None:
        return torch.tensor(counts, dtype=real_type(x))[:, None]
    return counts[0] if mask is None else torch.tensor(counts, dtype=real_type(x))


def apply(
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    groups: Groups = None,
    signs: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`activation((x - center)·scale + shift + residual)`, in `out` if given.

    Into `signs`, if given (see `signs_for`), where the activation lets the gradient through.
    """
    calls["apply"] += 1
    y = empty_like(x) if out is None else given(out, x)
    center, scale, shift = (per_channel(t, x, groups) for t in (center, scale, shift))
    residual = residual_alike(residual, x)
    kernel = forward_kernel(x.dtype, activation, add=residual is not None)
    for slab in slabs(x, groups):
        slab.values(at.RESIDUAL, residual)
        slab.values(at.Y, y)
        slab.signs(signs)
        slab.channel(at.CENTER, center)
        slab.channel(at.SCALE, scale)
        slab.channel(at.SHIFT, shift)
        slab.run(kernel, at.MAP)
    return y


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    groups: Groups = None,
    signs: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Moments]:
    """`moments` and `apply` by these moments, in one visit of each block of channels.

    y = activation((x - mean)/√(var + eps)·weight + bias + residual), in `out` if given.
    """
    calls["normalize"] += 1
    y = empty_like(x) if out is None else given(out, x)
    weight = None if weight is None else per_channel(weight, x)
    bias = None if bias is None else per_channel(bias, x)
    residual = residual_alike(residual, x)
    kernel = forward_kernel(x.dtype, activation, add=residual is not None)
    mean, low, var, scale, shift = _per_channel_results(5, x, groups)
    counts = []
    for slab in slabs(x, groups):
        counts.append(slab.count)
        slab.values(at.RESIDUAL, residual)
        slab.values(at.Y, y)
        slab.signs(signs)
        slab.shared(at.WEIGHT, weight)
        slab.shared(at.BIAS, bias)
        slab.numbers((at.COUNT, at.EPS), (slab.count, eps))
        for slot, t in (
            (at.CENTER, mean), (at.LOW, low), (at.VAR, var), (at.SCALE, scale), (at.SHIFT, shift)
        ):  # fmt: skip
            slab.channel(slot, t)
        slab.run(kernel, *slab.plan.forward(at.SETTLE))
    return y, Moments(_counts(counts, x, groups, None), mean, var, low)


class Branch(NamedTuple):
    """What every kernel of the backward direction reads of x's size, laid out as x is.

    The activation's derivative is taken from `signs` if there are any, from z if `rebuilt` (out of
    x and the residual), else from y.
    """

    grad: Tensor
    y: Tensor | None
    residual: Tensor | None
    signs: Tensor | None
    rebuilt: bool

    @property
    def options(self) -> dict[str, bool]:
        """The kernel's options that follow from it."""
        return {
            "signed": self.signs is not None,
            "rebuilt": self.rebuilt,
            "add": self.residual is not None,
        }

    def hand_over(self, slab: Slab) -> None:
        """Put its addresses into the kernel's arguments."""
        slab.values(at.GRAD, self.grad)
        slab.values(at.Y, self.y)
        slab.values(at.RESIDUAL, self.residual)
        slab.signs(self.signs)


def branch_of(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    signs: Tensor | None,
    activation: str | None,
) -> Branch:
    """What this activation's gradient is taken from."""
    code = CODES[activation]
    if signs is not None:
        return Branch(alike(grad, x, "grad"), None, None, signs, False)
    by_input = code in FROM_INPUT or (y is None and code in BY_EITHER)
    if y is None and code != IDENTITY and not by_input:
        raise ValueError(
            f"`y` must be the output, for the gradient of {activation} is taken from it; got None."
        )
    return Branch(
        alike(grad, x, "grad"),
        None if y is None or by_input or code == IDENTITY else alike(y, x, "y"),
        residual_alike(residual, x) if by_input else None,
        None,
        by_input,
    )


def results(
    x: Tensor, want: bool, out: tuple[Tensor, Tensor | None] | None
) -> tuple[Tensor, Tensor | None]:
    """Where dx and the residual's gradient go."""
    if out is None:
        return empty_like(x), empty_like(x) if want else None
    dx, dresidual = out
    if want and dresidual is None:
        raise ValueError("`out` must hold memory for the residual's gradient, too; got None.")
    return given(dx, x), given(dresidual, x) if want and dresidual is not None else None


def reduce_grad(
    grad: Tensor,
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    y: Tensor | None = None,
    residual: Tensor | None = None,
    signs: Tensor | None = None,
    activation: str | None = None,
    groups: Groups = None,
) -> tuple[Tensor, Tensor]:
    """`Σg` and `Σg·(x - center)` over all positions, with g the gradient before the activation."""
    calls["reduce_grad"] += 1
    branch = branch_of(grad, x, y, residual, signs, activation)
    place = [per_channel(t, x, groups) for t in (center, scale, shift)]
    kernel = backward_kernel(x.dtype, activation, **branch.options)
    total, moved = _per_channel_results(2, x, groups)
    for slab in slabs(x, groups):
        branch.hand_over(slab)
        for slot, t in zip((at.CENTER, at.SCALE, at.SHIFT), place, strict=True):
            slab.channel(slot, t)
        slab.channel(at.SUM_GRAD, total)
        slab.channel(at.SUM_GRAD_X, moved)
        slab.run(kernel, at.REDUCE, at.MERGE)
    return total, moved


def apply_grad(
    grad: Tensor,
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    shift: Tensor,
    slope: Tensor,
    constant: Tensor,
    *,
    y: Tensor | None = None,
    residual: Tensor | None = None,
    signs: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
    groups: Groups = None,
    want_residual: bool = False,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`dx = scale·g + [valid]·(slope·(x - center) + constant)`, and g itself if wanted.

    Without an activation g is `grad`, and no copy of it is made.
    """
    calls["apply_grad"] += 1
    want = want_residual and activation is not None
    branch = branch_of(grad, x, y, residual, signs, activation)
    place = [per_channel(t, x, groups) for t in (center, scale, shift)]
    masked = mask is not None
    kernel = backward_kernel(x.dtype, activation, want=want, masked=masked, **branch.options)
    dx, dresidual = results(x, want, out)
    slope, constant = (per_channel(t, x, groups) for t in (slope, constant))
    mask = None if mask is None else mask.contiguous()
    for slab in slabs(x, groups):
        branch.hand_over(slab)
        for slot, t in zip((at.CENTER, at.SCALE, at.SHIFT), place, strict=True):
            slab.channel(slot, t)
        slab.values(at.DX, dx)
        slab.values(at.DRESIDUAL, dresidual)
        slab.channel(at.SLOPE, slope)
        slab.channel(at.CONSTANT, constant)
        if mask is not None:
            slab.shared(at.MASK, mask.view(-1)[slab.first * slab.length :])
        slab.run(kernel, at.MAP)
    return dx, dresidual if want else (grad if want_residual else None)


def normalize_grad(
    grad: Tensor,
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    shift: Tensor,
    slope_factor: Tensor,
    constant_factor: Tensor,
    mean_low: Tensor,
    mean_gap: Tensor,
    *,
    y: Tensor | None = None,
    residual: Tensor | None = None,
    signs: Tensor | None = None,
    activation: str | None = None,
    groups: Groups = None,
    want_residual: bool = False,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """`reduce_grad` and `apply_grad` by its sums, in one visit of each block of channels.

    With S₁ = Σg and S₂ = Σg·(x - center) - mean_low·S₁:

        dx = scale·g - constant_factor·S₁ - slope_factor·S₂·((x - center) - mean_gap)

    Returns dx, g or None, Σg, Σg·(x - center). Without an activation g is `grad`, not a copy.
    """
    calls["normalize_grad"] += 1
    want = want_residual and activation is not None
    branch = branch_of(grad, x, y, residual, signs, activation)
    place = [per_channel(t, x, groups) for t in (center, scale, shift)]
    dx, dresidual = results(x, want, out)
    factors = [
        per_channel(t, x, groups) for t in (slope_factor, constant_factor, mean_low, mean_gap)
    ]
    total, moved, slope, constant = _per_channel_results(4, x, groups)
    kernel = backward_kernel(x.dtype, activation, want=want, **branch.options)
    for slab in slabs(x, groups):
        branch.hand_over(slab)
        for slot, t in zip((at.CENTER, at.SCALE, at.SHIFT), place, strict=True):
            slab.channel(slot, t)
        slab.values(at.DX, dx)
        slab.values(at.DRESIDUAL, dresidual)
        for slot, t in (
            (at.SUM_GRAD, total), (at.SUM_GRAD_X, moved), (at.SLOPE, slope),
            (at.CONSTANT, constant), (at.SLOPE_FACTOR, factors[0]),
            (at.CONSTANT_FACTOR, factors[1]), (at.MEAN_LOW, factors[2]), (at.MEAN_GAP, factors[3]),
        ):  # fmt: skip
            slab.channel(slot, t)
        slab.run(kernel, *slab.plan.backward())
    return dx, dresidual if want else (grad if want_residual else None), total, moved
