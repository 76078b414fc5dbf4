"""JAX's transformations of the pure function, and what a backward keeps in memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.test_util import check_grads

import steadynorm as sn
from steadynorm.jax import RunningStatistics, batch_norm, initial_state


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("policy", ["batch", "frozen", sn.Ghost(2)], ids=repr)
def test_first_and_second_derivatives(policy: Any) -> None:
    with jax.enable_x64(True):
        x, weight, bias, grad = draw(5, 4, 3), draw(3), draw(3, seed=1), draw(5, 4, 3, seed=2)
        state = RunningStatistics(draw(3), jnp.ones(3), None)

        def loss(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
            y, _ = batch_norm(x, state, weight, bias, statistics=policy, activation="tanh")
            return (y * grad).sum()

        check_grads(loss, (x, weight, bias), order=2, modes=["rev"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "policy",
    [sn.Steady(window=None), sn.Renorm(warmup=0, r_ramp=1, d_ramp=1)],
    ids=["steady", "renorm"],
)
def test_what_carries_no_gradient_carries_none_in_second_derivatives(policy: Any) -> None:
    constant = jax.lax.stop_gradient
    with jax.enable_x64(True):
        x, grad = draw(5, 2), draw(5, 2, seed=1)
        mean, var = jnp.array([0.3, -0.1]), jnp.array([1.5, 0.7])
        state = RunningStatistics(mean, var, jnp.asarray(3))

        def ours(x: jax.Array) -> jax.Array:
            return batch_norm(x, state, statistics=policy)[0]

        def truth(x: jax.Array) -> jax.Array:
            m, v = x.mean(0), x.var(0)
            if isinstance(policy, sn.Renorm):
                r = constant(jnp.clip(jnp.sqrt((v + 1e-5) / (var + 1e-5)), 1 / 3, 3))
                d = constant(jnp.clip((m - mean) / jnp.sqrt(var + 1e-5), -5, 5))
                return (x - m) / jnp.sqrt(v + 1e-5) * r + d
            k = max(5 / (5 + 16), 1 / 4)
            u = (1 - k) * var + k * v + k * (1 - k) * constant(m - mean) ** 2
            return (x - mean - k * (m - mean)) / jnp.sqrt(u + 1e-5)

        found, wanted = (
            jax.jacrev(jax.grad(lambda x, f=f: (jnp.sin(f(x)) * grad).sum()))(x)
            for f in (ours, truth)
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_derivatives_of_every_order_are_those_of_the_plain_formula() -> None:
    """The third found a constant where the second had left one: an error of a half."""
    with jax.enable_x64(True):
        x, grad, direction = draw(5, 2), draw(5, 2, seed=1), draw(5, 2, seed=2)

        def ours(x: jax.Array) -> jax.Array:
            return (jnp.tanh(batch_norm(x, None)[0]) * grad).sum()

        def plain(x: jax.Array) -> jax.Array:
            normalized = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)
            return (jnp.tanh(normalized) * grad).sum()

        for _ in range(3):
            np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(plain)(x), rtol=1e-9)
            ours, plain = (
                lambda x, f=f: (jax.grad(f)(x) * direction).sum()  # type: ignore[misc]
                for f in (ours, plain)
            )


def test_vmap_is_a_loop_in_values_states_and_gradients() -> None:
    x, grad = draw(4, 6, 3), draw(4, 6, 3, seed=1)
    state = initial_state(3)

    def one(x: jax.Array, grad: jax.Array) -> tuple[Any, jax.Array]:
        y, pull, after = jax.vjp(
            lambda x: batch_norm(x, state, statistics="steady"), x, has_aux=True
        )
        return (y, after), pull(grad)[0]

    together = jax.vmap(one)(x, grad)
    for i in range(4):
        jax.tree.map(
            lambda t, alone, i=i: np.testing.assert_allclose(t[i], alone, atol=1e-6),
            together,
            one(x[i], grad[i]),
        )


@pytest.mark.parametrize(
    ("activation", "sized"),
    [(None, 1), ("relu", 2), ("silu", 1)],  # x; and y, where the derivative is read from it
)
def test_a_backward_keeps_the_input_and_no_copy_of_it(activation: str | None, sized: int) -> None:
    x, weight = draw(64, 32, 8), draw(8)

    def call(x: jax.Array, weight: jax.Array) -> jax.Array:
        return batch_norm(x, None, weight, activation=activation)[0]

    _, pull = jax.vjp(call, x, weight)
    kept = [t for t in jax.tree.leaves(pull) if isinstance(t, jax.Array) and t.size == x.size]
    assert len(kept) == sized
    others = sum(t.size for t in jax.tree.leaves(pull) if hasattr(t, "size")) - sized * x.size
    assert others < 200


@pytest.mark.parametrize("policy", ["batch", "steady", "running", "renorm", "frozen"])
def test_a_training_call_is_exported_for_any_batch_size(policy: str) -> None:
    """`jax.export` raised AttributeError: a symbol for the size is no number."""
    x, grad, state = draw(6, 5, 3), draw(6, 5, 3, seed=1), initial_state(3)

    def call(x: jax.Array, grad: jax.Array) -> Any:
        y, pull, after = jax.vjp(lambda x: batch_norm(x, state, statistics=policy), x, has_aux=True)
        return y, pull(grad), after

    sizes = export.symbolic_shape("samples, positions")
    shape = jax.ShapeDtypeStruct((*sizes, 3), x.dtype)
    found = export.export(jax.jit(call))(shape, shape).call(x, grad)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(call(x, grad)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_ghost_is_exported_for_one_batch_size() -> None:
    call = jax.jit(lambda x: batch_norm(x, None, statistics=sn.Ghost(2))[0])
    samples, positions = export.symbolic_shape("samples, positions")
    with pytest.raises(ValueError, match=r"got the symbol samples\. Export for one batch size\."):
        export.export(call)(jax.ShapeDtypeStruct((samples, 5, 3), jnp.float32))
    x = draw(6, 5, 3)
    exported = export.export(call)(jax.ShapeDtypeStruct((6, positions, 3), x.dtype))
    np.testing.assert_allclose(exported.call(x), call(x), atol=1e-6)


@pytest.mark.parametrize(
    ("policy", "dtype"),
    [("renorm", "bfloat16"), ("running", "float32"), (sn.Ghost(3), "float32")],
    ids=repr,
)
def test_a_program_that_refuses_promotion_gets_the_same(policy: Any, dtype: str) -> None:
    """`Ghost` raised under "raise", and half precision and counts of batches under "strict"."""
    x, grad, state = draw(8, 4, 3).astype(dtype), draw(8, 4, 3, seed=1), initial_state(3)
    weight, mask = draw(3, seed=2), draw(8, 4, seed=3) > -0.5

    def loss(x: jax.Array, weight: jax.Array) -> Any:
        y, after = batch_norm(
            x, state, weight, weight, statistics=policy, mask=mask, activation="silu", residual=x
        )
        return (y.astype("float32") * grad).sum(), (y, after)

    call = jax.value_and_grad(jax.jit(loss), (0, 1), has_aux=True)
    wanted = call(x, weight)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        found = call(x, weight)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_scan_moves_the_state_as_a_loop_does() -> None:
    batches, state = draw(5, 8, 3), initial_state(3)
    scanned, _ = jax.lax.scan(
        lambda state, x: (batch_norm(x, state, statistics="steady")[1], None), state, batches
    )
    for x in batches:
        state = batch_norm(x, state, statistics="steady")[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), scanned, state)
    assert int(scanned.batches) == 5


def test_splitting_a_stream_leaves_steadys_state_nearly_the_same() -> None:
    """The averages span the same data at every batch size."""
    stream, ends = draw(512, 4) * 2 + 3, []
    for size in (1, 8, 64):
        state, _ = jax.lax.scan(
            lambda state, x: (batch_norm(x, state, statistics="steady")[1], None),
            initial_state(4),
            stream.reshape(-1, size, 4),
        )
        ends.append(state)
    for state in ends:
        np.testing.assert_allclose(state.mean, stream.mean(0), atol=0.15)
        np.testing.assert_allclose(state.var, stream.var(0), rtol=0.1)
