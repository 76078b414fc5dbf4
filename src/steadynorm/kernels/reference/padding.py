"""NaN and infinity where a mask leaves a position out: the output there, and nothing else.

What padding holds enters no moments. Nor may it enter a gradient: Σg·(x - center) runs over all
positions, for all are normalized, and 0·NaN is NaN. So where the mask is false and x, or what the
activation's derivative is taken from, is not finite, no gradient flows.
"""

from __future__ import annotations

from typing import Any

from steadynorm.statistics.moments import Array


def counting(stages: Any, mask: Array, x: Array, *others: Array | None, axis: int = 1) -> Array:
    """Where a gradient counts: where the mask is true, or x and the others are finite."""
    counts = stages.xp.isfinite(x)
    for t in others:
        counts = counts if t is None else counts & stages.xp.isfinite(t)
    return counts | stages.beside(mask, x, axis)


def zeroed(stages: Any, counts: Array, *tensors: Array | None) -> Any:
    """The tensors, 0 where no gradient counts."""
    return tuple(None if t is None else stages.xp.where(counts, t, 0) for t in tensors)


def apply(
    stages: Any, x: Array, maps: tuple[Array, ...], *, mask: Array | None, axis: int = 1,
    residual: Array | None = None, **options: Any,
) -> Array:  # fmt: skip
    """`stages.apply`, for a framework that differentiates it."""
    if mask is None:
        return stages.apply(x, *maps, axis=axis, residual=residual, **options)
    xp, counts = stages.xp, counting(stages, mask, x, residual, axis=axis)
    still = [None if t is None else xp.stop_gradient(t) for t in (x, residual, *maps)]
    y = stages.apply(still[0], *still[2:], axis=axis, residual=still[1], **options)
    x, residual = zeroed(stages, counts, x, residual)
    moved = stages.apply(x, *maps, axis=axis, residual=residual, **options)
    return xp.where(counts, moved, y)
