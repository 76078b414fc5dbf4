"""What `steadynorm.keras.BatchNormalization` must do on the backend of this process.

Run by `test_backends.py`; alone: KERAS_BACKEND=jax python -m pytest tests/keras/layer_checks.py
"""

from itertools import product
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from tests import truth

import steadynorm as sn
from steadynorm.keras import BatchNormalization

# Keras's variables have NumPy's old `__array__`, without `copy`.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BACKEND = keras.config.backend()
POLICIES = {
    "batch": sn.Batch(),
    "steady": sn.Steady(window=None),
    "running": sn.Running(),
    "renorm": sn.Renorm(warmup=0, r_ramp=2, d_ramp=2),
    "ghost": sn.Ghost(3),
    "frozen": sn.Frozen(),
}
SHAPES = {"2d": ((11, 3), -1), "last": ((5, 4, 3, 3), -1), "first": ((5, 3, 4, 2), 1)}
Layer = keras.layers.BatchNormalization


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def array(tensor: Any) -> np.ndarray:
    return ops.convert_to_numpy(tensor)


def counted(layer: Layer, batches: int) -> list[np.int32]:
    """What follows Keras's weights in a list for `set_weights`."""
    return [] if getattr(layer, "num_batches_tracked", None) is None else [np.int32(batches)]


def built(kind: type[Layer], shape: tuple[int, ...], seed: int = 5, **arguments: Any) -> Layer:
    """A layer with arbitrary weights: gamma, beta and the moving statistics."""
    layer = kind(**arguments)
    layer.build(shape)
    channels = shape[layer.axis]
    values = [draw(channels, seed=seed + i) for i in range(2 * layer.scale + layer.center)]
    values = values[: layer.scale + layer.center]
    moving = [draw(channels, seed=seed + 7), draw(channels, seed=seed + 8) ** 2 + 0.5]
    layer.set_weights([*values, *moving, *counted(layer, 7)])
    return layer


def gradients(layer: Layer, x: np.ndarray, grad: np.ndarray, **call: Any) -> list[np.ndarray]:
    """Of `sum(layer(x) * grad)`, for x and the trainable weights, by the backend's own means."""
    weights = layer.trainable_variables
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            t = tf.convert_to_tensor(x)
            tape.watch(t)
            loss = tf.reduce_sum(layer(t, training=True, **call) * grad)
        found = tape.gradient(loss, [t, *(w.value for w in weights)])
    elif BACKEND == "torch":
        t = ops.convert_to_tensor(x).requires_grad_()
        layer.zero_grad()
        (layer(t, training=True, **call) * ops.convert_to_tensor(grad)).sum().backward()
        found = [t.grad, *(w.value.grad for w in weights)]
    else:
        import jax

        fixed = [v.value for v in layer.non_trainable_variables]

        def loss(t: Any, values: list[Any]) -> tuple[Any, list[Any]]:
            y, moved = layer.stateless_call(values, fixed, t, training=True, **call)
            return (y * grad).sum(), moved

        both = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        (dx, dweights), moved = both(x, [w.value for w in weights])
        for variable, value in zip(layer.non_trainable_variables, moved, strict=True):
            variable.assign(value)
        found = [dx, *dweights]
    return [array(t) for t in found]


@pytest.mark.parametrize(("policy", "masked"), list(product(POLICIES, [False, True])))
def test_values_gradients_and_statistics_are_right(policy: str, masked: bool) -> None:
    shape, axis = SHAPES["first" if masked else "last"]
    x, grad = 2 * draw(*shape) + 1, draw(*shape, seed=1)
    mask = draw(*np.delete(shape, axis), seed=2) < 0.5 if masked else None
    layer = built(
        BatchNormalization, shape, axis=axis, momentum=0.8, statistics=POLICIES[policy],
        activation="tanh",
    )  # fmt: skip
    gamma, beta, mean, var, *_ = layer.get_weights()
    second = [np.moveaxis(t, axis, 1) for t in (x, grad)]
    expected = truth.train(
        second[0],
        POLICIES[policy],
        truth.Running(mean, var, 7),
        truth.Setting(gamma, beta, "tanh", 0.2, 1e-3, unbiased=False),
        mask=mask,
        grad=second[1],
    )
    y = array(layer(x, training=False))
    hat = (np.moveaxis(x, axis, -1) - mean) / np.sqrt(var + 1e-3)
    np.testing.assert_allclose(y, np.moveaxis(np.tanh(hat * gamma + beta), -1, axis), atol=2e-6)
    call = {} if mask is None else {"mask": mask}
    dx, dgamma, dbeta = gradients(layer, x, grad, **call)
    np.testing.assert_allclose(np.moveaxis(dx, axis, 1), expected.dx, atol=1e-5)
    np.testing.assert_allclose(dgamma, expected.dweight, atol=2e-5)
    np.testing.assert_allclose(dbeta, expected.dbias, atol=2e-5)
    np.testing.assert_allclose(array(layer.moving_mean), expected.running.mean, atol=1e-6)
    np.testing.assert_allclose(array(layer.moving_variance), expected.running.var, rtol=2e-6)
    layer.set_weights([gamma, beta, mean, var, *counted(layer, 7)])
    y = array(layer(x, training=True, **call))
    np.testing.assert_allclose(np.moveaxis(y, axis, 1), expected.y, atol=3e-6)


TWO_WAY = sn.Steady(prior=16, horizon=64, window=16)


def start(policy: sn.Steady, shape: tuple[int, ...], axis: int) -> tuple[Layer, Any, Any]:
    """A layer, and its running statistics and parameters for the truth."""
    layer = built(BatchNormalization, shape, axis=axis, statistics=policy, activation="tanh")
    gamma, beta, mean, var, *_ = layer.get_weights()
    setting = truth.Setting(gamma, beta, "tanh", 0.01, 1e-3, unbiased=False)
    return layer, truth.Running(mean, var, 7), setting


@pytest.mark.parametrize("masked", [False, True])
def test_the_memory_of_the_gradient_on_torch_and_one_way_elsewhere(masked: bool) -> None:
    """Ten steps; one-way is `window=None`, and the layer says so."""
    two_way = BACKEND == "torch"
    shape, axis = SHAPES["first"]
    layer, running, setting = start(TWO_WAY, shape, axis)
    policy = TWO_WAY if two_way else sn.Steady(prior=16, horizon=64, window=None)
    memory = np.zeros((2, 3)) if two_way else None
    for step in range(10):
        x, grad = 2 * draw(*shape, seed=2 * step) + 1, draw(*shape, seed=2 * step + 1)
        mask = draw(*np.delete(shape, axis), seed=99 + step) < 0.5 if masked else None
        right = truth.train(x, policy, running, setting, mask=mask, grad=grad, memory=memory)
        assert right.running is not None
        running, memory = right.running, right.memory
        dx, *_ = gradients(layer, x, grad, **({} if mask is None else {"mask": mask}))
        np.testing.assert_allclose(dx, right.dx, atol=1e-5)
        if two_way:
            np.testing.assert_allclose(array(layer.gradient_memory.value), memory, atol=1e-5)
    why = f"one-way: Keras on {BACKEND} keeps no memory of the gradient"
    assert (why in repr(layer)) is not two_way
    assert layer.get_config()["statistics"]["window"] == 16
    assert len(layer.get_weights()) == 4
    layer.set_weights(layer.get_weights())
    assert layer.gradient_memory is None or not array(layer.gradient_memory.value).any()


def test_samples_of_padding_alone_change_nothing() -> None:
    """Under `Steady`, whose statistics move by how many samples there are."""
    shape, axis = SHAPES["first"]
    mask = draw(*np.delete(shape, axis), seed=1) < 0.5
    mask[2:] = False
    found = []
    for rows in (shape[0], 2):
        layer, *_ = start(sn.Steady(horizon=2, window=None), shape, axis)
        given = ops.convert_to_tensor(draw(*shape)[:rows])
        layer(given, training=True, mask=ops.convert_to_tensor(mask[:rows]))
        found.append([array(w.value) for w in layer.weights])
    for padded, short in zip(*found, strict=True):
        np.testing.assert_allclose(padded, short, rtol=1e-6)


def test_the_memory_moves_once_for_a_forward() -> None:
    if BACKEND != "torch":
        return  # the test above says that there is none
    shape, axis = SHAPES["2d"]
    x, grad = (
        ops.convert_to_tensor(draw(*shape)).requires_grad_(),
        ops.convert_to_tensor(draw(*shape, seed=1)),
    )
    layer, alone = (start(TWO_WAY, shape, axis)[0] for _ in range(2))
    y = layer(x, training=True)
    y.backward(grad, retain_graph=True)
    first, moved = array(x.grad), array(layer.gradient_memory.value)
    assert moved.any()
    x.grad = None
    y.backward(grad)
    np.testing.assert_array_equal(array(x.grad), first)
    np.testing.assert_array_equal(array(layer.gradient_memory.value), moved)
    alone(x.detach(), training=True)  # a forward without a backward
    assert not array(alone.gradient_memory.value).any()


@pytest.mark.parametrize(
    "arguments",
    [{}, {"axis": 1, "momentum": 0.5, "epsilon": 1e-5}, {"scale": False}, {"center": False}],
    ids=str,
)
def test_equal_to_kerass_layer(arguments: dict[str, Any]) -> None:
    """Outputs in both modes, moving statistics, and weights exchanged both ways."""
    x = draw(6, 3, 3)
    theirs = built(Layer, x.shape, **arguments)
    ours = BatchNormalization(**arguments)
    ours.build(x.shape)
    ours.set_weights(theirs.get_weights())
    for step in (1, 2):
        for training in (True, False):
            found, expected = ours(x * step, training=training), theirs(x * step, training=training)
            np.testing.assert_allclose(array(found), array(expected), atol=3e-6)
    theirs.set_weights(ours.get_weights())
    np.testing.assert_allclose(array(theirs(x)), array(ours(x)), atol=3e-6)
    assert {**theirs.get_config(), "name": ours.name}.items() <= ours.get_config().items()
    assert isinstance(ours, Layer)


def test_not_trainable_means_inference_and_nothing_moves() -> None:
    layer = built(BatchNormalization, (6, 3))
    layer.trainable = False
    before, x = layer.get_weights(), draw(6, 3)
    np.testing.assert_array_equal(array(layer(x, training=True)), array(layer(x, training=False)))
    for was, now in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mean", [0.0, 1e6])
def test_forward_is_within_the_bar(policy: str, mean: float) -> None:
    """2e-6 from float64, on float32 data of standard deviation 1."""
    x = draw(64, 7, 5) + np.float32(mean)
    layer = BatchNormalization(epsilon=1e-5, statistics=POLICIES[policy])
    layer.build(x.shape)
    moving = [np.ones(5), np.zeros(5), np.full(5, np.float32(mean + 0.3)), np.ones(5)]
    layer.set_weights([*moving, *counted(layer, 7)])
    running = truth.Running(*layer.get_weights()[2:4], 7)
    setting = truth.Setting(momentum=0.01, unbiased=False)
    expected = truth.train(np.moveaxis(x, -1, 1), POLICIES[policy], running, setting)
    found = np.moveaxis(array(layer(x, training=True)).astype(np.float64), -1, 1)
    assert np.abs(found - expected.y).max() <= 2e-6


def test_the_compiler_keeps_the_bar() -> None:
    x = draw(64, 7, 5) + np.float32(1e6)
    double = x.astype(np.float64)
    expected = (double - double.mean((0, 1))) / np.sqrt(double.var((0, 1)) + 1e-3)
    model = keras.Sequential([keras.Input((7, 5)), BatchNormalization(momentum=0.0)])
    seen = []

    class Loss(keras.losses.Loss):
        def call(self, _: Any, y: Any) -> Any:
            return ops.mean(ops.square(y - ops.cast(expected, "float32")), axis=(1, 2))

    model.compile(optimizer=keras.optimizers.SGD(0.0), loss=Loss(), jit_compile=BACKEND != "torch")
    seen.append(model.train_on_batch(x, expected))
    assert float(np.asarray(seen[0])) <= (6e-7) ** 2
    np.testing.assert_allclose(array(model.layers[0].moving_variance), double.var((0, 1)), 1e-6)


def test_variance_stays_right_where_kerass_falls() -> None:
    """Keras on torch and NumPy: variance by E[x²] - E[x]², NaN at mean 1e3 and deviation 0.1."""
    x = (1e3 + 0.1 * draw(512, 4)).astype(np.float32)
    y = array(BatchNormalization(epsilon=1e-6)(x, training=True))
    np.testing.assert_allclose(y.std(0), 1, atol=1e-3)


def test_masks_with_channels_first() -> None:
    """Keras fails, is silently wrong where C equals T, raises at C = 1, shrinks where none is."""
    for channels in (1, 3, 4):
        x, mask = draw(6, channels, 4), draw(6, 4, seed=1) < 0.5
        layer = BatchNormalization(axis=1, momentum=0.0)
        layer(x, training=True, mask=mask)
        valid = np.moveaxis(x, 1, -1)[mask]
        np.testing.assert_allclose(array(layer.moving_mean), valid.mean(0), atol=1e-6)
        np.testing.assert_allclose(array(layer.moving_variance), valid.var(0), rtol=1e-5)
        layer(x, training=True, mask=np.zeros((6, 4), bool))
        np.testing.assert_allclose(array(layer.moving_variance), valid.var(0), rtol=1e-5)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("steps", [3, 4])
def test_a_mask_that_arrives_by_itself_says_which_steps_count(steps: int, beside: bool) -> None:
    """Of 4 steps of 4 values it fitted the values too, and was taken for theirs."""
    x = draw(6, steps, 4) + 1
    valid = draw(6, steps, seed=1) < 0.5
    x[~valid] = 0
    inputs = keras.Input((steps, 4))
    layer = BatchNormalization(axis=1, momentum=0.0)
    masked = keras.layers.Masking()(inputs)
    model = keras.Model(inputs, layer(masked, residual=inputs) if beside else layer(masked))
    model(x, training=True)
    expected = [x[:, step][valid[:, step]].mean() for step in range(steps)]
    np.testing.assert_allclose(array(layer.moving_mean), expected, atol=1e-5)


def test_a_mask_of_kerass_own_shape_with_channels_first() -> None:
    """(N, C) beside (N, C, T): every channel has its own valid positions."""
    x, mask = draw(6, 3, 4), draw(6, 3, seed=1) < 0.5
    layer = BatchNormalization(axis=1, momentum=0.0)
    y = array(layer(x, training=True, mask=mask))
    for channel in range(3):
        valid = x[mask[:, channel], channel]
        mean, var = valid.mean(), valid.var()
        np.testing.assert_allclose(array(layer.moving_mean)[channel], mean, atol=1e-6)
        np.testing.assert_allclose(array(layer.moving_variance)[channel], var, rtol=1e-5)
        expected = (x[:, channel] - mean) / np.sqrt(var + 1e-3)
        np.testing.assert_allclose(y[:, channel], expected, atol=3e-6)
    mask[:, 1] = False
    before = array(layer.moving_mean), array(layer.moving_variance)
    layer(2 * x, training=True, mask=mask)
    for was, now in zip(before, (layer.moving_mean, layer.moving_variance), strict=True):
        assert ((array(now) == was) == [False, True, False]).all()


def test_a_mask_arrives_by_itself_beside_a_residual_too() -> None:
    tokens = np.array([[1, 2, 0, 0], [3, 0, 0, 0]])
    embedded = keras.layers.Embedding(5, 3, mask_zero=True)
    for residual in (False, True):
        layer = BatchNormalization(momentum=0.0)
        x = embedded(tokens)
        layer(x, training=True, **({"residual": x} if residual else {}))
        np.testing.assert_allclose(
            array(layer.moving_mean), array(x)[tokens > 0].mean(0), atol=1e-6
        )


def test_residual_and_activation_run_inside() -> None:
    x, residual = draw(6, 3), draw(6, 3, seed=1)
    layer = BatchNormalization(activation="relu")
    expected = np.maximum(x / np.sqrt(1 + 1e-3) + residual, 0)
    np.testing.assert_allclose(array(layer(x, residual=residual)), expected, atol=1e-6)
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layer(inputs, residual=inputs))
    np.testing.assert_allclose(array(model(x)), np.maximum(x / np.sqrt(1 + 1e-3) + x, 0), atol=1e-6)


def test_renorm_of_keras_moves_nothing_without_a_valid_value() -> None:
    x, layer = draw(6, 3), BatchNormalization(renorm=True, nonfinite="skip")
    layer(x, training=True)
    before = layer.get_weights()
    layer(x, training=True, mask=np.zeros(6, bool))
    layer(x * np.inf, training=True)
    for was, now in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)
    layer(x, training=True)
    assert not np.array_equal(layer.get_weights()[-1], before[-1])


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_skip_keeps_nonfinite_batches_out(bad: float) -> None:
    x = draw(6, 3)
    x[0, 0] = bad
    layer = BatchNormalization(nonfinite="skip", statistics="steady")
    layer(x, training=True)
    np.testing.assert_array_equal(array(layer.moving_mean), 0)
    assert int(layer.num_batches_tracked) == 0


def test_one_value_gives_beta_and_an_empty_batch_moves_nothing() -> None:
    layer = BatchNormalization()
    np.testing.assert_array_equal(array(layer(draw(1, 3), training=True)), np.zeros((1, 3)))
    before = layer.get_weights()
    assert tuple(layer(draw(0, 3), training=True).shape) == (0, 3)
    for was, now in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)


def test_half_precision_keeps_float32_statistics() -> None:
    layer = BatchNormalization(dtype="mixed_float16", momentum=0.0)
    y = layer(100 + draw(64, 3), training=True)
    assert keras.backend.standardize_dtype(y.dtype) == "float16"
    assert {str(w.dtype) for w in layer.weights} == {"float32"}
    np.testing.assert_allclose(array(y).astype(np.float32).std(0), 1, atol=5e-3)
    if BACKEND != "jax":  # which holds float64 only where that is switched on
        exact = BatchNormalization(dtype="float64", statistics="steady")
        y = exact(draw(6, 3).astype(np.float64), training=True, mask=np.ones((6,), bool))
        assert keras.backend.standardize_dtype(y.dtype) == "float64"


def test_what_is_refused() -> None:
    x = draw(6, 4, 3)
    with pytest.raises(
        ValueError, match=r"`residual` must have the shape of `inputs`, \(6, 4, 3\)"
    ):
        BatchNormalization()(x, residual=x[:1])
    with pytest.raises(ValueError, match=r"one axis fewer than `inputs`: the shape \(6, 4\)"):
        BatchNormalization()(x, training=True, mask=np.ones((6,), bool))
    with pytest.raises(ValueError, match=r"one axis fewer than `inputs`: the shape \(6, 4\)"):
        BatchNormalization()(x, mask=np.ones((6, 3), bool))  # in inference too
    with pytest.raises(ValueError, match=r"`momentum` must lie in \[0, 1\], the weight of the old"):
        BatchNormalization(momentum=1.5)
    for epsilon in (0.0, -1e-3, float("nan")):
        with pytest.raises(ValueError, match="`epsilon` must be above 0, so that a channel"):
            BatchNormalization(epsilon=epsilon)
    with pytest.raises(
        ValueError, match="renorm=True goes with statistics='batch' alone; got 'stea"
    ):
        BatchNormalization(renorm=True, statistics="steady")
    with pytest.raises(ValueError, match="`nonfinite` must be 'propagate' or 'skip'"):
        BatchNormalization(nonfinite="drop")
    with pytest.raises(ValueError, match="statistics must be one of 'batch'"):
        BatchNormalization(statistics="layer")
    with pytest.raises(ValueError, match="groups samples along axis 0"):
        BatchNormalization(axis=0, statistics="ghost")(x, training=True)
