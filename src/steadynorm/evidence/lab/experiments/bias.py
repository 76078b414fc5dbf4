"""The same training with and without a bias before batch normalization, to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from math import log10
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steadynorm.evidence import networks
from steadynorm.evidence.digits import Digits, batches, tensors
from steadynorm.evidence.lab.experiment import Experiment
from steadynorm.evidence.lab.figures import chart, table
from steadynorm.evidence.lab.runs import Result, Runs, Setting
from steadynorm.evidence.lab.verdict import Verdict, expect, judge
from steadynorm.evidence.networks import KINDS
from steadynorm.evidence.training import Tick
from steadynorm.report.page import Piece

BATCH = 64
EARLY = 20  # steps in which single precision is compared; later one flipped ReLU decides
FLOOR = 1e-20  # what a difference of 0 counts as, where its logarithm is taken
NAMES = {
    "batch": "BN by the batch",
    "steady": "Steady",
    "none": "no normalization",
    "float32": "single",
    "float64": "double precision",
}
FLAT = KINDS[0]


def settings(steps: int) -> list[Setting]:
    """Both networks and types; the double precision also by other statistics, and without any."""
    exact = [(kind, "batch", dtype) for kind in KINDS for dtype in ("float64", "float32")]
    others = [(FLAT, policy, "float64") for policy in ("steady", "none")]
    return [
        {"network": kind, "statistics": policy, "type": dtype, "steps": steps}
        for kind, policy, dtype in (*exact, *others)
    ]


def build(setting: Setting, digits: Digits, seed: int, *, bias: bool) -> nn.Sequential:
    """The network of a setting; with `bias`, each layer before a normalization has a random one."""
    network = networks.build(setting["network"], setting["statistics"], digits, seed)
    network = network.to(getattr(torch, setting["type"]))
    networks.initialize(network, seed)  # anew, in the wider type
    if bias:
        random = torch.Generator().manual_seed(seed + 1)
        for host in [m for m in network if isinstance(m, nn.Linear | nn.Conv2d)][:-1]:
            values = torch.randn(host.weight.shape[0], generator=random, dtype=torch.float64)
            host.bias = nn.Parameter(values.to(host.weight.dtype))
    return network


def perturbed(network: nn.Sequential) -> nn.Sequential:
    """The same network with its first weights moved by one rounding each, every other one up: all
    of them in one direction would be a change of scale, which normalization undoes.
    """
    with torch.no_grad():
        first: Any = next(iter(network.parameters()))
        step = torch.full_like(first, torch.finfo(first.dtype).eps).flatten()
        step[::2].neg_()
        first.mul_(1 + step.view_as(first))
    return network


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train without a bias, with one, and without one from weights moved by one rounding; in every
    step, the largest difference of the logits of the training batch, relative to the largest logit.
    (Not of the logits of inference: running means start at 0 and take time to reach a bias.)
    """
    images, labels, _, _ = tensors(digits)
    images = images.to(getattr(torch, setting["type"]))
    models = [
        build(setting, digits, seed, bias=False),
        build(setting, digits, seed, bias=True),
        perturbed(build(setting, digits, seed, bias=False)),
    ]
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.05, momentum=0.9) for n in models]
    order = batches(len(labels), BATCH, seed)
    by_bias: list[float] = []
    by_rounding: list[float] = []
    for _ in range(setting["steps"]):
        part = next(order)
        logits = []
        for network, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            logits.append(network(images[part]))
            F.cross_entropy(logits[-1], labels[part]).backward()
            optimizer.step()
        by_bias.append(relative_difference(logits[1], logits[0]))
        by_rounding.append(relative_difference(logits[2], logits[0]))
        tick(1)
    return {
        "step": list(range(1, setting["steps"] + 1)),
        "difference": by_bias,
        "by_rounding": by_rounding,
        "largest": max(by_bias),
        "early": max(by_bias[:EARLY]),
        "early_by_rounding": max(by_rounding[:EARLY]),
    }


@torch.no_grad()
def relative_difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value of `b`."""
    return float((a - b).abs().max() / b.abs().max())


def exponent(difference: float) -> float:
    """The decimal logarithm."""
    return log10(max(difference, FLOOR))


def verdict(runs: Runs) -> Verdict:
    """In double precision by its size, in single by a change of one rounding."""
    measured = runs.derived(
        largest=lambda run: exponent(run["largest"]),
        beside=lambda run: exponent(run["early"]) - exponent(run["early_by_rounding"]),
    )
    batch = measured.where(statistics="batch")
    exact = {kind: batch.mean("largest", network=kind, type="float64") for kind in KINDS}
    beside = {kind: batch.mean("beside", network=kind, type="float32") for kind in KINDS}
    plain = measured.mean("largest", type="float64", statistics="none")
    count = runs[0].setting["steps"]
    return judge(
        f"Over {count} steps in double precision, networks with and without a bias differ by "
        f"10^{max(e.value for e in exact.values()):.1f} of the largest logit at most; in single "
        f"precision, over the first {EARLY}, by 10^{max(e.value for e in beside.values()):.1f} "
        f"times what moving the first weights by one rounding makes. Without normalization the "
        f"same bias makes a difference of 10^{plain.value:.1f}.",
        [
            *(expect(f"log10 of the difference, double precision, {kind}", exact[kind], below=-8)
              for kind in KINDS),
            *(expect(f"log10 of the difference / by one rounding, single, {EARLY} steps, {kind}",
                     beside[kind], below=1)
              for kind in KINDS),
            expect("log10 of the difference without normalization", plain, above=-2),
        ],
    )  # fmt: skip


def shows(runs: Runs) -> Iterator[Piece]:
    """The largest differences, and how they grow."""
    measured = runs.derived(largest=lambda run: exponent(run["largest"]))
    for kind in KINDS:
        yield table(
            "Largest difference of the logits, power of ten", measured.where(network=kind),
            rows="statistics", columns="type", names=NAMES, measure="largest", note=kind,
        )  # fmt: skip
    yield chart(
        "Difference that a bias makes", runs.where(network=FLAT), x="step", y="difference",
        series=lambda run: f"{NAMES[run['statistics']]}, {run['type']}", log_y=True,
        y_title="largest difference / largest logit",
        description="Fully connected; mean over the seeds, the band is their range.",
    )  # fmt: skip
    yield (
        f"After {EARLY} steps single precision is not compared: in some runs, with a bias and with "
        "weights moved by one rounding alike, a rounding that flips one ReLU has grown to 1 % of "
        "the logits after 200 steps (seen when the rule still counted all steps)."
    )
    yield (
        "Where running statistics take part in normalizing a training batch, as with Steady, the "
        "mean that is subtracted follows the bias with a delay, so a bias is not quite without "
        "effect in training."
    )


EXPERIMENT = Experiment(
    name="bias",
    title="A bias before batch normalization",
    claim="A bias before batch normalization does nothing: training is the same without it.",
    source="Ioffe & Szegedy 2015, section 3.2",
    factors={
        "network": "three hidden layers, or three convolutions",
        "statistics": "what normalizes: the batch, Steady, or nothing",
        "type": "single (float32) or double precision (float64)",
    },
    measure="Largest difference of the training batch's logits, relative to the largest logit, "
    "over all steps of two runs that differ in a random bias (standard deviation 1) "
    "before each normalization; SGD with momentum 0.9, rate 0.05, batch 64.",
    rule="In double precision the difference stays below 1e-8; in single, over the first 20 "
    "steps, below ten times what moving the first weights by one rounding makes; without "
    "normalization it is above 1e-2.",
    settings={"quick": settings(100), "full": settings(200)}, run=run, verdict=verdict,
    shows=shows, weights={"network": dict.fromkeys(KINDS, 3)},  # three of them train side by side
)  # fmt: skip
