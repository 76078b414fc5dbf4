"""Whether batch normalization works by keeping the distribution of each layer's input steady."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from steadynorm.evidence.lab import estimates
from steadynorm.evidence.lab.batches import tensors
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
from steadynorm.evidence.lab.experiments import convergence
from steadynorm.evidence.lab.layers import modes_kept
from steadynorm.evidence.lab.networks import (
    Normalization,
    fully_connected,
    initialize,
    normalization_1d,
)
from steadynorm.evidence.lab.show import curves, first_reaching, table
from steadynorm.evidence.lab.training import Recipe, Tick, inference_accuracy, train
from steadynorm.report.charts import lines

BATCH = 32
TARGET = 0.9
ARMS = ("none", "batch", "batch, shifted")
NETWORKS = {convergence.SIGMOID: 0.9, convergence.RELU: 0.09}  # good rates for the plain networks
EVERY = 10


class Shift(nn.Module):
    """Noise of Santurkar et al. (2018, appendix A), in training only: of every unit, and anew at
    every step, a mean from ±0.5 and a scale from 1 to 1.25; around them, of every sample, an offset
    from mean ± 0.1 and a factor from scale ± 0.1.
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


def settings(profile: Profile) -> Sequence[Setting]:
    """Three arms of two networks."""
    samples = 16_000 if profile == "quick" else 32_000
    return [
        {"network": network, "normalization": arm, "samples": samples}
        for network in NETWORKS
        for arm in ARMS
    ]


def recipe(setting: Setting) -> Recipe:
    """SGD at a constant rate, without momentum and clipping."""
    return Recipe(
        BATCH, setting["samples"], rate=NETWORKS[setting["network"]] * 64 / BATCH, momentum=0.0,
        clip=None, schedule="constant", points=1,
    )  # fmt: skip


def steps(setting: Setting) -> int:
    """The length of a run, for the order."""
    return recipe(setting).steps


def build(setting: Setting, inputs: int, seed: int) -> nn.Sequential:
    """The networks of the first experiment; the last part before an activation is the place where
    noise is added and distributions are looked at.
    """
    arm, sigmoid = setting["normalization"], setting["network"] == convergence.SIGMOID
    made = 0

    def shifted(width: int) -> nn.Module:
        nonlocal made
        made += 1
        normalize = normalization_1d("batch")
        assert normalize is not None
        return nn.Sequential(normalize(width), Shift(width, 1000 * seed + made))

    kinds: dict[str, Normalization | None] = {
        "none": None, "batch": normalization_1d("batch"), "batch, shifted": shifted
    }  # fmt: skip
    network = fully_connected(
        inputs, kinds[arm], widths=(100,) * 3 if sigmoid else (64,) * 10,
        activation=nn.Sigmoid if sigmoid else nn.ReLU,
    )  # fmt: skip
    initialize(network, seed)
    if sigmoid:
        convergence.small_weights(network, seed)
    return network


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train; every ten steps note the accuracy, and what enters the last hidden activation."""
    network = build(setting, digits.train_images[0].size, seed)
    images, _, test_images, test_labels = tensors(digits)
    last = network[-3]  # before the last hidden activation and the last Linear
    at: list[int] = []
    accuracy: list[float] = []
    seen: list[Tensor] = []

    def watch(step: int, _: nn.Module) -> None:
        if step % EVERY == 0:
            at.append(step)
            accuracy.append(inference_accuracy(network, test_images, test_labels))
            seen.append(percentiles(network, last, images[:256]))

    done = train(network, digits, recipe(setting), seed=seed, tick=tick, watch=watch, layers=False)
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
def percentiles(network: nn.Module, place: nn.Module, images: Tensor) -> Tensor:
    """The 15th, 50th and 85th percentile of every unit that leaves `place`, normalized as in
    training; (3, units). Buffers and the noise's random state are left as they were.
    """
    found: list[Tensor] = []
    kept = {name: value.clone() for name, value in network.state_dict().items()}
    shifts = [module for module in network.modules() if isinstance(module, Shift)]
    states = [shift.generator.get_state() for shift in shifts]
    hook = place.register_forward_hook(lambda _, __, output: found.append(output))
    try:
        with modes_kept(network):
            network.train()
            network(images)
    finally:
        hook.remove()
        network.load_state_dict(kept)
        for shift, state in zip(shifts, states, strict=True):
            shift.generator.set_state(state)
    return torch.quantile(found[0], torch.tensor([0.15, 0.5, 0.85]), dim=0)


def movement(path: Tensor) -> float:
    """How far the median goes from one look to the next, in units of the spread between the 15th
    and the 85th percentile: the mean over the run and the median over the units.
    """
    low, median, high = path[:-1].unbind(1)
    spread = (high - low).clamp(min=1e-12)
    moved = ((path[1:, 1] - median).abs() / spread).mean(0)
    return float(moved.median())


def needed(runs: Runs, network: str, arm: str) -> list[float]:
    """Steps to the target by seed; the whole run's where it was not reached."""
    some = runs.where(network=network, normalization=arm)
    return [float(run["reached"] or run["budget"]) for run in some]


def verdict(runs: Runs) -> Verdict:
    """The distribution must move less with it, and moving it on purpose must hurt."""
    findings, said = [], []
    for network in NETWORKS:
        moved = {arm: runs.values("movement", network=network, normalization=arm) for arm in ARMS}
        less = estimates.ratio(moved["none"], moved["batch"])
        more = estimates.ratio(moved["batch, shifted"], moved["none"])
        slower = estimates.ratio(
            needed(runs, network, "batch, shifted"), needed(runs, network, "batch")
        )
        faster = estimates.ratio(
            needed(runs, network, "none"), needed(runs, network, "batch, shifted")
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
    sentence = ". ".join(said)
    return judge(f"{sentence[0].upper()}{sentence[1:]}.", findings)


def show(runs: Runs) -> Shown:
    """Steps, movement, and the paths of the percentiles."""
    names = {"none": "none", "batch": "BN", "batch, shifted": "BN, shift injected"}

    def called(run: Run) -> str:
        return names[run["normalization"]]

    charts = []
    for network in NETWORKS:
        some = runs.where(network=network)
        first = Runs(run for run in some if run.seed == min(runs.seeds))
        charts.append(
            lines(
                f"Accuracy: {network}", curves(some, "step", "accuracy", called), x="step",
                y="accuracy", series="series", replicate="seed", percent=True, x_title="steps",
                y_title="accuracy on the test digits", order=list(names.values()),
                description="Mean over the seeds; the band is their range.",
            )
        )  # fmt: skip
        for arm in ARMS:
            paths = [
                {"percentile": name, "step": step, "value": value}
                for run in first.where(normalization=arm)
                for name, key in (("85th", "high"), ("50th", "median"), ("15th", "low"))
                for step, value in zip(run["step"], run[key], strict=True)
            ]
            charts.append(
                lines(
                    f"Input of the last hidden activation, {names[arm]}: {network}", paths,
                    x="step", y="value", series="percentile", x_title="steps",
                    y_title="value", description="One unit over 256 training digits, normalized "
                    "as in training; the first seed. The paper's figure 1.",
                )
            )  # fmt: skip
    return Shown(
        [
            table(
                "Steps to 90 % accuracy", runs, rows="network", columns="normalization",
                value=lambda run: run["reached"], names=names,
            ),
            table(
                "Movement of the median every ten steps, % of the spread", runs, rows="network",
                columns="normalization", value=lambda run: 100 * run["movement"], names=names,
            ),
        ],
        charts,
    )  # fmt: skip


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
    settings=settings,
    run=run,
    verdict=verdict,
    show=show,
    steps=steps,
)
