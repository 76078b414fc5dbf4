"""Several devices as one: `shard_map`, `pmap` and `vmap`, weighted by counts."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import steadynorm as sn
from steadynorm.jax import BatchNorm, RunningStatistics, batch_norm

POLICIES = [sn.Batch(), sn.Steady(), sn.Renorm(warmup=0), sn.Ghost(2)]
STATE = RunningStatistics(jnp.array([0.1, 0.2, 0.3]), jnp.array([1.0, 2.0, 3.0]), jnp.asarray(5))


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def mesh() -> jax.sharding.Mesh:
    if len(jax.devices()) < 4:
        pytest.skip("JAX was started with fewer than four devices before these tests were read")
    return jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def close(actual: Any, expected: Any) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6, rtol=3e-6), actual, expected
    )


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_shard_map_equals_one_device(policy: Any) -> None:
    """Values, state and all gradients; JAX itself checks that state and weights stay shared."""
    x, grad, weight, bias = draw(16, 6, 3), draw(16, 6, 3, seed=1), draw(3), draw(3, seed=2)
    mask = draw(16, 6, seed=3) < 1  # a different count on every device

    def loss(
        x: jax.Array, weight: jax.Array, bias: jax.Array, axis_name: str | None
    ) -> tuple[jax.Array, Any]:
        def local(x: Any, grad: Any, mask: Any, weight: Any, bias: Any, state: Any) -> Any:
            y, after = batch_norm(
                x, state, weight, bias, statistics=policy, mask=mask, axis_name=axis_name
            )
            return y, (y * grad), after

        if axis_name is not None:
            local = jax.shard_map(
                local,
                mesh=mesh(),
                in_specs=(P("data"), P("data"), P("data"), P(), P(), P()),
                out_specs=(P("data"), P("data"), P()),
            )
        y, weighted, after = local(x, grad, mask, weight, bias, STATE)
        return weighted.sum(), (y, after)

    run = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnames="axis_name"
    )
    (_, aux), gradients = run(x, weight, bias, axis_name="data")
    (_, expected_aux), expected = run(x, weight, bias, axis_name=None)
    close(aux, expected_aux)
    close(gradients, expected)


def test_masked_devices_are_weighted_by_their_counts() -> None:
    """flax takes the mean of the devices' means: 6.25 where 4.0 is right."""
    x = jnp.array([[10.0, 0, 0, 0], [2.5, 2.5, 2.5, 2.5]])[..., None]
    mask = jnp.array([[True, False, False, False], [True] * 4])[..., None]
    state = RunningStatistics(jnp.zeros(1), jnp.ones(1), None)
    call = partial(batch_norm, momentum=0.0, axis_name="d")
    _, after = jax.vmap(lambda x, m: call(x, state, mask=m), axis_name="d")(x, mask)
    np.testing.assert_allclose(after.mean, np.full((2, 1), 4.0))
    theirs = nnx.BatchNorm(1, momentum=0.0, axis_name="d", rngs=nnx.Rngs(0))
    nnx.vmap(
        lambda layer, x, m: layer(x, mask=m),
        in_axes=(nnx.StateAxes({...: None}), 0, 0),
        axis_name="d",
    )(theirs, x, mask)
    np.testing.assert_allclose(theirs.mean[...], [6.25])  # the defect is still theirs


def test_pmap_pools_and_agrees_with_one_device() -> None:
    mesh()
    x = draw(4, 5, 3) + 1e6
    y, after = jax.pmap(
        lambda x: batch_norm(x, STATE, axis_name="d", statistics="steady"), axis_name="d"
    )(x)
    expected, expected_after = batch_norm(x.reshape(20, 3), STATE, statistics="steady")
    np.testing.assert_allclose(y.reshape(20, 3), expected, atol=2e-6)
    for row in range(4):
        np.testing.assert_allclose(after.mean[row], expected_after.mean, rtol=1e-7)
        np.testing.assert_array_equal(after.var[row], after.var[0])


def test_groups_of_devices_pool_on_their_own() -> None:
    x = draw(4, 5, 3)
    groups = [[0, 3], [1, 2]]
    y, after = jax.pmap(
        lambda x: batch_norm(x, STATE, axis_name="d", axis_index_groups=groups), axis_name="d"
    )(x) if len(mesh().devices) else (None, None)  # fmt: skip
    for pair in groups:
        both = x[jnp.array(pair)].reshape(10, 3)
        expected, expected_after = batch_norm(both, STATE)
        close(y[jnp.array(pair)].reshape(10, 3), expected)
        close(after.mean[pair[0]], expected_after.mean)
        close(after.mean[pair[1]], expected_after.mean)


@pytest.mark.parametrize("policy", ["batch", "steady", sn.Ghost(2)], ids=repr)
@pytest.mark.parametrize("groups", [[[0, 1, 2], [3]], [[2], [3, 1, 0]]], ids=repr)
def test_groups_of_devices_may_differ_in_size(groups: list[list[int]], policy: Any) -> None:
    if len(mesh().devices) < 4:
        return
    x, grad = draw(4, 4, 3), draw(4, 4, 3, seed=1)
    state = STATE._replace(batches=jnp.asarray(7))

    def loss(x: jax.Array, grad: jax.Array, **pooled: Any) -> Any:
        y, after = batch_norm(x, state, statistics=policy, **pooled)
        return (y * grad).sum(), (y, after)

    def device(x: jax.Array, grad: jax.Array) -> Any:
        pooled = {"axis_name": "d", "axis_index_groups": groups}
        return jax.grad(partial(loss, **pooled), has_aux=True)(x, grad)

    dx, (y, after) = jax.pmap(device, axis_name="d")(x, grad)
    for group in groups:
        mine = jnp.array(group) if policy == sn.Ghost(2) else jnp.array(sorted(group))
        one = x[mine].reshape(-1, 3), grad[mine].reshape(-1, 3)
        expected_dx, (expected, expected_after) = jax.grad(loss, has_aux=True)(*one)
        close(y[mine].reshape(-1, 3), expected)
        close(dx[mine].reshape(-1, 3), expected_dx)
        for index in group:
            close(jax.tree.map(lambda t, i=index: t[i], after), expected_after)


def test_a_device_without_a_valid_position_takes_part_and_has_no_say() -> None:
    x = jnp.stack([draw(6, 3), jnp.full((6, 3), 1e3)])
    mask = jnp.array([[True] * 6, [False] * 6])
    call = jax.vmap(lambda x, m: batch_norm(x, STATE, mask=m, axis_name="d"), axis_name="d")
    y, after = call(x, mask)
    expected, expected_after = batch_norm(x[0], STATE)
    close(y[0], expected)
    close(after.mean[1], expected_after.mean)


def test_the_module_pools_over_devices_under_nnx_shard_map() -> None:
    layer = BatchNorm(3, axis_name="data", rngs=nnx.Rngs(0))
    alone = BatchNorm(3, rngs=nnx.Rngs(0))
    x = draw(16, 3)

    @nnx.jit
    @nnx.shard_map(
        mesh=mesh(),
        in_specs=(nnx.StateSharding({...: P()}), P("data")),
        out_specs=P("data"),
    )
    def forward(layer: BatchNorm, x: jax.Array) -> jax.Array:
        return layer(x)

    close(forward(layer, x), alone(x))
    close(layer.mean[...], alone.mean[...])
