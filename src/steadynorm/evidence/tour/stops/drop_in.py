"""The same convolutional network without normalization, with torch's layers, and with ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steadynorm.evidence.lab.jobs import Job
from steadynorm.evidence.lab.runs import Setup, execute, interval
from steadynorm.evidence.lab.training import Recipe, Training
from steadynorm.evidence.tour.stop import Setting, StopResult
from steadynorm.report.charts import lines
from steadynorm.report.page import Chart, Table

ARMS = {"none": None, "torch.nn": "torch", "steadynorm": "batch"}


class DropIn:
    """Batch 64: batch normalization learns faster, and ours does what torch's does."""

    name = "drop-in"
    title = "At batch 64: what torch.nn does"

    def jobs(self, setting: Setting) -> Sequence[Job]:
        recipe = Recipe(batch_size=64, samples=4_000 if setting.short else 12_000, points=15)
        return [
            Job(
                self.name,
                (arm, seed),
                recipe.steps,
                execute,
                (Setup("convolutional", statistics, recipe), setting.data_dir, seed),
            )
            for seed in setting.seeds
            for arm, statistics in ARMS.items()
        ]

    def result(self, setting: Setting, outcomes: Mapping[tuple[Any, ...], Any]) -> StopResult:
        runs: Mapping[tuple[str, int], Training] = outcomes
        by_arm = {arm: [runs[arm, seed] for seed in setting.seeds] for arm in ARMS}
        rows = []
        for arm, trained in by_arm.items():
            half = [run.points[len(run.points) // 2 - 1].accuracy for run in trained]
            rows.append(
                (
                    arm,
                    str(interval([100 * (1 - accuracy) for accuracy in half])),
                    str(interval([run.error for run in trained])),
                    interval([run.points[-1].loss for run in trained]).mean,
                )
            )
        apart = max(
            abs(ours.loss - theirs.loss)
            for seed in setting.seeds
            for ours, theirs in zip(
                runs["steadynorm", seed].points, runs["torch.nn", seed].points, strict=True
            )
        )
        steps = by_arm["steadynorm"][0].points[-1].step
        error = {arm: interval([run.error for run in trained]) for arm, trained in by_arm.items()}
        sentence = (
            f"After {steps} steps: {error['none'].mean:.1f} % error without normalization, "
            f"{error['torch.nn'].mean:.1f} % with torch.nn's layers, "
            f"{error['steadynorm'].mean:.1f} % with ours; the two losses are never "
            f"more than {apart:.1g} apart."
        )
        table = Table(
            "A small convolutional network, batch 64",
            ("normalization", "error half-way, %", "error, %", "last training loss"),
            rows,
            note=f"Error of inference on the test digits; {_over(setting)}.",
            digits=3,
            emphasis=(2,),
        )
        return StopResult(
            sentence,
            [table],
            _charts(runs),
            figures={
                "largest_loss_difference": apart,
                "runs": [
                    {"normalization": arm, "seed": seed, **run.record()}
                    for (arm, seed), run in sorted(runs.items())
                ],
            },
        )


def _charts(runs: Mapping[tuple[str, int], Training]) -> list[Chart]:
    curves = [
        {"normalization": arm, "seed": seed, **vars(point)}
        for (arm, seed), run in sorted(runs.items(), key=lambda item: item[0][1])
        for point in run.points
    ]
    curves.sort(key=lambda row: list(ARMS).index(row["normalization"]))
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


def _over(setting: Setting) -> str:
    if len(setting.seeds) == 1:
        return "one seed"
    return f"mean over {len(setting.seeds)} seeds with its 95 % interval"
