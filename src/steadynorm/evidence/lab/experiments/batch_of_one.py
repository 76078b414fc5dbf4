"""Batch 1 and 2, in convolutions above all: what a batch of one should count for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

from torch import nn

from steadynorm.evidence.lab import estimates
from steadynorm.evidence.lab.data import Digits
from steadynorm.evidence.lab.experiment import (
    Experiment,
    Profile,
    Result,
    Runs,
    Setting,
    Shown,
    Verdict,
    expect,
    judge,
)  # fmt: skip
from steadynorm.evidence.lab.networks import (
    Normalization,
    convolutional,
    fully_connected,
    initialize,
    normalization_1d,
    normalization_2d,
    renorm_for,
)  # fmt: skip
from steadynorm.evidence.lab.remembered import Remembered
from steadynorm.evidence.lab.show import table
from steadynorm.evidence.lab.training import Recipe, Tick, Watch, train
from steadynorm.statistics import Batch, Frozen, Policy, Running, Steady

NETWORKS = ("convolutional", "fully connected")
TAIL = 0.75  # of the run, after which "frozen tail" normalizes with what it has kept
POLICIES: dict[str, Policy] = {"batch": Batch(), "running": Running(), "steady": Steady()}
CANDIDATES: dict[str, Callable[[int], nn.Module]] = {
    "square root": partial(Remembered, power=0.5, remember=False),
    "samples": partial(Remembered, power=0.0, remember=False),
    "positions, remembered": partial(Remembered, power=1.0),
    "square root, remembered": partial(Remembered, power=0.5),
    "samples, remembered": partial(Remembered, power=0.0),
}
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


def settings(profile: Profile) -> Sequence[Setting]:
    """All rules on the convolutions, those that differ on vectors; up to batch 64 where a rule that
    is better at 1 could be worse.
    """
    quick = profile == "quick"
    samples = 3_000 if quick else 6_000
    found = [("convolutional", 1, kind) for kind in (IN_QUICK if quick else NAMES)]
    found += [("convolutional", 2, kind) for kind in AT_TWO if not quick or kind in IN_QUICK]
    if not quick:
        found += [("fully connected", size, kind) for size in (1, 2) for kind in ON_VECTORS]
        found += [
            (network, size, kind)
            for network in NETWORKS
            for size in (8, 64)
            for kind in ("steady", "samples, remembered")
        ]
    return [
        {"network": network, "batch": size, "kind": kind, "samples": samples}
        for network, size, kind in found
    ]


def recipe(setting: Setting) -> Recipe:
    """One cycle, the rate in proportion to the batch."""
    return Recipe(setting["batch"], setting["samples"], points=1)


def steps(setting: Setting) -> int:
    """The length of a run."""
    return recipe(setting).steps


def normalization(setting: Setting) -> Normalization | None:
    """What the setting normalizes with."""
    kind = setting["kind"]
    plane = setting["network"] == "convolutional"
    if kind == "none":
        return None
    if kind in ("group", "layer"):
        groups = 4 if kind == "group" else 1
        return partial(nn.GroupNorm, groups)
    if kind in CANDIDATES:
        return CANDIDATES[kind]
    if kind == "renorm":
        policy: Policy = renorm_for(recipe(setting).steps)
    else:
        policy = POLICIES["batch" if kind == "frozen tail" else kind]
    return (normalization_2d if plane else normalization_1d)(policy)


def frozen_tail(setting: Setting) -> Watch:
    """Freezes the statistics of all layers once `TAIL` of the run is done."""
    start = int(TAIL * recipe(setting).steps)

    def watch(step: int, network: nn.Module) -> None:
        if step == start:
            for module in network.modules():
                layer: Any = module
                if hasattr(layer, "statistics"):
                    layer.statistics = Frozen()

    return watch


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train; errors of inference, and of the test digits normalized as in training."""
    made = normalization(setting)
    if setting["network"] == "convolutional":
        network = convolutional(made)
    else:
        network = fully_connected(digits.train_images[0].size, made)
    initialize(network, seed)
    watch = frozen_tail(setting) if setting["kind"] == "frozen tail" else None
    done = train(
        network, digits, recipe(setting), seed=seed, tick=tick, watch=watch, layers=False
    )  # fmt: skip
    in_training = done.accuracy_in_training
    return {
        "error": done.error,
        "error_in_training": None if in_training is None else 100 * (1 - in_training),
        "stopped": done.stopped,
    }


def verdict(runs: Runs) -> Verdict:
    """Counting otherwise, alone and with the remembered gradient, against `Steady`."""
    one = {"network": "convolutional", "batch": 1}

    def points(kind: str) -> estimates.Estimate:
        return estimates.difference(
            runs.values("error", kind="steady", **one), runs.values("error", kind=kind, **one)
        )

    counted, both = points("samples"), points("samples, remembered")
    rest = estimates.difference(
        runs.values("error", kind="samples, remembered", **one),
        runs.values("error", kind="group", **one),
    )
    steady = estimates.mean(runs.values("error", kind="steady", **one))
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


def show(runs: Runs) -> Shown:
    """Errors of inference, and of the test digits normalized as in training."""
    tables = [
        table(
            f"{title}, {network}, %", runs.where(network=network), rows="kind", columns="batch",
            names=NAMES, corner="normalization / batch size", value=itemgetter(m),
        )
        for title, m in (("Error of inference", "error"),
                         ("Error normalized as in training", "error_in_training"))
        for network in runs.distinct("network")
    ]  # fmt: skip
    return Shown(
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
    settings=settings,
    run=run,
    verdict=verdict,
    show=show,
    steps=steps,
)
