"""Steps to a target accuracy, without batch normalization and with it at higher learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import nn

from steadynorm.evidence.lab import estimates
from steadynorm.evidence.lab.data import Digits
from steadynorm.evidence.lab.estimates import Estimate
from steadynorm.evidence.lab.experiment import (
    Experiment,
    Profile,
    Result,
    Run,
    Runs,
    Setting,
    Shown,
    Verdict,
    expect,
    judge,
)  # fmt: skip
from steadynorm.evidence.lab.networks import fully_connected, initialize, normalization_1d
from steadynorm.evidence.lab.show import curves, first_reaching, table
from steadynorm.evidence.lab.training import Recipe, Tick, train
from steadynorm.report.charts import lines

BATCH = 32
SIGMOID, RELU = "sigmoid, small weights", "ReLU, He's weights"
# The learning rates called 1×: about the plain networks' best, as the runs show.
BASE = {SIGMOID: 0.3, RELU: 0.03}
TARGET = 0.95
ARMS: tuple[tuple[str, float], ...] = (
    ("none", 0.3), ("none", 1), ("none", 3), ("none", 5), ("none", 30),
    ("batch", 1), ("batch", 5), ("batch", 30),
)  # fmt: skip


def settings(profile: Profile) -> Sequence[Setting]:
    """Every arm for as many steps."""
    samples = 24_000 if profile == "quick" else 40_000
    return [
        {"network": network, "normalization": normalization, "rate": times, "samples": samples}
        for network in BASE
        for normalization, times in ARMS
    ]


def recipe(setting: Setting) -> Recipe:
    """SGD at a constant rate, without momentum and clipping: nothing but the rate is varied."""
    steps = setting["samples"] // BATCH
    return Recipe(
        BATCH, setting["samples"], rate=BASE[setting["network"]] * setting["rate"] * 64 / BATCH,
        momentum=0.0, clip=None, schedule="constant", points=steps // 10,
    )  # fmt: skip


def steps(setting: Setting) -> int:
    """The length of a run, for the order."""
    return recipe(setting).steps * (3 if setting["normalization"] == "batch" else 1)


def build(setting: Setting, inputs: int, seed: int) -> nn.Module:
    """The paper's first network, with small normal weights, or ten layers as built today."""
    policy = None if setting["normalization"] == "none" else setting["normalization"]
    if setting["network"] == RELU:
        network = fully_connected(inputs, normalization_1d(policy), widths=(64,) * 10)
        initialize(network, seed)
        return network
    network = fully_connected(
        inputs, normalization_1d(policy), widths=(100,) * 3, activation=nn.Sigmoid
    )
    small_weights(network, seed)
    return network


def small_weights(network: nn.Module, seed: int) -> None:
    """Normal weights of standard deviation 0.1 and zero biases."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train, and note the accuracy of inference on the test digits every ten steps."""
    network = build(setting, digits.train_images[0].size, seed)
    done = train(network, digits, recipe(setting), seed=seed, tick=tick, layers=False)
    at = [point.step for point in done.points]
    accuracy = [point.accuracy for point in done.points]
    return {
        "reached": first_reaching(at, accuracy, TARGET),
        "budget": recipe(setting).steps,
        "best": max(accuracy, default=done.accuracy),
        "final": done.accuracy,
        "stopped": done.stopped,
        "step": at[::2],
        "accuracy": accuracy[::2],
    }


def needed(run: Run) -> float:
    """Steps to the target; where it was not reached, the whole run's, which is too few."""
    return float(run["reached"] or run["budget"])


def fewer(runs: Runs, network: str) -> tuple[Estimate, float]:
    """How many times fewer steps batch normalization at 5× needs than the plain network at the
    rate that is best for it on average, and that rate.
    """
    some = runs.where(network=network)
    of = {arm: [needed(r) for r in some.where(normalization=arm[0], rate=arm[1])] for arm in ARMS}
    best = min((arm for arm in ARMS if arm[0] == "none"), key=lambda arm: fmean(of[arm]))
    return estimates.ratio(of[best], of["batch", 5]), best[1]


def verdict(runs: Runs) -> Verdict:
    """Fewer steps in both networks, and a rate that only the normalized ones bear."""
    ratios = {network: fewer(runs, network) for network in BASE}
    findings = [
        expect(f"times fewer steps, {network}", ratio, above=2)
        for network, (ratio, _) in ratios.items()
    ]
    final = {
        (network, kind): estimates.mean(
            runs.values("final", network=network, normalization=kind, rate=30)
        )
        for network in BASE
        for kind in ("none", "batch")
    }
    for network in BASE:
        plain, normalized = final[network, "none"], final[network, "batch"]
        findings += [
            expect(f"accuracy at 30× without, {network}", plain, below=0.5),
            expect(f"accuracy at 30× with, {network}", normalized, above=0.9),
        ]
    (small, at_small), (he, at_he) = ratios[SIGMOID], ratios[RELU]
    return judge(
        f"With batch normalization at 5× the learning rate, 95 % accuracy takes {small.text(1)} "
        f"times fewer steps in the paper's sigmoid network and {he.text(1)} times fewer in ten "
        f"layers of ReLU with He's weights; the plain networks had the best of five rates "
        f"({at_small:g}× and {at_he:g}×).",
        findings,
    )


def show(runs: Runs) -> Shown:
    """Steps and accuracy of every arm, and the curves."""
    names = {"none": "no normalization", "batch": "batch normalization"}

    def called(run: Run) -> str:
        return f"{'BN' if run['normalization'] == 'batch' else 'none'}, {run['rate']:g}×"

    tables, charts = [], []
    for network in BASE:
        some = runs.where(network=network)
        tables += [
            table(
                f"Steps to 95 % accuracy: {network}", some, rows="normalization", columns="rate",
                value=lambda run: run["reached"], names=names, corner="learning rate ×",
                note="A dash where a seed never got there.",
            ),
            table(
                f"Accuracy at the end, %: {network}", some, rows="normalization", columns="rate",
                value=lambda run: 100 * run["final"], names=names, corner="learning rate ×",
            ),
        ]  # fmt: skip
        charts.append(
            lines(
                f"Accuracy: {network}", curves(some, "step", "accuracy", called), x="step",
                y="accuracy", series="series", replicate="seed", percent=True,
                x_title="steps", y_title="accuracy on the test digits",
                description="Mean over the seeds; the band is their range.",
            )
        )  # fmt: skip
    rates = " and ".join(f"{rate:g} ({network})" for network, rate in BASE.items())
    return Shown(tables, charts, [f"1× is a learning rate of {rates} at batch {BATCH}."])


EXPERIMENT = Experiment(
    name="convergence",
    title="Steps to a target accuracy",
    claim="With batch normalization and a higher learning rate, training needs several times "
    "fewer steps.",
    source="Ioffe & Szegedy 2015, section 4.2.2: 14 times fewer at 5×",
    factors={
        "network": "the paper's first one, three hidden layers of 100 sigmoid units with small "
        "normal weights; ten hidden layers of 64 ReLU units with He's weights",
        "normalization": "none, or batch normalization before every activation",
        "rate": "learning rate, in multiples of the plain network's",
    },
    measure="Steps until the accuracy of inference on the test digits is 95 %, looked at every ten "
    "steps and still so at the next look; SGD at a constant rate.",
    rule="In both networks it takes less than half the steps at 5× than the plain network at the "
    "best of its five rates, and at 30× ends above 90 % where the plain network ends below 50 %.",
    settings=settings,
    run=run,
    verdict=verdict,
    show=show,
    steps=steps,
)
