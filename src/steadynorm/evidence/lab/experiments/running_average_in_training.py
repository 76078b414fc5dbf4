"""The running average normalizes in training too, against the batch's own statistics."""

from __future__ import annotations

from collections.abc import Sequence

from steadynorm.evidence.lab import estimates
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
from steadynorm.evidence.lab.training import Recipe, Tick, train
from steadynorm.report.charts import lines

SIZES = (64, 16, 4)
NAMES = {"batch": "the batch", "running": "the running average"}


def settings(profile: Profile) -> Sequence[Setting]:
    """Both forms at every batch size, on as many digits."""
    samples = 8_000 if profile == "quick" else 16_000
    return [
        {"statistics": policy, "batch": size, "samples": samples}
        for policy in NAMES
        for size in SIZES
    ]


def recipe(setting: Setting) -> Recipe:
    """One cycle."""
    return Recipe(setting["batch"], setting["samples"])


def steps(setting: Setting) -> int:
    """The length of a run."""
    return recipe(setting).steps


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train; errors of inference, and of the same digits normalized as in training."""
    normalization = normalization_1d(setting["statistics"])
    network = fully_connected(digits.train_images[0].size, normalization)
    initialize(network, seed)
    done = train(network, digits, recipe(setting), seed=seed, tick=tick, layers=False)
    return {
        "error": done.error,
        "error_in_training": 100 * (1 - (done.accuracy_in_training or 0)),
        "samples_seen": [point.samples for point in done.points],
        "loss": [point.loss for point in done.points],
        "stopped": done.stopped,
    }


def verdict(runs: Runs) -> Verdict:
    """Error against error at every batch size."""
    more = {
        size: estimates.difference(
            runs.values("error", statistics="running", batch=size),
            runs.values("error", statistics="batch", batch=size),
        )
        for size in SIZES
    }
    return judge(
        f"Normalized by the running average in training, the network makes "
        f"{more[64].text(1)} points more errors than by the batch at batch 64, {more[16].text(1)} "
        f"at 16 and {more[4].text(1)} at 4.",
        [
            expect(f"points of error more than by the batch, at batch {size}", more[size], below=1)
            for size in SIZES
        ],
    )


def show(runs: Runs) -> Shown:
    """Errors, and the loss over training."""

    def called(run: Run) -> str:
        return f"{NAMES[run['statistics']]}, {run['batch']}"

    return Shown(
        [
            table(
                "Error of inference, %", runs, rows="statistics", columns="batch", names=NAMES,
                corner="normalized by / batch size", value=lambda run: run["error"],
            ),
            table(
                "Error on the same digits normalized as in training, %", runs, rows="statistics",
                columns="batch", names=NAMES, corner="normalized by / batch size",
                value=lambda run: run["error_in_training"],
            ),
        ],
        [
            lines(
                "Loss in training", curves(runs, "samples_seen", "loss", called),
                x="samples_seen", y="loss", series="series", replicate="seed", log_y=True,
                x_title="digits seen", y_title="loss",
                description="Mean over the seeds; the band is their range.",
            )
        ],
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="running-average-in-training",
    title="The running average in training",
    claim="The running average of mean and variance may normalize in training as well as the "
    "batch's own.",
    source="course notes on batch normalization, which give the algorithm in this form",
    factors={
        "statistics": "sn.Batch(), or sn.Running(), the average with the batch in it",
        "batch": "batch size",
    },
    measure="Error of inference on the test digits, in per cent; three hidden layers of 128, ReLU, "
    "SGD with momentum, one cycle; momentum 0.1 of the averages.",
    rule="The running average makes at most one point of error more than the batch, at batch 64, "
    "16 and 4.",
    settings=settings,
    run=run,
    verdict=verdict,
    show=show,
    steps=steps,
)
