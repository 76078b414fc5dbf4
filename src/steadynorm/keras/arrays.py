"""`keras.ops` as the array namespace of the reference, of the activations and of the policies."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from math import prod
from typing import Any

import keras
from keras import ops

from steadynorm.kernels.reference import Reference

Tensor = Any  # of whichever backend


class KerasArrays:
    """The functions that `ArrayNamespace` asks for; what is not here is `keras.ops`'s own."""

    int32 = "int32"
    cast = widened = staticmethod(ops.cast)

    def __getattr__(self, name: str) -> Any:
        return getattr(ops, name)

    @staticmethod
    def const(number: float, like: Tensor) -> float:
        """Beside a plain number, every backend's operators keep the tensor's type."""
        return number

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
    def sum(x: Tensor, axes: tuple[int, ...]) -> Tensor:
        """The sum, one axis after the other, the last first.

        XLA on the CPU adds hundreds of values of a channel sequentially; for data near 1e6, whose
        roundings repeat, that cost the variance of 448 values 2e-6.
        """
        for axis in sorted(axes, reverse=True):  # the first one first takes XLA 20 times as long
            x = ops.sum(x, axis, keepdims=True)
            if keras.config.backend() == "jax":  # whose compiler would join the axes again
                x = import_module("jax").lax.optimization_barrier(x)
        return x

    @staticmethod
    def mean(x: Tensor, axes: tuple[int, ...]) -> Tensor:
        size = KerasArrays.size(x, axes)
        size = max(size, 1) if isinstance(size, int) else ops.maximum(size, 1)
        return KerasArrays.sum(x, axes) / size

    @staticmethod
    def mean_and_variance(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        mean = KerasArrays.mean(x, axes)
        return mean, KerasArrays.mean(ops.square(x - mean), axes)

    @staticmethod
    def add(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        return a + b

    @staticmethod
    def addcmul(a: Tensor, b: Tensor, c: Tensor, *, out: Tensor) -> Tensor:
        return a + b * c


xp: Any = KerasArrays()
reference = Reference(xp)
