"""The four stages in `jax.numpy`: everything of the input's size, and nothing else.

`x` has its channels on `axis` (counted from the front). Per-channel arguments are (C,), or (G, C)
with groups, in `statistics_dtype(x)`. `groups` is None or the group lengths along axis 0, which
then is not the channels' own. `mask` is None or boolean, of x's shape without the channel axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from steadynorm.jax.activations import ACTIVATIONS
from steadynorm.statistics import Moments

Groups = tuple[int, ...] | None
Stage = Callable[["_Frame", Sequence[Array | None], Sequence[Array]], tuple[Array, ...]]


_barrier: Any = jax.lax.optimization_barrier  # not annotated by JAX


def statistics_dtype(x: Array) -> DTypeLike:
    """The type that statistics of x are computed and kept in: float32 or wider."""
    return jnp.promote_types(x.dtype, jnp.float32)


class _Frame(NamedTuple):
    """What to reduce, and how a per-channel array broadcasts, in x or in a run of equal groups."""

    axes: tuple[int, ...]
    shape: tuple[int, ...]

    def spread(self, channel: Array) -> Array:
        return channel.reshape(self.shape)


def _total(t: Array, axes: tuple[int, ...]) -> Array:
    """The sum over `axes`, kept with length 1: one axis after the other, the last first.

    XLA on the CPU adds hundreds of values of one channel in a row; for data near 1e6, whose
    roundings repeat, that cost the variance of 448 values 2e-6. Without the barrier XLA would join
    the axes again.
    """
    for axis in sorted(axes, reverse=True):  # the first one first takes XLA 20 times as long
        t = _barrier(t.sum(axis, keepdims=True))
    return t


def _frame(x: Array, axis: int, groups_in_run: int | None) -> _Frame:
    if groups_in_run is None:
        axes = tuple(i for i in range(x.ndim) if i != axis)
        return _Frame(axes, tuple(x.shape[axis] if i == axis else 1 for i in range(x.ndim)))
    inside = (groups_in_run, 1, *(x.shape[i] if i == axis else 1 for i in range(1, x.ndim)))
    return _Frame(tuple(i for i in range(1, x.ndim + 1) if i != axis + 1), inside)


def _over_groups(
    stage: Stage,
    x_sized: Sequence[Array | None],
    per_channel: Sequence[Array],
    axis: int,
    groups: Groups,
) -> tuple[Array, ...]:
    """Call the stage on x, or on every run of equal groups as (groups, samples, ...), and join."""
    x = x_sized[0]
    assert x is not None
    if groups is None:
        return stage(_frame(x, axis, None), x_sized, per_channel)
    results, sample, row = [], 0, 0
    for size, run in groupby(groups):
        count = len(list(run))
        end = sample + count * size
        parts = [
            t if t is None else t[sample:end].reshape(count, size, *t.shape[1:]) for t in x_sized
        ]
        rows = [t[row : row + count] for t in per_channel]
        results.append(stage(_frame(x, axis, count), parts, rows))
        sample, row = end, row + count
    return tuple(
        jnp.concatenate([t.reshape(-1, *t.shape[2:]) if t.ndim > 2 else t for t in parts])
        for parts in zip(*results, strict=True)
    )


def moments(x: Array, *, axis: int, mask: Array | None = None, groups: Groups = None) -> Moments:
    """Count, mean and biased variance per channel, over valid positions where a mask is given.

    Two passes: a mean `high`, then mean `low` and variance of `x - high`; the mean is high + low.
    """
    wide = x.astype(statistics_dtype(x))
    channels = x.shape[axis]
    if x.size == 0:
        zero = jnp.zeros((len(groups), channels) if groups else (channels,), wide.dtype)
        return Moments(0, zero, zero, zero)

    def stage(
        frame: _Frame, arrays: Sequence[Array | None], _: Sequence[Array]
    ) -> tuple[Array, ...]:
        values, valid = arrays
        assert values is not None
        rows = (-1,) if groups is None else (frame.shape[0], -1)
        per_row = prod(values.shape[axis] for axis in frame.axes)
        count = None
        if valid is not None:
            count = valid.sum(frame.axes, keepdims=True, dtype=jnp.int32).astype(values.dtype)

        def mean(t: Array) -> Array:
            if valid is None or count is None:
                return _total(t, frame.axes) / per_row
            return _total(jnp.where(valid, t, 0), frame.axes) / jnp.maximum(count, 1)

        high = mean(values)
        centered = values - high
        low = mean(centered)
        var = mean(jnp.square(centered - low))
        low = jnp.where(jnp.isfinite(high), low, 0)  # the mean of an infinity is infinite
        results = (high.reshape(rows), var.reshape(rows), low.reshape(rows))
        return results if count is None else (*results, count.reshape(rows))

    valid = None if mask is None else jnp.expand_dims(mask, axis)
    high, var, low, *counts = _over_groups(stage, [wide, valid], [], axis, groups)
    if counts:
        return Moments(counts[0], high, var, low)
    if groups is None:
        return Moments(x.size // channels, high, var, low)
    per_sample = x.size // (x.shape[0] * channels)
    return Moments(jnp.array(groups, wide.dtype)[:, None] * per_sample, high, var, low)


def _affine(
    frame: _Frame,
    x: Array | None,
    residual: Array | None,
    center: Array,
    scale: Array,
    shift: Array,
) -> Array:
    assert x is not None
    centered = x.astype(center.dtype) - frame.spread(center)
    z = centered * frame.spread(scale) + frame.spread(shift)
    return z if residual is None else z + residual


def apply(
    x: Array,
    center: Array,
    scale: Array,
    shift: Array,
    *,
    axis: int,
    residual: Array | None = None,
    activation: str | None = None,
    groups: Groups = None,
    dtype: DTypeLike | None = None,
) -> Array:
    """`activation((x - center)·scale + shift + residual)`, in `dtype` (x's, if None)."""

    def stage(
        frame: _Frame, arrays: Sequence[Array | None], channels: Sequence[Array]
    ) -> tuple[Array, ...]:
        values, extra = arrays
        z = _affine(frame, values, extra, *channels)
        y = z if activation is None else ACTIVATIONS[activation].forward(z)
        return (y.astype(x.dtype if dtype is None else dtype),)

    return _over_groups(stage, [x, residual], [center, scale, shift], axis, groups)[0]


def _before_activation(
    activation: str | None,
    frame: _Frame,
    arrays: Sequence[Array | None],
    channels: Sequence[Array],
) -> Array:
    """The gradient before the activation, from (x, grad, y, residual)."""
    x, grad, y, residual = arrays
    assert grad is not None
    g = grad.astype(channels[0].dtype)
    if activation is None:
        return g
    kind = ACTIVATIONS[activation]
    if kind.from_output and y is not None:
        return kind.gradient(g, y.astype(g.dtype))
    z = _affine(frame, x, residual, *channels[:3])
    return kind.gradient(g, kind.forward(z) if kind.from_output else z)


def reduce_grad(
    grad: Array,
    x: Array,
    center: Array,
    scale: Array,
    shift: Array,
    *,
    axis: int,
    y: Array | None = None,
    residual: Array | None = None,
    activation: str | None = None,
    groups: Groups = None,
) -> tuple[Array, Array]:
    """`Σg` and `Σg·(x - center)` over all positions, with g the gradient before the activation."""

    def stage(
        frame: _Frame, arrays: Sequence[Array | None], channels: Sequence[Array]
    ) -> tuple[Array, ...]:
        g = _before_activation(activation, frame, arrays, channels)
        values = arrays[0]
        assert values is not None
        moved = values.astype(g.dtype) - frame.spread(channels[0])
        rows = channels[0].shape
        total, moment = _total(g, frame.axes), _total(g * moved, frame.axes)
        return total.reshape(rows), moment.reshape(rows)

    total, moved = _over_groups(stage, [x, grad, y, residual], [center, scale, shift], axis, groups)
    return total, moved


def apply_grad(
    grad: Array,
    x: Array,
    center: Array,
    scale: Array,
    shift: Array,
    slope: Array,
    constant: Array,
    *,
    axis: int,
    y: Array | None = None,
    residual: Array | None = None,
    activation: str | None = None,
    mask: Array | None = None,
    groups: Groups = None,
) -> tuple[Array, Array]:
    """`dx = scale·g + [valid]·(slope·(x - center) + constant)` in x's type, and g."""

    def stage(
        frame: _Frame, arrays: Sequence[Array | None], channels: Sequence[Array]
    ) -> tuple[Array, ...]:
        *branch, valid = arrays
        g = _before_activation(activation, frame, branch, channels)
        middle, gain, _, tilt, level = map(frame.spread, channels)
        values = branch[0]
        assert values is not None
        through = (values.astype(g.dtype) - middle) * tilt + level
        if valid is not None:
            through = jnp.where(valid, through, 0)
        return (gain * g + through).astype(x.dtype), g

    valid = None if mask is None else jnp.expand_dims(mask, axis)
    dx, g = _over_groups(
        stage,
        [x, grad, y, residual, valid],
        [center, scale, shift, slope, constant],
        axis,
        groups,
    )
    return dx, g
