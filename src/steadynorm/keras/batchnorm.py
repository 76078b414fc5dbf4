"""Batch normalization that drops in for `keras.layers.BatchNormalization`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from steadynorm.keras import stages
from steadynorm.keras.replicas import replicas
from steadynorm.statistics import (
    Context,
    Frozen,
    Ghost,
    Moments,
    Normalizer,
    Policy,
    RunningStatistics,
    attach,
    coefficients,
    of_running,
    policy_from,
    step,
)

Tensor = Any
MANY = np.int32(1 << 30)  # batches seen, where a checkpoint does not say how many


@keras.saving.register_keras_serializable(package="steadynorm")
class BatchNormalization(keras.layers.BatchNormalization):  # type: ignore[misc]
    """Batch normalization, in place of `keras.layers.BatchNormalization`, on every backend.

        x̂ = (x - m)/√(u + epsilon)        y = activation(gamma·x̂ + beta + residual)

    per channel. In training the policy `statistics` chooses m and u; in inference, which in Keras
    includes `trainable=False`, they are the moving statistics. Same arguments, weights and defaults
    as Keras's layer, and a subclass of it. Every training call moves `moving_mean` and
    `moving_variance` once: `moving = momentum·moving + (1 - momentum)·batch`, with the biased
    variance, unless the policy has its own rule.

    Args:
        axis: the channel axis.
        momentum: weight of the old average.
        epsilon: added to the variance.
        center: learn beta.
        scale: learn gamma.
        renorm: not taken: write `statistics=sn.Renorm()`, which keeps `moving_variance` only.
        synchronized: pool moments over replicas, by count: those of `tf.distribute`, or of torch's
            default process group. With JAX the batch is that of all devices in any case.
        statistics: `sn.Batch()`, `sn.Steady()`, `sn.Running()`, `sn.Renorm()`, `sn.Ghost()`,
            `sn.Frozen()`, or a lower-case name. A policy that asks how many batches were seen adds
            one weight, `num_batches_tracked`; the default adds none.
        activation: one that runs inside the layer: whatever `keras.activations.get` takes, with
            Keras's meaning ("leaky_relu" has slope 0.2 there), or None.
        nonfinite: "skip" keeps batches with NaN or infinity out of the moving statistics.

    The other arguments are those of Keras's layer and of every layer.

    Call arguments:
        inputs: of any rank.
        training: whether the policy decides and the moving statistics move.
        mask: true where valid; of inputs' shape without the channel axis, wherever that is, or with
            length 1 in places. Moments come from valid positions; every position is normalized.
        residual: of inputs' shape; added before the activation.

    Raises:
        ValueError: wrong mask or residual shape, unknown names; `Ghost` where TensorFlow does not
            know the batch size when it traces.
        TypeError: a policy that is none.

    >>> import numpy as np
    >>> layer = BatchNormalization(statistics="steady", activation="relu")
    >>> y = layer(np.array([[1.0, 2.0, 3.0]]), training=True)  # a batch of one
    >>> tuple(y.shape), int(layer.num_batches_tracked)
    ((1, 3), 1)

    Differs from Keras: the variance is always the centred one; masks work for every `axis`; a batch
    without a valid value moves nothing; `synchronized` weighs replicas by their counts and is there
    for torch too. Differs from torch: `momentum` weighs the old average, the moving variance is
    biased, epsilon is 1e-3, and one value per channel gives beta instead of an error.

    Source: Ioffe & Szegedy 2015; the policies name theirs.
    """

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        renorm: bool = False,
        renorm_clipping: Any = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        *,
        statistics: Policy | str | Mapping[str, Any] = "batch",
        activation: str | Callable[[Tensor], Tensor] | None = None,
        nonfinite: str = "propagate",
        **kwargs: Any,
    ) -> None:
        if renorm or renorm_clipping:
            raise ValueError(
                "BatchNormalization: `renorm` must be False; got renorm="
                f"{renorm!r}, renorm_clipping={renorm_clipping!r}. Write statistics=sn.Renorm("
                "r_max=..., d_max=...), which needs no weights beyond the moving statistics."
            )
        if nonfinite not in ("propagate", "skip"):
            raise ValueError(
                f"BatchNormalization: `nonfinite` must be 'propagate' or 'skip'; got {nonfinite!r}."
            )
        super().__init__(
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            moving_mean_initializer=moving_mean_initializer,
            moving_variance_initializer=moving_variance_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            **kwargs,
        )
        self.synchronized = synchronized
        self.statistics = _policy(statistics)
        self.activation = None if activation is None else keras.activations.get(activation)
        self.nonfinite = nonfinite
        self.num_batches_tracked: Any = None

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the weights: Keras's, and the number of batches where the policy asks for it."""
        super().build(input_shape)
        if self.statistics.counts_batches:
            self.num_batches_tracked = self.add_weight(
                shape=(),
                name="num_batches_tracked",
                initializer="zeros",
                dtype="int32",
                trainable=False,
                autocast=False,
            )

    def call(
        self,
        inputs: Tensor,
        training: bool | None = None,
        mask: Tensor | None = None,
        residual: Tensor | None = None,
        inputs_mask: Tensor | None = None,
    ) -> Tensor:
        """Normalize `inputs`; see the class."""
        if mask is None:
            mask = inputs_mask  # where Keras puts a mask that arrives by itself, beside a residual
        axis = self.axis % len(inputs.shape)
        dtype = keras.backend.result_type(inputs.dtype, "float32")
        x = ops.cast(inputs, dtype)
        if residual is not None:
            residual = ops.cast(_same_shape(residual, inputs), dtype)
        if training and self.trainable and not isinstance(self.statistics, Frozen):
            if mask is not None:
                mask = _expanded(mask, inputs, axis)
            normalizer, groups = self._train(x, axis, mask)
        else:
            normalizer, groups = of_running(self._running(dtype)), None
        gamma, beta = (None if w is None else ops.cast(w, dtype) for w in (self.gamma, self.beta))
        known = coefficients(normalizer, gamma, beta, self.epsilon)
        y = stages.apply(
            x,
            known.center,
            known.scale,
            known.shift,
            axis=axis,
            residual=residual,
            activation=self.activation,
            groups=groups,
        )
        return ops.cast(y, self.compute_dtype)

    def _running(self, dtype: str) -> RunningStatistics:
        batches = self.num_batches_tracked
        return RunningStatistics(
            ops.cast(self.moving_mean, dtype),
            ops.cast(self.moving_variance, dtype),
            None if batches is None else ops.cast(batches, dtype),
        )

    def _train(self, x: Tensor, axis: int, mask: Tensor | None) -> tuple[Normalizer, stages.Groups]:
        """What normalizes a batch, with gradient, and in which groups; moves the statistics."""
        groups = self._groups(x, axis)
        live = stages.moments(x, axis=axis, mask=mask, groups=groups)
        samples = stages.number(x, [0]) if len(x.shape) > 1 else 1
        others = replicas() if self.synchronized and groups is None else None
        if others is not None:
            live, samples = others.pool(live, samples)
        batch = Moments(
            live.count, live.mean, ops.stop_gradient(live.var), ops.stop_gradient(live.mean_low)
        )
        dtype = keras.backend.standardize_dtype(x.dtype)
        running = self._running(dtype)
        context = Context(
            samples if isinstance(samples, int) else ops.cast(samples, dtype),
            1 - self.momentum,
            self.epsilon,
            _Namespace(dtype),
            unbiased=False,
        )
        normalizer, after = step(
            self.statistics, batch, running, context, skip_nonfinite=self.nonfinite == "skip"
        )
        if after is not None and after is not running:
            self.moving_mean.assign(ops.cast(after.mean, self.moving_mean.dtype))
            self.moving_variance.assign(ops.cast(after.var, self.moving_variance.dtype))
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.assign(ops.cast(after.batches, "int32"))
        return attach(normalizer, batch, live), groups

    def _groups(self, x: Tensor, axis: int) -> stages.Groups:
        if not isinstance(self.statistics, Ghost):
            return None
        samples = ops.shape(x)[0]
        if axis == 0 or not isinstance(samples, int):
            what = "`axis`=0" if axis == 0 else "a batch whose size is not known when tracing"
            raise ValueError(
                f"BatchNormalization: statistics={self.statistics!r} groups samples along axis 0 "
                f"and must know how many there are; got {what}. Give the batches one size "
                f"(drop_remainder=True, or keras.Input(..., batch_size=...))."
            )
        return self.statistics.lengths(samples) or None

    def get_config(self) -> dict[str, Any]:
        """Keras's configuration, and what is ours."""
        activation = self.activation
        name = type(self.statistics).__name__.lower()
        return {
            **super().get_config(),
            "synchronized": self.synchronized,
            "statistics": {"policy": name, **vars(self.statistics)},
            "activation": None if activation is None else keras.activations.serialize(activation),
            "nonfinite": self.nonfinite,
        }

    def load_own_variables(self, store: Any) -> None:
        """Read weights of this layer or of Keras's own, which does not count batches."""
        missing = str(len(self.weights) - 1)
        if self.num_batches_tracked is not None and missing not in store:
            store = {**{key: store[key] for key in store}, missing: MANY}
        super().load_own_variables(store)

    def set_weights(self, weights: list[Any]) -> None:
        """Set weights of this layer or of Keras's own, which does not count batches."""
        if self.num_batches_tracked is not None and len(weights) == len(self.weights) - 1:
            weights = [*weights, MANY]
        super().set_weights(weights)


class _Namespace:
    """`keras.ops`, with plain numbers in the statistics' type, which TensorFlow insists on."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype

    def where(self, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
        a, b = (
            ops.convert_to_tensor(t, dtype=self._dtype) if isinstance(t, int | float) else t
            for t in (a, b)
        )
        return ops.where(condition, a, b)

    def __getattr__(self, name: str) -> Any:
        return getattr(ops, name)


def _policy(statistics: Policy | str | Mapping[str, Any]) -> Policy:
    """A policy from itself, its name, or a configuration."""
    if not isinstance(statistics, Mapping):
        return policy_from(statistics)
    settings = dict(statistics)
    return type(policy_from(settings.pop("policy", None)))(**settings)


def _same_shape(residual: Tensor, inputs: Tensor) -> Tensor:
    if tuple(residual.shape) != tuple(inputs.shape):
        raise ValueError(
            f"BatchNormalization: `residual` must have the shape of `inputs`, "
            f"{tuple(inputs.shape)}; got {tuple(residual.shape)}."
        )
    return residual


def _expanded(mask: Tensor, inputs: Tensor, axis: int) -> Tensor:
    """`mask` as boolean, of inputs' shape without the channel axis."""
    target = tuple(n for i, n in enumerate(ops.shape(inputs)) if i != axis)
    static = [n for i, n in enumerate(inputs.shape) if i != axis]
    came = tuple(mask.shape)
    fits = len(came) == len(static) and all(
        n in (1, None) or wanted in (n, None) for n, wanted in zip(came, static, strict=True)
    )
    if not fits:
        raise ValueError(
            f"BatchNormalization: `mask` must have one axis fewer than `inputs`: the shape "
            f"{tuple(static)}, that of `inputs` without its channel axis {axis}, or 1 in places; "
            f"got {came}."
        )
    return ops.broadcast_to(ops.cast(mask, "bool"), target)
