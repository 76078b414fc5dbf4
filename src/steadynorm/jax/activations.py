"""Activations that run inside the layer: forward, and derivative from output or input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Activation(NamedTuple):
    """`forward(z)`, and `gradient(grad, t)` with t the output y if `from_output`, else z."""

    forward: Callable[[Array], Array]
    gradient: Callable[[Array, Array], Array]
    from_output: bool


def _by_jax(forward: Callable[[Array], Array]) -> Activation:
    """The derivative is taken from z, which is rebuilt from x, by JAX itself."""

    def gradient(grad: Array, z: Array) -> Array:
        dz: Array = jax.vjp(forward, z)[1](grad)[0]
        return dz

    return Activation(forward, gradient, from_output=False)


_gelu = partial(jax.nn.gelu, approximate=False)

# Comparisons are written so that a NaN in the output lets the gradient through, as elsewhere.
ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(jax.nn.relu, lambda g, y: jnp.where(y <= 0, 0, g), True),
    "relu6": Activation(jax.nn.relu6, lambda g, y: jnp.where((y <= 0) | (y >= 6), 0, g), True),
    "leaky_relu": Activation(
        partial(jax.nn.leaky_relu, negative_slope=0.01),
        lambda g, y: jnp.where(y > 0, g, g * 0.01),
        True,
    ),
    "silu": _by_jax(jax.nn.silu),
    "gelu": _by_jax(_gelu),
    "hardswish": _by_jax(jax.nn.hard_swish),
    "elu": Activation(jax.nn.elu, lambda g, y: jnp.where(y > 0, g, g * (y + 1)), True),
    "sigmoid": Activation(jax.nn.sigmoid, lambda g, y: g * y * (1 - y), True),
    "tanh": Activation(jnp.tanh, lambda g, y: g * (1 - y * y), True),
}
