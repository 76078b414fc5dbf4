"""Trains one network for 50 steps in one framework; run as `python train.py FRAMEWORK IN OUT`.

Everything goes in and comes out under torch's names: the way there and back is the conversion of
checkpoints, part of what is tested. Linear, BN (tanh inside), linear, BN, linear; mean squared
error; plain gradient steps.
"""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from steadynorm.models.checkpoints import convert_settings, convert_weights
from steadynorm.statistics import Steady

RATE, MOMENTUM, EPS, BATCH = 0.1, 0.2, 1e-3, 32
NORMS, LINEARS = ("1", "3"), ("0", "2", "4")
Arrays = dict[str, np.ndarray]


def settings(framework: str, statistics: str) -> list[dict[str, Any]]:
    shared = convert_settings({"momentum": MOMENTUM, "eps": EPS}, "torch", framework).values
    # One-way, as it is in JAX and TensorFlow: the memory of the gradient is torch's alone.
    policy = Steady(window=None) if statistics == "steady" else statistics
    return [{**shared, "statistics": policy, "activation": a} for a in ("tanh", None)]


def norms(weights: Arrays, source: str, target: str, statistics: str) -> Arrays:
    """The two layers; only `Batch` keeps an unbiased variance in torch."""
    n = BATCH if statistics == "batch" else None
    counted = statistics != "batch"
    return convert_weights(
        weights, source, target, values_per_channel=n, count_batches=counted
    ).values


def train_torch(weights: Arrays, x: np.ndarray, y: np.ndarray, statistics: str) -> Iterator[Any]:
    import torch

    import steadynorm as sn

    first, second = (
        sn.BatchNorm1d(len(weights[f"{i}.bias"]), **{**arguments, "affine": True})
        for i, arguments in zip(NORMS, settings("torch", statistics), strict=True)
    )
    shapes = [weights[f"{i}.weight"].shape[::-1] for i in LINEARS]
    linear = [torch.nn.Linear(*shape) for shape in shapes]
    model = torch.nn.Sequential(linear[0], first, linear[1], second, linear[2])
    model.load_state_dict({name: torch.tensor(a) for name, a in weights.items()})
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for inputs, target in zip(torch.tensor(x), torch.tensor(y), strict=True):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), target)
        loss.backward()
        optimizer.step()
        yield (
            float(loss.detach()),
            {name: t.numpy().copy() for name, t in model.state_dict().items()},
        )
    model.eval()
    if statistics == "batch":  # in inference the others normalize with the biased variance
        for norm in (first, second):
            norm.running_var *= (BATCH - 1) / BATCH
    yield model(torch.tensor(x[0])).detach().numpy(), {}


def train_jax(weights: Arrays, x: np.ndarray, y: np.ndarray, statistics: str) -> Iterator[Any]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from steadynorm.jax import BatchNorm

    layers: list[Any] = []
    converted = norms(weights, "torch", "flax", statistics)
    arguments = iter(settings("flax", statistics))
    for i in "01234":
        if i in LINEARS:
            layer = nnx.Linear(*weights[f"{i}.weight"].shape[::-1], rngs=nnx.Rngs(0))
            layer.kernel[...] = jnp.asarray(weights[f"{i}.weight"].T)
            layer.bias[...] = jnp.asarray(weights[f"{i}.bias"])
        else:
            layer = BatchNorm(len(weights[f"{i}.bias"]), rngs=nnx.Rngs(0), **next(arguments))
            for name, array in converted.items():
                if name.startswith(f"{i}."):
                    getattr(layer, name[2:])[...] = jnp.asarray(array)
        layers.append(layer)
    model = nnx.Sequential(*layers)

    @nnx.jit
    def step(model: nnx.Sequential, inputs: jax.Array, target: jax.Array) -> jax.Array:
        def loss_of(model: nnx.Sequential) -> jax.Array:
            return jnp.square(model(inputs) - target).mean()

        loss, gradient = nnx.value_and_grad(loss_of)(model)
        parameters = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - RATE * g, parameters, gradient))
        return loss

    def state() -> Arrays:
        found = {}
        flat = {}
        for i, layer in zip("01234", layers, strict=True):
            if i in LINEARS:
                found |= {f"{i}.weight": np.asarray(layer.kernel[...]).T}
                found |= {f"{i}.bias": np.asarray(layer.bias[...])}
            else:
                names = ("scale", "bias", "mean", "var", "num_batches_tracked")
                variables = {n: getattr(layer, n) for n in names if hasattr(layer, n)}
                flat |= {f"{i}.{n}": np.asarray(v[...]) for n, v in variables.items()}
        return found | norms(flat, "flax", "torch", statistics)

    for inputs, target in zip(x, y, strict=True):
        yield float(step(model, inputs, target)), state()
    model.eval()
    yield np.asarray(model(x[0])), {}


def train_keras(weights: Arrays, x: np.ndarray, y: np.ndarray, statistics: str) -> Iterator[Any]:
    import keras

    from steadynorm.keras import BatchNormalization

    converted = norms(weights, "torch", "keras", statistics)
    roles = ("gamma", "beta", "moving_mean", "moving_variance", "num_batches_tracked")
    model = keras.Sequential([keras.Input((x.shape[-1],))])
    arguments = iter(settings("keras", statistics))
    for i in "01234":
        if i in LINEARS:
            model.add(keras.layers.Dense(len(weights[f"{i}.bias"])))
            values = [weights[f"{i}.weight"].T, weights[f"{i}.bias"]]
        else:
            model.add(BatchNormalization(**next(arguments)))
            values = [converted[f"{i}/{role}"] for role in roles if f"{i}/{role}" in converted]
        model.layers[-1].set_weights(values)
    model.compile(optimizer=keras.optimizers.SGD(RATE), loss="mse")

    def state() -> Arrays:
        found, flat = {}, {}
        for i, layer in zip("01234", model.layers, strict=True):
            values = [keras.ops.convert_to_numpy(w.value) for w in layer.weights]
            if i in LINEARS:
                found |= {f"{i}.weight": values[0].T, f"{i}.bias": values[1]}
            else:
                flat |= {f"{i}/{r}": v for r, v in zip(roles, values, strict=False)}
        return found | norms(flat, "keras", "torch", statistics)

    for inputs, target in zip(x, y, strict=True):
        yield float(np.asarray(model.train_on_batch(inputs, target))), state()
    yield np.asarray(model.predict_on_batch(x[0])), {}


def record(framework: str, given: Arrays, statistics: str, dtype: Any = np.float32) -> Arrays:
    """The loss of every step, the weights after some, and the output in inference."""
    weights = {
        name[2:]: a.astype(dtype) if a.dtype.kind == "f" else a
        for name, a in given.items()
        if name.startswith("w:")
    }
    x, y = given["x"].astype(dtype), given["y"].astype(dtype)
    train = {"torch": train_torch, "jax": train_jax, "keras": train_keras}[framework]
    out: Arrays = {}
    for step, (value, state) in enumerate(train(weights, x, y, statistics), 1):
        out[f"loss {step}" if state else "inference"] = np.asarray(value)
        if step in (1, 10, 50):
            out |= {f"step {step}: {name}": a for name, a in state.items() if a.dtype.kind == "f"}
    return out


if __name__ == "__main__":
    framework, source, target = sys.argv[1:]
    with np.load(source) as archive:
        arrays = dict(archive)
    results = {
        f"{statistics}; {key}": value
        for statistics in ("batch", "steady")
        for key, value in record(framework, arrays, statistics).items()
    }
    np.savez(target, allow_pickle=False, **results)
