"""Files, weights and whole models: from Keras's layer to ours and back.

Run by `test_backends.py`; alone: KERAS_BACKEND=jax python -m pytest tests/keras/model_checks.py
"""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from tests.keras.layer_checks import POLICIES, Layer, array, draw

from steadynorm.keras import BatchNormalization, convert
from steadynorm.statistics import policy_from

# Keras's variables have NumPy's old `__array__`, without `copy`.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_loading_moving_variance_into_renorm_keeps_it() -> None:
    """Keras's renorm layer: 25 becomes about 2 after one step."""
    x = 5 * draw(64, 3)
    source = Layer()
    source.build(x.shape)
    source.set_weights([np.ones(3), np.zeros(3), np.zeros(3), np.full(3, 25.0)])
    layer = BatchNormalization(statistics="renorm")
    layer.build(x.shape)
    layer.set_weights(source.get_weights())
    layer(x, training=True)
    np.testing.assert_allclose(array(layer.moving_variance), 25, rtol=0.02)


@pytest.mark.parametrize("policy", ["batch", "steady"])
def test_files_round_trip(policy: str, tmp_path: Path) -> None:
    x, y = draw(64, 6), draw(64, 2)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(4),
            BatchNormalization(statistics=policy, activation="relu", nonfinite="skip"),
            keras.layers.Dense(2),
        ]
    )
    model.compile(optimizer="sgd", loss="mse")
    model.fit(x, y, batch_size=24, epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    layer = again.layers[1]
    assert type(layer) is BatchNormalization
    assert layer.statistics == policy_from(policy)
    assert layer.nonfinite == "skip"
    np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))
    if policy == "steady":
        assert int(layer.num_batches_tracked) == 6
    model.save_weights(tmp_path / "model.weights.h5")
    again.layers[0].set_weights([0 * w for w in again.layers[0].get_weights()])
    again.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))


def trained(kind: type[Layer], **arguments: Any) -> keras.Model:
    """A small model with two norms, and statistics that are not 0 and 1."""
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(4), kind(**arguments), layers.Dense(2), kind(**arguments)]
    )
    for i, w in enumerate(model.weights):
        w.assign(draw(*w.shape, seed=i) ** 2 + 0.5)
    return model


def assert_statistics_survive_a_batch(model: keras.Model, x: np.ndarray) -> None:
    """The batch weighs what it weighs after many: by the momentum, or by the horizon."""
    dense, norm = model.layers[:2]
    before, batch = array(norm.moving_mean), array(dense(x)).mean(0)
    model(x, training=True)
    weight = (array(norm.moving_mean) - before) / (batch - before)
    horizon = getattr(norm.statistics, "horizon", None)
    expected = 0.01 if horizon is None else len(x) / (len(x) + horizon)
    np.testing.assert_allclose(weight, expected, rtol=1e-3)


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
@pytest.mark.parametrize("policy", ["batch", "steady", "running", "renorm"])
def test_files_of_kerass_layer_load(policy: str, suffix: str, tmp_path: Path) -> None:
    theirs, x = trained(Layer), draw(6, 3)
    file = tmp_path / f"a{suffix}"
    (theirs.save if suffix == ".keras" else theirs.save_weights)(file)
    model = trained(BatchNormalization, statistics=policy)
    model.set_weights([0 * w for w in model.get_weights()])
    model.load_weights(file)
    np.testing.assert_allclose(array(model(x)), array(theirs(x)), rtol=1e-6, atol=2e-6)
    assert_statistics_survive_a_batch(model, x)


@pytest.mark.parametrize("policy", ["steady", "running"])
def test_pretrained_statistics_survive_set_weights_and_convert(policy: str) -> None:
    theirs, x = trained(Layer), draw(6, 3)
    model = trained(BatchNormalization, statistics=policy)
    model.set_weights(theirs.get_weights())
    for ours in (model, convert(theirs, statistics=policy)):
        assert_statistics_survive_a_batch(ours, x)
    fresh = BatchNormalization(statistics=policy)  # the first batch of all stands alone
    fresh(x, training=True)
    np.testing.assert_allclose(array(fresh.moving_mean), x.mean(0), atol=1e-6)


def test_convert_a_keras_application() -> None:
    arguments = {"input_shape": (32, 32, 3), "alpha": 0.25, "classes": 3, "weights": None}
    theirs = keras.applications.MobileNet(**arguments)
    for layer in theirs.layers:
        if isinstance(layer, Layer):
            channels = layer.moving_mean.shape[0]
            layer.moving_mean.assign(0.1 * draw(channels))
            layer.moving_variance.assign(0.5 + 0 * draw(channels))
    ours, x = convert(theirs, statistics="steady", nonfinite="skip"), draw(2, 32, 32, 3)
    kinds = {type(layer) for layer in ours.layers if isinstance(layer, Layer)}
    assert kinds == {BatchNormalization}
    assert [layer.name for layer in ours.layers[1:]] == [layer.name for layer in theirs.layers[1:]]
    expected = array(theirs(x))
    np.testing.assert_allclose(array(ours(x)), expected, atol=1e-5)
    assert ours.layers[2].momentum == theirs.layers[2].momentum
    assert ours.layers[2].nonfinite == "skip"
    other = keras.applications.MobileNet(**arguments)
    ours.set_weights(other.get_weights())
    np.testing.assert_allclose(array(ours(x)), array(other(x)), atol=1e-5)
    np.testing.assert_array_equal(array(theirs(x)), expected)  # left as it was


def test_convert_keeps_sharing_nesting_and_counts() -> None:
    shared, inner = Layer(name="shared"), trained(Layer)
    a, b = keras.Input((3,)), keras.Input((3,))
    y = shared(a) + shared(b)
    theirs = keras.Model([a, b], inner(y))
    shared.set_weights([draw(3, seed=i) ** 2 for i in range(4)])
    shared.trainable = False
    ours, call = convert(theirs, statistics="running"), [draw(5, 3), draw(5, 3, seed=1)]
    np.testing.assert_allclose(array(ours(call)), array(theirs(call)), rtol=1e-5)
    assert ours.get_layer("shared").trainable is False
    assert len(ours.weights) == len(theirs.weights)
    ours.layers[-1](draw(6, 3), training=True)
    again = convert(ours)
    norms = [layer for layer in again.layers[-1].layers if isinstance(layer, Layer)]
    assert all(layer.statistics == POLICIES["running"] for layer in norms)
    assert all(int(layer.num_batches_tracked) > 1000 for layer in norms)


def test_convert_says_what_it_leaves() -> None:
    @keras.saving.register_keras_serializable(package="tests")
    class Special(Layer):  # type: ignore[misc]
        pass

    model = keras.Sequential([keras.Input((3,)), Special(name="special")])
    with pytest.warns(UserWarning, match=r"left as they are: .*special\. Layers inside other"):
        assert type(convert(model).layers[0]) is Special


@pytest.mark.parametrize("before", [False, True], ids=["as written", "before the activation"])
def test_the_classic_example_learns_real_digits(before: bool) -> None:
    """With only the import changed; shortened to two epochs of half the digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x_train = (digits.data[:900] / 16).astype(np.float32)
    y_train = keras.utils.to_categorical(digits.target[:900], 10)
    keras.utils.set_random_seed(0)
    hidden = (
        [keras.layers.Dense(128), BatchNormalization(), keras.layers.Activation("relu")]
        if before
        else [keras.layers.Dense(128, activation="relu"), BatchNormalization()]
    )
    model = keras.Sequential([*hidden, keras.layers.Dense(10, activation="softmax")])
    model.compile(optimizer="adam", loss="categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(x_train, y_train, batch_size=32, epochs=2, verbose=0)
    assert history.history["accuracy"][-1] > 0.8


@pytest.mark.parametrize("policy", ["steady", "running", "renorm"])
def test_a_model_without_an_input_shape_is_built_by_fit(policy: str) -> None:
    """Keras builds it in a symbolic call: on torch, tensors have no values there."""
    model = keras.Sequential([keras.layers.Dense(3), BatchNormalization(statistics=policy)])
    model.compile(optimizer="sgd", loss="mse")
    model.fit(draw(6, 3), draw(6, 3, seed=1), batch_size=3, verbose=0)
    assert int(model.layers[1].num_batches_tracked) == 2
    assert np.isfinite(array(model.layers[1].moving_mean)).all()


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras", ".h5"])
@pytest.mark.parametrize(("before", "after"), [("steady", "batch"), ("batch", "steady")])
def test_files_load_under_another_policy(
    before: str, after: str, suffix: str, tmp_path: Path
) -> None:
    source, x = trained(BatchNormalization, statistics=before), draw(6, 3)
    source(x, training=True)
    file = tmp_path / f"a{suffix}"
    (source.save_weights if "weights" in suffix else source.save)(file)
    model = trained(BatchNormalization, statistics=after)
    model.set_weights([0 * w for w in model.get_weights()])
    model.load_weights(file)
    np.testing.assert_allclose(array(model(x)), array(source(x)), rtol=2e-6)
    if after == "steady":
        assert_statistics_survive_a_batch(model, x)


@pytest.mark.parametrize(("suffix", "count"), [(".keras", 8), (".weights.h5", 8), (".h5", 0)])
def test_the_count_of_batches_is_in_files_but_for_whole_h5_models(
    suffix: str, count: int, tmp_path: Path
) -> None:
    model, x = trained(BatchNormalization, statistics="steady"), draw(6, 3)
    model.layers[1].num_batches_tracked.assign(5)
    for _ in range(3):
        model(x, training=True)
    file = tmp_path / f"a{suffix}"
    (model.save_weights if "weights" in suffix else model.save)(file)
    again = trained(BatchNormalization, statistics="steady")
    again.load_weights(file)
    assert int(again.layers[1].num_batches_tracked) == count
    layer = again.layers[1]
    layer.set_weights([*layer.get_weights(), np.int32(8)])
    assert int(layer.num_batches_tracked) == 8
    layer.set_weights(layer.get_weights())
    assert int(layer.num_batches_tracked) == 0


def test_weights_that_are_refused_leave_the_count_of_batches() -> None:
    layer = BatchNormalization(statistics="steady")
    for _ in range(2):
        layer(draw(4, 3), training=True)
    with pytest.raises(ValueError, match="weight list of length 3"):
        layer.set_weights(layer.get_weights()[:-1])
    assert int(layer.num_batches_tracked) == 2
