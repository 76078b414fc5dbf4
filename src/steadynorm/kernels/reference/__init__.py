"""The four stages in plain operations over an array namespace: the truth for every framework.

The compiled kernels are held to it, and it serves where they do not: any device, any float type,
any memory format, JAX and Keras. `moments` and `apply` are written so that a framework's own
derivatives of them are those of the closed form.

x has its channels on `axis`, counted from the front. Per-channel arrays are (C,), or (G, C) with
groups, in `statistics_dtype(x)`. `groups` is None or the lengths of the groups along axis 0, which
then is not the channel axis. `mask` is None or boolean, of x's shape without the channel axis, or
of x's whole shape where every channel has its own valid positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple, Protocol

from steadynorm.kernels.activations import ACTIVATIONS, functions
from steadynorm.statistics.moments import Array, Moments, at_least_one

Groups = tuple[int, ...] | None


class ArrayNamespace(Protocol):
    """What the stages ask of an array library, beside operators, indexing and `.dtype`.

    What has no documentation here is NumPy's. The namespace is one of elementwise mathematics for
    `activations`, too.
    """

    int32: Any
    where: Any
    square: Any
    reshape: Any
    expand_dims: Any
    concatenate: Any
    promote_types: Any

    def statistics_dtype(self, x: Array) -> Any:
        """The type that statistics of x are computed and kept in: float32 or wider."""

    def cast(self, x: Array, dtype: Any) -> Array:
        """`x` in another type."""

    def isfinite(self, x: Array) -> Array:
        """Where x is neither infinite nor NaN."""

    def widened(self, x: Array, dtype: Any) -> Array:
        """`x` in the type statistics have; half precision may stay where operators widen it."""

    def constant(self, numbers: Sequence[int], like: Array) -> Array:
        """An array of numbers, of the type and on the device of `like`."""

    def shape(self, x: Array) -> tuple[Any, ...]:
        """The shape; a length that is not known when tracing is a scalar array."""

    def size(self, x: Array, axes: tuple[int, ...]) -> Any:
        """How many values the axes span: a number, or a scalar array of x's type."""

    def sum(self, x: Array, axes: tuple[int, ...]) -> Array:
        """The sum over `axes`, which stay with length 1; of half precision in float32."""

    def mean(self, x: Array, axes: tuple[int, ...]) -> Array:
        """The mean over `axes`, which stay with length 1; 0 where there is no value."""

    def mean_and_variance(self, x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
        """The mean, and the biased variance about it, as `mean` gives them."""

    def stop_gradient(self, x: Array) -> Array:
        """`x` as a constant."""

    def add(self, a: Array, b: Array, *, out: Array) -> Array:
        """`a + b`; `out` is an intermediate whose memory the result may take."""

    def addcmul(self, a: Array, b: Array, c: Array, *, out: Array) -> Array:
        """`a + b·c`; `out` is an intermediate whose memory the result may take."""


class _Run(NamedTuple):
    """A run of groups of equal length, or the whole batch."""

    groups: tuple[int, int] | None  # how many, and how many samples in each
    samples: slice
    rows: slice
    axes: tuple[int, ...]  # to reduce, in the view of x as (groups, samples, ...)
    beside: tuple[int, ...]  # the shape of a per-channel array that broadcasts against that view
    per_channel: tuple[int, ...]  # its shape outside


def _runs(rank: int, channels: int, axis: int, groups: Groups) -> list[_Run]:
    others = tuple(i for i in range(rank) if i != axis)
    beside = tuple(channels if i == axis else 1 for i in range(rank))
    if groups is None:
        return [_Run(None, slice(None), slice(None), others, beside, (channels,))]
    runs, sample, row = [], 0, 0
    for size, run in groupby(groups):
        count = len(list(run))
        samples, rows = slice(sample, sample + count * size), slice(row, row + count)
        axes = tuple(i + 1 for i in others)
        runs.append(_Run((count, size), samples, rows, axes, (count, *beside), (count, channels)))
        sample, row = samples.stop, rows.stop
    return runs


class Reference:
    """The stages over one array namespace."""

    def __init__(self, xp: ArrayNamespace) -> None:
        self.xp: Any = xp

    def statistics_dtype(self, x: Array) -> Any:
        """The type that statistics of x are computed and kept in: float32 or wider."""
        return self.xp.statistics_dtype(x)

    def moments(
        self, x: Array, *, axis: int = 1, mask: Array | None = None, groups: Groups = None
    ) -> Moments:
        """Count, mean and biased variance per channel, over valid positions where a mask is given.

        Two steps: a mean `high`, then mean `low` and variance of `x - high`; the mean is the sum
        of both.
        """
        xp = self.xp
        widen = xp.widened if mask is None else xp.cast
        wide = widen(x, xp.statistics_dtype(x))
        valid = self.beside(mask, x, axis)
        parts = [
            self._moments_of_run(run, *arrays)
            for run, arrays, _ in self._split([wide, valid], [], axis, groups)
        ]
        counts, high, var, low = zip(*parts, strict=True)
        count = self._join(counts) if mask is not None else self._count(wide, high[0], axis, groups)
        return Moments(count, self._join(high), self._join(var), self._join(low))

    def _moments_of_run(
        self, run: _Run, values: Array, valid: Array | None
    ) -> tuple[Array | None, Array, Array, Array]:
        """Valid positions (None without a mask), rounded mean, variance, what the rounding lost."""
        xp = self.xp
        count = None
        if valid is not None:
            count = xp.cast(xp.sum(xp.cast(valid, xp.int32), run.axes), values.dtype)
            values = xp.where(valid, values, 0)  # first, so that no derivative meets a NaN there

        def mean(t: Array) -> Array:
            if count is None:
                return xp.mean(t, run.axes)
            return xp.sum(t, run.axes) / at_least_one(count)

        high = xp.stop_gradient(mean(values))  # a pivot: the mean's gradient flows through `low`
        centered = values - high
        if valid is None:
            low, var = xp.mean_and_variance(centered, run.axes)
        else:
            low = mean(xp.where(valid, centered, 0))
            var = mean(xp.where(valid, xp.square(centered - low), 0))
        low = xp.where(xp.isfinite(high), low, 0)  # else NaN, where the mean is infinite
        if count is not None:
            count = xp.reshape(count, (*run.per_channel[:-1], -1))  # 1 or C values
        return count, *(xp.reshape(t, run.per_channel) for t in (high, var, low))

    def _count(self, x: Array, like: Array, axis: int, groups: Groups) -> Any:
        if groups is None:
            return self.xp.size(x, tuple(i for i in range(len(x.shape)) if i != axis))
        per_sample = self.xp.size(x, tuple(i for i in range(1, len(x.shape)) if i != axis))
        return self.xp.constant(groups, like)[:, None] * per_sample

    def apply(
        self,
        x: Array,
        center: Array,
        scale: Array,
        shift: Array,
        *,
        axis: int = 1,
        residual: Array | None = None,
        activation: str | None = None,
        groups: Groups = None,
        dtype: Any = None,
    ) -> Array:
        """`activation((x - center)·scale + shift + residual)`.

        The result has type `dtype`; None is x's, promoted by residual's.
        """
        xp = self.xp
        if dtype is None:
            dtype = x.dtype if residual is None else xp.promote_types(x.dtype, residual.dtype)
        parts = []
        for run, arrays, per_channel in self._split(
            [x, residual], [center, scale, shift], axis, groups
        ):
            z = self._affine(*arrays, *per_channel)
            parts.append(
                self._merge(run, z if activation is None else functions(activation, xp)[0](z))
            )
        return xp.cast(self._join(parts), dtype)

    def reduce_grad(
        self,
        grad: Array,
        x: Array,
        center: Array,
        scale: Array,
        shift: Array,
        *,
        axis: int = 1,
        y: Array | None = None,
        residual: Array | None = None,
        activation: str | None = None,
        groups: Groups = None,
    ) -> tuple[Array, Array]:
        """`Σg` and `Σg·(x - center)` over all positions, with g the gradient before the activation.

        The activation's derivative is taken from `y` where it is given and suffices, else from z
        computed again.
        """
        sums, products = [], []
        for run, (d, t, *others), per_channel in self._split(
            [grad, x, y, residual], [center, scale, shift], axis, groups
        ):
            g = self._before_activation(activation, d, t, *others, *per_channel)
            centered = self.xp.widened(t, center.dtype) - per_channel[0]
            sums.append(self.xp.reshape(self.xp.sum(g, run.axes), run.per_channel))
            products.append(self.xp.reshape(self.xp.sum(g * centered, run.axes), run.per_channel))
        return self._join(sums), self._join(products)

    def apply_grad(
        self,
        grad: Array,
        x: Array,
        center: Array,
        scale: Array,
        shift: Array,
        slope: Array,
        constant: Array,
        *,
        axis: int = 1,
        y: Array | None = None,
        residual: Array | None = None,
        activation: str | None = None,
        mask: Array | None = None,
        groups: Groups = None,
        want_residual: bool = False,
    ) -> tuple[Array, Array | None]:
        """`dx = scale·g + [valid]·(slope·(x - center) + constant)`, and g itself if wanted."""
        xp = self.xp
        valid = self.beside(mask, x, axis)
        dx, dresidual = [], []
        for run, (d, t, out, extra, ok), (middle, gain, step, tilt, level) in self._split(
            [grad, x, y, residual, valid], [center, scale, shift, slope, constant], axis, groups
        ):
            g = self._before_activation(activation, d, t, out, extra, middle, gain, step)
            centered = xp.widened(t, center.dtype) - middle
            through = xp.addcmul(level, centered, tilt, out=centered)
            if ok is not None:
                through = xp.where(ok, through, 0)
            dx.append(self._merge(run, xp.addcmul(through, g, gain, out=through)))
            if want_residual:
                dresidual.append(self._merge(run, g))
        wanted = xp.cast(self._join(dresidual), grad.dtype) if want_residual else None
        return xp.cast(self._join(dx), x.dtype), wanted

    def _affine(
        self, x: Array, residual: Array | None, center: Array, scale: Array, shift: Array
    ) -> Array:
        centered = self.xp.widened(x, center.dtype) - center
        z = self.xp.addcmul(shift, centered, scale, out=centered)
        return z if residual is None else self.xp.add(z, residual, out=z)

    def _before_activation(
        self,
        activation: str | None,
        grad: Array,
        x: Array,
        y: Array | None,
        residual: Array | None,
        center: Array,
        scale: Array,
        shift: Array,
    ) -> Array:
        """The gradient at z, from that at the output."""
        g = self.xp.widened(grad, center.dtype)
        if activation is None:
            return g
        forward, gradient = functions(activation, self.xp)
        from_input = ACTIVATIONS[activation].source == "input"
        if y is not None and not from_input:
            return self.gradient_from_output(grad, y, activation, center.dtype)
        z = self._affine(x, residual, center, scale, shift)
        return gradient(g, z if from_input else forward(z))

    def gradient_from_output(self, grad: Array, y: Array, activation: str, dtype: Any) -> Array:
        """The gradient at z, for activations whose derivative the output tells."""
        gate = ACTIVATIONS[activation].gate
        if gate is not None and hasattr(self.xp, "gated"):
            return self.xp.widened(self.xp.gated(grad, y, *gate), dtype)
        g, y = self.xp.widened(grad, dtype), self.xp.cast(y, dtype)
        return functions(activation, self.xp)[1](g, y)

    def _split(
        self,
        x_sized: Sequence[Array | None],
        per_channel: Sequence[Array],
        axis: int,
        groups: Groups,
    ) -> list[tuple[_Run, list[Array | None], list[Array]]]:
        """For every run of groups the arrays of x's size, and those per channel beside them."""
        shape = x_sized[0].shape  # type: ignore[union-attr]
        return [
            (
                run,
                [None if t is None else self._view(run, t) for t in x_sized],
                [self._spread(run, t) for t in per_channel],
            )
            for run in _runs(len(shape), shape[axis], axis, groups)
        ]

    def beside(self, mask: Array | None, x: Array, axis: int) -> Array | None:
        """`mask` in a shape that broadcasts against x."""
        whole = mask is None or len(mask.shape) == len(x.shape)
        return mask if whole else self.xp.expand_dims(mask, axis)

    def _view(self, run: _Run, x: Array) -> Array:
        if run.groups is None:
            return x
        return self.xp.reshape(x[run.samples], (*run.groups, *self.xp.shape(x)[1:]))

    def _spread(self, run: _Run, channels: Array) -> Array:
        rows = channels if run.groups is None else channels[run.rows]
        return self.xp.reshape(rows, run.beside)

    def _merge(self, run: _Run, x: Array) -> Array:
        """The inverse of `_view`."""
        if run.groups is None:
            return x
        return self.xp.reshape(x, (run.groups[0] * run.groups[1], *self.xp.shape(x)[2:]))

    def _join(self, parts: Sequence[Array]) -> Array:
        return parts[0] if len(parts) == 1 else self.xp.concatenate(parts)
