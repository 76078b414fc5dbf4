"""The memory of the gradient of a Keras layer on the torch backend, moved by backward passes."""

from __future__ import annotations

from typing import Any, NamedTuple

from keras import ops

from steadynorm.keras.arrays import reference, xp
from steadynorm.keras.replica_context import ReplicaContext
from steadynorm.kernels.reference import padding
from steadynorm.statistics import (
    Coefficients,
    GradientCoefficients,
    GradientMemory,
    Moments,
    Normalizer,
    remember,
    with_memory,
)

Tensor = Any


class Seen(NamedTuple):
    """What a forward has seen: pooled moments, what normalizes, the rate, and the replicas."""

    batch: Moments
    normalizer: Normalizer
    rate: Any
    replicas: ReplicaContext | None


class GradientMemoryOfLayer:
    """A layer's memory, `value` (2, C): no weight, not saved, and zeros after loading.

    The zeros are made when first read: Keras may build a layer on torch's meta device, where
    tensors have no values.
    """

    def __init__(self, channels: int, dtype: str) -> None:
        self._zeros = (2, channels), dtype
        self._value: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The two numbers of every channel."""
        if self._value is None:
            self._value = ops.zeros(*self._zeros)
        return self._value

    @value.setter
    def value(self, value: Tensor) -> None:
        self._value = value

    def joined(
        self, z: Tensor, x: Tensor, affine: Coefficients, seen: Seen, axis: int, mask: Tensor | None
    ) -> Tensor:
        """`z`, whose gradient moves the memory once and takes the remembered part off x's.

        The first backward pass through it moves the memory; later ones start from where it did.
        """
        known = Coefficients(*(ops.stop_gradient(t) for t in affine))
        before: list[Tensor] = []

        @ops.custom_gradient  # type: ignore[untyped-decorator]
        def identity(z: Tensor, x: Tensor) -> Any:
            def gradient(z: Tensor, x: Tensor, *, upstream: Tensor) -> tuple[Tensor, Tensor]:
                first = not before
                if first:
                    before.append(ops.cast(self.value, known.rho.dtype))
                grad, seen_x = ops.stop_gradient(upstream), x
                if mask is not None:
                    counts = padding.counting(reference, mask, x, z, axis=axis)
                    grad, seen_x = padding.zeroed(reference, counts, grad, x)
                sums = reference.reduce_grad(grad, seen_x, *known[:3], axis=axis)
                if seen.replicas is not None:
                    sums = ops.unstack(seen.replicas.total(ops.stack(sums)))
                memory = GradientMemory(*ops.unstack(before[0]))
                memory = remember(
                    memory, seen.rate, seen.normalizer, seen.batch, known.rho, *sums, xp=xp
                )
                if first:
                    self.value = ops.cast(ops.stack(memory), self.value.dtype)
                nothing = GradientCoefficients(0.0, 0.0)
                slope, constant = with_memory(
                    nothing, memory, seen.normalizer, known.scale, known.rho
                )
                part = reference.apply(x, known.center, slope, constant, axis=axis)
                if mask is not None:
                    valid = ops.expand_dims(mask, axis) if len(mask.shape) < len(x.shape) else mask
                    part = ops.where(valid, part, 0)
                return upstream, part

            return z, gradient

        return identity(z, x)
