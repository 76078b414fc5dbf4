"""Batch normalization before the activation or after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from steadynorm.evidence.lab import estimates
from steadynorm.evidence.lab.data import Digits
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
from steadynorm.evidence.lab.networks import initialize, normalization_1d
from steadynorm.evidence.lab.show import curves, table
from steadynorm.evidence.lab.training import Recipe, Tick, train
from steadynorm.report.charts import lines

BATCH = 32
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid,
}  # fmt: skip
NAMES = {"before": "before the activation", "after": "after the activation", "none": "no BN"}


def settings(profile: Profile) -> Sequence[Setting]:
    """Every placement with every activation, at two depths."""
    samples, depths = (8_000, (4,)) if profile == "quick" else (20_000, (4, 10))
    return [
        {"placement": placement, "activation": name, "depth": depth, "samples": samples}
        for depth in depths
        for placement in NAMES
        for name in ACTIVATIONS
    ]


def recipe(setting: Setting) -> Recipe:
    """One cycle."""
    return Recipe(BATCH, setting["samples"])


def steps(setting: Setting) -> int:
    """The length of a run, longer for deeper ones."""
    return recipe(setting).steps


def build(inputs: int, placement: str, activation: str, depth: int, width: int = 64) -> nn.Module:
    """Hidden layers with the normalization where `placement` says."""
    normalization = normalization_1d("batch")
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(depth):
        layers.append(nn.Linear(inputs, width, bias=placement != "before"))
        act = ACTIVATIONS[activation]()
        if placement == "none" or normalization is None:
            layers.append(act)
        else:
            norm = normalization(width)
            layers += [norm, act] if placement == "before" else [act, norm]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, 10))


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train; the error of inference along the way and at the end."""
    network = build(
        digits.train_images[0].size, setting["placement"], setting["activation"], setting["depth"]
    )
    initialize(network, seed, nonlinearity=setting["activation"])
    done = train(network, digits, recipe(setting), seed=seed, tick=tick, layers=False)
    return {
        "error": done.error,
        "step": [point.step for point in done.points],
        "loss": [point.loss for point in done.points],
        "mean_loss": sum(p.loss for p in done.points) / max(len(done.points), 1),
        "stopped": done.stopped,
    }


def verdict(runs: Runs) -> Verdict:
    """After minus before, for each activation and depth."""
    findings = []
    for depth in sorted(runs.distinct("depth"), reverse=True):
        for name in ACTIVATIONS:
            found = {
                side: runs.values("error", placement=side, activation=name, depth=depth)
                for side in ("before", "after")
            }
            more = estimates.difference(found["after"], found["before"])
            words = f"points of error more after than before {name}, {depth} layers"
            findings.append(expect(words, more, above=0))
    better = sum(finding.holds == "yes" for finding in findings)
    worse = sum(finding.holds == "no" for finding in findings)
    return judge(
        f"Before the activation is the better place for certain in {better} of {len(findings)} "
        f"combinations of activation and depth, and for certain not in {worse}; in the others the "
        f"seeds do not tell.",
        findings,
    )


def show(runs: Runs) -> Shown:
    """Errors of inference, and the loss over training."""
    deepest = max(runs.distinct("depth"))

    def called(run: Run) -> str:
        return f"{run['activation']}, {NAMES[run['placement']]}"

    normalized = [run for run in runs.where(depth=deepest) if run["placement"] != "none"]
    return Shown(
        [
            table(
                f"Error of inference with {depth} hidden layers, %", runs.where(depth=depth),
                rows="placement", columns="activation", names=NAMES, corner="batch normalization",
                value=lambda run: run["error"],
            )
            for depth in runs.distinct("depth")
        ],
        [
            lines(
                f"Loss in training, {deepest} hidden layers",
                curves(normalized, "step", "loss", called), x="step", y="loss", series="series",
                replicate="seed", log_y=True, x_title="steps", y_title="loss",
                description="Mean over the seeds; the band is their range.",
            )
        ],
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
    settings=settings,
    run=run,
    verdict=verdict,
    show=show,
    steps=steps,
)
