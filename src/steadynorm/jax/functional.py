"""Batch normalization as a pure function over JAX arrays."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from steadynorm.jax import checks
from steadynorm.jax.arrays import reference
from steadynorm.jax.named_axis import NamedAxis, varying_like
from steadynorm.kernels.activations import ACTIVATIONS, ActivationName
from steadynorm.kernels.checks import (
    activation_name,
    momentum_range,
    nonfinite_name,
    residual_shape,
)
from steadynorm.kernels.reference import Groups, padding
from steadynorm.statistics import (
    Coefficients,
    Context,
    Frozen,
    Ghost,
    Moments,
    Normalizer,
    Policy,
    PolicyName,
    RunningStatistics,
    batches_seen,
    coefficients,
    gradient_coefficients,
    gradient_factors,
    of_running,
    parameter_gradients,
    policy_from,
    step,
)

P = ParamSpec("P")
R = TypeVar("R")


class _Settings(NamedTuple):
    """All that is known when JAX traces the call."""

    policy: Policy
    inference: bool
    axis: int
    momentum: float
    epsilon: float
    activation: str | None
    skip_nonfinite: bool
    replicas: NamedAxis | None
    groups: Groups
    dtype: DTypeLike

    @property
    def pooled(self) -> NamedAxis | None:
        """The replicas whose moments are joined: none where groups stand on their own."""
        return self.replicas if self.groups is None else None


class _Inputs(NamedTuple):
    """The arrays of a call."""

    x: Array
    weight: Array | None
    bias: Array | None
    residual: Array | None
    mask: Array | None
    state: RunningStatistics | None


class _Saved(NamedTuple):
    """What a forward leaves for its backward: x, and y or the residual where needed for g."""

    inputs: _Inputs
    residual_like: Array | None
    y: Array | None
    batch: Moments | None
    normalizer: Normalizer
    affine: Coefficients


def initial_state(num_features: int, *, dtype: DTypeLike = jnp.float32) -> RunningStatistics:
    """Running statistics before the first batch: mean 0, variance 1, no batch seen.

    >>> initial_state(2).var
    Array([1., 1.], dtype=float32)
    """
    return RunningStatistics(
        jnp.zeros(num_features, dtype), jnp.ones(num_features, dtype), jnp.zeros((), jnp.int32)
    )


def batch_norm(
    x: ArrayLike,
    state: RunningStatistics | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    use_running_average: bool = False,
    axis: int = -1,
    momentum: float = 0.99,
    epsilon: float = 1e-5,
    statistics: Policy | PolicyName = "batch",
    activation: ActivationName | None = None,
    residual: Array | None = None,
    mask: Array | None = None,
    axis_name: Hashable | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    nonfinite: str = "propagate",
    dtype: DTypeLike | None = None,
    owner: str = "batch_norm",
) -> tuple[Array, RunningStatistics | None]:
    """Normalize each channel, scale and shift it; then add a residual and apply an activation.

        x̂ = (x - m)/√(u + epsilon)        y = activation(weight·x̂ + bias + residual)

    In inference (`use_running_average=True`), and with `Frozen()`, m and u are the running
    statistics; in training the policy `statistics` says. Pure: the state after the batch is
    returned. `state = momentum·state + (1 - momentum)·batch`, with the biased variance, unless the
    policy has its own rule. Goes under `jit`, `grad` (reverse mode, any order), `vmap`,
    `shard_map`, `pmap`, `scan` and `checkpoint`.

    Args:
        x: real numbers of any shape.
        state: running statistics, from `initial_state` or the call before; None to keep none.
            Float32 or wider in training, whatever x is.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        use_running_average: whether this is inference.
        axis: the channel axis. Samples lie on axis 0, or on axis 1 where axis 0 is the channels'.
        momentum: weight of the old average; a number, as `epsilon` is, not a traced array.
        epsilon: added to the variance; 0 or above.
        statistics: a policy or its lower-case name. `Steady` is one-way here, as with
            `window=None`: nothing but gradients leaves a backward pass in JAX.
        activation: None, or one of relu, relu6, leaky_relu (slope 0.01), silu, gelu (exact),
            hardswish, elu, sigmoid, tanh, mish.
        residual: of x's shape; added before the activation.
        mask: boolean, True where valid; broadcasts, axis by axis, against x without its channel
            axis, or against x with length 1 there; one that NumPy's broadcasting would read
            otherwise is refused. Moments come from valid positions; every
            position is normalized.
        axis_name: named axis, or several, of `shard_map`, `pmap` or `vmap` to pool moments over,
            weighted by the values per channel of each. The groups of `Ghost` stay on their own
            replica.
        axis_index_groups: subsets of that axis that pool on their own.
        nonfinite: "propagate", or "skip" to keep a batch with NaN or infinity out of the state.
        dtype: floating-point type of y; None is x's.
        owner: the name that errors begin with.

    Returns:
        y of x's shape, and the state after the batch. No gradient flows through the state.

    Raises:
        ValueError: wrong shapes or values.
        TypeError: wrong kinds of arguments.

    The backward pass is the closed form of every policy. It keeps x, channel-sized statistics, and
    y (or the residual) where the activation's derivative needs it.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, state = batch_norm(x, initial_state(2), momentum=0.9, epsilon=0.0)
    >>> y
    Array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> state.mean
    Array([0.2, 2. ], dtype=float32)

    Differs from flax: the variance is never E[x²] - E[x]²; a batch without a valid value updates
    nothing; replicas and masks are weighted by counts. Differs from `steadynorm.functional`, as
    flax does from torch: `momentum` weighs the old average, the running variance is biased, and one
    value per channel under `Batch` gives the bias instead of an error. Forward-mode derivatives
    (`jax.jvp`) are not defined.

    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2; the policies name theirs.
    """
    policy = policy_from(statistics).one_way()
    activation_name(activation, owner)
    nonfinite_name(nonfinite, owner)
    use_running_average = checks.constant(use_running_average, "use_running_average", bool, owner)
    momentum = checks.constant(momentum, "momentum", float, owner)
    epsilon = checks.constant(epsilon, "epsilon", float, owner)
    momentum_range(momentum, owner)
    checks.positive_or_zero(epsilon, owner)
    x = jnp.asarray(x)
    weight, bias, residual = (
        None if t is None else jnp.asarray(t) for t in (weight, bias, residual)
    )
    checks.real(owner, weight=weight, bias=bias, residual=residual)
    axis = checks.input_and_axis(x, axis, policy, owner)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.float32)
    checks.state_kind(state, owner)
    checks.per_channel(x, axis, state, weight, bias, owner)
    checks.running_known(policy, state, use_running_average, owner)
    if residual is not None:
        residual_shape(residual.shape, x.shape, "x", owner)
    if mask is not None:
        mask = checks.expanded_mask(mask, x, axis, owner)
    inference = use_running_average or isinstance(policy, Frozen)
    if not inference:
        checks.state_can_move(state, owner)
    replicas = None
    if axis_name is not None and not inference:
        index_groups = tuple(tuple(group) for group in axis_index_groups or ())
        replicas = NamedAxis(axis_name, index_groups or None)
    groups = None
    if isinstance(policy, Ghost) and not inference:
        checks.samples_known(x, policy, owner)
        groups = policy.lengths(x.shape[0]) if x.size else None
    settings = _Settings(
        policy,
        inference,
        axis,
        momentum,
        epsilon,
        activation,
        nonfinite == "skip",
        replicas,
        groups,
        checks.result_dtype(x.dtype if dtype is None else dtype, owner),
    )
    weight, bias, residual = varying_like(x, (weight, bias, residual))
    y, after = _compiled(settings, _Inputs(x, weight, bias, residual, mask, state))
    return y, state if inference else after


def _by_own_rules(function: Callable[P, R]) -> Callable[P, R]:
    """Traced with JAX's default promotion of types and ranks, however strict the user's code is.

    Forward and backward mix types and ranks on purpose: half precision with float32 statistics,
    rows per group with values per channel.
    """

    @wraps(function)
    def traced(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return traced


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(settings: _Settings, inputs: _Inputs) -> tuple[Array, RunningStatistics | None]:
    return _forward(settings, inputs)[0]


def _samples(settings: _Settings, x: Array, mask: Array | None) -> Any:
    """How many samples there are, on the first axis that is not the channels'.

    With a mask those that have a valid position, where the policy asks for their number.
    """
    if mask is None or mask.ndim == 0 or not settings.policy.counts_samples:
        return reference.xp.size(x, (int(settings.axis == 0),)) if x.ndim > 1 else 1
    valid = mask.any(axis=tuple(range(1, mask.ndim)))
    return valid.sum(dtype=reference.statistics_dtype(x))


def _policy_step(
    settings: _Settings, inputs: _Inputs
) -> tuple[Moments | None, Normalizer, RunningStatistics | None]:
    """Pooled moments, what normalizes, and the running statistics after this batch."""
    x, state = inputs.x, inputs.state
    dtype = reference.statistics_dtype(x)
    running = state and RunningStatistics(
        state.mean.astype(dtype), state.var.astype(dtype), batches_seen(state, xp=jnp)
    )
    if settings.inference:
        assert running is not None  # checks.running_known
        return None, of_running(running), state
    batch = reference.moments(x, axis=settings.axis, mask=inputs.mask, groups=settings.groups)
    samples = _samples(settings, x, inputs.mask)
    if settings.pooled is not None:
        batch, samples = settings.pooled.pool(batch, samples)
    context = Context(samples, 1 - settings.momentum, settings.epsilon, jnp, unbiased=False)
    advance = partial(step, settings.policy, skip_nonfinite=settings.skip_nonfinite)
    normalizer, after = advance(batch, running, context)
    if settings.replicas is not None and settings.pooled is None:
        # Every replica's groups move the state, in the replicas' order.
        _, after = advance(settings.replicas.gather(batch), running, context)
    if after is not None and state is not None:
        after = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), after, state)
    return batch, _by_share(normalizer, batch), after


def _by_share(normalizer: Normalizer, batch: Moments) -> Normalizer:
    """The same values; gradient flows by the share alone, in second derivatives too."""
    still = jax.tree.map(lambda part: jax.lax.stop_gradient(jnp.asarray(part)), normalizer)
    mean = batch.mean + batch.mean_low
    return normalizer._replace(
        mean=still.mean,
        mean_low=_moved_by(still.mean_low, still.share, mean),
        var=_moved_by(still.var, still.share, batch.var),
        gain=normalizer.gain if isinstance(normalizer.gain, float) else still.gain,
        offset=normalizer.offset if isinstance(normalizer.offset, float) else still.offset,
    )


@jax.custom_jvp
def _moved_by(value: Array, share: Array, live: Array) -> Array:
    """`value`, whose derivative is that of `share`·`live`."""
    return value


@_moved_by.defjvp
@_by_own_rules
def _moved_by_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    value, share, _ = primals
    # Itself again as the value: a plain `value` would be a constant in the next derivative.
    return _moved_by(*primals), jnp.asarray(share * tangents[2], value.dtype)


@_by_own_rules
def _forward(
    settings: _Settings, inputs: _Inputs
) -> tuple[tuple[Array, RunningStatistics | None], _Saved]:
    batch, normalizer, after = _policy_step(settings, inputs)
    x, residual = inputs.x, inputs.residual
    dtype = reference.statistics_dtype(x)
    gamma, beta = (None if p is None else p.astype(dtype) for p in (inputs.weight, inputs.bias))
    affine = coefficients(normalizer, gamma, beta, settings.epsilon)
    y = reference.apply(
        x,
        *affine[:3],
        axis=settings.axis,
        residual=residual,
        activation=settings.activation,
        groups=settings.groups,
        dtype=settings.dtype,
    )
    source = ACTIVATIONS[settings.activation].source if settings.activation else None
    rebuilds, from_output = source == "input", source in ("output", "either")
    saved = _Saved(
        inputs._replace(residual=residual if rebuilds else None, state=None),
        None if residual is None else jnp.zeros((), residual.dtype),
        y if from_output else None,
        batch and batch._replace(count=jnp.asarray(batch.count, dtype)),
        normalizer,
        affine,
    )
    return (y, after), saved


@_by_own_rules
def _backward(settings: _Settings, saved: _Saved, gradients: tuple[Array, Any]) -> tuple[_Inputs]:
    grad, _ = gradients
    inputs, batch, normalizer, affine = saved.inputs, saved.batch, saved.normalizer, saved.affine
    x, y, residual = inputs.x, saved.y, inputs.residual
    if inputs.mask is not None:
        counts = padding.counting(reference, inputs.mask, x, y, residual, axis=settings.axis)
        grad, x, y, residual = padding.zeroed(reference, counts, grad, x, y, residual)
    arrays = (grad, x, *affine[:3])
    branch: dict[str, Any] = {
        "axis": settings.axis,
        "y": y,
        "residual": residual,
        "activation": settings.activation,
        "groups": settings.groups,
    }
    sums = reference.reduce_grad(*arrays, **branch)
    dweight, dbias = parameter_gradients(normalizer, affine.rho, *sums)
    through = jnp.zeros_like(affine.scale), jnp.zeros_like(affine.scale)
    if batch is not None:
        if settings.pooled is not None:
            sums = settings.pooled.sum(sums)
        factors = gradient_factors(normalizer, batch, affine.scale, affine.rho)
        through = gradient_coefficients(factors, *sums)
    like = saved.residual_like
    dx, g = reference.apply_grad(
        *arrays, *through, mask=inputs.mask, want_residual=like is not None, **branch
    )

    def fitted(gradient: Array, parameter: Array | None) -> Array | None:
        if parameter is None:
            return None
        return gradient.reshape(-1, parameter.shape[0]).sum(0).astype(parameter.dtype)

    dresidual = None if g is None or like is None else g.astype(like.dtype)
    dparameters = fitted(dweight, inputs.weight), fitted(dbias, inputs.bias)
    return (_Inputs(dx, *dparameters, dresidual, None, None),)


_normalize.defvjp(_forward, _backward)
# Compiled even where the caller does not compile: one dispatch instead of some thirty.
_compiled = jax.jit(_normalize, static_argnums=0)
