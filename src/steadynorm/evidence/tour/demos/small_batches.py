"""A fully connected network at batch 2 and batch 1 under every policy, and at batch 64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from steadynorm.evidence.networks import renorm_for
from steadynorm.evidence.tour.demo import Demo, DemoResult, Outcomes, TourOptions, error_of, spread
from steadynorm.evidence.training import Recipe, TrainingResult, TrainingSetup, execute
from steadynorm.evidence.workers import Job
from steadynorm.report.charts import intervals, lines
from steadynorm.report.page import Chart, Table
from steadynorm.statistics import Policy, Steady


class Arm(NamedTuple):
    """A policy at a batch size; "none" is no normalization."""

    policy: str
    batch_size: int

    @property
    def label(self) -> str:
        """A series' name in the charts: the batch size only where it differs from the chart's."""
        return f"{self.policy} at 64" if self.batch_size == 64 else self.policy


POLICIES = ("Batch", "Renorm", "Running", "Steady", "none")
ARMS = (Arm("Batch", 64), *(Arm(policy, size) for size in (2, 1) for policy in POLICIES))
Trained = Mapping[Arm, Sequence[TrainingResult]]


def jobs(options: TourOptions) -> Sequence[Job]:
    """One training for each arm and seed; all see the same digits equally often."""
    planned = []
    for seed in options.seeds:
        for arm in ARMS:
            recipe = Recipe(arm.batch_size, samples=2_400 if options.short else 6_000)
            policy: Policy | str = (
                renorm_for(recipe.steps) if arm.policy == "Renorm" else arm.policy.lower()
            )
            setup = TrainingSetup("fully connected", policy, recipe)
            arguments = (setup, options.data_dir, seed)
            planned.append(Job(DEMO.name, (arm, seed), recipe.steps, execute, arguments))
    return planned


def result(options: TourOptions, outcomes: Outcomes) -> DemoResult:
    """Errors under every policy, learning curves, and what the layers saw."""
    by_arm = {arm: [outcomes[arm, seed] for seed in options.seeds] for arm in ARMS}

    def error(policy: str, size: int) -> str:
        return f"{error_of([r.accuracy for r in by_arm[Arm(policy, size)]]).value:.1f} %"

    return DemoResult(
        f"Error at batch 2: {error('Batch', 2)} with Batch, {error('Steady', 2)} with Steady; "
        f"the same network at batch 64 has {error('Batch', 64)}. At batch 1 Batch cannot "
        f"train, Steady has {error('Steady', 1)}.",
        [_table(by_arm, options.seeds_in_words)],
        [*_curves(by_arm, options.seeds), _gap(by_arm), *_layers(by_arm)],
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
                {"policy": arm.policy, "batch_size": arm.batch_size, "seed": seed} | run.record()
                for (arm, seed), run in sorted(outcomes.items())
            ]
        },
    )


def _table(by_arm: Trained, seeds: str) -> Table:
    rows = []
    for arm, trained in by_arm.items():
        in_training, inference = "cannot train", "–"
        if not trained[0].stopped:
            in_training = error_of([run.accuracy_in_training or 0 for run in trained]).plus_minus
            inference = error_of([run.accuracy for run in trained]).plus_minus
        rows.append((arm.policy, arm.batch_size, in_training, inference))
    refusals = [run.stopped for runs in by_arm.values() for run in runs if run.stopped]
    note = (
        f"Error on the test digits, {seeds}; ± is the 95 % interval of the mean. "
        "Batch, Renorm and Running keep torch's momentum of 0.1."
    )
    if refusals:
        note += f" What Batch says at batch 1: “{refusals[0]}”"
    return Table(
        "A fully connected network of three hidden layers",
        ("policy", "batch", "error as in training, %", "error of inference, %"),
        rows,
        note=note,
        emphasis=[index for index, arm in enumerate(by_arm) if arm.policy == "Steady"],
    )


def _curves(by_arm: Trained, seeds: Sequence[int]) -> list[Chart]:
    rows = [
        {"policy": arm.label, "seed": seed, "batch": arm.batch_size, **vars(point)}
        for arm, trained in by_arm.items()
        for seed, run in zip(seeds, trained, strict=True)
        for point in run.points
    ]
    return [
        lines(
            f"{title} at batch {size}", [row for row in rows if row["batch"] in (size, 64)],
            x="samples", y=y, series="policy", replicate="seed",
            order=[arm.label for arm in ARMS[:6]], highlight="Steady", log_y=y == "loss",
            percent=y == "accuracy", y_max=10.0 if y == "loss" else None,
            x_title="digits seen", y_title=words,
            description="Mean over the seeds; the band is their range. "
            "Select a policy in the legend to see it alone.",
        )
        for size in (2, 1)
        for y, title, words in (
            ("loss", "Training loss", "training loss"),
            ("accuracy", "Accuracy of inference", "accuracy on the test digits"),
        )
    ]  # fmt: skip


def _gap(by_arm: Trained) -> Chart:
    rows = []
    for arm, trained in by_arm.items():
        for words, values in (
            ("as in training", [run.accuracy_in_training for run in trained]),
            ("inference", [run.accuracy for run in trained]),
        ):
            known = [value for value in values if value is not None]
            if known and trained[0].stopped is None:
                name = f"{arm.policy}, batch {arm.batch_size}"
                rows.append({"arm": name, "normalized": words, **spread(known)})
    return intervals(
        "The same test digits, normalized as in training and as in inference",
        rows, value="accuracy", low="lowest", high="highest", label="arm",
        series="normalized", value_title="accuracy", wide=True,
        description="Mean and range over the seeds. Two dots apart: the network meets other "
        "statistics in inference than it was trained with.",
    )  # fmt: skip


def _layers(by_arm: Trained) -> list[Chart]:
    quantities = (
        ("mean", "Mean of a batch, minus the running mean", 0.0),
        ("std", "Standard deviation of a batch", 1.0),
        ("used_std", "Standard deviation that normalizes", 1.0),
    )
    ends = ("10th percentile", "median", "90th percentile")
    return [
        intervals(
            title,
            [
                {
                    "layer": f"layer {number}", "policy": f"{arm.policy} at {arm.batch_size}",
                    **dict(zip(ends, getattr(layer, quantity), strict=True)),
                }
                for arm in (Arm("Batch", 64), Arm("Batch", 2), Arm("Steady", 2))
                for number, layer in enumerate(by_arm[arm][0].layers, start=1)
            ],
            value="median", low=ends[0], high=ends[2],
            label="layer", series="policy", zero=True, reference=agrees,
            value_title="in running standard deviations", wide=quantity == "used_std",
            description="Median over channels and batches, from the 10th to the 90th "
            f"percentile, first seed. At {agrees:g} the running statistics say the same.",
        )
        for quantity, title, agrees in quantities
    ]  # fmt: skip


DEMO = Demo("small-batches", "At batch 2 and 1: where statistics fail", jobs, result)
