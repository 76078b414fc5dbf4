"""How wide the band of learning rates is that train, with and without batch normalization."""

from __future__ import annotations

from collections.abc import Iterator

from steadynorm.evidence import estimates
from steadynorm.evidence.digits import Digits
from steadynorm.evidence.lab import ladder
from steadynorm.evidence.lab.experiment import Experiment
from steadynorm.evidence.lab.figures import sentences
from steadynorm.evidence.lab.runs import Result, Runs, Setting
from steadynorm.evidence.lab.verdict import Verdict, expect, judge
from steadynorm.evidence.training import Recipe, Tick
from steadynorm.report.page import Piece


def recipe(setting: Setting) -> Recipe:
    """Plain SGD."""
    return Recipe.constant(ladder.BATCH, setting["samples"], setting["rate"])


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train at the rate of the setting."""
    return ladder.trained(setting, seed, digits, tick, recipe(setting))


def largest(runs: Runs, depth: int, kind: str) -> list[float]:
    """By seed, the largest rate that trains; half the smallest where none does."""
    some = runs.where(depth=depth, normalization=kind)
    nothing = min(some.distinct("rate")) / 2
    trains = [run for run in some if run["accuracy"] >= ladder.ENOUGH]
    return [
        max((run["rate"] for run in trains if run.seed == seed), default=nothing)
        for seed in runs.seeds
    ]


def verdict(runs: Runs) -> Verdict:
    """A wider band in both networks, because higher rates train."""
    findings, said = [], []
    for depth in ladder.DEPTHS:
        with_it, without = (ladder.widths(runs, "rate", depth, kind) for kind in ("batch", "none"))
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
    return judge(sentences(said, "; "), findings)


def shows(runs: Runs) -> Iterator[Piece]:
    """Accuracy over the rate."""
    return ladder.shows(runs, "rate", "learning rate", "learning rate")


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
    settings=ladder.settings("rate", -10, 4), run=run, verdict=verdict, shows=shows,
    recipe=recipe,
)  # fmt: skip
