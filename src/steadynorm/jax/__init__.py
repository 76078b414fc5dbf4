"""Batch normalization for JAX: a pure function, and a module for flax."""

from steadynorm.jax.batchnorm import BatchNorm
from steadynorm.jax.functional import batch_norm, initial_state
from steadynorm.statistics import RunningStatistics

__all__ = ["BatchNorm", "RunningStatistics", "batch_norm", "initial_state"]
