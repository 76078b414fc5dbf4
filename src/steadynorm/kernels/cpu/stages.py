"""The stages on CPU, compiled by Numba: all floating types, channels first or last.

The same names and arguments as in `reference.py`, plus `normalize` and `normalize_grad`, which do
both stages of a direction while a block of channels is still in the cache. `unsupported` says what
cannot run here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steadynorm.kernels.reference import Groups
from steadynorm.kernels.reference.gradient_sources import GradientSources, Kept
from steadynorm.kernels.spec import statistics_dtype
from steadynorm.statistics.moments import Moments

from . import loops
from .kernels import SCALARS, backward_kernel, forward_kernel, gradient_options
from .readable import name_of
from .results import empty_like
from .signs import empty_signs, outputs_for
from .slabs import (
    MOMENTS,
    Slab,
    checked_output,
    laid_out_as,
    per_channel,
    residual_laid_out_as,
    shape_of,
    slabs,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "apply", "apply_grad", "empty_signs", "moments", "normalize", "normalize_grad", "outputs_for",
    "reduce_grad", "unsupported",
]  # fmt: skip


@lru_cache(maxsize=4096)
def unsupported(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, residual: torch.dtype | None
) -> str | None:
    """Why the kernels do not take such an input and type of residual; None if they do."""
    if dtype not in SCALARS:
        *others, last = map(name_of, SCALARS)
        return f"the input is {name_of(dtype)}, not {', '.join(others)} or {last}"
    like = torch.empty_strided(shape, strides, device="meta")
    if like.numel() == 0:
        return "the input is empty"
    if like.ndim < 2 or shape_of(like) is None:
        return "the input is contiguous neither channels-first nor channels-last"
    if residual is not None and residual is not dtype:
        return f"the residual is {name_of(residual)}, the input {name_of(dtype)}"
    return None


def moments(x: Tensor, *, mask: Tensor | None = None, groups: Groups = None) -> Moments:
    """Count, mean and biased variance per channel, over valid positions where a mask is given."""
    mask = None if mask is None else mask.contiguous()
    kernel = forward_kernel(x.dtype, masked=mask is not None)
    mean, low, var = _results_per_channel(3, x, groups)
    counts = []
    for slab in slabs(x, groups):
        count = slab.count
        if mask is not None:
            valid = mask.view(-1).narrow(0, slab.first * slab.length, count)
            slab.shared(mask=valid)
            count = int(torch.count_nonzero(valid))
        counts.append(count)
        slab.arguments.count = max(count, 1)
        slab.by_channel(center=mean, center_low=low, var=var)
        slab.run(kernel, *MOMENTS)
        if count == 0:
            for t in (mean, low, var):
                t.view(-1, slab.channels)[slab.group] = 0
    return Moments(_counts(counts, x, groups, mask), mean, var, low)


def _results_per_channel(number: int, x: Tensor, groups: Groups) -> tuple[Tensor, ...]:
    sizes = (number, x.shape[1]) if groups is None else (number, len(groups), x.shape[1])
    return torch.empty(sizes, dtype=statistics_dtype(x), device="cpu").unbind()


def _counts(counts: list[int], x: Tensor, groups: Groups, mask: Tensor | None) -> Any:
    """As the reference gives it: a number if all channels and groups have the same."""
    if groups is not None:
        return torch.tensor(counts, dtype=statistics_dtype(x), device="cpu")[:, None]
    return (
        counts[0] if mask is None else torch.tensor(counts, dtype=statistics_dtype(x), device="cpu")
    )


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

    Into `signs`, if given (see `empty_signs`), where the activation lets the gradient through.
    """
    y = empty_like(x) if out is None else checked_output(out, x)
    center, scale, shift = (per_channel(t, x, groups) for t in (center, scale, shift))
    residual = residual_laid_out_as(residual, x)
    kernel = forward_kernel(x.dtype, activation, add=residual is not None)
    for slab in slabs(x, groups):
        slab.values(residual=residual, y=y)
        slab.signs(signs)
        slab.by_channel(center=center, scale=scale, shift=shift)
        slab.run(kernel, loops.MAP)
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
    y = empty_like(x) if out is None else checked_output(out, x)
    weight = None if weight is None else per_channel(weight, x)
    bias = None if bias is None else per_channel(bias, x)
    residual = residual_laid_out_as(residual, x)
    kernel = forward_kernel(x.dtype, activation, add=residual is not None)
    mean, low, var, scale, shift = _results_per_channel(5, x, groups)
    counts = []
    for slab in slabs(x, groups):
        counts.append(slab.count)
        slab.arguments.count, slab.arguments.eps = slab.count, eps
        slab.values(residual=residual, y=y)
        slab.signs(signs)
        slab.shared(weight=weight, bias=bias)
        slab.by_channel(center=mean, center_low=low, var=var, scale=scale, shift=shift)
        slab.run(kernel, *slab.cut.forward(loops.DECIDE))
    return y, Moments(_counts(counts, x, groups, None), mean, var, low)


class _Backward:
    """What both stages of the backward direction read, and the kernel that reads it."""

    def __init__(
        self, grad: Tensor, x: Tensor, maps: tuple[Tensor, Tensor, Tensor], **kept: Unpack[Kept]
    ) -> None:
        self.x, self.sources = x, GradientSources.of(laid_out_as, grad, x, **kept)
        self.maps = tuple(per_channel(t, x, self.sources.groups) for t in maps)

    def kernel(self, *, want: bool = False, masked: bool = False) -> Any:
        """The compiled kernel for these options."""
        keep, activation = self.sources.keep, self.sources.activation
        options = gradient_options(keep, residual=self.sources.residual is not None)
        return backward_kernel(self.x.dtype, activation, want=want, masked=masked, **options)

    def slabs(self) -> Iterator[Slab]:
        """The groups, each with what is read handed over."""
        center, scale, shift = self.maps
        read = self.sources
        for slab in slabs(self.x, read.groups):
            slab.values(grad=read.grad, y=read.y, residual=read.residual)
            slab.signs(read.signs)
            slab.by_channel(center=center, scale=scale, shift=shift)
            yield slab

    def results(
        self, want: bool, out: tuple[Tensor, Tensor | None] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Where dx and the residual's gradient go."""
        x = self.x
        if out is None:
            return empty_like(x), empty_like(x) if want else None
        dx, dresidual = out
        if want and dresidual is None:
            raise ValueError("`out` must hold memory for the residual's gradient, too; got None.")
        dx = checked_output(dx, x)
        return dx, checked_output(dresidual, x) if want and dresidual is not None else None


def reduce_grad(
    grad: Tensor, x: Tensor, center: Tensor, scale: Tensor, shift: Tensor, **kept: Unpack[Kept]
) -> tuple[Tensor, Tensor]:
    """`Σg` and `Σg·(x - center)` over all positions, with g the gradient before the activation."""
    read = _Backward(grad, x, (center, scale, shift), **kept)
    sum_grad, sum_grad_x = _results_per_channel(2, x, read.sources.groups)
    kernel = read.kernel()
    for slab in read.slabs():
        slab.by_channel(sum_grad=sum_grad, sum_grad_x=sum_grad_x)
        slab.run(kernel, loops.REDUCE, loops.MERGE)
    return sum_grad, sum_grad_x


def apply_grad(
    grad: Tensor,
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    shift: Tensor,
    slope: Tensor,
    constant: Tensor,
    *,
    mask: Tensor | None = None,
    want_residual: bool = False,
    out: tuple[Tensor, Tensor | None] | None = None,
    **kept: Unpack[Kept],
) -> tuple[Tensor, Tensor | None]:
    """`dx = scale·g + [valid]·(slope·(x - center) + constant)`, and g itself if wanted.

    Without an activation g is `grad`, and no copy of it is made.
    """
    read = _Backward(grad, x, (center, scale, shift), **kept)
    writes = read.sources.is_written(want_residual)
    dx, dresidual = read.results(writes, out)
    slope, constant = (per_channel(t, x, read.sources.groups) for t in (slope, constant))
    mask = None if mask is None else mask.contiguous()
    kernel = read.kernel(want=writes, masked=mask is not None)
    for slab in read.slabs():
        slab.values(dx=dx, dresidual=dresidual)
        slab.by_channel(slope=slope, constant=constant)
        if mask is not None:
            slab.shared(mask=mask.view(-1)[slab.first * slab.length :])
        slab.run(kernel, loops.MAP)
    return dx, dresidual if writes or not want_residual else grad


def normalize_grad(
    grad: Tensor,
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    shift: Tensor,
    rho: Tensor,
    constant_factor: Tensor,
    mean_low: Tensor,
    mean_gap: Tensor,
    *,
    want_residual: bool = False,
    out: tuple[Tensor, Tensor | None] | None = None,
    **kept: Unpack[Kept],
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """`reduce_grad` and `apply_grad` by its sums, in one visit of each block of channels.

    With S₁ = Σg and S₂ = Σg·(x - center) - mean_low·S₁:

        dx = scale·g - constant_factor·(S₁ + rho²·S₂·((x - center) - mean_gap))

    Returns dx, g or None, Σg, Σg·(x - center). Without an activation g is `grad`, not a copy.
    """
    read = _Backward(grad, x, (center, scale, shift), **kept)
    groups, writes = read.sources.groups, read.sources.is_written(want_residual)
    dx, dresidual = read.results(writes, out)
    rho, constant_factor, mean_low, mean_gap = (
        per_channel(t, x, groups) for t in (rho, constant_factor, mean_low, mean_gap)
    )
    sum_grad, sum_grad_x, slope, constant = _results_per_channel(4, x, groups)
    kernel = read.kernel(want=writes)
    for slab in read.slabs():
        slab.values(dx=dx, dresidual=dresidual)
        slab.by_channel(
            sum_grad=sum_grad, sum_grad_x=sum_grad_x, slope=slope, constant=constant,
            rho=rho, constant_factor=constant_factor, center_low=mean_low, mean_gap=mean_gap,
        )  # fmt: skip
        slab.run(kernel, *slab.cut.backward())
    return dx, dresidual if writes or not want_residual else grad, sum_grad, sum_grad_x
