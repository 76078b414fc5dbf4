"""A fully connected network at batch 2 and batch 1 under every policy, and at batch 64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from steadynorm.evidence.lab.jobs import Job
from steadynorm.evidence.lab.networks import renorm_for
from steadynorm.evidence.lab.runs import Setup, execute, interval
from steadynorm.evidence.lab.training import Recipe, Training
from steadynorm.evidence.tour.stop import Setting, StopResult
from steadynorm.report.charts import intervals, lines
from steadynorm.report.page import Chart, Table
from steadynorm.statistics import Batch, Policy, Running, Steady


class Arm(NamedTuple):
    """A policy at a batch size; None is no normalization."""

    policy: str
    batch_size: int


POLICIES = ("Batch", "Renorm", "Running", "Steady")
ARMS = (
    Arm("Batch", 64),
    *(Arm(policy, 2) for policy in (*POLICIES, "none")),
    *(Arm(policy, 1) for policy in (*POLICIES, "none")),
)


def policy_of(arm: Arm, steps: int) -> Policy | None:
    """The policy an arm trains with; Renorm's schedule is scaled to the length of the run."""
    kinds: dict[str, Policy | None] = {
        "Batch": Batch(), "Running": Running(), "Steady": Steady(), "none": None
    }  # fmt: skip
    return renorm_for(steps) if arm.policy == "Renorm" else kinds[arm.policy]


class SmallBatches:
    """Batch 2 and 1: the batch's own statistics fall apart, Steady holds."""

    name = "small-batches"
    title = "At batch 2 and 1: where statistics fail"

    def recipe(self, setting: Setting, arm: Arm) -> Recipe:
        """All arms see the same digits equally often."""
        return Recipe(arm.batch_size, samples=2_400 if setting.short else 6_000)

    def jobs(self, setting: Setting) -> Sequence[Job]:
        jobs = []
        for seed in setting.seeds:
            for arm in ARMS:
                recipe = self.recipe(setting, arm)
                setup = Setup("fully connected", policy_of(arm, recipe.steps), recipe)
                jobs.append(
                    Job(
                        self.name,
                        (arm, seed),
                        recipe.steps,
                        execute,
                        (setup, setting.data_dir, seed),
                    )
                )
        return jobs

    def result(self, setting: Setting, outcomes: Mapping[tuple[Any, ...], Any]) -> StopResult:
        runs: Mapping[tuple[Arm, int], Training] = outcomes
        by_arm = {arm: [runs[arm, seed] for seed in setting.seeds] for arm in ARMS}
        seeds = f"{len(setting.seeds)} seeds" if len(setting.seeds) > 1 else "one seed"
        return StopResult(
            self._sentence(by_arm),
            [self._table(by_arm, seeds)],
            self._charts(runs, by_arm),
            text=[
                "At batch 2 two digits decide the mean and the variance that normalize each "
                "other, so what a digit looks like to the network depends on its partner; at "
                "batch 1 nothing is left of it. Running and Steady normalize with a memory of "
                "earlier batches too; Steady believes the batch as far as it knows, n values "
                f"against a prior of {Steady().prior:g} remembered ones, and keeps its memory over "
                f"{Steady().horizon:g} samples, whatever the batch size."
            ],
            figures={
                "runs": [
                    {"policy": arm.policy, "batch_size": arm.batch_size, "seed": seed}
                    | run.record()
                    for (arm, seed), run in sorted(runs.items())
                ]
            },
        )

    def _sentence(self, by_arm: Mapping[Arm, list[Training]]) -> str:
        def error(policy: str, batch_size: int) -> str:
            return f"{interval([run.error for run in by_arm[policy, batch_size]]).mean:.1f} %"  # type: ignore[index]

        return (
            f"Error at batch 2: {error('Batch', 2)} with Batch, {error('Steady', 2)} with Steady; "
            f"the same network at batch 64 has {error('Batch', 64)}. At batch 1 Batch cannot "
            f"train, Steady has {error('Steady', 1)}."
        )

    def _table(self, by_arm: Mapping[Arm, list[Training]], seeds: str) -> Table:
        rows = []
        for arm, trained in by_arm.items():
            stopped = trained[0].stopped
            measured = [100 * (1 - (run.accuracy_in_training or 0)) for run in trained]
            rows.append(
                (
                    arm.policy,
                    arm.batch_size,
                    "cannot train" if stopped else str(interval(measured)),
                    "–" if stopped else str(interval([run.error for run in trained])),
                )
            )
        refusals = [run.stopped for runs in by_arm.values() for run in runs if run.stopped]
        note = (
            f"Error on the test digits, {seeds}; ± is the 95 % interval of the mean. "
            "Batch, Renorm and Running keep torch's momentum of 0.1."
        )
        if refusals:
            note += f" What Batch says at batch 1: “{refusals[0]}”"
        emphasis = [index for index, arm in enumerate(by_arm) if arm.policy == "Steady"]
        return Table(
            "A fully connected network of three hidden layers",
            ("policy", "batch", "error as in training, %", "error of inference, %"),
            rows,
            note=note,
            emphasis=emphasis,
        )

    def _charts(
        self,
        runs: Mapping[tuple[Arm, int], Training],
        by_arm: Mapping[Arm, list[Training]],
    ) -> list[Chart]:
        curves = [
            {"policy": label(arm), "seed": seed, "batch": arm.batch_size, **vars(point)}
            for arm in ARMS
            for (other, seed), run in runs.items()
            if other == arm
            for point in run.points
        ]
        reference = label(ARMS[0])
        charts = []
        for size in (2, 1):
            some = [row for row in curves if row["batch"] == size or row["policy"] == reference]
            for y, title, words in (
                ("loss", "Training loss", "training loss"),
                ("accuracy", "Accuracy of inference", "accuracy on the test digits"),
            ):
                charts.append(
                    lines(
                        f"{title} at batch {size}", some, x="samples", y=y, series="policy",
                        replicate="seed", order=[label(arm) for arm in ARMS[:6]],
                        highlight="Steady", log_y=y == "loss", percent=y == "accuracy",
                        y_max=10.0 if y == "loss" else None,
                        x_title="digits seen", y_title=words,
                        description="Mean over the seeds; the band is their range. "
                        "Select a policy in the legend to see it alone.",
                    )
                )  # fmt: skip
        return [*charts, self._gap(by_arm), *self._layers(by_arm)]

    def _gap(self, by_arm: Mapping[Arm, list[Training]]) -> Chart:
        rows = []
        for arm, trained in by_arm.items():
            for words, values in (
                ("as in training", [run.accuracy_in_training for run in trained]),
                ("inference", [run.accuracy for run in trained]),
            ):
                known = [value for value in values if value is not None]
                if known and trained[0].stopped is None:
                    rows.append(
                        {
                            "arm": f"{arm.policy}, batch {arm.batch_size}",
                            "normalized": words,
                            "accuracy": sum(known) / len(known),
                            "lowest": min(known),
                            "highest": max(known),
                        }
                    )
        return intervals(
            "The same test digits, normalized as in training and as in inference",
            rows, value="accuracy", low="lowest", high="highest", label="arm",
            series="normalized", value_title="accuracy", wide=True,
            description="Mean and range over the seeds. Two dots apart: the network meets other "
            "statistics in inference than it was trained with.",
        )  # fmt: skip

    def _layers(self, by_arm: Mapping[Arm, list[Training]]) -> list[Chart]:
        quantities = (
            ("mean", "Mean of a batch, minus the running mean", 0.0),
            ("std", "Standard deviation of a batch", 1.0),
            ("used_std", "Standard deviation that normalizes", 1.0),
        )
        charts = []
        for quantity, title, agrees in quantities:
            rows = []
            for arm in (Arm("Batch", 64), Arm("Batch", 2), Arm("Steady", 2)):
                for number, layer in enumerate(by_arm[arm][0].layers, start=1):
                    low, middle, high = getattr(layer, quantity)
                    rows.append(
                        {
                            "layer": f"layer {number}",
                            "policy": f"{arm.policy} at {arm.batch_size}",
                            "10th percentile": low,
                            "median": middle,
                            "90th percentile": high,
                        }
                    )
            charts.append(
                intervals(
                    title, rows, value="median", low="10th percentile", high="90th percentile",
                    label="layer", series="policy", zero=True, reference=agrees,
                    value_title="in running standard deviations", wide=quantity == "used_std",
                    description="Median over channels and batches, from the 10th to the 90th "
                    f"percentile, first seed. At {agrees:g} the running statistics say the same.",
                )
            )  # fmt: skip
        return charts


def label(arm: Arm) -> str:
    """A series' name in the charts: the batch size only where it differs from the chart's."""
    return f"{arm.policy} at 64" if arm.batch_size == 64 else arm.policy
