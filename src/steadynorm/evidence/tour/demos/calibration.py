"""Trained networks whose statistics are measured anew, and adapted to paler digits."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from steadynorm.evidence import estimates
from steadynorm.evidence.digits import Digits, load, tensors
from steadynorm.evidence.networks import build
from steadynorm.evidence.tour.demo import Demo, DemoResult, Outcomes, TourOptions, error_of
from steadynorm.evidence.training import Recipe, Tick, inference_accuracy, train
from steadynorm.evidence.workers import Job
from steadynorm.report.charts import intervals
from steadynorm.report.page import Table

CONTRAST = 1 / 3
GROUP = 40  # digits that are adapted to together


@dataclass(frozen=True)
class Accuracies:
    """Accuracy of inference on the test digits, and the report of `calibrate` or `adapt`."""

    before: float
    after: float
    layerwise: float | None
    layers: list[dict[str, Any]]


def calibrated(
    recipe: Recipe, data_dir: str | None, seed: int, *, tick: Tick | None = None
) -> Accuracies:
    """Train at a small batch, then measure the statistics on the same training digits."""
    from steadynorm.models.calibrate import calibrate

    digits = load(data_dir)
    network = build("fully connected", "batch", digits, seed)
    train(network, digits, recipe, seed=seed, tick=tick)
    images, _, test_images, labels = tensors(digits)
    before = inference_accuracy(network, test_images, labels)
    layerwise = copy.deepcopy(network)
    calibrate(layerwise, images.split(64), passes="layerwise", progress=False)
    report = calibrate(network, images.split(64), progress=False)
    return Accuracies(
        before,
        inference_accuracy(network, test_images, labels),
        inference_accuracy(layerwise, test_images, labels),
        report.to_dict()["layers"],
    )


def adapted(
    recipe: Recipe, data_dir: str | None, seed: int, *, tick: Tick | None = None
) -> Accuracies:
    """Train at full contrast, then adapt to groups of paler test digits, without their labels."""
    from steadynorm.models.calibrate import adapt

    digits = load(data_dir)
    network = build("convolutional", "batch", digits, seed)
    train(network, digits, recipe, seed=seed, tick=tick)
    pale, labels = tensors(_paler(digits))[2:]
    before = inference_accuracy(network, pale, labels)
    right, layers = 0.0, []
    for x, y in zip(pale.split(GROUP), labels.split(GROUP), strict=True):
        model = copy.deepcopy(network)
        layers = adapt(model, [x], progress=False).to_dict()["layers"]
        right += inference_accuracy(model, x, y) * len(y)
    return Accuracies(before, right / len(labels), None, layers)


def _paler(digits: Digits) -> Digits:
    """The same, with the test digits at a third of their contrast, about the training mean."""
    mean = digits.train_images.mean()
    return digits._replace(test_images=mean + (digits.test_images - mean) * CONTRAST)


def jobs(options: TourOptions) -> Sequence[Job]:
    """A training for each tool and seed."""
    small, large = (
        Recipe(size, samples=3_000 if options.short else 9_000, points=1) for size in (2, 64)
    )
    return [
        Job(DEMO.name, (what, seed), recipe.steps, run, (recipe, options.data_dir, seed))
        for seed in options.seeds
        for what, run, recipe in (("calibrate", calibrated, small), ("adapt", adapted, large))
    ]


def result(options: TourOptions, outcomes: Outcomes) -> DemoResult:
    """Errors before and after."""
    mended, moved = (
        [outcomes[what, seed] for seed in options.seeds] for what in ("calibrate", "adapt")
    )
    rows: list[tuple[str, str, list[float]]] = [
        ("trained at batch 2", "trained at batch 2", [run.before for run in mended]),
        ("then calibrate", "calibrated", [run.after for run in mended]),
        ("then calibrate, layerwise", "layerwise", [run.layerwise or 0.0 for run in mended]),
        ("trained at batch 64, on paler digits", "on pale digits", [r.before for r in moved]),
        (f"then adapt to {GROUP} of them at a time", "adapted", [run.after for run in moved]),
    ]
    errors = [error_of(values) for _, _, values in rows]
    gains = [
        estimates.mean(100 * (r.after - r.before) for r in runs).plus_minus
        for runs in (mended, moved)
    ]
    first, after, _, shifted, after_shift = (f"{error.value:.1f} %" for error in errors)
    return DemoResult.of(
        DEMO.title,
        f"calibrate changes the error of a network trained at batch 2 from {first} to {after}; "
        f"adapt that of a network that meets paler digits from {shifted} to {after_shift}, "
        "without a label.",
        Table(
            "The same weights, other statistics",
            ("network", "error of inference, %"),
            [(row[0], error.plus_minus) for row, error in zip(rows, errors, strict=True)],
            note=f"Error on the test digits, {options.seeds_in_words}; ± is the 95 % interval of "
            "the mean. Paler: a third of the contrast. Gain in accuracy, paired by seed: "
            f"calibrate {gains[0]}, adapt {gains[1]} points.",
            emphasis=(1, 4),
        ),
        intervals(
            "Accuracy of inference, before and after",
            [
                {"network": name, "accuracy": sum(values) / len(values)}
                | {"lowest": min(values), "highest": max(values)}
                for _, name, values in rows
            ],
            value="accuracy", low="lowest", high="highest", label="network",
            value_title="accuracy on the test digits",
            description="Mean and range over the seeds.",
        ),
        "Running statistics are averages over the last few batches, here 20 digits. calibrate "
        "replaces them by those of all training digits, with the weights held still; how much that "
        "helps depends on how far they were off. It cannot mend what training at batch 2 did to "
        "the weights: for that see Steady. adapt mixes them with those of new data, prior samples "
        "against n (Schneider et al. 2020).",
        figures={
            "runs": [
                {"tool": what, "seed": seed, **asdict(run)}
                for (what, seed), run in sorted(outcomes.items())
            ]
        },
    )  # fmt: skip


DEMO = Demo("calibration", "After training: the statistics, measured anew", jobs, result)
