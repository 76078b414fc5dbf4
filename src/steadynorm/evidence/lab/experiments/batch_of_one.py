"""Batch 1 and 2, in convolutions above all: what a batch of one should count for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from steadynorm.evidence.digits import Digits
from steadynorm.evidence.lab.experiment import Experiment, Figures
from steadynorm.evidence.lab.experiments.small_batches import frozen_tail, recipe
from steadynorm.evidence.lab.figures import table
from steadynorm.evidence.lab.gradient_memory import GradientMemoryNorm
from steadynorm.evidence.lab.runs import Profile, Result, Runs, Setting
from steadynorm.evidence.lab.verdict import Verdict, expect, judge
from steadynorm.evidence.networks import Statistics, build, renorm_for
from steadynorm.evidence.training import Tick, train

FLAT, CONVOLUTIONAL = "fully connected", "convolutional"
CANDIDATES: dict[str, Callable[[int], nn.Module]] = {
    "square root": partial(GradientMemoryNorm, power=0.5, remember=False),
    "samples": partial(GradientMemoryNorm, power=0.0, remember=False),
    "positions, remembered": partial(GradientMemoryNorm, power=1.0),
    "square root, remembered": partial(GradientMemoryNorm, power=0.5),
    "samples, remembered": partial(GradientMemoryNorm, power=0.0),
}
OTHERS: dict[str, Statistics] = {
    "group": partial(nn.GroupNorm, 4), "layer": partial(nn.GroupNorm, 1), "frozen tail": "batch",
}  # fmt: skip
NAMES = {
    "none": "no normalization",
    "group": "GroupNorm(4)",
    "layer": "LayerNorm",
    "batch": "Batch",
    "frozen tail": "Batch, frozen tail",
    "renorm": "Renorm",
    "running": "Running",
    "steady": "Steady (counts positions)",
    "square root": "Steady counting samples·√positions",
    "samples": "Steady counting samples",
    "positions, remembered": "positions, gradient remembered",
    "square root, remembered": "samples·√positions, gradient remembered",
    "samples, remembered": "samples, gradient remembered",
}
# Where there are no positions, counting them is counting samples.
ON_VECTORS = ("none", "layer", "running", "steady", "samples, remembered")
AT_TWO = ("none", "group", "batch", "running", "steady", "samples", "samples, remembered")
IN_QUICK = ("group", "steady", "samples", "positions, remembered", "samples, remembered")


def settings(samples: int, found: list[tuple[str, int, str]]) -> list[Setting]:
    """From network, batch size and kind of normalization."""
    return [
        {"network": network, "batch": size, "kind": kind, "samples": samples}
        for network, size, kind in found
    ]


SETTINGS: dict[Profile, list[Setting]] = {
    "quick": settings(
        3_000,
        [(CONVOLUTIONAL, 1, kind) for kind in IN_QUICK]
        + [(CONVOLUTIONAL, 2, kind) for kind in AT_TWO if kind in IN_QUICK],
    ),
    # All rules on the convolutions, those that differ on vectors; up to batch 64 where a rule that
    # is better at 1 could be worse.
    "full": settings(
        6_000,
        [(CONVOLUTIONAL, 1, kind) for kind in NAMES]
        + [(CONVOLUTIONAL, 2, kind) for kind in AT_TWO]
        + [(FLAT, size, kind) for size in (1, 2) for kind in ON_VECTORS]
        + [
            (network, size, kind)
            for network in (CONVOLUTIONAL, FLAT)
            for size in (8, 64)
            for kind in ("steady", "samples, remembered")
        ],
    ),
}


def statistics(setting: Setting) -> Statistics:
    """What the setting normalizes with."""
    kind = setting["kind"]
    if kind == "renorm":
        return renorm_for(recipe(setting).steps)
    return (CANDIDATES | OTHERS).get(kind, kind)


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train; errors of inference, and of the test digits normalized as in training."""
    network = build(setting["network"], statistics(setting), digits, seed)
    freeze = frozen_tail(setting) if setting["kind"] == "frozen tail" else None
    done = train(network, digits, recipe(setting), seed=seed, tick=tick, after_step=freeze)
    return {
        "error": done.error, "error_in_training": done.error_in_training, "stopped": done.stopped
    }  # fmt: skip


def verdict(runs: Runs) -> Verdict:
    """Counting otherwise, alone and with the remembered gradient, against `Steady`."""
    one = runs.where(network=CONVOLUTIONAL, batch=1)
    counted, both = (
        one.difference("error", "kind", "steady", kind)
        for kind in ("samples", "samples, remembered")
    )
    rest = one.difference("error", "kind", "samples, remembered", "group")
    steady = one.mean("error", kind="steady")
    return judge(
        f"Convolutions at batch 1: Steady makes {steady.text(1)} % errors. Counting a sample's "
        f"positions as one value takes off {counted.text(1)} points; with the gradient through "
        f"the running variance remembered besides, {both.text(1)}, which leaves {rest.text(1)} "
        f"points to GroupNorm.",
        [
            expect("points of error that counting samples takes off, batch 1", counted, above=0),
            expect("the same with the gradient remembered", both, above=0),
            expect("points of error that are then left to GroupNorm", rest, below=1),
        ],
    )


def figures(runs: Runs) -> Figures:
    """Errors of inference, and of the test digits normalized as in training."""
    tables = [
        table(
            f"{title}, {network}, %", runs.where(network=network), rows="kind", columns="batch",
            names=NAMES, corner="normalization / batch size", measure=measure,
        )
        for title, measure in (("Error of inference", "error"),
                               ("Error normalized as in training", "error_in_training"))
        for network in runs.distinct("network")
    ]  # fmt: skip
    return Figures(
        tables,
        text=[
            "The remembered gradient is a candidate, not a policy of the package: Steady drops the "
            "gradient through that part of the variance that comes from earlier batches; here the "
            "present one takes it over, at the average that earlier batches showed."
        ],
    )


EXPERIMENT = Experiment(
    name="batch-of-one",
    title="A batch of one",
    claim="At batch 1 a convolution's positions tell less than their number, since they belong to "
    "one image: counted as fewer values, Steady does better.",
    source="this package's open question; the remembered gradient is kin of Yan et al. 2020",
    factors={
        "kind": "policies; GroupNorm and LayerNorm from outside; Steady whose share counts "
        "positions, samples, or samples times the root of positions; the same with the gradient "
        "through the running variance remembered",
        "batch": "batch size",
        "network": "three convolutions, or three hidden layers",
    },
    measure="Error of inference on the test digits, in per cent, on equally many digits seen; SGD "
    "with momentum, one cycle, rate 0.1 at batch 64 and in proportion.",
    rule="In the convolutions at batch 1, counting samples takes errors off Steady's, also with "
    "the gradient remembered, and then less than a point is left to GroupNorm.",
    settings=SETTINGS, run=run, verdict=verdict, figures=figures, recipe=recipe,
)  # fmt: skip
