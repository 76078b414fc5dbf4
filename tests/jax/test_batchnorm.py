"""`BatchNorm` in the place of `flax.nnx.BatchNorm`: what flax documents and tests of its module."""

import inspect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import steadynorm as sn
from steadynorm.jax import BatchNorm


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def pair(channels: int = 3, **arguments: Any) -> tuple[nnx.BatchNorm, BatchNorm]:
    kinds = (nnx.BatchNorm, BatchNorm)
    theirs, ours = (kind(channels, rngs=nnx.Rngs(0), **arguments) for kind in kinds)
    return theirs, ours


def close(actual: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), actual, expected)


def test_the_constructor_takes_all_that_flax_takes_with_its_defaults() -> None:
    theirs = inspect.signature(nnx.BatchNorm.__init__).parameters
    ours = inspect.signature(BatchNorm.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    plain = [name for name in theirs if name not in {"self", "bias_init", "scale_init"}]
    assert {n: ours[n].default for n in plain} == {n: theirs[n].default for n in plain}


def test_attributes_variables_and_state_are_flaxes() -> None:
    theirs, ours = pair(use_bias=False)
    assert isinstance(ours, nnx.BatchNorm)
    assert set(vars(theirs)) <= set(vars(ours))
    assert jax.tree.structure(nnx.state(ours)) == jax.tree.structure(nnx.state(theirs))
    assert ours.bias is None
    for name, kind in (("mean", nnx.BatchStat), ("var", nnx.BatchStat), ("scale", nnx.Param)):
        assert type(getattr(ours, name)) is kind


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"axis": 1, "momentum": 0.9, "epsilon": 1e-3},
        {"use_bias": False},
        {"use_scale": False, "use_bias": False},
        {"scale_init": nnx.initializers.normal(), "bias_init": nnx.initializers.normal()},
        {"dtype": jnp.float32, "param_dtype": jnp.bfloat16},
    ],
    ids=lambda arguments: " ".join(arguments) or "defaults",
)
def test_training_and_inference_equal_flaxes(arguments: dict[str, Any]) -> None:
    theirs, ours = pair(use_fast_variance=False, **arguments)
    x = draw(6, 3, 4) if arguments.get("axis") == 1 else draw(6, 4, 3)
    for step in range(3):
        y, expected = ours(x * step + step), theirs(x * step + step)
        assert y.dtype == expected.dtype
        close(y, expected)
    close(nnx.to_pure_dict(nnx.state(ours)), nnx.to_pure_dict(nnx.state(theirs)))
    for layer in (theirs, ours):
        layer.eval()
    close(ours(x), theirs(x))
    close(ours(x, use_running_average=False), theirs(x, use_running_average=False))


def test_gradients_equal_flaxes() -> None:
    theirs, ours = pair(use_fast_variance=False)
    x, grad = draw(5, 4, 3), draw(5, 4, 3, seed=1)

    def loss(layer: nnx.BatchNorm, x: jax.Array) -> jax.Array:
        return (layer(x) * grad).sum()

    wanted = nnx.DiffState(0, nnx.Param)
    found, expected = (
        nnx.jit(nnx.grad(loss, argnums=(wanted, 1)))(layer, x) for layer in (ours, theirs)
    )
    close(nnx.to_pure_dict(found[0]), nnx.to_pure_dict(expected[0]))
    close(found[1], expected[1])
    close(ours.mean[...], theirs.mean[...])  # the state moved under jit and grad


def test_every_channel_is_normal_after_it() -> None:
    y = BatchNorm(3, rngs=nnx.Rngs(0))(4 * draw(40, 5, 3) + 7)
    np.testing.assert_allclose(y.mean((0, 1)), 0, atol=1e-5)
    np.testing.assert_allclose(y.var((0, 1)), 1, rtol=1e-4)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_types_are_flaxes(dtype: Any, param_dtype: Any) -> None:
    theirs, ours = pair(dtype=dtype, param_dtype=param_dtype)
    x = draw(6, 3).astype(jnp.bfloat16)
    assert ours(x).dtype == theirs(x).dtype
    assert ours.mean[...].dtype == ours.var[...].dtype == jnp.float32
    assert ours.scale is not None
    assert ours.scale[...].dtype == param_dtype


def test_without_a_choice_of_mode_the_call_is_refused() -> None:
    layer = BatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`use_running_average` must be given to the constructor"):
        layer(draw(2, 3))
    assert layer(draw(2, 3), use_running_average=True).shape == (2, 3)


def test_a_mask_in_flaxes_shape_and_in_ours() -> None:
    theirs, ours = pair(use_fast_variance=False)
    x, mask = draw(6, 4, 3), draw(6, 4, seed=1) < 0.5
    expected = theirs(x, mask=mask[..., None])
    close(ours(x, mask=mask[..., None]), expected)
    close(ours.var[...], theirs.var[...])
    close(ours(x, mask=mask), expected)


def test_one_value_per_channel_gives_the_bias() -> None:
    theirs, ours = pair()
    x = draw(1, 3)
    close(ours(x), theirs(x))
    np.testing.assert_array_equal(ours(x), jnp.zeros((1, 3)))


@pytest.mark.parametrize("statistics", ["steady", "running", "renorm"])
def test_policies_that_count_batches_add_one_variable(statistics: str) -> None:
    layer = BatchNorm(3, statistics=statistics, rngs=nnx.Rngs(0))
    theirs, _ = pair()
    nnx.update(layer, nnx.state(theirs))  # flax's checkpoint: what it lacks is left alone

    @nnx.jit
    def train(layer: BatchNorm, x: jax.Array) -> jax.Array:
        return layer(x)

    for _ in range(3):
        train(layer, draw(4, 3))
    assert int(layer.num_batches_tracked[...]) == 3


@pytest.mark.parametrize(("statistics", "weight"), [("steady", 4 / 644), ("running", 0.01)])
def test_statistics_of_flaxes_checkpoint_survive_the_first_batch(
    statistics: str, weight: float
) -> None:
    """The first batch weighs what it weighs after many, instead of replacing them."""
    layer = BatchNorm(3, statistics=statistics, rngs=nnx.Rngs(0))
    theirs, _ = pair()
    theirs.mean[...], theirs.var[...] = jnp.full(3, 10.0), jnp.full(3, 4.0)
    nnx.update(layer, nnx.state(theirs))
    x = draw(4, 3)
    nnx.jit(lambda layer, x: layer(x))(layer, x)
    np.testing.assert_allclose(layer.mean[...], 10 + weight * (x.mean(0) - 10), rtol=1e-6)
    assert int(layer.num_batches_tracked[...]) > sn.statistics.MANY_BATCHES


def test_frozen_never_moves_and_residual_and_activation_run_inside() -> None:
    layer = BatchNorm(3, statistics=sn.Frozen(), activation="relu", rngs=nnx.Rngs(0))
    x = draw(4, 3)
    before = nnx.to_pure_dict(nnx.state(layer))
    np.testing.assert_allclose(
        layer(x, residual=x), jnp.maximum(x / jnp.sqrt(1 + 1e-5) + x, 0), atol=1e-6
    )
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(layer)), before)


def test_it_splits_merges_clones_and_views() -> None:
    layer = BatchNorm(3, statistics="steady", rngs=nnx.Rngs(0))
    layer(draw(4, 3))
    graph, state = nnx.split(layer)
    again = nnx.merge(graph, state)
    assert again.statistics == sn.Steady()
    close(again(draw(4, 3), use_running_average=True), layer(draw(4, 3), use_running_average=True))
    seen = nnx.view(layer, use_running_average=True)
    seen(draw(4, 3))
    assert int(layer.num_batches_tracked[...]) == 1


def test_layers_stacked_by_vmap_keep_their_own_statistics() -> None:
    @nnx.split_rngs(splits=4)
    @nnx.vmap
    def make(rngs: nnx.Rngs) -> BatchNorm:
        return BatchNorm(3, rngs=rngs)

    layers, x = make(nnx.Rngs(0)), draw(4, 5, 3)
    y = nnx.vmap(lambda layer, x: layer(x))(layers, x)
    for i in range(4):
        alone = BatchNorm(3, rngs=nnx.Rngs(0))
        close(y[i], alone(x[i]))
        close(layers.mean[...][i], alone.mean[...])


def test_a_network_trains_in_scan_and_checkpoint() -> None:
    """The statistics move once a step, however often the layer is recomputed."""
    layer, plain = (BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0)) for _ in range(2))
    x = draw(6, 3) + 2

    def loss(layer: BatchNorm, x: jax.Array) -> jax.Array:
        return (jnp.tanh(layer(x)) ** 2).sum()

    found = nnx.grad(nnx.remat(loss), argnums=1)(layer, x)
    close(found, nnx.grad(loss, argnums=1)(plain, x))
    close(layer.mean[...], plain.mean[...])
    np.testing.assert_allclose(layer.mean[...], 0.1 * x.mean(0), rtol=1e-5)

    carry, _ = jax.lax.scan(partial(advance, x), nnx.split(layer)[1], None, length=20)
    graph, _ = nnx.split(layer)
    close(nnx.merge(graph, carry).mean[...], (1 - 0.9**21) * x.mean(0))


def advance(x: jax.Array, state: Any, _: None) -> tuple[Any, None]:
    layer = nnx.merge(nnx.graphdef(BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0))), state)
    layer(x)
    return nnx.state(layer), None


def test_steady_is_one_way_and_says_so() -> None:
    """No state leaves a backward pass in JAX: `window` is as None, in value and gradient."""
    layers = [
        BatchNorm(3, statistics=sn.Steady(prior=16, window=window), rngs=nnx.Rngs(0))
        for window in (16, None)
    ]
    for seed in range(3):
        x, grad = draw(2, 5, 3, seed=seed), draw(2, 5, 3, seed=seed + 9)
        found, expected = (
            nnx.value_and_grad(lambda layer, x, g=grad: (layer(x) * g).sum(), argnums=(0, 1))(
                layer, x
            )
            for layer in layers
        )
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    close(nnx.state(layers[0]), nnx.state(layers[1]))
    assert "one-way='JAX keeps no memory of the gradient'" in repr(layers[0])
    assert "one-way" not in repr(layers[1])
    y, _ = sn.jax.batch_norm(x, sn.jax.initial_state(3), statistics=sn.Steady(window=16))
    assert y.shape == x.shape
