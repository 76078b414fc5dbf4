"""The doctor looks at a network trained at batch 2, before and after its own cure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch import nn
from torch.nn import functional as F

from steadynorm.doctor import Report
from steadynorm.doctor.report.charts import compared
from steadynorm.doctor.report.groups import Group, grouped, named, verdict
from steadynorm.doctor.report.html import what_is_wrong
from steadynorm.doctor.report.json import to_record
from steadynorm.evidence.digits import batches, load, tensors
from steadynorm.evidence.networks import build
from steadynorm.evidence.tour.demo import Demo, DemoResult, Outcomes, TourOptions, error_of
from steadynorm.evidence.training import Recipe, Tick, inference_accuracy, train
from steadynorm.evidence.workers import Job
from steadynorm.report.charts import intervals
from steadynorm.report.page import Chart, Table


@dataclass(frozen=True)
class Visit:
    """What the doctor said before and after, what `fix` did, and accuracies of inference: as it
    was, after the cure, and of the same network trained with the policy that the doctor names.
    """

    before: Report
    after: Report
    done: list[str]
    as_it_was: float
    cured: float
    advised: float


def visit(
    recipe: Recipe, count: int, data_dir: str | None, seed: int, *, tick: Tick | None = None
) -> Visit:
    """Train at a small batch, show the doctor `count` training batches, apply the safe cures."""
    import steadynorm as sn
    from steadynorm.doctor.fixes import fix

    digits = load(data_dir)
    images, labels, test_images, test_labels = tensors(digits)

    def trained(policy: str) -> nn.Module:
        network = build("fully connected", policy, digits, seed)
        train(network, digits, recipe, seed=seed, tick=tick)
        return network.eval()

    network = trained("torch")
    order = islice(batches(len(labels), recipe.batch_size, seed), count)
    shown = [(images[batch], labels[batch]) for batch in order]
    report = sn.diagnose(network, shown, loss=F.cross_entropy)
    fixed = fix(network, report, shown, loss=F.cross_entropy)
    accuracies = (
        inference_accuracy(model, test_images, test_labels)
        for model in (network, fixed.model, trained("steady"))
    )
    done = [f"{change.what} {change.where}" for change in fixed.changes]
    return Visit(report, fixed.after, done, *accuracies)


def jobs(options: TourOptions) -> Sequence[Job]:
    """One visit for each seed."""
    recipe = Recipe(2, samples=2_400 if options.short else 6_000, points=1)
    count = 200 if options.short else 700
    return [
        Job(DEMO.name, (seed,), 2 * recipe.steps, visit, (recipe, count, options.data_dir, seed))
        for seed in options.seeds
    ]


def result(options: TourOptions, outcomes: Outcomes) -> DemoResult:
    """The findings before and after, and what cure and advice are worth."""
    visits: list[Visit] = [outcomes[seed,] for seed in options.seeds]
    first = visits[0]
    error = {
        name: error_of([getattr(visit, name) for visit in visits])
        for name in ("as_it_was", "cured", "advised")
    }
    before, cured, advised = error.values()
    found = grouped(first.before.findings)
    return DemoResult.of(
        DEMO.title,
        f"The doctor finds {verdict(first.before)}"
        + (f", first of all: {found[0].title}" if found else "")
        + f". Its safe cure takes the error of inference from {before.value:.1f} % to "
        f"{cured.value:.1f} %; its advice, Steady, trained at batch 2 too, to "
        f"{advised.value:.1f} %.",
        "It reads the model and a few hundred of its training batches, changes nothing of them, "
        "and judges by rules, each with its threshold and its source; sn.diagnose(model, batches) "
        "or steadynorm doctor. Calibration mends what the running statistics have wrong. It does "
        "not mend what training at batch 2 did to the weights; for that the doctor names the "
        "policy that would do.",
        Table(
            "What the doctor finds",
            ("when", "finding", "severity", "defect", "where"),
            [*_rows("before", first.before), *_rows("after the cure", first.after)],
            note=f"Of seed {options.seeds[0]}.",
        ),
        Table(
            "What it is worth",
            ("network", "error of inference, %"),
            [
                ("trained at batch 2", before.plus_minus),
                ("the same, after the safe cure", cured.plus_minus),
                ("trained at batch 2 with Steady, as advised", advised.plus_minus),
            ],
            note=f"Error on the test digits, {options.seeds_in_words}; ± is the 95 % interval of "
            "the mean.",
            emphasis=(2,),
        ),
        *_charts(first),
        *what_is_wrong(first.before).cards,
        figures={
            "runs": [
                {
                    "seed": seed,
                    "accuracy": {name: getattr(v, name) for name in error},
                    "done": v.done,
                    "before": to_record(v.before)["findings"],
                    "after": to_record(v.after)["findings"],
                }
                for seed, v in zip(options.seeds, visits, strict=True)
            ]
        },
    )


def _charts(visit: Visit) -> list[Chart]:
    """How far the running statistics were off, and are after the cure."""
    rows: dict[str, list[dict[str, Any]]] = {"shift": [], "ratio": []}
    for when, report in (("before", visit.before), ("after", visit.after)):
        for layer in report.evidence.layers:
            against = compared(layer)
            for name, charted in rows.items() if against is not None else ():
                low, middle, high = np.percentile(getattr(against, name), [10, 50, 90])
                row = {"layer": named(layer), "when": when}
                charted.append({**row, "low": low, "median": middle, "high": high})
    description = (
        "The median channel of each layer, and a bar over the middle 80 % of its channels."
    )
    return [
        intervals(
            title, rows[name], value="median", low="low", high="high", label="layer", series="when",
            reference=right, value_title=unit, description=description,
        )
        for name, title, unit, right in (
            ("shift", "Running mean minus the data's", "standard deviations", 0.0),
            ("ratio", "Running standard deviation over the data's", "ratio", 1.0),
        )
    ]  # fmt: skip


def _rows(when: str, report: Report) -> list[tuple[str, str, str, str, str]]:
    groups = grouped(report.findings)
    if not groups:
        return [(when, "none", "", "", "")]
    return [
        (when if number == 0 else "", group.first.code, str(group.first.severity), group.title,
         _where(group))
        for number, group in enumerate(groups)
    ]  # fmt: skip


def _where(group: Group) -> str:
    layers = group.layers
    if not layers:
        return "the model"
    return f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers from {layers[0]}"


DEMO = Demo("doctor", "The doctor on a network trained at batch 2", jobs, result)
