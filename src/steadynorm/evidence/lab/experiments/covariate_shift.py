"""Whether batch normalization works by keeping the distribution of each layer's input steady."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.evidence import estimates
from steadynorm.evidence.digits import Digits, tensors
from steadynorm.evidence.lab import two_networks
from steadynorm.evidence.lab.experiment import Experiment
from steadynorm.evidence.lab.figures import chart, first_reaching, sentences, table
from steadynorm.evidence.lab.runs import FinishedRun, Result, Runs, Setting, grid
from steadynorm.evidence.lab.two_networks import NETWORKS, needed, recipe
from steadynorm.evidence.lab.verdict import Verdict, expect, judge
from steadynorm.evidence.networks import Statistics, normalization_1d
from steadynorm.evidence.training import Tick, inference_accuracy, train
from steadynorm.models.untouched import untouched
from steadynorm.report.charts import lines
from steadynorm.report.page import Chart, Piece

TARGET = 0.9
NAMES = {"none": "none", "batch": "BN", "batch, shifted": "BN, shift injected"}
EVERY = 10


class InjectedShift(nn.Module):
    """Noise of Santurkar et al. (2018, appendix A), in training only. At every step each unit draws
    a mean from ±0.5 and a scale from 1 to 1.25; around them each sample draws an offset from mean ±
    0.1 and a factor from scale ± 0.1.
    """

    def __init__(self, features: int, seed: int) -> None:
        super().__init__()
        self.features = features
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, input: Tensor) -> Tensor:
        """A factor and an offset for every value."""
        if not self.training:
            return input

        def uniform(*shape: int) -> Tensor:
            return 2 * torch.rand(*shape, generator=self.generator) - 1

        mean = 0.5 * uniform(self.features)
        scale = 1.125 + 0.125 * uniform(self.features)
        factor = scale + 0.1 * uniform(*input.shape)
        return input * factor + mean + 0.1 * uniform(*input.shape)


def build(setting: Setting, digits: Digits, seed: int) -> nn.Sequential:
    """A network whose module before an activation is where noise is added and distributions are
    measured.
    """
    normalization: Any = normalization_1d("batch")
    seeds = count(1000 * seed + 1)

    def shifted(width: int) -> nn.Module:
        return nn.Sequential(normalization(width), InjectedShift(width, next(seeds)))

    kind = setting["normalization"]
    statistics: Statistics = shifted if kind == "batch, shifted" else kind
    return two_networks.build(setting["network"], statistics, digits, seed)


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train; every ten steps record the accuracy, and the input of the last hidden activation."""
    network = build(setting, digits, seed)
    images, _, test_images, test_labels = tensors(digits)
    last = network[-3]  # before the last hidden activation and the last Linear
    at: list[int] = []
    accuracy: list[float] = []
    seen: list[Tensor] = []

    def look(step: int, _: nn.Module) -> None:
        if step % EVERY == 0:
            at.append(step)
            accuracy.append(inference_accuracy(network, test_images, test_labels))
            seen.append(percentiles(network, last, images[:256]))

    done = train(network, digits, recipe(setting), seed=seed, tick=tick, after_step=look)
    path = torch.stack(seen)  # (moments of training, 3 percentiles, units)
    unit = path[:, :, 0]
    return {
        "reached": first_reaching(at, accuracy, TARGET),
        "budget": recipe(setting).steps,
        "final": done.accuracy,
        "stopped": done.stopped,
        "movement": movement(path),
        "step": at,
        "accuracy": accuracy,
        "low": unit[:, 0].tolist(),
        "median": unit[:, 1].tolist(),
        "high": unit[:, 2].tolist(),
    }


@torch.no_grad()
def percentiles(network: nn.Module, layer: nn.Module, images: Tensor) -> Tensor:
    """The 15th, 50th and 85th percentile of every unit of the output of `layer`, normalized as in
    training; (3, units). The network and the noise's random state are left as they were.
    """
    found: list[Tensor] = []
    shifts = [module for module in network.modules() if isinstance(module, InjectedShift)]
    states = [shift.generator.get_state() for shift in shifts]
    with untouched(network):
        layer.register_forward_hook(lambda _, __, output: found.append(output))
        network.train()
        network(images)
    for shift, state in zip(shifts, states, strict=True):
        shift.generator.set_state(state)
    return torch.quantile(found[0], torch.tensor([0.15, 0.5, 0.85]), dim=0)


def movement(path: Tensor) -> float:
    """How far the median moves between two records, in units of the spread between the 15th and the
    85th percentile: the mean over the run and the median over the units.
    """
    low, median, high = path[:-1].unbind(1)
    spread = (high - low).clamp(min=1e-12)
    moved = ((path[1:, 1] - median).abs() / spread).mean(0)
    return float(moved.median())


def verdict(runs: Runs) -> Verdict:
    """The distribution must move less with it, and moving it on purpose must hurt."""
    findings, said = [], []
    for network in NETWORKS:
        plain, batch, shifted = (
            needed(runs, network=network, normalization=kind) for kind in NAMES
        )
        slower, faster = estimates.ratio(shifted, batch), estimates.ratio(plain, shifted)
        less, more = (
            runs.ratio("movement", "normalization", first, second, network=network)
            for first, second in (("none", "batch"), ("batch, shifted", "none"))
        )
        findings += [
            expect(f"movement without / with, {network}", less, above=1),
            expect(f"steps with injected shift / with none injected, {network}", slower, above=2),
        ]
        said.append(
            f"{network}: without batch normalization the input moves {less.text(1)} times as much "
            f"as with it. With shift injected after it that moves {more.text(1)} times as much as "
            f"without; training then takes {slower.text(1)} times the steps, and the plain "
            f"network {faster.text(1)} times those"
        )
    return judge(sentences(said), findings)


def shows(runs: Runs) -> Iterator[Piece]:
    """Steps, movement, and the paths of the percentiles."""
    for title, measure, times in (
        ("Steps to 90 % accuracy", "reached", 1),
        ("Movement of the median every ten steps, % of the spread", "movement", 100),
    ):
        yield table(
            title, runs, rows="network", columns="normalization", measure=measure, times=times,
            names=NAMES,
        )  # fmt: skip
    for network in NETWORKS:
        some = runs.where(network=network)
        yield chart(
            f"Accuracy: {network}", some, x="step", y="accuracy",
            series=lambda run: NAMES[run["normalization"]], order=list(NAMES.values()),
        )  # fmt: skip
        yield from (paths(run) for run in some if run.seed == min(runs.seeds))


def paths(run: FinishedRun) -> Chart:
    """One unit's percentiles over training."""
    rows = [
        {"percentile": name, "step": step, "value": value}
        for name, key in (("85th", "high"), ("50th", "median"), ("15th", "low"))
        for step, value in zip(run["step"], run[key], strict=True)
    ]
    kind = NAMES[run["normalization"]]
    return lines(
        f"Input of the last hidden activation, {kind}: {run['network']}", rows, x="step",
        y="value", series="percentile", x_title="steps", y_title="value",
        description="One unit over 256 training digits, normalized as in training; the first seed. "
        "The paper's figure 1.",
    )  # fmt: skip


def settings(samples: int) -> list[Setting]:
    """Three arms of two networks."""
    return grid(network=NETWORKS, normalization=tuple(NAMES), samples=samples)


EXPERIMENT = Experiment(
    name="covariate-shift",
    title="Internal covariate shift",
    claim="Batch normalization trains faster because it keeps the distribution of each layer's "
    "input steady.",
    source="Ioffe & Szegedy 2015, figure 1; against it Santurkar et al. 2018, section 2",
    factors={
        "network": "three sigmoid layers of 100 with small weights; ten ReLU layers of 64",
        "normalization": "none, batch normalization, and the same with a random shift and scale "
        "injected after it, of every unit and anew at every step",
    },
    measure="Steps to 90 % accuracy of inference, and how far the median input of the last hidden "
    "activation moves in ten steps, relative to the spread between the 15th and 85th percentile.",
    rule="In both networks the input moves less with batch normalization than without, and a shift "
    "injected after it at least doubles the steps.",
    settings={"quick": settings(16_000), "full": settings(32_000)}, run=run, verdict=verdict,
    shows=shows, recipe=recipe,
)  # fmt: skip
