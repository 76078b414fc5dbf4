"""Batch normalization before the activation or after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from steadynorm.evidence.digits import Digits
from steadynorm.evidence.lab.experiment import Experiment
from steadynorm.evidence.lab.figures import chart, table
from steadynorm.evidence.lab.runs import Result, Runs, Setting, grid
from steadynorm.evidence.lab.verdict import Verdict, expect, judge
from steadynorm.evidence.networks import initialize, normalization_1d
from steadynorm.evidence.training import Recipe, Tick, train
from steadynorm.report.page import Piece

BATCH = 32
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid,
}  # fmt: skip
NAMES = {"before": "before the activation", "after": "after the activation", "none": "no BN"}


def settings(samples: int, *depths: int) -> list[Setting]:
    """Every placement with every activation."""
    return grid(
        depth=depths, placement=tuple(NAMES), activation=tuple(ACTIVATIONS), samples=samples
    )


def recipe(setting: Setting) -> Recipe:
    """One cycle."""
    return Recipe(BATCH, setting["samples"])


def build(inputs: int, placement: str, activation: str, depth: int, width: int = 64) -> nn.Module:
    """Hidden layers with the normalization where `placement` says."""
    normalization: Any = normalization_1d("batch")
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(depth):
        layers.append(nn.Linear(inputs, width, bias=placement != "before"))
        layers.append(ACTIVATIONS[activation]())
        if placement != "none":
            layers.insert(len(layers) - (placement == "before"), normalization(width))
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, 10))


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train; the error of inference along the way and at the end."""
    placement, activation = setting["placement"], setting["activation"]
    network = build(digits.pixels, placement, activation, setting["depth"])
    initialize(network, seed, nonlinearity=activation)
    done = train(network, digits, recipe(setting), seed=seed, tick=tick)
    losses = [point.loss for point in done.points]
    return {
        "error": done.error,
        "step": [point.step for point in done.points],
        "loss": losses,
        "mean_loss": sum(losses) / len(losses) if losses else None,
        "stopped": done.stopped,
    }


def verdict(runs: Runs) -> Verdict:
    """After minus before, for each activation and depth."""
    findings = [
        expect(
            f"points of error more after than before {name}, {depth} layers",
            runs.difference("error", "placement", "after", "before", activation=name, depth=depth),
            above=0,
        )
        for depth in sorted(runs.distinct("depth"), reverse=True)
        for name in ACTIVATIONS
    ]
    better = sum(finding.holds == "yes" for finding in findings)
    worse = sum(finding.holds == "no" for finding in findings)
    return judge(
        f"Before the activation is the better place for certain in {better} of {len(findings)} "
        f"combinations of activation and depth, and for certain not in {worse}; in the others the "
        f"seeds do not tell.",
        findings,
    )


def shows(runs: Runs) -> Iterator[Piece]:
    """Errors of inference, and the loss over training."""
    for depth in runs.distinct("depth"):
        yield table(
            f"Error of inference with {depth} hidden layers, %", runs.where(depth=depth),
            rows="placement", columns="activation", names=NAMES, corner="batch normalization",
            measure="error",
        )  # fmt: skip
    deepest = max(runs.distinct("depth"))
    normalized = [run for run in runs.where(depth=deepest) if run["placement"] != "none"]
    yield chart(
        f"Loss in training, {deepest} hidden layers", normalized, x="step", y="loss",
        series=lambda run: f"{run['activation']}, {NAMES[run['placement']]}", log_y=True,
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="before-or-after",
    title="Before or after the activation",
    claim="Batch normalization belongs before the activation, not after it.",
    source="Ioffe & Szegedy 2015, section 3.2; course notes say before and code it after",
    factors={
        "placement": "Linear, BN, activation; or Linear, activation, BN; or no BN",
        "activation": "ReLU, tanh or sigmoid",
        "depth": "hidden layers, of 64 units each",
    },
    measure="Error of inference on the test digits, in per cent; SGD with momentum, one cycle.",
    rule="After the activation makes more errors than before it, with every activation and depth.",
    settings={"quick": settings(8_000, 4), "full": settings(20_000, 4, 10)}, run=run,
    verdict=verdict, shows=shows, recipe=recipe,
)  # fmt: skip
