"""Trained networks whose statistics are measured anew, and adapted to paler digits."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from steadynorm.evidence.lab.batches import tensors
from steadynorm.evidence.lab.data import Digits, load
from steadynorm.evidence.lab.jobs import Job
from steadynorm.evidence.lab.networks import (
    convolutional,
    fully_connected,
    initialize,
    normalization_1d,
    normalization_2d,
)
from steadynorm.evidence.lab.runs import interval
from steadynorm.evidence.lab.training import Recipe, Tick, inference_accuracy, train
from steadynorm.evidence.tour.stop import Setting, StopResult
from steadynorm.report.charts import intervals
from steadynorm.report.page import Chart, Table

CONTRAST = 1 / 3
GROUP = 40  # digits that are adapted to together


@dataclass(frozen=True)
class Accuracies:
    """Accuracy of inference on the test digits, and what `calibrate` or `adapt` said."""

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
    network = fully_connected(digits.train_images[0].size, normalization_1d("batch"))
    initialize(network, seed)
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
    network = convolutional(normalization_2d("batch"))
    initialize(network, seed)
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


class Calibration:
    """Measure the statistics instead of averaging them along the way."""

    name = "calibration"
    title = "After training: the statistics, measured anew"

    def jobs(self, setting: Setting) -> Sequence[Job]:
        small = Recipe(2, samples=3_000 if setting.short else 9_000, points=1)
        large = Recipe(64, samples=3_000 if setting.short else 9_000, points=1)
        return [
            Job(self.name, (what, seed), recipe.steps, run, (recipe, setting.data_dir, seed))
            for seed in setting.seeds
            for what, run, recipe in (
                ("calibrate", calibrated, small),
                ("adapt", adapted, large),
            )
        ]

    def result(self, setting: Setting, outcomes: Mapping[tuple[Any, ...], Any]) -> StopResult:
        runs: Mapping[tuple[str, int], Accuracies] = outcomes
        mended, moved = (
            [runs[what, seed] for seed in setting.seeds] for what in ("calibrate", "adapt")
        )
        rows = [
            ("trained at batch 2", [run.before for run in mended]),
            ("then calibrate", [run.after for run in mended]),
            ("then calibrate, layerwise", [run.layerwise or 0.0 for run in mended]),
            ("trained at batch 64, on paler digits", [r.before for r in moved]),
            (f"then adapt to {GROUP} of them at a time", [run.after for run in moved]),
        ]
        error = {name: interval([100 * (1 - value) for value in values]) for name, values in rows}
        seeds = f"{len(setting.seeds)} seeds" if len(setting.seeds) > 1 else "one seed"
        figures = [interval([100 * (r.after - r.before) for r in runs]) for runs in (mended, moved)]
        first, _, _, shifted, after_shift = error.values()
        return StopResult(
            f"calibrate changes the error of a network trained at batch 2 from {first.mean:.1f} % "
            f"to {error['then calibrate'].mean:.1f} %; adapt that of a network that meets paler "
            f"digits from {shifted.mean:.1f} % to {after_shift.mean:.1f} %, without a label.",
            [
                Table(
                    "The same weights, other statistics",
                    ("network", "error of inference, %"),
                    [(name, str(value)) for name, value in error.items()],
                    note=f"Error on the test digits, {seeds}; ± is the 95 % interval of the mean. "
                    "Paler: a third of the contrast. "
                    f"Gain in accuracy, paired by seed: calibrate {figures[0]}, adapt {figures[1]} "
                    "points.",
                    emphasis=(1, 4),
                )
            ],
            [self._chart([values for _, values in rows])],
            text=[
                "Running statistics are averages over the last few batches, here 20 digits. "
                "calibrate replaces them by those of all training digits, with the weights held "
                "still; how much that helps depends on how far they were off. It cannot mend what "
                "training at batch 2 did to the weights: for that see Steady. adapt mixes them "
                "with those of new data, prior samples against n (Schneider et al. 2020)."
            ],
            figures={
                "runs": [
                    {"tool": what, "seed": seed, **asdict(run)}
                    for (what, seed), run in sorted(runs.items())
                ]
            },
        )

    def _chart(self, accuracies: Sequence[list[float]]) -> Chart:
        names = ("trained at batch 2", "calibrated", "layerwise", "on pale digits", "adapted")
        return intervals(
            "Accuracy of inference, before and after",
            [
                {
                    "network": name,
                    "accuracy": sum(values) / len(values),
                    "lowest": min(values),
                    "highest": max(values),
                }
                for name, values in zip(names, accuracies, strict=True)
            ],
            value="accuracy",
            low="lowest",
            high="highest",
            label="network",
            value_title="accuracy on the test digits",
            description="Mean and range over the seeds.",
        )
