"""`keras.ops` as the array namespace of the reference, of the activations and of the policies."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from math import prod
from typing import Any

import keras
from keras import ops

from steadynorm.kernels.reference import Reference
from steadynorm.kernels.reference.immutable_arrays import ImmutableArrays

Tensor = Any  # of whichever backend


class KerasArrays(ImmutableArrays):
    """The functions that `ArrayNamespace` asks for; what is not here is `keras.ops`'s own."""

    int32 = "int32"
    cast = widened = staticmethod(ops.cast)

    def __getattr__(self, name: str) -> Any:
        return getattr(ops, name)

    @staticmethod
    def promote_types(*dtypes: Any) -> str:
        """Keras's rule, but for float64, which it makes float32 on torch and JAX."""
        if any(keras.backend.standardize_dtype(dtype) == "float64" for dtype in dtypes):
            return "float64"
        promoted: str = keras.backend.result_type(*dtypes)
        return promoted

    @staticmethod
    def statistics_dtype(x: Tensor) -> str:
        return KerasArrays.promote_types(x.dtype, "float32")

    @staticmethod
    def constant(numbers: Sequence[int], like: Tensor) -> Tensor:
        return ops.convert_to_tensor(numbers, dtype=like.dtype)

    @staticmethod
    def size(x: Tensor, axes: tuple[int, ...]) -> Any:
        lengths = [ops.shape(x)[axis] for axis in axes]
        if all(isinstance(length, int) for length in lengths):
            return prod(lengths)
        return ops.cast(ops.prod(ops.stack([ops.cast(n, "int32") for n in lengths])), x.dtype)

    @staticmethod
    def sum_over(x: Tensor, axis: int) -> Tensor:
        x = ops.sum(x, axis, keepdims=True)
        if keras.config.backend() == "jax":  # whose compiler would join the axes again
            x = import_module("jax").lax.optimization_barrier(x)
        return x


xp: Any = KerasArrays()
reference = Reference(xp)
