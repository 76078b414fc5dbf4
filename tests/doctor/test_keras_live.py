"""Live Keras models and their training runs, on every backend, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

HEAD = """
import keras
import numpy as np
import steadynorm as sn
from keras import layers
from steadynorm.doctor.callbacks import keras_callback

keras.utils.set_random_seed(0)
chance = np.random.default_rng(0)
x = (chance.normal(size=(1024, 4)) * [1, 2, 3, 4] + 3).astype("float32")
y = (x.sum(1) > 12).astype("int64")


def fitted(*parts, epochs=2, **given):
    model = keras.Sequential([keras.Input((4,)), *parts, layers.Dense(2)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    callback = keras_callback(every=2, **given)
    model.fit(x, y, batch_size=32, epochs=epochs, verbose=0, shuffle=False, callbacks=[callback])
    return model, callback.watch


class InInference(layers.Layer):
    def __init__(self):
        super().__init__()
        self.norm = layers.BatchNormalization()

    def build(self, shape):
        self.norm.build(shape)

    def call(self, x):
        return self.norm(x, training=False)

"""


@pytest.fixture(params=["tensorflow", "jax", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ran(backend: str, code: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", HEAD + code], capture_output=True, text=True, check=False,
        env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_run_is_read_by_the_moving_statistics(backend: str) -> None:
    """The batches' own statistics, of a norm that gets the data themselves."""
    assert "agree" in ran(
        backend,
        """
model, watch = fitted(layers.BatchNormalization(momentum=0.9), epochs=1)
mean, var = np.zeros(4), np.ones(4)
for step in range(32):
    batch = x[32 * step : 32 * step + 32].astype("float64")
    if step % 2 == 0:
        shift = (batch.mean(0) - mean) / np.sqrt(var + 1e-3)
        ratio = np.sqrt((batch.var(0) + 1e-3) / (var + 1e-3))
        reading = watch.readings[step // 2]
        assert reading.step == step
        np.testing.assert_allclose(reading.shift, np.sqrt((shift**2).mean()), rtol=1e-3)
        np.testing.assert_allclose(reading.ratio, np.exp(np.log(ratio).mean()), rtol=1e-3)
    mean, var = 0.9 * mean + 0.1 * batch.mean(0), 0.9 * var + 0.1 * batch.var(0)
assert watch.steps == 32
print("agree")
""",
    )


def test_the_last_execution_of_an_epoch_may_hold_fewer_batches() -> None:
    """Ten batches, four at a time: the third time two. The weighted averages of their own."""
    assert "agree" in ran(
        "jax",
        """
model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(momentum=0.9)])
model.compile("adam", "mse", steps_per_execution=4)
callback = keras_callback(every=1)
model.fit(x[:320], x[:320], batch_size=32, epochs=1, verbose=0, shuffle=False, callbacks=[callback])
parts = x[:320].astype("float64").reshape(10, 32, 4)
mean, var = np.zeros(4), np.ones(4)
for reading, batches in zip(callback.watch.readings, (parts[:4], parts[4:8], parts[8:])):
    weights = 0.9 ** np.arange(len(batches))[::-1]
    batch_mean = np.average(batches.mean(1), axis=0, weights=weights)
    shift = (batch_mean - mean) / np.sqrt(var + 1e-3)
    np.testing.assert_allclose(reading.shift, np.sqrt((shift**2).mean()), rtol=1e-3)
    for batch in batches:
        mean, var = 0.9 * mean + 0.1 * batch.mean(0), 0.9 * var + 0.1 * batch.var(0)
assert len(callback.watch.readings) == 3
print("agree")
""",
    )


def test_what_is_found_in_runs_and_models(backend: str) -> None:
    found = ran(
        backend,
        """
def codes(report):
    return [finding.code for finding in report.findings]

model, watch = fitted(layers.Dense(8), layers.BatchNormalization(momentum=0.9))
print(codes(watch.report()), codes(sn.diagnose(model)))
model, watch = fitted(layers.BatchNormalization(momentum=0.9995))
print(codes(watch.report()))
model, watch = fitted(InInference())
print(codes(sn.diagnose(model)), len(watch.readings), watch.report().evidence.remarks)
try:
    sn.diagnose(model, [x])
except ValueError as error:
    print(error)
""",
    ).splitlines()
    assert found[0] == "[] []"
    assert found[1] == "['SN402']"
    assert found[2].startswith("['SN101'] 0 (")
    assert "In no step that was read did the statistics of" in found[2]
    assert found[3] == (
        "diagnose: `batches` is for torch models; of a Keras model the layers' state alone is "
        "judged."
    )
