"""Refuses arguments that cannot work: which, what was required, what came, what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from steadynorm.statistics import Ghost, Policy, RunningStatistics

T = TypeVar("T")


def constant(value: Any, name: str, kind: Callable[[Any], T], owner: str) -> T:
    """A setting as a plain number: the compiled call is made for it, so no tracer can be one."""
    if not isinstance(value, jax.Array | np.ndarray):
        return value  # type: ignore[no-any-return]
    try:
        return kind(value)
    except jax.errors.ConcretizationTypeError:
        raise TypeError(
            f"{owner}: `{name}` must be known when JAX traces the call; got a tracer of "
            f"{value.dtype}. Make it a static argument of jit, or no argument of the function."
        ) from None


def positive_or_zero(epsilon: float, owner: str) -> None:
    """Below 0 a channel of small variance is NaN."""
    if not epsilon >= 0:
        raise ValueError(f"{owner}: `epsilon` must be 0 or above; got {epsilon!r}.")


def real(owner: str, **arrays: Any) -> None:
    """What enters y is real: a complex number would lose its imaginary part."""
    for name, array in arrays.items():
        if array is not None and jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise TypeError(f"{owner}: `{name}` must hold real numbers; got {array.dtype}.")


def result_dtype(dtype: Any, owner: str) -> Any:
    """y's type is a floating-point one: an integer would drop fractions."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{owner}: `dtype` must be a floating-point type; got {jnp.dtype(dtype)}.")
    return jnp.dtype(dtype)


def input_and_axis(x: Array, axis: int, policy: Policy, owner: str) -> int:
    """x is real, and `axis` one of its axes; returned counted from the front."""
    if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
        raise TypeError(f"{owner}: `x` must hold real numbers; got {x.dtype}.")
    if not hasattr(axis, "__index__"):
        raise TypeError(
            f"{owner}: `axis` must be one axis, an int; got {axis!r}. Reshape `x` to join several."
        )
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(
            f"{owner}: `axis` must be an axis of `x`, from {-x.ndim} to {x.ndim - 1}; got {axis} "
            f"for shape {x.shape}."
        )
    axis %= x.ndim
    if isinstance(policy, Ghost) and axis == 0:
        raise ValueError(
            f"{owner}: statistics={policy!r} groups samples along axis 0; got `axis`=0 for the "
            f"channels. Move the channels to another axis."
        )
    return axis


def samples_known(x: Array, policy: Ghost, owner: str) -> None:
    """How many samples there are is a number, as it is not when `jax.export` takes any number."""
    if not isinstance(x.shape[0], int):
        raise ValueError(
            f"{owner}: statistics={policy!r} groups samples along axis 0 and must know how many "
            f"there are; got the symbol {x.shape[0]}. Export for one batch size."
        )


def per_channel(
    x: Array,
    axis: int,
    state: RunningStatistics | None,
    weight: Array | None,
    bias: Array | None,
    owner: str,
) -> None:
    """Per-channel arrays have one value per channel."""
    given = {"weight": weight, "bias": bias}
    if state is not None:
        given |= {"state.mean": state.mean, "state.var": state.var}
    for name, array in given.items():
        if array is not None and array.shape != (x.shape[axis],):
            raise ValueError(
                f"{owner}: `{name}` must have shape ({x.shape[axis]},), one value for each channel "
                f"on axis {axis} of `x` with shape {x.shape}; got {array.shape}."
            )


def state_kind(state: Any, owner: str) -> None:
    """`state` is a `RunningStatistics` of floating-point arrays; integers would drop fractions."""
    if state is None:
        return
    if not isinstance(state, RunningStatistics):
        raise TypeError(
            f"{owner}: `state` must be a steadynorm.jax.RunningStatistics, from initial_state or "
            f"the call before, or None; got {type(state).__name__}. Write "
            f"RunningStatistics(mean, var, batches)."
        )
    for name, array in (("mean", state.mean), ("var", state.var)):
        dtype = getattr(array, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{owner}: `state.{name}` must be a floating-point array; got "
                f"{type(array).__name__ if dtype is None else dtype}. Use jnp.asarray(..., "
                f"jnp.float32)."
            )


def state_can_move(state: RunningStatistics | None, owner: str) -> None:
    """Half precision is too coarse to average in: bfloat16's 2.2 takes up no 0.008."""
    if state is None:
        return
    for name, array in (("mean", state.mean), ("var", state.var)):
        if array.dtype.itemsize < 4:
            raise TypeError(
                f"{owner}: `state.{name}` must be float32 or wider in training; got {array.dtype}, "
                f"in which running statistics stop short of the data's. Keep the state in float32, "
                f"whatever type the input has."
            )


def running_known(
    policy: Policy, state: RunningStatistics | None, inference: bool, owner: str
) -> None:
    """There are running statistics where they are needed."""
    if state is None and (inference or policy.needs_running):
        what = "use_running_average=True" if inference else f"statistics={policy!r}"
        raise ValueError(
            f"{owner}: {what} needs running statistics; got state=None. Start with "
            f"steadynorm.jax.initial_state(num_features)."
        )


def expanded_mask(mask: Any, x: Array, axis: int, owner: str) -> Array:
    """`mask` as boolean, of x's shape without the channel axis.

    With as many axes as x, its channel axis must have length 1, as where flax's masks broadcast.
    """
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"{owner}: `mask` must be boolean, True where valid; got {mask.dtype}. "
            f"Use mask.astype(bool)."
        )
    target = tuple(n for i, n in enumerate(x.shape) if i != axis)
    shape = mask.shape
    if mask.ndim == x.ndim and shape[axis] == 1:
        mask = mask.squeeze(axis)
    fits = _broadcasts(mask.shape, target)
    # NumPy and flax would put the new axis in front, and the last of these on x's last axis.
    numpys = (1, *shape)
    if fits and mask.ndim == len(shape) == x.ndim - 1 and numpys[axis] == 1:
        without = numpys[:axis] + numpys[axis + 1 :]
        if _broadcasts(without, target) and without != shape:
            raise ValueError(
                f"{owner}: `mask` of shape {shape} can be read in two ways for `x` of shape "
                f"{x.shape}: without the channel axis {axis}, or with a new axis in front, as "
                f"NumPy broadcasts. Give it {x.ndim} axes, with length 1 on the channel axis."
            )
    if not fits:
        raise ValueError(
            f"{owner}: `mask` must broadcast against `x` without its channel axis, {target}, axis "
            f"by axis, or have length 1 on the channel axis {axis}; got {shape}."
        )
    return jnp.broadcast_to(mask, target)


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether an array of this shape broadcasts against `target`, axis by axis."""
    return len(shape) == len(target) and all(
        n in (1, wanted) for n, wanted in zip(shape, target, strict=True)
    )
