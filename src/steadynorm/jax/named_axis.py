"""Moments and gradient sums over a named axis of shard_map, pmap or vmap: one psum each way."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from steadynorm.statistics import Moments, pool

T = TypeVar("T")
_psum: Any = jax.lax.psum  # not annotated by JAX


class NamedAxis(NamedTuple):
    """A named axis, or several, and optionally groups of its indices that reduce on their own."""

    axis_name: Hashable
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None

    def pool(self, local: Moments, samples: int) -> tuple[Moments, Array]:
        """Moments pooled over the replicas, by count, and how many samples they hold together."""
        count = jnp.asarray(local.count, local.mean.dtype).reshape(1)
        rows = self.gather(local._replace(count=count))
        return pool(rows, xp=jnp), self.sum(jnp.asarray(samples, local.mean.dtype))

    def gather(self, local: Moments) -> Moments:
        """The moments of all replicas, one below the other; (C,) counts as one row.

        A psum of rows that are zero except at the replica's own index. Unlike an all_gather, its
        result is known to JAX to be the same on every replica.
        """
        channels = local.mean.shape[-1]
        parts = [jnp.atleast_2d(part) for part in (local.count, *local[1:])]
        block = jnp.concatenate(parts, axis=1)
        blocks = jnp.zeros((self._number(), *block.shape), block.dtype)
        rows = self.sum(blocks.at[self._index()].set(block)).reshape(-1, block.shape[1])
        ends = [1, 1 + channels, 1 + 2 * channels]
        return Moments(*jnp.split(rows, ends, axis=1))

    def sum(self, value: T) -> T:
        """The sum over the replicas."""
        groups = self.axis_index_groups
        summed: T = _psum(
            value, self.axis_name, axis_index_groups=None if groups is None else list(groups)
        )
        return summed

    def _number(self) -> int:
        """How many replicas the largest group has; in smaller ones, rows stay zero and count 0."""
        if self.axis_index_groups is not None:
            return max(map(len, self.axis_index_groups))
        size: int = _psum(1, self.axis_name)  # a constant: nothing is sent
        return size

    def _index(self) -> Array:
        index = jax.lax.axis_index(self.axis_name)
        if self.axis_index_groups is None:
            return index
        within = np.concatenate([np.arange(len(group)) for group in self.axis_index_groups])
        return jnp.asarray(within[np.argsort(np.concatenate(self.axis_index_groups))])[index]


def varying_like(x: Array, other: T) -> T:
    """`other`, marked as different per replica wherever x is (under `shard_map`).

    The gradient of a weight that all replicas share is then summed over them by JAX itself.
    """
    axes = _varying_axes(x)

    def mark(array: Array) -> Array:
        missing = tuple(axes - _varying_axes(array))
        if not missing:
            return array
        lax: Any = jax.lax
        old = not hasattr(lax, "pcast")  # JAX before 0.8
        marked: Array = (
            lax.pvary(array, missing) if old else lax.pcast(array, missing, to="varying")
        )
        return marked

    marked: T = jax.tree.map(mark, other)
    return marked


def _varying_axes(x: Array) -> frozenset[Any]:
    """The mesh axes along which x differs, as far as this version of JAX records it."""
    kind: Any = jax.typeof(x) if hasattr(jax, "typeof") else None
    account = getattr(kind, "manual_axis_type", None)  # since JAX 0.10
    axes: Any = getattr(kind, "vma", frozenset()) if account is None else account.varying
    return frozenset(axes)
