"""JAX as the array namespace of the reference and of the activations."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from steadynorm.kernels.reference import Reference

_barrier: Any = jax.lax.optimization_barrier  # not annotated by JAX


class JaxArrays:
    """The functions that `ArrayNamespace` asks for, over JAX arrays."""

    int32 = jnp.int32
    where = staticmethod(jnp.where)
    square = staticmethod(jnp.square)
    isfinite = staticmethod(jnp.isfinite)
    reshape = staticmethod(jnp.reshape)
    expand_dims = staticmethod(jnp.expand_dims)
    concatenate = staticmethod(jnp.concatenate)
    promote_types = staticmethod(jnp.promote_types)
    stop_gradient = staticmethod(jax.lax.stop_gradient)
    shape = staticmethod(jnp.shape)
    sigmoid = staticmethod(jax.nn.sigmoid)
    tanh = staticmethod(jnp.tanh)
    erf = staticmethod(jax.scipy.special.erf)
    exp = staticmethod(jnp.exp)
    expm1 = staticmethod(jnp.expm1)

    @staticmethod
    def const(number: float, like: Array) -> float:
        """Beside a plain number, JAX's operators keep the array's type."""
        return number

    @staticmethod
    def statistics_dtype(x: Array) -> DTypeLike:
        return jnp.promote_types(x.dtype, jnp.float32)

    @staticmethod
    def cast(x: Array, dtype: DTypeLike) -> Array:
        return x.astype(dtype)

    widened = cast

    @staticmethod
    def constant(numbers: Sequence[int], like: Array) -> Array:
        return jnp.array(numbers, like.dtype)

    @staticmethod
    def size(x: Array, axes: tuple[int, ...]) -> int:
        return prod(x.shape[axis] for axis in axes)

    @staticmethod
    def sum(x: Array, axes: tuple[int, ...]) -> Array:
        """The sum, one axis after the other, the last first.

        XLA on the CPU adds hundreds of values of a channel sequentially; for data near 1e6, whose
        roundings repeat, that cost the variance of 448 values 2e-6. The barrier keeps XLA from
        joining the axes again.
        """
        for axis in sorted(axes, reverse=True):  # the first one first takes XLA 20 times as long
            x = _barrier(x.sum(axis, keepdims=True))
        return x

    @staticmethod
    def mean(x: Array, axes: tuple[int, ...]) -> Array:
        mean: Array = JaxArrays.sum(x, axes) / max(JaxArrays.size(x, axes), 1)
        return mean

    @staticmethod
    def mean_and_variance(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
        mean = JaxArrays.mean(x, axes)
        return mean, JaxArrays.mean(jnp.square(x - mean), axes)

    @staticmethod
    def add(a: Array, b: Array, *, out: Array) -> Array:
        return a + b

    @staticmethod
    def addcmul(a: Array, b: Array, c: Array, *, out: Array) -> Array:
        return a + b * c


reference = Reference(JaxArrays())
