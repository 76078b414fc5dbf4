"""The bar: 2e-6 from float64 on float32 data of standard deviation 1, at any mean up to 1e6."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests import tolerances, truth

import steadynorm as sn
from steadynorm.jax import BatchNorm, RunningStatistics, batch_norm

POLICIES = [
    sn.Batch(), sn.Steady(window=None), sn.Running(), sn.Renorm(warmup=0), sn.Ghost(16), sn.Frozen()
]  # fmt: skip
BAR = tolerances.BAR


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("mean", [0.0, 1e4, 1e6])
def test_forward_is_within_the_bar(mean: float, policy: Any, masked: bool) -> None:
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((64, 5, 7)) + mean).astype(np.float32)
    mask = rng.random((64, 7)) < 0.8 if masked else None
    running = truth.Running(np.full(5, np.float32(mean + 0.3)), np.full(5, np.float32(1.1)), 9)
    setting = truth.Setting(momentum=0.01, unbiased=False)
    expected = truth.train(x, policy, running, setting, mask=mask)
    state = RunningStatistics(jnp.asarray(running.mean), jnp.asarray(running.var), jnp.asarray(9))
    y, after = batch_norm(jnp.asarray(x), state, axis=1, statistics=policy, mask=mask)
    assert np.abs(np.asarray(y, np.float64) - expected.y).max() <= BAR
    assert tolerances.error(after.mean, expected.running.mean) <= 1e-7
    assert tolerances.error(after.var, expected.running.var) <= 1e-6


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("std", [1e-13, 1e15])
def test_gradients_are_right_at_any_scale(std: float, policy: Any) -> None:
    """ρ³ is outside float32: the gradient was NaN at 1e-13, and off by 0.2 at 1e15."""
    rng = np.random.default_rng(3)
    x = ((rng.standard_normal((64, 5)) + 3) * std).astype(np.float32)
    grad = rng.standard_normal(x.shape).astype(np.float32)
    running = truth.Running(np.full(5, np.float32(3 * std)), np.full(5, np.float32(std**2)), 9)
    setting = truth.Setting(momentum=0.01, unbiased=False, eps=1e-30)
    expected = truth.train(x, policy, running, setting, grad=grad)
    state = RunningStatistics(jnp.asarray(running.mean), jnp.asarray(running.var), jnp.asarray(9))

    def call(x: jax.Array) -> jax.Array:
        return batch_norm(x, state, statistics=policy, momentum=0.99, epsilon=1e-30)[0]

    y, pull = jax.vjp(call, jnp.asarray(x))
    (dx,) = pull(jnp.asarray(grad))
    assert tolerances.error(y, expected.y) <= 1e-6
    assert tolerances.error(np.float64(dx) * std, expected.dx * std) <= 2e-6


@pytest.mark.parametrize("shape", [(200_000, 2), (8, 64, 64, 3)])
def test_large_batches_are_within_the_bar(shape: tuple[int, ...]) -> None:
    x = (np.random.default_rng(0).standard_normal(shape) + 1e6).astype(np.float32)
    double = np.moveaxis(x, -1, 1).astype(np.float64)
    expected = np.moveaxis(truth.train(double, sn.Batch()).y, 1, -1)
    y, _ = batch_norm(jnp.asarray(x), None)
    assert np.abs(np.asarray(y, np.float64) - expected).max() <= BAR


def test_the_compiler_keeps_the_bar_inside_a_larger_program() -> None:
    """The sums that repair the mean's rounding look like zeros to algebra."""
    x = (np.random.default_rng(1).standard_normal((96, 8)) + 1e6).astype(np.float32)
    weight = jnp.eye(8)

    def program(x: jax.Array) -> jax.Array:
        y, _ = batch_norm(x @ weight, None)
        return y @ weight * 1

    expected = truth.train(x, sn.Batch()).y
    with jax.default_matmul_precision("highest"):
        y = jax.jit(program)(jnp.asarray(x))
    assert np.abs(np.asarray(y, np.float64) - expected).max() <= BAR


def test_ours_stands_where_flax_fast_variance_falls() -> None:
    """flax by default: output of standard deviation 31.7 at mean 1e4, standard deviation 0.1."""
    x = jnp.asarray(np.random.default_rng(0).normal(1e4, 0.1, (256, 4)), jnp.float32)
    theirs = nnx.BatchNorm(4, rngs=nnx.Rngs(0))(x)
    ours = BatchNorm(4, rngs=nnx.Rngs(0))(x)
    assert float(theirs.std()) > 10
    assert abs(float(ours.std()) - 1) < 1e-3


def test_variance_is_never_nan_nor_negative_for_finite_input() -> None:
    x = jnp.full((8, 3), 1e3, jnp.float32).at[0, 0].set(1e3 + 0.1)
    _, state = batch_norm(x, RunningStatistics(jnp.zeros(3), jnp.zeros(3), None), momentum=0.0)
    assert (np.asarray(state.var) >= 0).all()
    np.testing.assert_array_equal(state.var[1:], [0.0, 0.0])


@pytest.mark.parametrize("steps", [1, 10, 100, 300])
def test_evaluation_is_right_from_the_first_step(steps: int) -> None:
    """equinox, mode "batch": evaluation std .19, .54, .93, .99 at these steps, where 1 is right."""
    rng = np.random.default_rng(0)
    state = RunningStatistics(jnp.zeros(4), jnp.ones(4), jnp.zeros((), jnp.int32))
    advance = jax.jit(lambda x, state: batch_norm(x, state, statistics="running")[1])
    for _ in range(steps):
        state = advance(jnp.asarray(rng.normal(0, 0.2, (256, 4)), jnp.float32), state)
    x = jnp.asarray(rng.normal(0, 0.2, (2048, 4)), jnp.float32)
    y, _ = batch_norm(x, state, use_running_average=True)
    np.testing.assert_allclose(np.asarray(y).std(0), 1, atol=0.1)
