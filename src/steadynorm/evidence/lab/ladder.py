"""Over how wide a range of a factor networks train, with batch normalization and without."""

from __future__ import annotations

import math
from collections.abc import Iterator

from steadynorm.evidence.digits import Digits
from steadynorm.evidence.lab.figures import chart, table
from steadynorm.evidence.lab.runs import Profile, Result, Runs, Setting, grid
from steadynorm.evidence.networks import build, initialize
from steadynorm.evidence.training import Recipe, Tick, train
from steadynorm.report.page import Piece

BATCH = 32
ENOUGH = 0.9  # accuracy at the end, from which on a network counts as trained
DEPTHS = (3, 10)
NAMES = {"none": "none", "batch": "batch normalization"}


def settings(factor: str, lowest: int, highest: int) -> dict[Profile, list[Setting]]:
    """Powers of 2 from 2^`lowest` to 2^`highest`, in the quick profile every second one."""
    steps: dict[Profile, int] = {"quick": 2, "full": 1}
    return {
        profile: grid(
            depth=DEPTHS,
            normalization=tuple(NAMES),
            **{factor: tuple(2.0**power for power in range(lowest, highest + 1, step))},
            samples=12_800,
        )
        for profile, step in steps.items()
    }


def trained(
    setting: Setting, seed: int, digits: Digits, tick: Tick, recipe: Recipe, scale: float = 1.0
) -> Result:
    """Train and measure. `scale` multiplies the initial weights of all hidden layers; the
    last layer, which is never normalized, is not scaled.
    """
    widths = (64,) * setting["depth"]
    network = build("fully connected", setting["normalization"], digits, seed, widths=widths)
    initialize(network[:-1], seed, scale=scale)
    done = train(network, digits, recipe, seed=seed, tick=tick)
    return {"accuracy": done.accuracy, "stopped": done.stopped}


def widths(runs: Runs, factor: str, depth: int, kind: str) -> list[float]:
    """By seed, the decades of the factor that train: rungs that end at `ENOUGH` or better, times
    the distance between rungs.
    """
    some = runs.where(depth=depth, normalization=kind)
    values = sorted(some.distinct(factor))
    rung = math.log10(values[1] / values[0])
    return [
        rung * sum(run["accuracy"] >= ENOUGH for run in some if run.seed == seed)
        for seed in runs.seeds
    ]


def shows(runs: Runs, factor: str, corner: str, x_title: str) -> Iterator[Piece]:
    """Accuracy over the factor, for each depth."""
    names = NAMES | {value: f"{value:.2g}" for value in runs.distinct(factor)}
    for depth in DEPTHS:
        some = runs.where(depth=depth)
        yield table(
            f"Accuracy at the end, %: {depth} hidden layers", some, rows=factor,
            columns="normalization", measure="accuracy", times=100, names=names, corner=corner,
        )  # fmt: skip
        yield chart(
            f"What trains, {depth} hidden layers", some, x=factor, y="accuracy",
            series="normalization", names=NAMES, log_x=True, x_title=x_title,
        )  # fmt: skip
