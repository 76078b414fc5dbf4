"""The stages in `keras.ops`: everything of the input's size, and nothing else.

`x` has its channels on `axis` (counted from the front). Per-channel arguments are (C,), or (G, C)
with groups. `groups` is None or the group lengths along axis 0, which then is not the channels'
own. `mask` is None or boolean, of x's shape without the channel axis.

Here the backend differentiates: `moments` and `apply` are written so that every backend's
derivatives of them, of any order, are those of the closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

import keras
from keras import ops

from steadynorm.statistics import Moments

Tensor = Any  # of whichever backend
Groups = tuple[int, ...] | None


class _Frame(NamedTuple):
    """What to reduce, and how a per-channel tensor broadcasts, in x or in a run of equal groups."""

    axes: tuple[int, ...]
    shape: tuple[int, ...]

    def spread(self, channel: Tensor) -> Tensor:
        return ops.reshape(channel, self.shape)


def _frame(x: Tensor, axis: int, groups_in_run: int | None) -> _Frame:
    rank, channels = len(x.shape), x.shape[axis]
    if groups_in_run is None:
        shape = tuple(channels if i == axis else 1 for i in range(rank))
        return _Frame(tuple(i for i in range(rank) if i != axis), shape)
    inside = (groups_in_run, 1, *(channels if i == axis else 1 for i in range(1, rank)))
    return _Frame(tuple(i for i in range(1, rank + 1) if i != axis + 1), inside)


def _over_groups(
    stage: Callable[..., tuple[Tensor, ...]],
    x_sized: Sequence[Tensor | None],
    per_channel: Sequence[Tensor],
    axis: int,
    groups: Groups,
) -> tuple[Tensor, ...]:
    """Call the stage on x, or on every run of equal groups as (groups, samples, ...), and join."""
    x = x_sized[0]
    if groups is None:
        return stage(_frame(x, axis, None), *x_sized, *per_channel)
    results, sample, row = [], 0, 0
    for size, run in groupby(groups):
        count = len(list(run))
        end = sample + count * size
        parts = [
            t if t is None else ops.reshape(t[sample:end], (count, size, *ops.shape(t)[1:]))
            for t in x_sized
        ]
        rows = [t[row : row + count] for t in per_channel]
        results.append(stage(_frame(x, axis, count), *parts, *rows))
        sample, row = end, row + count
    return tuple(
        ops.concatenate(
            [ops.reshape(t, (-1, *ops.shape(t)[2:])) if len(t.shape) > 2 else t for t in parts]
        )
        for parts in zip(*results, strict=True)
    )


def _total(t: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The sum over `axes`, kept with length 1: one axis after the other, the last first.

    Added in one go, hundreds of values of a channel would be added in a row, by XLA on the CPU at
    least; for data near 1e6, whose roundings repeat, that cost the variance of 448 values 2e-6.
    """
    for axis in sorted(axes, reverse=True):  # the first one first takes XLA 20 times as long
        t = ops.sum(t, axis, keepdims=True)
        if keras.config.backend() == "jax":  # whose compiler would join the axes again
            t = import_module("jax").lax.optimization_barrier(t)
    return t


def number(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """How many values `axes` span: a plain number, or a float32 scalar where shapes are dynamic."""
    lengths = [ops.shape(tensor)[axis] for axis in axes]
    if all(isinstance(length, int) for length in lengths):
        return prod(lengths)
    return ops.cast(ops.prod(ops.stack([ops.cast(n, "int32") for n in lengths])), "float32")


def moments(x: Tensor, *, axis: int, mask: Tensor | None = None, groups: Groups = None) -> Moments:
    """Count, mean and biased variance per channel, over valid positions where a mask is given.

    Two passes: a mean `high`, then mean `low` and variance of `x - high`; the mean is high + low.
    Gradient flows through `low` and the variance.
    """

    def stage(frame: _Frame, values: Tensor, valid: Tensor | None) -> tuple[Tensor, ...]:
        rows = (-1,) if groups is None else (frame.shape[0], -1)
        if valid is None:
            count = number(values, frame.axes)
            some = max(count, 1) if isinstance(count, int) else ops.maximum(count, 1)
        else:
            count = _total(ops.cast(valid, values.dtype), frame.axes)
            some = ops.maximum(count, 1)

        def mean(t: Tensor) -> Tensor:
            if valid is not None:
                t = ops.where(valid, t, ops.zeros_like(t))
            return _total(t, frame.axes) / (some if valid is not None else _like(some, t))

        high = ops.stop_gradient(mean(values))
        centered = values - high
        low = mean(centered)
        var = mean(ops.square(centered - low))
        low = ops.where(ops.isfinite(high), low, ops.zeros_like(low))  # an infinite mean is it
        results = tuple(ops.reshape(t, rows) for t in (high, var, low))
        return results if valid is None else (*results, ops.reshape(count, rows))

    valid = None if mask is None else ops.expand_dims(mask, axis)
    high, var, low, *counts = _over_groups(stage, [x, valid], [], axis, groups)
    if counts:
        return Moments(counts[0], high, var, low)
    if groups is None:
        count = number(x, _frame(x, axis, None).axes)
        return Moments(count if isinstance(count, int) else _like(count, x), high, var, low)
    per_sample = number(x, [i for i in range(1, len(x.shape)) if i != axis])
    sizes = ops.convert_to_tensor(groups, dtype=x.dtype)[:, None]
    return Moments(sizes * _like(per_sample, x), high, var, low)


def _like(number: Tensor, t: Tensor) -> Tensor:
    return number if isinstance(number, int) else ops.cast(number, t.dtype)


def apply(
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    axis: int,
    residual: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] | None = None,
    groups: Groups = None,
) -> Tensor:
    """`activation((x - center)·scale + shift + residual)`."""

    def stage(
        frame: _Frame,
        values: Tensor,
        extra: Tensor | None,
        middle: Tensor,
        slope: Tensor,
        step: Tensor,
    ) -> tuple[Tensor]:
        z = (values - frame.spread(middle)) * frame.spread(slope) + frame.spread(step)
        z = z if extra is None else z + extra
        return (z if activation is None else activation(z),)

    return _over_groups(stage, [x, residual], [center, scale, shift], axis, groups)[0]
