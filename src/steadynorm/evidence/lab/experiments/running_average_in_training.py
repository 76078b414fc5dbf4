"""The running average normalizes in training too, against the batch's own statistics."""

from __future__ import annotations

from collections.abc import Iterator

from steadynorm.evidence.digits import Digits
from steadynorm.evidence.lab.experiment import Experiment, one_cycle
from steadynorm.evidence.lab.figures import chart, table
from steadynorm.evidence.lab.runs import Result, Runs, Setting, grid
from steadynorm.evidence.lab.verdict import Verdict, expect, judge
from steadynorm.evidence.networks import build
from steadynorm.evidence.training import Tick, train
from steadynorm.report.page import Piece

SIZES = (64, 16, 4)
NAMES = {"batch": "the batch", "running": "the running average"}


def settings(samples: int) -> list[Setting]:
    """Both forms at every batch size, on as many digits."""
    return grid(statistics=tuple(NAMES), batch=SIZES, samples=samples)


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train; errors of inference, and of the same digits normalized as in training."""
    network = build("fully connected", setting["statistics"], digits, seed)
    done = train(network, digits, one_cycle(setting), seed=seed, tick=tick)
    return {
        "error": done.error,
        "error_in_training": done.error_in_training,
        "samples_seen": [point.samples for point in done.points],
        "loss": [point.loss for point in done.points],
        "stopped": done.stopped,
    }


def verdict(runs: Runs) -> Verdict:
    """Error against error at every batch size."""
    more = {
        size: runs.difference("error", "statistics", "running", "batch", batch=size)
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


def shows(runs: Runs) -> Iterator[Piece]:
    """Errors, and the loss over training."""
    for title, measure in (
        ("Error of inference, %", "error"),
        ("Error on the same digits normalized as in training, %", "error_in_training"),
    ):
        yield table(
            title, runs, rows="statistics", columns="batch", names=NAMES,
            corner="normalized by / batch size", measure=measure,
        )  # fmt: skip
    yield chart(
        "Loss in training", runs, x="samples_seen", y="loss",
        series=lambda run: f"{NAMES[run['statistics']]}, {run['batch']}", log_y=True,
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
    settings={"quick": settings(8_000), "full": settings(16_000)}, run=run, verdict=verdict,
    shows=shows,
)  # fmt: skip
