"""How wide the range of weight scales is that train, with and without batch normalization."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
from steadynorm.evidence.lab.networks import fully_connected, initialize, normalization_1d
from steadynorm.evidence.lab.show import table
from steadynorm.evidence.lab.training import Recipe, Tick, train
from steadynorm.report.charts import lines

BATCH = 32
RATE = 0.05
ENOUGH = 0.9
DEPTHS = (3, 10)


def settings(profile: Profile) -> Sequence[Setting]:
    """Scales from 2⁻⁸ to 2⁸, every second step or every step of a factor of 2."""
    ladder = range(-8, 9, 2) if profile == "quick" else range(-8, 9)
    return [
        {"depth": depth, "normalization": kind, "scale": 2.0**power, "samples": 12_800}
        for depth in DEPTHS
        for kind in ("none", "batch")
        for power in ladder
    ]


def recipe(setting: Setting) -> Recipe:
    """SGD at a rate that is good for both, constant, without momentum and clipping."""
    return Recipe(
        BATCH, setting["samples"], rate=RATE * 64 / BATCH, momentum=0.0, clip=None,
        schedule="constant", points=1,
    )  # fmt: skip


def steps(setting: Setting) -> int:
    """The length of a run, for the order."""
    return recipe(setting).steps


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train, and measure at the end. The last layer, which is never normalized, is not scaled."""
    policy = None if setting["normalization"] == "none" else setting["normalization"]
    network = fully_connected(
        digits.train_images[0].size, normalization_1d(policy), widths=(64,) * setting["depth"]
    )
    initialize(network, seed)
    initialize(network[:-1], seed, scale=setting["scale"])
    done = train(network, digits, recipe(setting), seed=seed, tick=tick, layers=False)
    return {"accuracy": done.accuracy, "stopped": done.stopped}


def widths(runs: Runs, depth: int, kind: str) -> list[float]:
    """By seed, the decades of the scale that train: rungs of the ladder that end at 90 % or
    better, times the distance between rungs.
    """
    some = runs.where(depth=depth, normalization=kind)
    scales = sorted(some.distinct("scale"))
    rung = math.log10(scales[1] / scales[0])
    return [
        rung * sum(run["accuracy"] >= ENOUGH for run in some if run.seed == seed)
        for seed in runs.seeds
    ]


def verdict(runs: Runs) -> Verdict:
    """A wider range at both depths."""
    findings, said = [], []
    for depth in reversed(DEPTHS):
        with_it, without = widths(runs, depth, "batch"), widths(runs, depth, "none")
        wider = estimates.difference(with_it, without)
        findings.append(expect(f"decades wider, {depth} layers", wider, above=0.5))
        said.append(
            f"with {depth} hidden layers scales over {estimates.mean(with_it).value:.1f} decades "
            f"train with batch normalization and over {estimates.mean(without).value:.1f} without"
        )
    sentence = "; ".join(said)
    return judge(sentence[0].upper() + sentence[1:] + ".", findings)


def show(runs: Runs) -> Shown:
    """Accuracy over the scale."""
    names = {"none": "none", "batch": "batch normalization"}
    return Shown(
        [
            table(
                f"Accuracy at the end, %: {depth} hidden layers", runs.where(depth=depth),
                rows="scale", columns="normalization", value=lambda run: 100 * run["accuracy"],
                names=names | {scale: f"{scale:.2g}" for scale in runs.distinct("scale")},
                corner="scale",
            )
            for depth in DEPTHS
        ],
        [
            lines(
                f"What trains, {depth} hidden layers",
                [
                    {
                        "normalization": names[run["normalization"]], "seed": run.seed,
                        "scale": run["scale"], "accuracy": run["accuracy"],
                    }
                    for run in runs.where(depth=depth)
                ],
                x="scale", y="accuracy", series="normalization", replicate="seed", log_x=True,
                percent=True, x_title="scale of the initial weights, He's = 1",
                y_title="accuracy on the test digits",
                description="Mean over the seeds; the band is their range.",
            )
            for depth in DEPTHS
        ],
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="initialization",
    title="The range of initial weights that train",
    claim="Batch normalization makes a network less sensitive to its initial weights.",
    source="Ioffe & Szegedy 2015, introduction and section 3.3; classic notes",
    factors={
        "depth": "hidden layers of 64 ReLU units",
        "normalization": "none, or batch normalization before every ReLU",
        "scale": "factor on He's weights of all hidden layers",
    },
    measure="Decades of the scale that end at 90 % accuracy of inference or better after 400 steps "
    f"of SGD at a rate of {RATE:g} and batch {BATCH}.",
    rule="The range is wider by more than half a decade (a factor of 3) at both depths.",
    settings=settings,
    run=run,
    verdict=verdict,
    show=show,
    steps=steps,
)
