"""Batch 64: batch normalization learns faster, and our layers do what torch.nn's do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from steadynorm.evidence import estimates
from steadynorm.evidence.tour.demo import Demo, DemoResult, Outcomes, TourOptions, error_of
from steadynorm.evidence.training import Recipe, TrainingResult, execute
from steadynorm.evidence.workers import Job
from steadynorm.report.charts import lines
from steadynorm.report.page import Chart, Table

ARMS = {"none": None, "torch.nn": "torch", "steadynorm": "batch"}


def jobs(options: TourOptions) -> Sequence[Job]:
    """One training for each layer and seed."""
    recipe = Recipe(batch_size=64, samples=4_000 if options.short else 12_000, points=15)
    return [
        Job(
            DEMO.name, (arm, seed), recipe.steps, execute,
            ("convolutional", statistics, recipe, options.data_dir, seed),
        )
        for seed in options.seeds
        for arm, statistics in ARMS.items()
    ]  # fmt: skip


def result(options: TourOptions, outcomes: Outcomes) -> DemoResult:
    """Errors half-way and at the end, and how far the losses of both layers differ."""
    runs: Mapping[tuple[str, int], TrainingResult] = outcomes
    by_arm = {arm: [runs[arm, seed] for seed in options.seeds] for arm in ARMS}
    error = {arm: error_of([run.accuracy for run in trained]) for arm, trained in by_arm.items()}
    rows = [
        (
            arm,
            error_of([r.points[len(r.points) // 2 - 1].accuracy for r in trained]).plus_minus,
            error[arm].plus_minus,
            estimates.mean(run.points[-1].loss for run in trained).value,
        )
        for arm, trained in by_arm.items()
    ]
    difference = max(
        abs(ours.loss - theirs.loss)
        for one, other in zip(by_arm["steadynorm"], by_arm["torch.nn"], strict=True)
        for ours, theirs in zip(one.points, other.points, strict=True)
    )
    count = len(options.seeds)
    over = "one seed" if count == 1 else f"mean over {count} seeds with its 95 % interval"
    return DemoResult.of(
        DEMO.title,
        f"After {by_arm['steadynorm'][0].points[-1].step} steps: {error['none'].value:.1f} % error "
        f"without normalization, {error['torch.nn'].value:.1f} % with torch.nn's layers, "
        f"{error['steadynorm'].value:.1f} % with ours; the two losses are never "
        f"more than {difference:.1g} apart.",
        Table(
            "A small convolutional network, batch 64",
            ("normalization", "error half-way, %", "error, %", "last training loss"),
            rows,
            note=f"Error of inference on the test digits; {over}.",
            digits=3,
            emphasis=(2,),
        ),
        *_charts(by_arm, options.seeds),
        figures={
            "largest_loss_difference": difference,
            "runs": [
                {"normalization": arm, "seed": seed, **run.record()}
                for (arm, seed), run in sorted(runs.items())
            ],
        },
    )


def _charts(by_arm: Mapping[str, list[TrainingResult]], seeds: Sequence[int]) -> list[Chart]:
    curves = [
        {"normalization": arm, "seed": seed, **vars(point)}
        for arm, trained in by_arm.items()
        for seed, run in zip(seeds, trained, strict=True)
        for point in run.points
    ]
    return [
        lines(
            "Training loss", curves, x="step", y="loss", series="normalization",
            replicate="seed", log_y=True, y_title="training loss",
            description="Mean over the seeds; the band is their range. "
            "torch.nn and steadynorm lie on each other.",
        ),
        lines(
            "Accuracy of inference", curves, x="step", y="accuracy", series="normalization",
            replicate="seed", percent=True, y_title="accuracy on the test digits",
            description="Mean over the seeds; the band is their range.",
        ),
    ]  # fmt: skip


DEMO = Demo("drop-in", "At batch 64: what torch.nn does", jobs, result)
