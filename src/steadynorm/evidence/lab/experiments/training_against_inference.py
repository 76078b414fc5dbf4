"""The gap between training and inference, and what population statistics do about it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from steadynorm.evidence.lab import estimates
from steadynorm.evidence.lab.batches import tensors
from steadynorm.evidence.lab.data import Digits
from steadynorm.evidence.lab.experiment import (
    Experiment,
    Profile,
    Result,
    Run,
    Runs,
    Setting,
    Shown,
    Verdict,
    expect,
    judge,
)  # fmt: skip
from steadynorm.evidence.lab.networks import fully_connected, initialize, normalization_1d
from steadynorm.evidence.lab.show import curves, table
from steadynorm.evidence.lab.training import (
    Recipe,
    Tick,
    accuracy_in_training,
    inference_accuracy,
    train,
)
from steadynorm.models.calibrate import Passes, calibrate
from steadynorm.report.charts import lines

SIZES = (64, 16, 4, 2)
LOOKS = 8
STATISTICS = {
    "running": "running averages",
    "calibrated": "calibrated, one pass",
    "population": "calibrated, layer by layer",
    "training": "the batch, as in training",
}

PASSES: dict[str, Passes] = {"calibrated": "one", "population": "layerwise"}


def settings(profile: Profile) -> Sequence[Setting]:
    """Every batch size, on as many digits."""
    samples = 6_000 if profile == "quick" else 12_000
    return [{"batch": size, "samples": samples} for size in SIZES]


def recipe(setting: Setting) -> Recipe:
    """One cycle."""
    return Recipe(setting["batch"], setting["samples"])


def steps(setting: Setting) -> int:
    """The length of a run."""
    return recipe(setting).steps


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train with batch statistics; a few times along the way, the error on the test digits with
    each kind of statistics.
    """
    images, _, test, labels = tensors(digits)
    network = fully_connected(digits.train_images[0].size, normalization_1d("batch"))
    initialize(network, seed)
    every = max(recipe(setting).steps // LOOKS, 1)
    found: dict[str, list[float]] = {name: [] for name in STATISTICS}
    at: list[int] = []

    def error(model: nn.Module) -> float:
        return 100 * (1 - inference_accuracy(model, test, labels))

    def look(step: int, trained: nn.Module) -> None:
        if step % every:
            return
        at.append(step * setting["batch"])
        found["running"].append(error(trained))
        for name, passes in PASSES.items():
            model = copy.deepcopy(trained)
            calibrate(model, torch.split(images, 256), passes=passes, progress=False)
            found[name].append(error(model))
        right = accuracy_in_training(trained, test, labels, setting["batch"])
        found["training"].append(100 * (1 - right))

    train(network, digits, recipe(setting), seed=seed, tick=tick, watch=look, layers=False)
    last = {f"{name} at the end": errors[-1] for name, errors in found.items()}
    return {"samples_seen": at, **found, **last}


def closed(runs: Runs, size: int) -> list[float]:
    """The share of the errors that running averages make over the population's that is gone after
    one pass of calibration; 0 where there was none to close.
    """
    shares = []
    for one in runs.where(batch=size):
        gap = one["running at the end"] - one["population at the end"]
        gain = one["running at the end"] - one["calibrated at the end"]
        shares.append(gain / gap if gap > 0 else 0.0)
    return shares


def verdict(runs: Runs) -> Verdict:
    """At batch 2 the gap and how much of it one pass closes; at 64 that there is none."""
    gaps = {
        size: estimates.difference(
            runs.values("running at the end", batch=size),
            runs.values("population at the end", batch=size),
        )
        for size in SIZES
    }
    gain = estimates.mean(closed(runs, 2))
    training = estimates.difference(
        runs.values("running at the end", batch=2), runs.values("training at the end", batch=2)
    )
    return judge(
        f"At batch 2 inference by running averages makes {gaps[2].text(1)} points more errors than "
        f"by the population's statistics, at batch 64 {gaps[64].text(1)}; one pass of calibration "
        f"closes {100 * gain.value:.0f} % of the gap at batch 2. The same network normalized by "
        f"batches of 2 is worse still: inference makes {training.text(1)} points more errors.",
        [
            expect("points of error, running averages - population, batch 2", gaps[2], above=1),
            expect("share of it that one pass of calibration closes", gain, above=0.5),
            expect("points, running averages - population, batch 64", gaps[64], below=1),
        ],
    )


def show(runs: Runs) -> Shown:
    """Errors at the end, and along training at batch 2."""
    rows = [
        Run({"statistics": STATISTICS[name], "batch": one["batch"]}, one.seed,
            {"error": one[f"{name} at the end"], "samples_seen": one["samples_seen"],
             "errors": one[name]})
        for one in runs for name in STATISTICS
    ]  # fmt: skip
    smallest = [row for row in rows if row["batch"] == min(SIZES)]
    return Shown(
        [
            table(
                "Error on the test digits at the end of training, %", Runs(rows),
                rows="statistics", columns="batch", corner="normalized by / batch size",
                value=lambda run: run["error"],
                note="Calibrated on all training digits: one pass of batches of 256, or layer by "
                "layer, which is exact. As in training: test batches of the training's size.",
            )
        ],
        [
            lines(
                f"Error along training at batch {min(SIZES)}",
                curves(smallest, "samples_seen", "errors", lambda run: run["statistics"]),
                x="samples_seen", y="errors", series="series", replicate="seed",
                x_title="digits seen", y_title="error, %",
                description="Mean over the seeds; the band is their range.",
            )
        ],
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="training-against-inference",
    title="Training against inference",
    claim="With small batches the running averages do not stand for the population, and inference "
    "is worse than it could be; calibration closes most of the gap.",
    source="Wu & Johnson 2021, section 3; Singh & Shrivastava 2019",
    factors={
        "batch": "batch size in training",
        "statistics": "running averages; those of all training digits, measured in one pass or "
        "layer by layer; those of test batches of the training's size",
    },
    measure="Error on the test digits in per cent; three hidden layers of 128, ReLU, SGD with "
    "momentum, one cycle, running averages with momentum 0.1.",
    rule="At batch 2 running averages make over a point more errors than the population's "
    "statistics, and one pass of calibration closes more than half of that; at batch 64 they make "
    "less than a point more.",
    settings=settings,
    run=run,
    verdict=verdict,
    show=show,
    steps=steps,
)
