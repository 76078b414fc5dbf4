"""JAX as the array namespace of the reference and of the activations."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from steadynorm.kernels.activations import normal_cdf_by
from steadynorm.kernels.reference import Reference
from steadynorm.kernels.reference.immutable_arrays import ImmutableArrays

_barrier: Any = jax.lax.optimization_barrier  # not annotated by JAX


class JaxArrays(ImmutableArrays):
    """The functions that `ArrayNamespace` asks for, over JAX arrays."""

    int32 = jnp.int32
    where = staticmethod(jnp.where)
    square = staticmethod(jnp.square)
    isfinite = staticmethod(jnp.isfinite)
    maximum = staticmethod(jnp.maximum)
    reshape = staticmethod(jnp.reshape)
    expand_dims = staticmethod(jnp.expand_dims)
    concatenate = staticmethod(jnp.concatenate)
    promote_types = staticmethod(jnp.promote_types)
    stop_gradient = staticmethod(jax.lax.stop_gradient)
    shape = staticmethod(jnp.shape)
    sigmoid = staticmethod(jax.nn.sigmoid)
    tanh = staticmethod(jnp.tanh)
    normal_cdf = staticmethod(normal_cdf_by(jax.scipy.special.erf))
    exp = staticmethod(jnp.exp)
    expm1 = staticmethod(jnp.expm1)

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
    def size(x: Array, axes: tuple[int, ...]) -> Any:
        size = prod(x.shape[axis] for axis in axes)  # a symbol, under `jax.export`, is no int
        return size if isinstance(size, int) else jnp.asarray(size, JaxArrays.statistics_dtype(x))

    @staticmethod
    def sum_over(x: Array, axis: int) -> Array:
        """Over one axis; the barrier keeps XLA from joining it with the next one again."""
        summed: Array = _barrier(x.sum(axis, keepdims=True))
        return summed


reference = Reference(JaxArrays())
