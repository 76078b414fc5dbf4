"""`steadynorm.jax.batch_norm` against the truth in float64 NumPy: values, state, gradients."""

from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests import tolerances, truth

import steadynorm as sn
from steadynorm.jax import RunningStatistics, batch_norm
from steadynorm.kernels.activations import ACTIVATIONS

POLICIES = {
    "batch": sn.Batch(),
    "steady": sn.Steady(window=None),
    "running": sn.Running(),
    "renorm": sn.Renorm(warmup=2, r_ramp=10, d_ramp=10),
    "ghost": sn.Ghost(3),
    "frozen": sn.Frozen(),
}
SHAPES = {"2d": ((11, 3), -1), "last": ((5, 4, 3, 3), -1), "first": ((5, 3, 4, 2), 1)}
LIMITS = {np.float64: 1e-12, np.float32: 2e-6}


class Case:
    """Random arguments, as NumPy arrays, and what the truth makes of them."""

    def __init__(self, shape: tuple[int, ...], axis: int, policy: Any, **setting: Any) -> None:
        rng = np.random.default_rng(7)
        self.axis, self.policy, channels = axis, policy, shape[axis]
        draw = rng.standard_normal
        self.x, self.residual, self.grad = (draw(shape) for _ in range(3))
        self.x = 2 * self.x + 1
        self.weight, self.bias = draw(channels), draw(channels)
        self.mean, self.var, self.batches = draw(channels), rng.random(channels) + 0.5, 7
        self.mask = None
        if setting.pop("masked", False):
            self.mask = rng.random(np.delete(shape, axis)) < 0.7
        self.activation = setting.pop("activation", None)

    @np.errstate(over="ignore")  # elu's unused branch
    def expected(self) -> truth.Result:
        result = truth.train(
            self.channels_second(self.x),
            self.policy,
            truth.Running(self.mean, self.var, self.batches),
            truth.Setting(self.weight, self.bias, self.activation, 0.01, 1e-5, unbiased=False),
            mask=self.mask,
            residual=self.channels_second(self.residual),
            grad=self.channels_second(self.grad),
        )
        back = {
            name: np.moveaxis(getattr(result, name), 1, self.axis)
            for name in ("y", "dx", "dresidual")
        }
        return result._replace(**back)

    def channels_second(self, t: np.ndarray) -> np.ndarray:
        return np.moveaxis(t, self.axis, 1)

    def actual(self, dtype: Any) -> truth.Result:
        def call(x: Any, weight: Any, bias: Any, residual: Any) -> Any:
            return batch_norm(
                x,
                state,
                weight,
                bias,
                axis=self.axis,
                statistics=self.policy,
                activation=self.activation,
                residual=residual,
                mask=self.mask,
            )

        def cast(t: np.ndarray) -> jax.Array:
            return jnp.asarray(t, dtype)

        state = RunningStatistics(cast(self.mean), cast(self.var), jnp.asarray(self.batches))
        y, pull, after = jax.vjp(
            call, *map(cast, (self.x, self.weight, self.bias, self.residual)), has_aux=True
        )
        return truth.Result(y, after, *pull(cast(self.grad)))


def compare(case: Case, dtype: Any) -> None:
    expected = case.expected()
    with jax.enable_x64(dtype is np.float64):
        actual = case.actual(dtype)
    for name in ("y", "dx", "dweight", "dbias", "dresidual"):
        found = getattr(actual, name)
        assert found.dtype == dtype, name
        error = tolerances.error(found, getattr(expected, name))
        assert error <= LIMITS[dtype], (name, error)
    for name in ("mean", "var"):
        error = tolerances.error(getattr(actual.running, name), getattr(expected.running, name))
        assert error <= LIMITS[dtype], (name, error)
    assert int(actual.running.batches) == expected.running.batches


@pytest.mark.parametrize(("policy", "shape"), list(product(POLICIES, SHAPES)))
@pytest.mark.parametrize("masked", [False, True])
def test_every_policy_and_layout_is_right_in_float64(policy: str, shape: str, masked: bool) -> None:
    compare(Case(*SHAPES[shape], POLICIES[policy], masked=masked), np.float64)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_is_right_in_float32(policy: str) -> None:
    compare(Case(*SHAPES["last"], POLICIES[policy], masked=True), np.float32)


@pytest.mark.parametrize(
    ("activation", "policy"),
    [(name, "batch") for name in ACTIVATIONS] + [("relu", "ghost"), ("gelu", "ghost")],
)
def test_every_activation_is_right_in_float64(activation: str, policy: str) -> None:
    case = Case(*SHAPES["2d"], POLICIES[policy], masked=True, activation=activation)
    compare(case, np.float64)


def test_inference_is_right_and_leaves_the_state() -> None:
    case = Case(*SHAPES["last"], POLICIES["batch"])
    with jax.enable_x64(True):
        state = RunningStatistics(jnp.asarray(case.mean), jnp.asarray(case.var), None)

        def call(x: Any) -> Any:
            y, after = batch_norm(x, state, use_running_average=True)
            assert after is state
            return y

        y, pull = jax.vjp(call, jnp.asarray(case.x))
        (dx,) = pull(jnp.asarray(case.grad))
    np.testing.assert_allclose(y, (case.x - case.mean) / np.sqrt(case.var + 1e-5), atol=1e-12)
    np.testing.assert_allclose(dx, case.grad / np.sqrt(case.var + 1e-5), atol=1e-12)


@pytest.mark.parametrize("policy", ["batch", "ghost"])
def test_without_a_state_none_is_kept(policy: str) -> None:
    case = Case(*SHAPES["2d"], POLICIES[policy])
    y, after = batch_norm(jnp.asarray(case.x), None, statistics=POLICIES[policy])
    assert after is None
    with_state, _ = batch_norm(
        jnp.asarray(case.x), RunningStatistics(0 * y[0], 0 * y[0] + 1, None), statistics=policy
    )
    if policy == "batch":
        np.testing.assert_array_equal(y, with_state)


def test_prior_zero_is_batch_and_bounds_of_one_are_batch() -> None:
    x = jnp.asarray(Case(*SHAPES["last"], None).x, jnp.float32)
    state = RunningStatistics(x[0, 0, 0], jnp.ones(3), jnp.asarray(5))
    expected, _ = batch_norm(x, state)
    for policy in (sn.Steady(prior=0), sn.Renorm(r_max=1, d_max=0, warmup=0)):
        np.testing.assert_allclose(batch_norm(x, state, statistics=policy)[0], expected, atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("policy", ["batch", "steady"])
def test_half_precision_input_keeps_its_type_and_float32_statistics(
    dtype: Any, policy: str
) -> None:
    case = Case((64, 3), -1, POLICIES[policy], activation="relu")
    x = jnp.asarray(case.x + 30, dtype)
    state = RunningStatistics(jnp.full(3, 30.0), jnp.ones(3), jnp.asarray(7))
    y, after = batch_norm(x, state, statistics=POLICIES[policy], activation="relu")
    dx = jax.grad(lambda x: (batch_norm(x, state)[0] * jnp.asarray(case.grad)).sum())(x)
    assert y.dtype == dx.dtype == dtype
    assert after.mean.dtype == after.var.dtype == jnp.float32
    running = truth.Running(np.full(3, 30.0), np.ones(3), 7)
    setting = truth.Setting(activation="relu", momentum=0.01, unbiased=False)
    expected = truth.train(np.asarray(x, np.float64), POLICIES[policy], running, setting)
    limit = {jnp.bfloat16: 4e-3, jnp.float16: 5e-4}[dtype]  # one rounding to 8 or 11 bits
    assert tolerances.error(np.asarray(y, np.float64), expected.y) <= limit
    assert tolerances.error(after.mean, expected.running.mean) <= 2e-7
    assert tolerances.error(after.var, expected.running.var) <= 1e-6


def test_whole_numbers_are_taken_as_float32() -> None:
    y, _ = batch_norm(jnp.asarray([[1], [3]]), None, epsilon=0.0)
    np.testing.assert_array_equal(y, [[-1.0], [1.0]])
    assert y.dtype == jnp.float32
