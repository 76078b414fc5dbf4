"""Batch normalization that drops in for `keras.layers.BatchNormalization`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.src import backend

from steadynorm.keras import recomputation
from steadynorm.keras.arrays import reference, xp
from steadynorm.keras.gradient_memory import GradientMemoryOfLayer, Seen
from steadynorm.keras.replica_context import replica_context
from steadynorm.kernels.checks import momentum_range, nonfinite_name, residual_shape
from steadynorm.kernels.reference import Groups, padding
from steadynorm.statistics import (
    Batch,
    Context,
    Frozen,
    Ghost,
    Moments,
    Normalizer,
    Policy,
    PolicyName,
    RunningStatistics,
    attach,
    batches_seen,
    coefficients,
    of_batch,
    of_running,
    policy_from,
    step,
    usable,
)

Tensor = Any


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
        axis: the channel axis. Samples lie on axis 0, or on axis 1 where axis 0 is the channels'.
        momentum: weight of the old average.
        epsilon: added to the variance.
        center: learn beta.
        scale: learn gamma.
        renorm: Keras's batch renormalization, with its three further weights and its two further
            arguments. `statistics=sn.Renorm()` needs none of them, and keeps a loaded
            `moving_variance`, which Keras's forgets in one step.
        synchronized: pool moments over replicas, by count: those of `tf.distribute`, or of torch's
            default process group. With JAX the batch is that of all devices in any case.
        statistics: `sn.Batch()`, `sn.Steady()`, `sn.Running()`, `sn.Renorm()`, `sn.Ghost()`,
            `sn.Frozen()`, or a lower-case name. A policy that asks how many batches were seen adds
            one variable, `num_batches_tracked`, which is saved but is none of `weights`: a legacy
            `.h5` file of a whole model keeps only those, and after it the count is 0, which beside
            trained statistics reads as many. The memory of the gradient of `Steady(window=...)` is
            kept on the torch backend; on the others `Steady` is one-way, as with `window=None`,
            since no state leaves their backward pass.
        activation: one that runs inside the layer: whatever `keras.activations.get` takes, with
            Keras's meaning ("leaky_relu" has slope 0.2 there), or None.
        nonfinite: "skip" keeps batches with NaN or infinity out of the moving statistics.

    The other arguments are those of Keras's layer and of every layer.

    Call arguments:
        inputs: of any rank.
        training: whether the policy decides and the moving statistics move.
        mask: true where valid; of inputs' shape without the channel axis, wherever that is, or with
            length 1 in places. Moments come from valid positions; every position is normalized. A
            mask that only fits without the last axis, as Keras's layers make them, is taken too;
            one that arrives by itself from such a layer is always read so.
        residual: of inputs' shape; added before the activation.

    Raises:
        ValueError: wrong mask or residual shape, unknown names, `momentum` outside [0, 1],
            `epsilon` not above 0; `Ghost` where TensorFlow does not
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
        *others: Any,
        synchronized: bool = False,
        statistics: Policy | PolicyName | Mapping[str, Any] = "batch",
        activation: str | Callable[[Tensor], Tensor] | None = None,
        nonfinite: str = "propagate",
        **keras_arguments: Any,
    ) -> None:
        nonfinite_name(nonfinite, "BatchNormalization")
        momentum_range(momentum, "BatchNormalization")
        if not epsilon > 0:
            raise ValueError(
                f"BatchNormalization: `epsilon` must be above 0, so that a channel of one value "
                f"can be normalized; got {epsilon!r}."
            )
        super().__init__(axis, momentum, epsilon, center, scale, *others, **keras_arguments)
        self.statistics = _policy(statistics)
        self.renorm = getattr(self, "renorm", False)  # older releases of Keras have none
        if self.renorm and self.statistics != Batch():
            raise ValueError(
                f"BatchNormalization: renorm=True goes with statistics='batch' alone; got "
                f"{statistics!r}. Write statistics=sn.Renorm(r_max=..., d_max=...), which needs no "
                f"weights beyond the moving statistics, or leave `statistics` out."
            )
        self.synchronized = synchronized
        self.activation = None if activation is None else keras.activations.get(activation)
        self.nonfinite = nonfinite
        self.num_batches_tracked: Any = None
        self.gradient_memory: GradientMemoryOfLayer | None = None
        self._first_runs = recomputation.first_runs()

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
        self._forget_gradient()

    def add_weight(self, *arguments: Any, **settings: Any) -> Any:
        """Add a weight; moving statistics are float32 or wider, whatever the layer's type is."""
        if settings.get("trainable") is False and settings.get("dtype") is None:
            settings["dtype"] = xp.promote_types(self.variable_dtype, "float32")
        return super().add_weight(*arguments, **settings)

    def _forget_gradient(self) -> None:
        if keras.config.backend() == "torch" and self.statistics.gradient_rate(1) is not None:
            channels = self.moving_mean.shape[0]
            self.gradient_memory = GradientMemoryOfLayer(channels, self.moving_mean.dtype)

    def __repr__(self) -> str:
        shown: str = super().__repr__()
        one_way = self.statistics.one_way()
        if self.statistics == one_way or keras.config.backend() == "torch":
            return shown
        why = f"one-way: Keras on {keras.config.backend()} keeps no memory of the gradient"
        return f"{shown[:-1]}, statistics={self.statistics!r}, {why}>"

    @property
    def weights(self) -> list[Any]:
        """The weights that Keras's layer has; `variables` holds the count of batches too."""
        return [w for w in super().weights if w is not self.num_batches_tracked]

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
        dtype = xp.statistics_dtype(inputs)
        x = ops.cast(inputs, dtype)
        if residual is not None:
            shapes = tuple(residual.shape), tuple(inputs.shape)
            residual_shape(*shapes, "inputs", "BatchNormalization")
            residual = ops.cast(residual, dtype)
        if mask is not None:
            mask = _expanded(mask, inputs, axis)  # of a wrong shape, refused in inference too
        if training and self.trainable and not isinstance(self.statistics, Frozen):
            normalizer, groups, seen = self._train(x, axis, mask)
        else:
            normalizer, groups, seen = of_running(self._running(dtype)), None, None
        gamma, beta = (None if w is None else ops.cast(w, dtype) for w in (self.gamma, self.beta))
        affine = coefficients(normalizer, gamma, beta, self.epsilon)
        counts = mask if training else None  # which gradients do
        branch = {"axis": axis, "residual": residual, "groups": groups}
        y = padding.apply(reference, x, affine[:3], mask=counts, **branch)
        if seen is not None and self.gradient_memory is not None:
            y = self.gradient_memory.joined(y, x, affine, seen, axis, mask)
        return ops.cast(y if self.activation is None else self.activation(y), self.compute_dtype)

    def _running(self, dtype: str) -> RunningStatistics:
        batches = self.num_batches_tracked
        running = RunningStatistics(
            ops.cast(self.moving_mean, dtype),
            ops.cast(self.moving_variance, dtype),
            None if batches is None else ops.cast(batches, dtype),
        )
        return running._replace(batches=batches_seen(running, xp=xp))

    def _train(
        self, x: Tensor, axis: int, mask: Tensor | None
    ) -> tuple[Normalizer, Groups, Seen | None]:
        """What normalizes a batch, with gradient, and in which groups; moves the statistics.

        And what the memory of the gradient has to know of the batch, where there is one.
        """
        remembers = self.gradient_memory is not None
        groups = self._groups(x, axis)
        live = reference.moments(x, axis=axis, mask=mask, groups=groups)
        first = int(axis == 0)  # samples lie on the first axis that is not the channels'
        samples = xp.size(x, (first,)) if len(x.shape) > 1 else 1
        if self.statistics.counts_samples and mask is not None and len(x.shape) > 1:
            place = first if len(mask.shape) == len(x.shape) else 0
            mask_of = ops.moveaxis(mask, place, 0)
            valid = ops.any(ops.reshape(mask_of, (mask_of.shape[0], -1)), axis=1)
            samples = ops.sum(ops.cast(valid, x.dtype))
        replicas = replica_context() if self.synchronized and groups is None else None
        if replicas is not None:
            live, samples = replicas.pool(live, samples)
        batch = Moments(
            live.count, live.mean, ops.stop_gradient(live.var), ops.stop_gradient(live.mean_low)
        )
        running = self._running(keras.backend.standardize_dtype(x.dtype))
        context = Context(samples, 1 - self.momentum, self.epsilon, xp, unbiased=False)
        skip_nonfinite = self.nonfinite == "skip"
        policy = self.statistics if remembers else self.statistics.one_way()
        policy = _KerasRenorm(self) if self.renorm else policy
        normalizer, after = step(policy, batch, running, context, skip_nonfinite=skip_nonfinite)
        again = recomputation.is_recomputation()
        if policy.needs_running and again:
            normalizer = recomputation.recall(self._first_runs, batch)
        elif policy.needs_running and recomputation.may_be_recomputed():
            recomputation.remember(self._first_runs, batch, normalizer)
        if again:
            pass  # the first run has moved the statistics
        elif self.renorm:
            self._move(usable(batch, skip_nonfinite=skip_nonfinite, xp=xp), batch)
        elif after is not None and after is not running:
            self.moving_mean.assign(ops.cast(after.mean, self.moving_mean.dtype))
            self.moving_variance.assign(ops.cast(after.var, self.moving_variance.dtype))
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.assign(ops.cast(after.batches, "int32"))
        seen = None
        if remembers:
            seen = Seen(batch, normalizer, self.statistics.gradient_rate(samples), replicas)
        return attach(normalizer, batch, live), groups, seen

    def _move(self, usable: Tensor, batch: Moments) -> None:
        """Move the five moving statistics of `renorm=True`, by Keras's own rule."""
        if usable is False:
            return
        state = [w for w in self.weights if w is not self.gamma and w is not self.beta]
        before = [ops.copy(w.value) for w in state]
        self._update_renorm_statistics(batch.mean, batch.var)
        if usable is not True:
            for weight, old in zip(state, before, strict=True):
                weight.assign(ops.where(usable, weight.value, old))

    def _groups(self, x: Tensor, axis: int) -> Groups:
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
        """Read weights of this layer under any policy, or of Keras's own, with a count or without.

        Without one it is 0, which beside trained statistics reads as many.
        """
        values = {key: store[key] for key in store.keys()}  # noqa: SIM118  an HDF5 store
        last = str(len(self.weights))
        counted = len(values) == len(self.weights) + 1 and np.shape(values.get(last, [])) == ()
        if self.num_batches_tracked is None and counted:
            del values[last]
        elif self.num_batches_tracked is not None and len(values) == len(self.weights):
            values[last] = np.int32(0)
        super().load_own_variables(values)
        self._forget_gradient()

    def set_weights(self, weights: list[Any]) -> None:
        """Set the weights that Keras's layer has, and the count of batches where it is given."""
        count = self.num_batches_tracked
        given = count is not None and len(weights) == len(self.weights) + 1
        super().set_weights(weights[:-1] if given else weights)
        if count is not None:
            count.assign(weights[-1] if given else np.int32(0))
        self._forget_gradient()


class _KerasRenorm(Policy):
    """Keras's `renorm=True`: corrections by three weights of the layer, which it moves itself."""

    counts_batches = False
    needs_running = True

    def __init__(self, layer: BatchNormalization) -> None:
        self.layer = layer

    def normalizer(
        self, batch: Moments, running: RunningStatistics | None, context: Context
    ) -> Normalizer:
        gain, offset, *_ = self.layer._renorm_correction_and_moments(batch.mean, batch.var)
        return of_batch(batch)._replace(gain=gain, offset=offset)

    def update(
        self, batch: Moments, running: RunningStatistics, context: Context
    ) -> RunningStatistics:
        return running


def _policy(statistics: Policy | PolicyName | Mapping[str, Any]) -> Policy:
    """A policy from itself, its name, or a configuration."""
    if not isinstance(statistics, Mapping):
        return policy_from(statistics)
    settings = dict(statistics)
    return type(policy_from(settings.pop("policy", None)))(**settings)


def _expanded(mask: Tensor, inputs: Tensor, axis: int) -> Tensor:
    """`mask` as boolean, of inputs' shape without the channel axis.

    A mask of the inputs' shape without the *last* axis, as Keras's layers make them, becomes one of
    the inputs' whole shape: where that is another shape, or the inputs come from such a layer.
    """
    shape, came = ops.shape(inputs), tuple(mask.shape)

    def fits(without: int) -> bool:
        static = [n for i, n in enumerate(inputs.shape) if i != without]
        return len(came) == len(static) and all(
            n in (1, None) or wanted in (n, None) for n, wanted in zip(came, static, strict=True)
        )

    mask, last = ops.cast(mask, "bool"), len(inputs.shape) - 1
    # Keras 3.5 has no function for it.
    carried = getattr(backend, "get_keras_mask", lambda t: getattr(t, "_keras_mask", None))(inputs)
    from_keras = axis != last and carried is not None and fits(last)
    if fits(axis) and not from_keras:
        return ops.broadcast_to(mask, tuple(n for i, n in enumerate(shape) if i != axis))
    if fits(last):
        return ops.broadcast_to(ops.expand_dims(mask, -1), shape)
    static = tuple(n for i, n in enumerate(inputs.shape) if i != axis)
    raise ValueError(
        f"BatchNormalization: `mask` must have one axis fewer than `inputs`: the shape {static}, "
        f"that of `inputs` without its channel axis {axis}, or 1 in places; got {came}."
    )
