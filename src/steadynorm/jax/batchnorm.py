"""Batch normalization as a module that drops in for `flax.nnx.BatchNorm`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import reprlib
from flax.nnx.module import first_from
from flax.nnx.nn import dtypes, initializers
from jax import Array
from jax.typing import DTypeLike

from steadynorm.jax.functional import batch_norm
from steadynorm.kernels.activations import ActivationName
from steadynorm.kernels.checks import activation_name, momentum_range, nonfinite_name
from steadynorm.statistics import Policy, PolicyName, RunningStatistics, policy_from


class BatchNorm(nnx.BatchNorm):
    """Batch normalization, in place of `flax.nnx.BatchNorm`.

        x̂ = (x - m)/√(u + epsilon)        y = activation(scale·x̂ + bias + residual)

    per channel. In training (`use_running_average=False`, or after `train()`) the policy
    `statistics` chooses m and u; in inference they are the running statistics. Same constructor
    arguments, attributes, variables and defaults as flax's module, and a subclass of it. Every
    training call updates `mean` and `var` once:
    `running = momentum·running + (1 - momentum)·batch`, with the biased variance.

    Args:
        num_features: C.
        use_running_average: whether to use the running statistics; `train()` and `eval()` set it.
        axis: the channel axis.
        momentum: weight of the old average.
        epsilon: added to the variance.
        dtype: type of the result; None promotes the types of input and parameters.
        param_dtype: type of scale and bias; the running statistics are float32.
        use_bias: learn a bias.
        use_scale: learn a scale (the weight).
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        axis_name: named axis of `shard_map`, `pmap` or `vmap` to pool moments over, by count.
        axis_index_groups: subsets of that axis that pool on their own.
        use_fast_variance: taken for flax's sake and not used: the fast variance, E[x²] - E[x]²,
            is wrong where the mean is large.
        promote_dtype: chooses the type of the result.
        rngs: random keys for the initializers.
        bias_metadata: metadata of the bias.
        scale_metadata: metadata of the scale.
        statistics: `sn.Batch()`, `sn.Steady()`, `sn.Running()`, `sn.Renorm()`, `sn.Ghost()`,
            `sn.Frozen()`, or a lower-case name. A policy that asks how many batches were seen adds
            one variable, `num_batches_tracked`; the default adds none. `Steady` is one-way here, as
            with `window=None`: nothing but gradients leaves a backward pass in JAX.
        activation: one that runs inside the layer, by name, or None.
        nonfinite: "skip" keeps batches with NaN or infinity out of the running statistics.

    Raises:
        ValueError, TypeError: as `steadynorm.jax.batch_norm`.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> layer = BatchNorm(3, statistics="steady", activation="relu", rngs=nnx.Rngs(0))
    >>> y = layer(jnp.array([[1.0, 2.0, 3.0]]))  # a batch of one
    >>> y.shape, int(layer.num_batches_tracked[...])
    ((1, 3), 1)

    Differs from flax: the variance is always the centred one; a mask has length 1 on the channel
    axis, or no such axis; a batch without a valid value updates nothing; replicas are weighted by
    their counts. Computation and state are float32 or wider whatever `dtype` says. Differs from
    torch: `momentum` weighs the old average, and the running variance is biased.

    Source: Ioffe & Szegedy 2015; the policies name theirs.
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Any = initializers.zeros_init(),  # noqa: B008  flax's own defaults
        scale_init: Any = initializers.ones_init(),  # noqa: B008
        axis_name: Any = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        statistics: Policy | PolicyName = "batch",
        activation: ActivationName | None = None,
        nonfinite: str = "propagate",
    ) -> None:
        activation_name(activation, "BatchNorm")
        nonfinite_name(nonfinite, "BatchNorm")
        momentum_range(momentum, "BatchNorm")
        super().__init__(
            num_features,
            use_running_average=use_running_average,
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        self.statistics = policy_from(statistics)
        self.activation = activation
        self.nonfinite = nonfinite
        if self.statistics.counts_batches:
            self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __nnx_repr__(self) -> Iterator[Any]:
        yield from super().__nnx_repr__()  # type: ignore[no-untyped-call]
        if self.statistics.one_way() != self.statistics:
            yield reprlib.Attr("one-way", "JAX keeps no memory of the gradient")

    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        residual: Array | None = None,
    ) -> Array:
        """Normalize `x`; see the class."""
        inference = first_from(
            use_running_average,
            self.use_running_average,
            error_msg="BatchNorm: `use_running_average` must be given to the constructor or the "
            "call, or set by train() or eval(); got None in both.",
        )
        scale, bias = (None if p is None else p[...] for p in (self.scale, self.bias))
        mean, var = self.mean[...], self.var[...]
        promoted = jax.eval_shape(
            partial(self.promote_dtype, dtype=self.dtype), (x, mean, var, scale, bias)
        )
        counted = self.statistics.counts_batches
        y, after = batch_norm(
            x,
            RunningStatistics(mean, var, self.num_batches_tracked[...] if counted else None),
            scale,
            bias,
            use_running_average=inference,
            axis=self.axis,
            momentum=self.momentum,
            epsilon=self.epsilon,
            statistics=self.statistics,
            activation=self.activation,
            residual=residual,
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            nonfinite=self.nonfinite,
            dtype=promoted[0].dtype,
            owner="BatchNorm",
        )
        if not inference and after is not None:
            self.mean[...], self.var[...] = after.mean, after.var
            if counted:
                self.num_batches_tracked[...] = after.batches
        return y
