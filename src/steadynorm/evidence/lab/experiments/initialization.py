"""How wide the range of weight scales is that train, with and without batch normalization."""

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

RATE = 0.05  # trains both kinds


def recipe(setting: Setting) -> Recipe:
    """Plain SGD."""
    return Recipe.constant(ladder.BATCH, setting["samples"], RATE)


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train from scaled weights."""
    return ladder.trained(setting, seed, digits, tick, recipe(setting), setting["scale"])


def verdict(runs: Runs) -> Verdict:
    """A wider range at both depths."""
    findings, said = [], []
    for depth in reversed(ladder.DEPTHS):
        with_it, without = (ladder.widths(runs, "scale", depth, kind) for kind in ("batch", "none"))
        wider = estimates.difference(with_it, without)
        findings.append(expect(f"decades wider, {depth} layers", wider, above=0.5))
        said.append(
            f"with {depth} hidden layers scales over {estimates.mean(with_it).value:.1f} decades "
            f"train with batch normalization and over {estimates.mean(without).value:.1f} without"
        )
    return judge(sentences(said, "; "), findings)


def shows(runs: Runs) -> Iterator[Piece]:
    """Accuracy over the scale."""
    return ladder.shows(runs, "scale", "scale", "scale of the initial weights, He's = 1")


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
    f"of SGD at a rate of {RATE:g} and batch {ladder.BATCH}.",
    rule="The range is wider by more than half a decade (a factor of 3) at both depths.",
    settings=ladder.settings("scale", -8, 8), run=run, verdict=verdict, shows=shows,
    recipe=recipe,
)  # fmt: skip
