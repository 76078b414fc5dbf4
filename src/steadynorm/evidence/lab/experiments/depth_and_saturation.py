"""Which networks train at all as they get deeper, and how the gradient fades on its way down."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

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
from steadynorm.evidence.lab.networks import fully_connected, initialize, normalization_1d
from steadynorm.evidence.lab.runs import interval
from steadynorm.evidence.lab.training import Recipe, Tick, train
from steadynorm.report.charts import lines
from steadynorm.report.page import Table

BATCH = 32
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU
}  # fmt: skip
# Two that serve each best, with and without; sigmoid bears higher ones.
RATES = {"sigmoid": (0.1, 1.0), "tanh": (0.01, 0.1), "relu": (0.01, 0.1)}
WIDTH = 32


def settings(profile: Profile) -> Sequence[Setting]:
    """Every activation and depth at each of two rates."""
    quick = profile == "quick"
    return [
        {
            "activation": activation, "depth": depth, "normalization": kind, "rate": rate,
            "samples": 8_000,
        }
        for depth in ((2, 10, 20) if quick else (2, 5, 10, 20, 50))
        for activation in ACTIVATIONS
        for kind in ("none", "batch")
        for rate in RATES[activation]
    ]  # fmt: skip


def recipe(setting: Setting) -> Recipe:
    """SGD with momentum in one cycle, the gradient clipped: as good a chance as any for all."""
    return Recipe(BATCH, setting["samples"], rate=setting["rate"] * 64 / BATCH, points=1)


def steps(setting: Setting) -> int:
    """About how long a run takes, in steps of one layer."""
    return recipe(setting).steps * int(setting["depth"])


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """The gradients of the initial network, then training."""
    policy = None if setting["normalization"] == "none" else setting["normalization"]
    activation = setting["activation"]
    network = fully_connected(
        digits.train_images[0].size, normalization_1d(policy),
        widths=(WIDTH,) * setting["depth"], activation=ACTIVATIONS[activation],
    )  # fmt: skip
    initialize(network, seed, nonlinearity=activation)
    gradients = gradient_norms(network, digits)
    initialize(network, seed, nonlinearity=activation)

    def tell(some: int) -> None:
        tick(some * setting["depth"])

    done = train(network, digits, recipe(setting), seed=seed, tick=tell, layers=False)
    return {"accuracy": done.accuracy, "stopped": done.stopped, "gradient": gradients}


def gradient_norms(network: nn.Module, digits: Digits) -> list[float | None]:
    """Of each layer's weights, the decimal logarithm of the gradient's norm on 256 digits; None
    where it is 0. The layers' statistics are used up: the network's buffers move.
    """
    images, labels, _, _ = tensors(digits)
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    kept = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    loss = F.cross_entropy(network(images[:256]), labels[:256])
    gradients = torch.autograd.grad(loss, [module.weight for module in linear])
    network.load_state_dict(kept)
    norms = [float(gradient.double().norm()) for gradient in gradients]
    return [math.log10(norm) if norm > 0 else None for norm in norms]


def best(runs: Runs, activation: str, depth: int, kind: str) -> list[float]:
    """By seed, the accuracy at the rate that is best for it."""
    some = runs.where(activation=activation, depth=depth, normalization=kind)
    return [max(run["accuracy"] for run in some if run.seed == seed) for seed in some.seeds]


def fading(run: Run) -> float:
    """Decades that the gradient loses from the last hidden layer to the first."""
    first, last = run["gradient"][0], run["gradient"][-2]
    return 20.0 if first is None or last is None else float(last - first)


def verdict(runs: Runs) -> Verdict:
    """Sigmoid networks of ten layers and more, and how fast the gradient fades in them."""
    deep = [depth for depth in runs.distinct("depth") if 10 <= depth <= 20]
    findings, said = [], []
    for depth in deep:
        plain = estimates.mean(best(runs, "sigmoid", depth, "none"))
        normalized = estimates.mean(best(runs, "sigmoid", depth, "batch"))
        findings += [
            expect(f"accuracy, sigmoid, {depth} layers, without", plain, below=0.3),
            expect(f"accuracy, sigmoid, {depth} layers, with", normalized, above=0.9),
        ]
        said.append(
            f"{depth} sigmoid layers reach {100 * plain.value:.0f} % without batch normalization "
            f"and {100 * normalized.value:.0f} % with it"
        )
    lost = {
        kind: [fading(r) for r in runs.where(
            activation="sigmoid", depth=10, normalization=kind, rate=RATES["sigmoid"][0])]
        for kind in ("none", "batch")
    }  # fmt: skip
    less = estimates.difference(lost["none"], lost["batch"])
    findings.append(expect("decades of gradient kept, 10 sigmoid layers", less, above=1))
    sentence = "; ".join(said)
    return judge(
        f"{sentence[0].upper()}{sentence[1:]}, each at the better of two learning rates. Down ten "
        f"sigmoid layers the gradient fades by {estimates.mean(lost['none']).value:.1f} decades "
        f"without it and by {estimates.mean(lost['batch']).value:.1f} with it.",
        findings,
    )


def show(runs: Runs) -> Shown:
    """What trains, and the gradient's norm by layer."""
    columns = [(a, kind) for a in ACTIVATIONS for kind in ("none", "batch")]
    rows = [
        [
            depth,
            *(str(interval([100 * v for v in best(runs, a, depth, kind)])) for a, kind in columns),
        ]
        for depth in runs.distinct("depth")
    ]
    head = ["hidden layers", *(f"{a}{', BN' if kind == 'batch' else ''}" for a, kind in columns)]
    rates = "; ".join(f"{a} {low:g} and {high:g}" for a, (low, high) in RATES.items())
    note = f"At the better of two learning rates: {rates}."
    depth = max(d for d in runs.distinct("depth") if d <= 20)
    gradients = [
        {
            "network": f"{r['activation']}{', BN' if r['normalization'] == 'batch' else ''}",
            "seed": r.seed, "layer": layer, "gradient": norm,
        }
        for r in runs.where(depth=depth)
        for layer, norm in enumerate(r["gradient"][:-1], start=1)
        if norm is not None and r["rate"] == RATES[r["activation"]][0]
    ]  # fmt: skip
    trains = [
        {
            "network": f"{a}{', BN' if kind == 'batch' else ''}", "seed": seed,
            "depth": d, "accuracy": accuracy,
        }
        for a, kind in columns
        for d in runs.distinct("depth")
        for seed, accuracy in enumerate(best(runs, a, d, kind))
    ]  # fmt: skip
    return Shown(
        [Table("Accuracy by depth, %", head, rows, note=note)],
        [
            lines(
                "What trains", trains, x="depth", y="accuracy", series="network",
                replicate="seed", percent=True, log_x=True, x_title="hidden layers",
                y_title="accuracy on the test digits",
                description="At the better of two learning rates; mean over the seeds, the band is "
                "their range.",
            ),
            lines(
                f"Gradient of the initial weights, {depth} layers", gradients, x="layer",
                y="gradient", series="network", replicate="seed",
                y_title="log₁₀ of the gradient's norm",
                description="Before training, on 256 digits. Layer 1 is next to the input.",
            ),
        ],
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
    settings=settings,
    run=run,
    verdict=verdict,
    show=show,
    steps=steps,
    seeds={"quick": 2, "full": 5},
)
