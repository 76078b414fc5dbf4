"""How wide the band of learning rates is that train, with and without batch normalization."""

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
ENOUGH = 0.9
DEPTHS = (3, 10)


def settings(profile: Profile) -> Sequence[Setting]:
    """A ladder of rates from 2⁻¹⁰ to 2⁴, every second step or every step of a factor of 2."""
    ladder = range(-10, 5, 2) if profile == "quick" else range(-10, 5)
    return [
        {"depth": depth, "normalization": kind, "rate": 2.0**power, "samples": 12_800}
        for depth in DEPTHS
        for kind in ("none", "batch")
        for power in ladder
    ]


def recipe(setting: Setting) -> Recipe:
    """SGD at a constant rate, without momentum and clipping."""
    return Recipe(
        BATCH, setting["samples"], rate=setting["rate"] * 64 / BATCH, momentum=0.0, clip=None,
        schedule="constant", points=1,
    )  # fmt: skip


def steps(setting: Setting) -> int:
    """The length of a run, for the order."""
    return recipe(setting).steps


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train, and measure at the end."""
    policy = None if setting["normalization"] == "none" else setting["normalization"]
    network = fully_connected(
        digits.train_images[0].size, normalization_1d(policy), widths=(64,) * setting["depth"]
    )
    initialize(network, seed)
    done = train(network, digits, recipe(setting), seed=seed, tick=tick, layers=False)
    return {"accuracy": done.accuracy, "stopped": done.stopped}


def widths(runs: Runs, depth: int, kind: str) -> list[float]:
    """By seed, the decades of the learning rate that train: rungs of the ladder that end at 90 %
    or better, times the distance between rungs.
    """
    some = runs.where(depth=depth, normalization=kind)
    rates = sorted(some.distinct("rate"))
    rung = math.log10(rates[1] / rates[0])
    return [
        rung * sum(run["accuracy"] >= ENOUGH for run in some if run.seed == seed)
        for seed in runs.seeds
    ]


def largest(runs: Runs, depth: int, kind: str) -> list[float]:
    """By seed, the largest rate that ends at 90 % or better; half the smallest where none does."""
    some = runs.where(depth=depth, normalization=kind)
    nothing = min(some.distinct("rate")) / 2
    return [
        max([r["rate"] for r in some if r.seed == seed and r["accuracy"] >= ENOUGH] or [nothing])
        for seed in runs.seeds
    ]


def verdict(runs: Runs) -> Verdict:
    """A wider band in both networks, because higher rates train."""
    findings, said = [], []
    for depth in DEPTHS:
        with_it, without = widths(runs, depth, "batch"), widths(runs, depth, "none")
        wider = estimates.difference(with_it, without)
        higher = estimates.ratio(largest(runs, depth, "batch"), largest(runs, depth, "none"))
        findings += [
            expect(f"decades wider, {depth} layers", wider, above=0.3),
            expect(f"largest rate with / without, {depth} layers", higher, above=3),
        ]
        said.append(
            f"with {depth} hidden layers rates over {estimates.mean(with_it).value:.1f} decades "
            f"train with batch normalization and over {estimates.mean(without).value:.1f} without, "
            f"the largest {higher.text(0)} times as large"
        )
    sentence = "; ".join(said)
    return judge(sentence[0].upper() + sentence[1:] + ".", findings)


def show(runs: Runs) -> Shown:
    """Accuracy over the rate."""
    names = {"none": "none", "batch": "batch normalization"}
    return Shown(
        [
            table(
                f"Accuracy at the end, %: {depth} hidden layers", runs.where(depth=depth),
                rows="rate", columns="normalization", value=lambda run: 100 * run["accuracy"],
                names=names | {rate: f"{rate:.2g}" for rate in runs.distinct("rate")},
                corner="learning rate",
            )
            for depth in DEPTHS
        ],
        [
            lines(
                f"What trains, {depth} hidden layers",
                [
                    {
                        "normalization": names[run["normalization"]], "seed": run.seed,
                        "rate": run["rate"], "accuracy": run["accuracy"],
                    }
                    for run in runs.where(depth=depth)
                ],
                x="rate", y="accuracy", series="normalization", replicate="seed", log_x=True,
                percent=True, x_title="learning rate", y_title="accuracy on the test digits",
                description="Mean over the seeds; the band is their range.",
            )
            for depth in DEPTHS
        ],
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="learning-rate-range",
    title="The band of learning rates that train",
    claim="With batch normalization more learning rates train, and higher ones.",
    source="Ioffe & Szegedy 2015, section 3.3; classic notes",
    factors={
        "depth": "hidden layers of 64 ReLU units with He's weights",
        "normalization": "none, or batch normalization before every ReLU",
        "rate": "learning rate of SGD at batch 32, constant",
    },
    measure="Decades of the learning rate that end at 90 % accuracy of inference or better after "
    "400 steps.",
    rule="The band is wider by more than 0.3 decades (a factor of 2), and its upper end more than "
    "3 times as high, at both depths.",
    settings=settings,
    run=run,
    verdict=verdict,
    show=show,
    steps=steps,
)
