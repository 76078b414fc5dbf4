"""The gap between training and inference, and what population statistics do about it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn

from steadynorm.evidence import estimates
from steadynorm.evidence.digits import Digits, tensors
from steadynorm.evidence.lab.experiment import Experiment, one_cycle
from steadynorm.evidence.lab.figures import chart, table
from steadynorm.evidence.lab.runs import FinishedRun, Result, Runs, Setting, grid
from steadynorm.evidence.lab.verdict import Verdict, expect, judge
from steadynorm.evidence.networks import build
from steadynorm.evidence.training import Tick, accuracy_in_training, inference_accuracy, train
from steadynorm.models.calibrate import Passes, calibrate
from steadynorm.report.page import Piece

SIZES = (64, 16, 4, 2)
LOOKS = 8
STATISTICS = {
    "running": "running averages",
    "calibrated": "calibrated, one pass",
    "population": "calibrated, layer by layer",
    "training": "the batch, as in training",
}
PASSES: dict[str, Passes] = {"calibrated": "one", "population": "layerwise"}


def settings(samples: int) -> list[Setting]:
    """Every batch size, on as many digits."""
    return grid(batch=SIZES, samples=samples)


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train with batch statistics; a few times along the way, the error on the test digits with
    each kind of statistics.
    """
    images, _, test, labels = tensors(digits)
    network = build("fully connected", "batch", digits, seed)
    every = max(one_cycle(setting).steps // LOOKS, 1)
    found: dict[str, list[float | None]] = {name: [] for name in STATISTICS}
    at: list[int] = []

    def look(step: int, trained: nn.Module) -> None:
        if step % every:
            return
        at.append(step * setting["batch"])
        accuracies = {
            "running": inference_accuracy(trained, test, labels),
            "training": accuracy_in_training(trained, test, labels, setting["batch"]),
        }
        for name, passes in PASSES.items():
            model = copy.deepcopy(trained)
            calibrate(model, torch.split(images, 256), passes=passes, progress=False)
            accuracies[name] = inference_accuracy(model, test, labels)
        for name, accuracy in accuracies.items():
            found[name].append(None if accuracy is None else 100 * (1 - accuracy))

    train(network, digits, one_cycle(setting), seed=seed, tick=tick, after_step=look)
    last = {f"{name} at the end": errors[-1] for name, errors in found.items()}
    return {"samples_seen": at, **found, **last}


def closed(runs: Runs, size: int) -> list[float]:
    """By seed, the share of the excess error of running averages over the population's statistics
    that one pass of calibration removes; 0 where there is no excess.
    """
    shares = []
    for one in runs.where(batch=size):
        gap = one["running at the end"] - one["population at the end"]
        gain = one["running at the end"] - one["calibrated at the end"]
        shares.append(gain / gap if gap > 0 else 0.0)
    return shares


def excess(runs: Runs, size: int, other: str) -> estimates.Estimate:
    """Points of error at the end that running averages make more than other statistics."""
    first, second = (runs.values(f"{name} at the end", batch=size) for name in ("running", other))
    return estimates.difference(first, second)


def verdict(runs: Runs) -> Verdict:
    """At batch 2 the gap and how much of it one pass closes; at 64 that there is none."""
    at_2, at_64 = (excess(runs, size, "population") for size in (2, 64))
    gain = estimates.mean(closed(runs, 2))
    training = excess(runs, 2, "training")
    return judge(
        f"At batch 2 inference by running averages makes {at_2.text(1)} points more errors than "
        f"by the population's statistics, at batch 64 {at_64.text(1)}; one pass of calibration "
        f"closes {100 * gain.value:.0f} % of the gap at batch 2. The same network normalized by "
        f"batches of 2 is worse still: inference makes {training.text(1)} points more errors.",
        [
            expect("points of error, running averages - population, batch 2", at_2, above=1),
            expect("share of it that one pass of calibration closes", gain, above=0.5),
            expect("points, running averages - population, batch 64", at_64, below=1),
        ],
    )


def shows(runs: Runs) -> Iterator[Piece]:
    """Errors at the end, and along training at batch 2."""
    by_kind = Runs(
        FinishedRun({"statistics": called, "batch": one["batch"]}, one.seed,
                    {"error": one[f"{name} at the end"], "samples_seen": one["samples_seen"],
                     "errors": one[name]})
        for one in runs for name, called in STATISTICS.items()
    )  # fmt: skip
    yield table(
        "Error on the test digits at the end of training, %", by_kind, rows="statistics",
        columns="batch", corner="normalized by / batch size", measure="error",
        note="Calibrated on all training digits: one pass of batches of 256, or layer by layer, "
        "which is exact. As in training: test batches of the training's size.",
    )  # fmt: skip
    yield chart(
        f"Error along training at batch {min(SIZES)}", by_kind.where(batch=min(SIZES)),
        x="samples_seen", y="errors", series=lambda run: run["statistics"], y_title="error, %",
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
    settings={"quick": settings(6_000), "full": settings(12_000)}, run=run, verdict=verdict,
    shows=shows,
)  # fmt: skip
