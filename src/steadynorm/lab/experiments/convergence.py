"""Steps to a target accuracy, without batch normalization and with it at higher learning rates."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from steadynorm.lab.data import Digits
from steadynorm.lab.experiment import (
    Experiment,
    Profile,
    Result,
    Runs,
    Setting,
    Shown,
    Verdict,
)
from steadynorm.lab.networks import fully_connected, initialize, normalization_1d
from steadynorm.lab.training import Recipe, Tick, train

BASE_RATE = 0.01
TARGET = 0.90
ARMS: tuple[tuple[str | None, int], ...] = (
    (None, 1), (None, 5), (None, 30), ("batch", 1), ("batch", 5), ("batch", 30),
)  # fmt: skip


def settings(profile: Profile) -> Sequence[Setting]:
    """All arms, equally long."""
    samples = 24_000 if profile == "quick" else 64_000
    return [
        {"normalization": normalization, "rate": times, "samples": samples}
        for normalization, times in ARMS
    ]


def recipe(setting: Setting) -> Recipe:
    """Plain SGD at a constant rate, as in the paper: no clipping, no warm-up."""
    return Recipe(
        32, setting["samples"], rate=BASE_RATE * 2 * setting["rate"], momentum=0.0, clip=None,
        schedule="constant", points=setting["samples"] // 32 // 10,
    )  # fmt: skip


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train and note the accuracy every ten steps."""
    network = fully_connected(
        digits.train_images[0].size, normalization_1d(setting["normalization"]),
        widths=(100,) * 3, activation=nn.Sigmoid,
    )  # fmt: skip
    initialize(network, seed)
    done = train(network, digits, recipe(setting), seed=seed, tick=tick, layers=False)
    return {
        "accuracy": [point.accuracy for point in done.points],
        "steps": [point.step for point in done.points],
        "stopped": done.stopped,
    }


def verdict(runs: Runs) -> Verdict:
    raise NotImplementedError


def show(runs: Runs) -> Shown:
    raise NotImplementedError


EXPERIMENT = Experiment(
    name="convergence",
    title="Steps to a target accuracy",
    claim="Batch normalization reaches a given accuracy in several times fewer steps.",
    source="Ioffe & Szegedy 2015, figure 2 and table 2",
    factors={},
    measure="",
    rule="",
    settings=settings,
    run=run,
    verdict=verdict,
    show=show,
    steps=lambda setting: recipe(setting).steps,
)
