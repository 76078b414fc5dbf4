"""At the edges: empty and masked-out batches, infinities, and what is refused, with which words."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import steadynorm as sn
from steadynorm.jax import BatchNorm, batch_norm, initial_state

X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 5, 3)), jnp.float32)
STATE = initial_state(3)._replace(mean=jnp.array([1.0, 2.0, 3.0]), batches=jnp.asarray(7))
POLICIES = ["batch", "steady", "running", "renorm", sn.Ghost(2), "frozen"]


def unmoved(after: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, after, STATE)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_an_empty_batch_updates_nothing(policy: Any) -> None:
    y, after = batch_norm(X[:0], STATE, statistics=policy)
    assert y.shape == (0, 5, 3)
    unmoved(after)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_without_a_valid_position_the_running_statistics_serve(policy: Any) -> None:
    call = jax.jit(lambda x: batch_norm(x, STATE, statistics=policy, mask=jnp.zeros((4, 5), bool)))
    y, after = call(X)
    np.testing.assert_allclose(y, (X - STATE.mean) / np.sqrt(1 + 1e-5), atol=1e-6)
    unmoved(after)
    dx = jax.grad(lambda x: (call(x)[0] * X).sum())(X)
    np.testing.assert_allclose(dx, X / np.sqrt(1 + 1e-5), atol=1e-6)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_skip_keeps_nonfinite_batches_out_of_the_state(bad: float) -> None:
    x = X.at[0, 0, 0].set(bad)
    _, after = batch_norm(x, STATE, nonfinite="skip")
    unmoved(after)
    y, after = batch_norm(x, STATE)
    assert not np.isfinite(np.asarray(after.mean[0]))
    assert np.isfinite(np.asarray(y[..., 1:])).all()


@pytest.mark.parametrize("policy", ["steady", "running", "frozen"])
def test_a_batch_of_one_trains(policy: str) -> None:
    x = X[:1, 0]
    dx = jax.grad(lambda x: (batch_norm(x, STATE, statistics=policy)[0] * x[::-1]).sum())(x)
    assert float(jnp.abs(dx).min()) > 0


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != sn.Ghost(2)])
def test_samples_of_padding_alone_change_nothing(policy: Any) -> None:
    """As where a last batch of 2 is filled up to the shape that was compiled."""
    mask = jnp.arange(5) < jnp.array([[3], [5], [0], [0]])
    state = STATE._replace(batches=jnp.asarray(10_000))  # the horizon, not the count, decides
    y, after = batch_norm(X, state, statistics=policy, mask=mask)
    short, short_after = batch_norm(X[:2], state, statistics=policy, mask=mask[:2])
    np.testing.assert_allclose(y[:2], short, rtol=1e-5, atol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), after, short_after)


def test_changing_the_mask_under_it_changes_nothing_at_valid_positions() -> None:
    mask = jnp.arange(20).reshape(4, 5) % 3 > 0
    y, after = batch_norm(X, STATE, mask=mask)
    other, other_after = batch_norm(jnp.where(mask[..., None], X, 1e6), STATE, mask=mask)
    np.testing.assert_array_equal(jnp.where(mask[..., None], y - other, 0), 0)
    jax.tree.map(np.testing.assert_array_equal, after, other_after)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"axis": (1, 2)}, TypeError, "`axis` must be one axis, an int; got (1, 2)"),
        ({"axis": 3}, ValueError, "`axis` must be an axis of `x`, from -3 to 2; got 3"),
        ({"activation": "swish"}, ValueError, "`activation` must be None or one of relu, relu6"),
        ({"activation": jnp.tanh}, TypeError, "`activation` must be None or one of relu, relu6"),
        ({"nonfinite": "drop"}, ValueError, "must be 'propagate' or 'skip'; got 'drop'."),
        ({"momentum": 1.5}, ValueError, "must lie in [0, 1], the weight of the old average"),
        ({"statistics": "group"}, ValueError, "statistics must be one of 'batch', 'steady'"),
        ({"weight": jnp.ones(4)}, ValueError, "`weight` must have shape (3,), one value for each"),
        ({"residual": X[:1]}, ValueError, "shape of `x`, (4, 5, 3); got (1, 5, 3)."),
        ({"mask": jnp.ones((4, 5))}, TypeError, "must be boolean, True where valid; got float32."),
        ({"mask": jnp.ones((5, 4), bool)}, ValueError, "(4, 5), axis by axis, or have length 1"),
        ({"mask": jnp.ones((4, 5, 3), bool)}, ValueError, "got (4, 5, 3)."),
        ({"mask": jnp.ones((4, 1), bool), "x": X[:, :4]}, ValueError, "can be read in two ways"),
        ({"state": list(STATE)}, TypeError, "must be a steadynorm.jax.RunningStatistics, from"),
        ({"state": tuple(STATE)}, TypeError, "or None; got tuple. Write RunningStatistics("),
        (
            {"state": STATE._replace(mean=jnp.zeros(3, int))},
            TypeError,
            "`state.mean` must be a floating-point array; got int32. Use jnp.asarray(",
        ),
        ({"axis": 0, "statistics": "ghost"}, ValueError, "groups samples along axis 0"),
        ({"epsilon": -1e-3}, ValueError, "`epsilon` must be 0 or above; got -0.001."),
        ({"dtype": "int32"}, TypeError, "`dtype` must be a floating-point type; got int32."),
        ({"weight": jnp.ones(3) * 1j}, TypeError, "`weight` must hold real numbers; got complex64"),
        ({"residual": X * 1j}, TypeError, "`residual` must hold real numbers; got complex64."),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=re.escape(words)):
        batch_norm(**{"x": X, "state": STATE, **arguments})


@pytest.mark.parametrize(
    ("name", "value"), [("use_running_average", True), ("momentum", 0.75), ("epsilon", 0.5)]
)
def test_settings_are_constants(name: str, value: float) -> None:
    """Arrays of one number were "non-hashable", tracers an error from inside."""

    def call(value: Any) -> Any:
        return batch_norm(X, STATE, **{name: value})

    jax.tree.map(np.testing.assert_array_equal, call(jnp.asarray(value)), call(value))
    with pytest.raises(TypeError, match=f"`{name}` must be known when JAX traces the call"):
        jax.jit(call)(value)


def test_a_weight_may_be_a_list() -> None:
    y, _ = batch_norm(X, STATE, [1.0, 2.0, 3.0], residual=np.asarray(X))
    wanted, _ = batch_norm(X, STATE, jnp.array([1.0, 2.0, 3.0]), residual=X)
    np.testing.assert_array_equal(y, wanted)


def test_a_mask_of_one_reading_is_taken_with_as_many_axes_or_one_fewer() -> None:
    x, valid = X[:, :4], jnp.array([True, False, True, True])
    for mask, whole in (
        (valid[:, None, None], valid[:, None]),
        (valid[None, :, None], valid[None, :]),
        (valid[None, :], valid[None, :]),
        (jnp.ones((1, 1), bool), jnp.ones((1, 1), bool)),
    ):
        expected = batch_norm(x, STATE, mask=jnp.broadcast_to(whole, (4, 4)))
        jax.tree.map(np.testing.assert_array_equal, batch_norm(x, STATE, mask=mask), expected)


@pytest.mark.parametrize("policy", ["steady", "running", "renorm"])
def test_channels_in_front_are_the_same_batch(policy: str) -> None:
    x, state = X[:, 0], STATE._replace(batches=jnp.asarray(50))
    y, after = batch_norm(x, state, statistics=policy)
    turned, turned_after = batch_norm(x.T, state, statistics=policy, axis=0)
    np.testing.assert_allclose(turned.T, y, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), turned_after, after)


def test_what_needs_a_state_says_so() -> None:
    for arguments in ({"use_running_average": True}, {"statistics": "steady"}):
        with pytest.raises(ValueError, match=r"needs running statistics; got state=None\. Start"):
            batch_norm(X, None, **arguments)
    with pytest.raises(TypeError, match="`x` must hold real numbers; got complex64"):
        batch_norm(X + 1j, STATE)
    with pytest.raises(ValueError, match="BatchNorm: `activation` must be None or one of"):
        BatchNorm(3, activation="no", rngs=nnx.Rngs(0))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_running_statistics_in_half_precision_serve_in_inference_alone(dtype: Any) -> None:
    """In bfloat16 a running mean stopped at 2.2 where 3 is right."""
    state = initial_state(2, dtype=dtype)
    x = jnp.ones((4, 2), dtype)
    with pytest.raises(TypeError, match=r"`state\.mean` must be float32 or wider in training"):
        batch_norm(x, state)
    for settings in ({"use_running_average": True}, {"statistics": "frozen"}):
        y, after = batch_norm(x, state, **settings)
        assert after is state
        np.testing.assert_allclose(y.astype(jnp.float32), 1.0, rtol=1e-2)


@pytest.mark.parametrize("fill", [np.nan, -np.inf])
@pytest.mark.parametrize("activation", [None, "relu", "silu", "tanh"])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_what_padding_holds_enters_no_gradient(policy: Any, activation: Any, fill: float) -> None:
    """Where the loss leaves it out; the truth is padding of zeros."""
    mask = (jnp.arange(20).reshape(4, 5) % 3 > 0)[..., None]

    def loss(x: Any, residual: Any, weight: Any) -> Any:
        y, _ = batch_norm(
            x, STATE, weight, residual=residual, mask=mask, statistics=policy, activation=activation
        )
        return (jnp.where(mask, y, 0) * X[::-1]).sum()

    def gradients(fill: float) -> Any:
        tensors = (jnp.where(mask, X, fill), jnp.where(mask, X[:, ::-1], fill), jnp.ones(3))
        return jax.grad(loss, argnums=(0, 1, 2))(*tensors)

    for found, truth in zip(gradients(fill), gradients(0.0), strict=True):
        np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-5)
