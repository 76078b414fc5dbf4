"""Moments over the replicas of the backend's own way to train on several devices."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import keras
from keras import ops

from steadynorm.statistics import Moments, pool

Tensor = Any


class ReplicaContext(NamedTuple):
    """How many there are, which one this is, and a sum over them that carries gradient."""

    number: int
    index: Any
    total: Callable[[Tensor], Tensor]

    def pool(self, live: Moments, samples: Tensor) -> tuple[Moments, Tensor]:
        """Moments pooled over the replicas, by count, and how many samples they hold together.

        A sum of rows that are zero except at the replica's own index gathers all rows.
        """
        dtype, channels = live.mean.dtype, live.mean.shape[-1]
        sizes = [ops.reshape(ops.cast(n, dtype), (1,)) for n in (live.count, samples)]
        row = ops.concatenate([*sizes, live.mean, live.var, live.mean_low])
        mine = ops.cast(ops.equal(ops.arange(self.number), self.index), dtype)
        rows = self.total(mine[:, None] * row[None])
        ends = [2, 2 + channels, 2 + 2 * channels]
        size, mean, var, low = ops.split(rows, ends, axis=1)
        parts = Moments(size[:, :1], ops.stop_gradient(mean), var, low)
        return pool(parts, xp=ops), ops.sum(size[:, 1])


def replica_context() -> ReplicaContext | None:
    """The replicas of this call; None where there is one, or where the batch is global anyway.

    TensorFlow: the replicas of `tf.distribute`. torch: the default process group. JAX: none, since
    under `keras.distribution` an array is the batch of all devices.
    """
    backend = keras.config.backend()
    if backend == "jax":
        return None
    framework = import_module(backend)  # loaded by Keras already
    if backend == "tensorflow":
        context = framework.distribute.get_replica_context()
        if context is None or context.num_replicas_in_sync == 1:
            return None
        add = framework.distribute.ReduceOp.SUM
        index = context.replica_id_in_sync_group
        number = context.num_replicas_in_sync
        return ReplicaContext(number, index, lambda t: context.all_reduce(add, t))
    group = framework.distributed
    if not group.is_available() or not group.is_initialized() or group.get_world_size() == 1:
        return None
    sum_with_gradient = import_module(f"{backend}.distributed.nn.functional").all_reduce
    return ReplicaContext(group.get_world_size(), group.get_rank(), sum_with_gradient)
