"""Batch normalization for JAX: a pure function, and a module for flax."""

from steadynorm._extras import needed_by
from steadynorm.statistics import RunningStatistics

with needed_by("steadynorm.jax"):
    from steadynorm.jax.batchnorm import BatchNorm
    from steadynorm.jax.functional import batch_norm, initial_state

__all__ = ["BatchNorm", "RunningStatistics", "batch_norm", "initial_state"]
