"""The same small network in Keras or in JAX: the framework's own layer, ours, and `Steady`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from steadynorm.evidence import estimates
from steadynorm.evidence.digits import Digits, load
from steadynorm.evidence.tour.demo import Demo, DemoResult, Outcomes, TourOptions
from steadynorm.evidence.workers import Job
from steadynorm.report.page import Table
from steadynorm.statistics import policy_from

Step = Callable[[Any, Any], float]
Predict = Callable[[Any], Any]
ARMS = ("its own layer", "steadynorm, batch", "steadynorm, steady")
NAMES = {"keras": "Keras", "jax": "JAX"}
MOMENTUM, WIDTHS = 0.9, (64, 64)


class FrameworkRun(NamedTuple):
    """Error of inference in per cent, and the mean loss of the last quarter of a run."""

    error: float
    loss: float


def demo(framework: str) -> Demo:
    """Batch 64 and batch 2, fully connected, plain gradient descent, in "keras" or "jax"."""
    made = partial(jobs, framework), partial(result, framework)
    return Demo(framework, title(framework), *made)


def title(framework: str) -> str:
    """What the demonstration is called."""
    return f"The same in {NAMES[framework]}"


def jobs(framework: str, options: TourOptions) -> Sequence[Job]:
    """One run for each layer, batch size and seed."""
    samples = 2_000 if options.short else 8_000
    return [
        Job(
            framework, (arm, size, seed), samples // size, execute,
            (framework, arm, size, samples // size, options.data_dir, seed),
        )
        for seed in options.seeds
        for size in (64, 2)
        for arm in ARMS
    ]  # fmt: skip


def result(framework: str, options: TourOptions, outcomes: Outcomes) -> DemoResult:
    """A row for each layer and batch size."""
    rows, errors = [], {}
    for size in (64, 2):
        for arm in ARMS:
            runs = [outcomes[arm, size, seed] for seed in options.seeds]
            error = estimates.mean(run.error for run in runs)
            loss = estimates.mean(run.loss for run in runs).value
            rows.append((size, arm, error.plus_minus, loss))
            errors[arm, size] = f"{error.value:.1f} %"
    own, ours, steady = ARMS
    return DemoResult.of(
        title(framework),
        f"{NAMES[framework]}, batch 64: {errors[own, 64]} error with its own "
        f"layer, {errors[ours, 64]} with ours. Batch 2: {errors[own, 2]} "
        f"and {errors[ours, 2]}, and {errors[steady, 2]} with Steady.",
        Table(
            f"A small fully connected network in {NAMES[framework]}",
            ("batch", "normalization", "error, %", "training loss at the end"),
            rows,
            note="Error of inference on the test digits.",
            digits=3,
        ),
        figures={
            "runs": [
                {"normalization": arm, "batch": size, "seed": seed, **run._asdict()}
                for (arm, size, seed), run in sorted(outcomes.items())
            ]
        },
    )


def execute(
    framework: str,
    arm: str,
    batch_size: int,
    steps: int,
    data_dir: str | None,
    seed: int,
    *,
    tick: Callable[[int], None] | None = None,
) -> FrameworkRun:
    """Train one network from `seed` on the digits and measure it."""
    digits = load(data_dir)
    flat = digits.pixels
    rate = 0.1 * batch_size / 64 if batch_size >= 64 else 0.01
    make = {"keras": _keras, "jax": _jax}[framework]
    step, predict = make(arm, flat, rate, seed)
    losses = []
    for batch in _batches(digits, batch_size, steps, seed):
        images = digits.train_images[batch].reshape(batch_size, flat)
        losses.append(step(images, digits.train_labels[batch]))
        if tick is not None:
            tick(1)
    guesses = np.asarray(predict(digits.test_images.reshape(-1, flat))).argmax(1)
    error = 100 * float((guesses != digits.test_labels).mean())
    return FrameworkRun(error, float(np.mean(losses[-max(steps // 4, 1) :])))


def _batches(digits: Digits, size: int, steps: int, seed: int) -> Iterator[Any]:
    rng = np.random.default_rng(seed)
    count = len(digits.train_labels)
    order = np.concatenate([rng.permutation(count) for _ in range(size * steps // count + 1)])
    yield from order[: size * steps].reshape(steps, size)


def _keras(arm: str, inputs: int, rate: float, seed: int) -> tuple[Step, Predict]:
    import keras

    from steadynorm.keras import BatchNormalization

    def norm() -> Any:
        if arm == ARMS[0]:
            return keras.layers.BatchNormalization(momentum=MOMENTUM)
        policy = policy_from(arm.rpartition(" ")[2])
        return BatchNormalization(momentum=MOMENTUM, statistics=policy)

    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((inputs,))])
    for width in WIDTHS:
        for layer in (keras.layers.Dense(width), norm(), keras.layers.Activation("relu")):
            model.add(layer)
    model.add(keras.layers.Dense(10))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.SGD(rate), loss=loss)

    def step(images: Any, labels: Any) -> float:
        return float(np.asarray(model.train_on_batch(images, labels)))

    return step, model.predict_on_batch


def _jax(arm: str, inputs: int, rate: float, seed: int) -> tuple[Step, Predict]:
    import jax
    from flax import nnx

    from steadynorm.jax import BatchNorm

    rngs = nnx.Rngs(seed)

    def norm(width: int) -> Any:
        if arm == ARMS[0]:
            return nnx.BatchNorm(width, momentum=MOMENTUM, rngs=rngs)
        policy = policy_from(arm.rpartition(" ")[2])
        return BatchNorm(width, momentum=MOMENTUM, statistics=policy, rngs=rngs)

    layers: list[Any] = []
    for width in WIDTHS:
        layers += [nnx.Linear(inputs, width, rngs=rngs), norm(width), jax.nn.relu]
        inputs = width
    model: Any = nnx.Sequential(*layers, nnx.Linear(inputs, 10, rngs=rngs))

    @nnx.jit
    def advance(model: Any, images: Any, labels: Any) -> Any:
        def loss_of(model: Any) -> Any:
            chosen = jax.nn.log_softmax(model(images))
            return -jax.numpy.take_along_axis(chosen, labels[:, None], axis=1).mean()

        loss, gradient = nnx.value_and_grad(loss_of)(model)
        parameters = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - rate * g, parameters, gradient))
        return loss

    def predict(images: Any) -> Any:
        model.eval()
        return model(images)

    return lambda images, labels: float(advance(model, images, labels)), predict
