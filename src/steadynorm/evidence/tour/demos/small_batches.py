"""Ten sigmoid layers, which do not train without normalization, normalized 64, 2 or 1 at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import NamedTuple

from steadynorm.evidence import estimates
from steadynorm.evidence.digits import load
from steadynorm.evidence.lab.micro_batches import MicroBatchNorm
from steadynorm.evidence.lab.side_by_side import train
from steadynorm.evidence.networks import build, renorm_for
from steadynorm.evidence.tour.demo import Demo, DemoResult, Outcomes, TourOptions
from steadynorm.evidence.training import Recipe, Tick
from steadynorm.evidence.workers import Job
from steadynorm.report.charts import intervals
from steadynorm.report.page import Table
from steadynorm.statistics import Policy, Steady, policy_from

STEP = 64  # samples whose gradients make a step


class Arm(NamedTuple):
    """A policy, and how many samples it normalizes together; "none" is no normalization."""

    policy: str
    together: int

    def __str__(self) -> str:
        return self.policy if self.policy == "none" else f"{self.policy}, {self.together}"


ARMS = (
    *(Arm("Batch", size) for size in (STEP, 2)), Arm("Renorm", 2),
    *(Arm("Steady", size) for size in (STEP, 2, 1)), Arm("none", STEP),
)  # fmt: skip


def execute(
    arm: Arm, samples: int, data_dir: str | None, seeds: Sequence[int], *, tick: Tick | None = None
) -> dict[str, list[float]]:
    """Train an arm's networks, one for each seed; their errors."""
    digits, recipe = load(data_dir), Recipe(STEP, samples)
    normalization = None
    if arm.policy != "none":
        renorm = renorm_for(recipe.steps * STEP // arm.together)
        policy: Policy = renorm if arm.policy == "Renorm" else policy_from(arm.policy.lower())
        normalization = partial(MicroBatchNorm, policy=policy, size=arm.together)
    networks = [build("ten sigmoid layers", normalization, digits, seed) for seed in seeds]
    return train(networks, digits, recipe, seeds, tick=tick)


def jobs(options: TourOptions) -> Sequence[Job]:
    """One training for each arm, of all seeds side by side; all see the same digits."""
    samples = 3_200 if options.short else 6_400
    return [
        Job(
            DEMO.name,
            arm,
            samples // STEP,
            execute,
            (arm, samples, options.data_dir, options.seeds),
        )
        for arm in ARMS
    ]


def result(options: TourOptions, outcomes: Outcomes) -> DemoResult:
    """Errors with running and with calibrated statistics."""
    measures = {"error": "running", "error_calibrated": "calibrated"}

    def error(policy: str, together: int) -> str:
        return f"{fmean(outcomes[policy, together]['error']):.1f} %"

    rows = []
    for arm in ARMS:
        cells = (estimates.mean(outcomes[arm][measure]).plus_minus for measure in measures)
        rows.append((arm.policy, "–" if arm.policy == "none" else arm.together, *cells))
    bars = [
        {
            "arm": str(arm), "statistics": words, "error": fmean(outcomes[arm][measure]),
            "lowest": min(outcomes[arm][measure]), "highest": max(outcomes[arm][measure]),
        }
        for arm in ARMS
        for measure, words in measures.items()
    ]  # fmt: skip
    return DemoResult.of(
        DEMO.title,
        f"Ten sigmoid layers make {error('none', STEP)} errors without normalization, "
        f"{error('Batch', STEP)} with 64 samples normalized together. Two at a time: "
        f"{error('Batch', 2)} with Batch, {error('Steady', 2)} with Steady. One at a time, where "
        f"Batch cannot train: {error('Steady', 1)} with Steady.",
        Table(
            "Ten sigmoid layers, each step from the gradients of 64 digits",
            ("policy", "normalized together", "error, %", "error after calibration, %"),
            rows,
            note=f"Inference on the test digits, {options.seeds_in_words}; ± is the 95 % interval "
            "of the mean. Batch and Renorm keep torch's momentum of 0.1.",
            emphasis=[index for index, arm in enumerate(ARMS) if arm.policy == "Steady"],
        ),
        intervals(
            "Error of inference", bars, value="error", low="lowest", high="highest", label="arm",
            series="statistics", log=True, value_title="error, %", wide=True,
            description="Mean and range over the seeds, with running statistics and after "
            "calibration.",
        ),
        "Two digits normalized together decide each other's mean and variance, so what a digit "
        "looks like to the network depends on its partner; one alone has no variance. Steady "
        f"normalizes with running statistics and a small share of the batch, {Steady().prior:g} "
        "remembered samples against its own, and takes from the gradient what the samples gone by "
        "would have taken. All micro-batches of a step are computed at once here, which the tests "
        "hold to the layers called in a loop.",
        figures={
            "runs": [
                {"policy": arm.policy, "together": arm.together, "seeds": list(options.seeds)}
                | outcomes[arm]
                for arm in ARMS
            ]
        },
    )  # fmt: skip


DEMO = Demo("small-batches", "Normalized two and one at a time", jobs, result)
