"""Which networks train at all as they get deeper, and how the gradient fades on its way down."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from steadynorm.evidence import estimates
from steadynorm.evidence.digits import Digits, tensors
from steadynorm.evidence.lab.experiment import Experiment
from steadynorm.evidence.lab.figures import chart, plus_minus, sentences
from steadynorm.evidence.lab.runs import FinishedRun, Result, Runs, Setting
from steadynorm.evidence.lab.verdict import Verdict, expect, judge
from steadynorm.evidence.networks import fully_connected, initialize, normalization_1d
from steadynorm.evidence.training import Recipe, Tick, train
from steadynorm.models.untouched import untouched
from steadynorm.report.page import Piece, Table

BATCH = 32
WIDTH = 32
DEPTHS = (2, 5, 10, 20, 50)
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU
}  # fmt: skip
# Two that serve each best, with and without; sigmoid tolerates higher ones.
RATES = {"sigmoid": (0.1, 1.0), "tanh": (0.01, 0.1), "relu": (0.01, 0.1)}
ARMS = [(activation, kind) for activation in ACTIVATIONS for kind in ("none", "batch")]


def settings(*depths: int) -> list[Setting]:
    """Every activation and depth at each of two rates."""
    return [
        {
            "activation": activation, "depth": depth, "normalization": kind, "rate": rate,
            "samples": 8_000,
        }
        for depth in depths
        for activation, kind in ARMS
        for rate in RATES[activation]
    ]  # fmt: skip


def recipe(setting: Setting) -> Recipe:
    """SGD with momentum in one cycle, the gradient clipped: as good a chance as any for all."""
    return Recipe(BATCH, setting["samples"], rate=setting["rate"] * 64 / BATCH, points=1)


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """The gradients of the initial network, then training."""
    activation = setting["activation"]
    network = fully_connected(
        digits.pixels, normalization_1d(setting["normalization"]),
        widths=(WIDTH,) * setting["depth"], activation=ACTIVATIONS[activation],
    )  # fmt: skip
    initialize(network, seed, nonlinearity=activation)
    gradients = gradient_norms(network, digits)
    done = train(network, digits, recipe(setting), seed=seed, tick=tick)
    return {"accuracy": done.accuracy, "stopped": done.stopped, "gradient": gradients}


def gradient_norms(network: nn.Module, digits: Digits) -> list[float | None]:
    """For each layer's weights, the decimal logarithm of the gradient's norm on 256 digits; None
    where it is 0. The network is left as it was.
    """
    images, labels, _, _ = tensors(digits)
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    with untouched(network):
        network.train()
        loss = F.cross_entropy(network(images[:256]), labels[:256])
        gradients = torch.autograd.grad(loss, [module.weight for module in linear])
    norms = [float(gradient.double().norm()) for gradient in gradients]
    return [math.log10(norm) if norm > 0 else None for norm in norms]


def best(runs: Runs, activation: str, depth: int, kind: str) -> list[float]:
    """By seed, the accuracy at the rate that is best for it."""
    some = runs.where(activation=activation, depth=depth, normalization=kind)
    return [max(run["accuracy"] for run in some if run.seed == seed) for seed in some.seeds]


def fading(run: FinishedRun) -> float:
    """Decades that the gradient loses from the last hidden layer to the first."""
    first, last = run["gradient"][0], run["gradient"][-2]
    return 20.0 if first is None or last is None else float(last - first)


def verdict(runs: Runs) -> Verdict:
    """Sigmoid networks of ten layers and more, and how fast the gradient fades in them."""
    findings, said = [], []
    for depth in (depth for depth in runs.distinct("depth") if 10 <= depth <= 20):
        plain, normalized = (
            estimates.mean(best(runs, "sigmoid", depth, kind)) for kind in ("none", "batch")
        )
        findings += [
            expect(f"accuracy, sigmoid, {depth} layers, without", plain, below=0.3),
            expect(f"accuracy, sigmoid, {depth} layers, with", normalized, above=0.9),
        ]
        said.append(
            f"{depth} sigmoid layers reach {100 * plain.value:.0f} % without batch normalization "
            f"and {100 * normalized.value:.0f} % with it"
        )
    ten = {"activation": "sigmoid", "depth": 10, "rate": RATES["sigmoid"][0]}
    faded = runs.where(**ten).derived(lost=fading)
    less = faded.difference("lost", "normalization", "none", "batch")
    without, with_it = (faded.mean("lost", normalization=kind).value for kind in ("none", "batch"))
    findings.append(expect("decades of gradient kept, 10 sigmoid layers", less, above=1))
    said[-1] += ", each at the better of two learning rates"
    return judge(
        f"{sentences(said, '; ')} Down ten sigmoid layers the gradient fades by {without:.1f} "
        f"decades without it and by {with_it:.1f} with it.",
        findings,
    )


def called(activation: str, kind: str) -> str:
    """The name of an arm."""
    return f"{activation}{', BN' if kind == 'batch' else ''}"


def shows(runs: Runs) -> Iterator[Piece]:
    """What trains, and the gradient's norm by layer."""
    depths = runs.distinct("depth")
    rows = [
        [depth, *(plus_minus(best(runs, arm, depth, kind), 100) for arm, kind in ARMS)]
        for depth in depths
    ]
    rates = "; ".join(f"{a} {low:g} and {high:g}" for a, (low, high) in RATES.items())
    yield Table(
        "Accuracy by depth, %", ["hidden layers", *(called(*arm) for arm in ARMS)], rows,
        note=f"At the better of two learning rates: {rates}.",
    )  # fmt: skip
    trains = [
        FinishedRun(
            {"network": called(arm, kind), "depth": depth}, seed, {"accuracy": accuracy}
        )
        for arm, kind in ARMS
        for depth in depths
        for seed, accuracy in enumerate(best(runs, arm, depth, kind))
    ]  # fmt: skip
    yield chart(
        "What trains", trains, x="depth", y="accuracy", series="network", log_x=True,
        x_title="hidden layers",
        description="At the better of two learning rates; mean over the seeds, the band is their "
        "range.",
    )  # fmt: skip
    deep = max(depth for depth in depths if depth <= 20)
    initial = runs.where(depth=deep).derived(
        network=lambda run: called(run["activation"], run["normalization"]),
        layer=lambda run: list(range(1, len(run["gradient"]))),
        gradient=lambda run: run["gradient"][:-1],
    )
    yield chart(
        f"Gradient of the initial weights, {deep} layers",
        [run for run in initial if run["rate"] == RATES[run["activation"]][0]], x="layer",
        y="gradient", series="network", y_title="log₁₀ of the gradient's norm",
        description="Before training, on 256 digits. Layer 1 is next to the input.",
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="depth-and-saturation",
    title="Depth and saturation",
    claim="Batch normalization trains deep networks of saturating units, where plain ones fail "
    "since their gradient vanishes.",
    source="Ioffe & Szegedy 2015, section 4.2.2: 69.8 % with sigmoid, plain sigmoid at chance; "
    "classic notes",
    factors={
        "activation": "sigmoid, tanh or ReLU, with initial weights of the kind made for each",
        "depth": f"hidden layers of {WIDTH} units",
        "normalization": "none, or batch normalization before every activation",
        "rate": "highest learning rate of one cycle; the better of two counts",
    },
    measure="Accuracy of inference on the test digits; the norm of the initial gradient by layer.",
    rule="At 10 and at 20 sigmoid layers accuracy is below 30 % without and above 90 % with batch "
    "normalization, and down 10 of them the gradient fades at least a decade less with it.",
    settings={"quick": settings(2, 10, 20), "full": settings(*DEPTHS)}, run=run, verdict=verdict,
    shows=shows, recipe=recipe,
    weights={"depth": {depth: depth for depth in DEPTHS}}, seeds={"quick": 2, "full": 5},
)  # fmt: skip
