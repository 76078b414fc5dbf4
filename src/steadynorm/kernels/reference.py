"""The four stages in plain PyTorch: any device, any float type, any memory format.

The truth that the other kernels are held to. `moments` and `apply` are also differentiable by
PyTorch itself, which compilation, function transforms and second derivatives rely on.

Per-channel arguments are (C,), or (G, C) with groups, in float32 (float64 for float64 input).
`groups` is None or the group lengths along N. `mask` is None or boolean, of x's shape without the
channel axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from steadynorm.kernels.activations import ACTIVATIONS, Elementwise, functions
from steadynorm.statistics.moments import Moments

Groups = tuple[int, ...] | None

TORCH = Elementwise(torch, own=torch.nn.functional)
"""Elementwise mathematics in PyTorch's operators."""


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The type that statistics of x are computed and kept in: float32 or wider."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _Frame(NamedTuple):
    """One run of equal groups: how to view x, what to reduce, how to broadcast a channel array."""

    split: tuple[int, int] | None
    axes: tuple[int, ...]
    shape: tuple[int, ...]

    def view(self, x: Tensor) -> Tensor:
        return x if self.split is None else x.unflatten(0, self.split)

    def spread(self, channel: Tensor) -> Tensor:
        return channel.reshape(self.shape)


def _frame(x: Tensor, split: tuple[int, int] | None) -> _Frame:
    ones = (1,) * (x.ndim - 2)
    if split is None:
        return _Frame(None, (0, *range(2, x.ndim)), (1, x.shape[1], *ones))
    return _Frame(split, (1, *range(3, x.ndim + 1)), (split[0], 1, x.shape[1], *ones))


def _over_groups(
    stage: Callable[..., tuple[Tensor | None, ...]],
    x_sized: Sequence[Tensor | None],
    per_channel: Sequence[Tensor],
    groups: Groups,
) -> tuple[Tensor | None, ...]:
    """Call `stage(frame, *x_sized, *per_channel)` on every run of equal groups, and join."""
    x = x_sized[0]
    assert x is not None
    if groups is None:
        return stage(_frame(x, None), *x_sized, *per_channel)
    results, sample, row = [], 0, 0
    for size, run in groupby(groups):
        count = len(list(run))
        frame = _frame(x, (count, size))
        parts = [t if t is None else t.narrow(0, sample, count * size) for t in x_sized]
        rows = [t.narrow(0, row, count) for t in per_channel]
        results.append(stage(frame, *(t if t is None else frame.view(t) for t in parts), *rows))
        sample, row = sample + count * size, row + count
    joined = zip(*results, strict=True)
    return tuple(None if parts[0] is None else torch.cat(parts) for parts in joined)


def _may_overwrite() -> bool:
    """Whether a fresh intermediate may be reused: nobody differentiates or transforms this call."""
    return not (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch.compiler.is_compiling()
    )


def moments(x: Tensor, *, mask: Tensor | None = None, groups: Groups = None) -> Moments:
    """Count, mean and biased variance per channel, over valid positions where a mask is given.

    Two passes: a mean `high`, then mean `low` and variance of `x - high`; the mean is high + low.
    """
    wide = x.to(statistics_dtype(x))
    if x.numel() == 0:
        zero = wide.sum((0, *range(2, x.ndim)))  # a sum, so that replicas meet in the backward
        zero = zero.expand(len(groups), -1) if groups else zero
        return Moments(0, zero, zero, zero)
    valid = None if mask is None else mask.unsqueeze(1)
    counts, high, var, low = _over_groups(_moments_of_run, [wide, valid], [], groups)
    count: int | Tensor | None = counts
    if counts is None:
        per_sample = x.numel() // (x.shape[0] * x.shape[1])
        count = (
            x.shape[0] * per_sample
            if groups is None
            else torch.tensor(groups, dtype=wide.dtype, device=x.device)[:, None] * per_sample
        )
    return Moments(count, high, var, low)


def _moments_of_run(
    frame: _Frame, values: Tensor, valid: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Valid counts (None without a mask), rounded mean, variance and what the rounding lost."""
    count = None
    if valid is not None:
        count = valid.sum(frame.axes, keepdim=True).to(values.dtype)

    def mean(t: Tensor) -> Tensor:
        if valid is None or count is None:
            return t.mean(frame.axes, keepdim=True)
        return torch.where(valid, t, 0).sum(frame.axes, keepdim=True) / count.clamp(min=1)

    high = mean(values).detach()  # a pivot; the gradient of the mean flows through `low`
    centered = values - high
    low = mean(centered)
    var = mean((centered - low).square())
    low = torch.where(high.isfinite(), low, 0)  # the mean of an infinity is it, as in torch
    rows = (frame.split[0], -1) if frame.split else (-1,)
    if count is not None:
        count = count.reshape(rows)
    return count, high.reshape(rows), var.reshape(rows), low.reshape(rows)


def apply(
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    groups: Groups = None,
) -> Tensor:
    """`activation((x - center)·scale + shift + residual)`, in x's type (promoted by residual's)."""

    def stage(
        frame: _Frame, t: Tensor, extra: Tensor | None, mid: Tensor, slope: Tensor, step: Tensor
    ) -> tuple[Tensor]:
        z = _affine(frame, t, extra, mid, slope, step)
        y = z if activation is None else functions(activation, TORCH)[0](z)
        return (y.flatten(0, 1) if frame.split else y,)

    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    (y,) = _over_groups(stage, [x, residual], [center, scale, shift], groups)
    assert y is not None
    return y.to(dtype)


def _affine(
    frame: _Frame, x: Tensor, residual: Tensor | None, center: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    centered = x.to(center.dtype) - frame.spread(center)
    scale, shift = frame.spread(scale), frame.spread(shift)
    if not _may_overwrite():
        z = torch.addcmul(shift, centered, scale)
        return z if residual is None else z + residual
    z = torch.addcmul(shift, centered, scale, out=centered)
    return z if residual is None else z.add_(residual)


class _Branch(NamedTuple):
    """What the derivative of the activation is taken from: the output, or what rebuilds z."""

    activation: str | None
    frame: _Frame
    scale: Tensor
    shift: Tensor

    def gradient(
        self, grad: Tensor, x: Tensor, center: Tensor, y: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        grad = grad.to(center.dtype)
        if self.activation is None:
            return grad
        forward, gradient = functions(self.activation, TORCH)
        from_input = ACTIVATIONS[self.activation].source == "input"
        if y is not None and not from_input:
            t = y.to(center.dtype)
        else:
            z = _affine(self.frame, x, residual, center, self.scale, self.shift)
            t = z if from_input else forward(z)
        result: Tensor = gradient(grad, t)
        return result


def reduce_grad(
    grad: Tensor,
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    y: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    groups: Groups = None,
) -> tuple[Tensor, Tensor]:
    """`Σg` and `Σg·(x - center)` over all positions, with g the gradient before the activation."""

    def stage(
        frame: _Frame,
        d: Tensor,
        t: Tensor,
        out: Tensor | None,
        extra: Tensor | None,
        mid: Tensor,
        slope: Tensor,
        step: Tensor,
    ) -> tuple[Tensor, Tensor]:
        g = _Branch(activation, frame, slope, step).gradient(d, t, mid, out, extra)
        rows = mid.shape
        total = g.sum(frame.axes).reshape(rows)
        moved = t.to(mid.dtype) - frame.spread(mid)
        return total, (g * moved).sum(frame.axes).reshape(rows)

    total, moved = _over_groups(stage, [grad, x, y, residual], [center, scale, shift], groups)
    assert total is not None
    assert moved is not None
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
    activation: str | None = None,
    mask: Tensor | None = None,
    groups: Groups = None,
    want_residual: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`dx = scale·g + [valid]·(slope·(x - center) + constant)`, and g itself if wanted."""

    def stage(
        frame: _Frame,
        d: Tensor,
        t: Tensor,
        out: Tensor | None,
        extra: Tensor | None,
        valid: Tensor | None,
        mid: Tensor,
        gain: Tensor,
        step: Tensor,
        tilt: Tensor,
        level: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        g = _Branch(activation, frame, gain, step).gradient(d, t, mid, out, extra)
        through = torch.addcmul(
            frame.spread(level), t.to(mid.dtype) - frame.spread(mid), frame.spread(tilt)
        )
        if valid is not None:
            through = torch.where(valid, through, 0)
        dx = torch.addcmul(through, g, frame.spread(gain)).to(x.dtype)
        extra_grad = g.to(grad.dtype) if want_residual else None
        if frame.split:
            dx = dx.flatten(0, 1)
            extra_grad = None if extra_grad is None else extra_grad.flatten(0, 1)
        return dx, extra_grad

    valid = None if mask is None else mask.unsqueeze(1)
    dx, dresidual = _over_groups(
        stage, [grad, x, y, residual, valid], [center, scale, shift, slope, constant], groups
    )
    assert dx is not None
    return dx, dresidual
