"""Two replicas with batches of 5 and 3 are one batch of 8: `python replica_checks.py OUT_FOLDER`.

On TensorFlow by `tf.distribute`, on torch by two processes, on JAX by `keras.distribution`, where
an array is the batch of all devices in any case (so 4 and 4).
"""

import sys
from pathlib import Path

import keras
import numpy as np

from steadynorm.keras import BatchNormalization

X = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32) + 5
GRAD = np.random.default_rng(1).standard_normal((8, 3)).astype(np.float32)
PARTS = (slice(0, 5), slice(5, 8))


def expected() -> tuple[np.ndarray, np.ndarray]:
    """Output, and gradient of `sum(y * GRAD)`, in float64 by the closed form."""
    x = X.astype(np.float64)
    rho = 1 / np.sqrt(x.var(0) + 1e-3)
    hat = (x - x.mean(0)) * rho
    return hat, rho * (GRAD - GRAD.mean(0) - hat * (GRAD * hat).mean(0))


def check(y: np.ndarray, dx: np.ndarray | None, layer: BatchNormalization) -> None:
    want_y, want_dx = expected()
    np.testing.assert_allclose(y, want_y, atol=2e-6)
    if dx is not None:
        np.testing.assert_allclose(dx, want_dx, atol=5e-6)
    mean, var = (keras.ops.convert_to_numpy(w.value) for w in layer.non_trainable_variables)
    np.testing.assert_allclose(mean, X.mean(0), rtol=1e-6)
    np.testing.assert_allclose(var, X.var(0), rtol=1e-5)


def on_tensorflow() -> None:
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        layer = BatchNormalization(synchronized=True, momentum=0.0)
        layer.build((None, 3))

    def one(x: tf.Tensor, grad: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(y * grad)
        return y, tape.gradient(loss, x)

    def spread(t: np.ndarray) -> tf.Tensor:
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(t[PARTS[context.replica_id_in_sync_group]])
        )

    results = tf.function(lambda x, g: strategy.run(one, (x, g)))(spread(X), spread(GRAD))
    y, dx = (np.concatenate(strategy.experimental_local_results(part)) for part in results)
    check(y, dx, layer)


def torch_replica(rank: int, folder: str) -> None:
    import torch

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    layer = BatchNormalization(synchronized=True, momentum=0.0)
    x = torch.tensor(X[PARTS[rank]], requires_grad=True)
    y = layer(x, training=True)
    (y * torch.tensor(GRAD[PARTS[rank]])).sum().backward()
    gathered: list[list[np.ndarray]] = [[], []]
    torch.distributed.all_gather_object(gathered, [y.detach().numpy(), x.grad.numpy()])
    check(*(np.concatenate(parts) for parts in zip(*gathered, strict=True)), layer)
    torch.distributed.destroy_process_group()


def on_jax() -> None:
    import jax

    assert len(jax.devices()) == 2
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    layer = BatchNormalization(synchronized=True, momentum=0.0)
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse")
    want_y, _ = expected()
    assert float(np.asarray(model.train_on_batch(X, want_y))) < 1e-11
    check(want_y, None, layer)


if __name__ == "__main__":
    backend, folder = keras.config.backend(), sys.argv[1]
    if backend == "tensorflow":
        on_tensorflow()
    elif backend == "jax":
        on_jax()
    else:
        import torch.multiprocessing

        torch.multiprocessing.spawn(torch_replica, (folder,), nprocs=2)
    Path(folder, "passed").touch()
