"""The same training with and without a bias before batch normalization, to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from math import log10
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steadynorm.evidence.lab import estimates
from steadynorm.evidence.lab.batches import batches, tensors
from steadynorm.evidence.lab.data import Digits
from steadynorm.evidence.lab.experiment import (
    Experiment,
    Profile,
    Result,
    Runs,
    Setting,
    Shown,
    Verdict,
    expect,
    judge,
)  # fmt: skip
from steadynorm.evidence.lab.networks import convolutional, fully_connected, initialize
from steadynorm.evidence.lab.show import curves, table
from steadynorm.evidence.lab.training import Tick
from steadynorm.nn import BatchNorm1d, BatchNorm2d
from steadynorm.report.charts import lines

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


def settings(profile: Profile) -> Sequence[Setting]:
    """Both networks and types; the double precision also by other statistics, and without any."""
    steps = 100 if profile == "quick" else 200
    kinds = ("fully connected", "convolutional")
    exact = [(kind, "batch", dtype) for kind in kinds for dtype in ("float64", "float32")]
    others = [("fully connected", policy, "float64") for policy in ("steady", "none")]
    return [
        {"network": kind, "statistics": policy, "type": dtype, "steps": steps}
        for kind, policy, dtype in (*exact, *others)
    ]


def steps(setting: Setting) -> int:
    """Three networks train side by side."""
    return 3 * int(setting["steps"])


def build(setting: Setting, digits: Digits, seed: int, *, bias: bool) -> nn.Sequential:
    """The network of a setting; with `bias`, each layer before a normalization has a random one."""
    policy = setting["statistics"]
    flat, plane = (
        None if policy == "none" else (lambda width, kind=kind: kind(width, statistics=policy))
        for kind in (BatchNorm1d, BatchNorm2d)
    )
    network = (
        fully_connected(digits.train_images[0].size, flat)
        if setting["network"] == "fully connected"
        else convolutional(plane)
    )
    network = network.to(getattr(torch, setting["type"]))
    initialize(network, seed)
    if bias:
        random = torch.Generator().manual_seed(seed + 1)
        hosts = [m for m in network if isinstance(m, nn.Linear | nn.Conv2d)][:-1]
        for host in hosts:
            values = torch.randn(host.weight.shape[0], generator=random, dtype=torch.float64)
            host.bias = nn.Parameter(values.to(host.weight.dtype))
    return network


def nudged(network: nn.Sequential) -> nn.Sequential:
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
    """Train without a bias, with one, and without one from weights moved by one rounding; in
    every step, the largest difference of the logits of the training batch, relative to the largest
    logit. (Not those of inference: running means begin at 0 and come to a bias only by and by.)
    """
    dtype = getattr(torch, setting["type"])
    images, labels, _, _ = tensors(digits)
    images = images.to(dtype)
    networks = [
        build(setting, digits, seed, bias=False),
        build(setting, digits, seed, bias=True),
        nudged(build(setting, digits, seed, bias=False)),
    ]
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.05, momentum=0.9) for n in networks]
    order = batches(len(labels), BATCH, seed)
    apart: list[tuple[float, float]] = []
    for _ in range(setting["steps"]):
        part = next(order)
        logits = []
        for network, optimizer in zip(networks, optimizers, strict=True):
            optimizer.zero_grad()
            logits.append(network(images[part]))
            F.cross_entropy(logits[-1], labels[part]).backward()
            optimizer.step()
        apart.append((_apart(logits[1], logits[0]), _apart(logits[2], logits[0])))
        tick(3)
    return {
        "step": list(range(1, setting["steps"] + 1)),
        "difference": [bias for bias, _ in apart],
        "by_rounding": [nudge for _, nudge in apart],
        "largest": max(bias for bias, _ in apart),
        "early": max(bias for bias, _ in apart[:EARLY]),
        "early_by_rounding": max(nudge for _, nudge in apart[:EARLY]),
    }


@torch.no_grad()
def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _exponents(runs: Runs, measure: str, **factors: Any) -> list[float]:
    return [log10(max(value, FLOOR)) for value in runs.values(measure, **factors)]


def verdict(runs: Runs) -> Verdict:
    """In double precision by its size, in single by a nudge of one rounding."""
    double = {"type": "float64", "statistics": "batch"}
    kinds = ("fully connected", "convolutional")
    exact = {kind: estimates.mean(_exponents(runs, "largest", network=kind, **double))
             for kind in kinds}  # fmt: skip
    single = {"type": "float32", "statistics": "batch"}
    beside = {
        kind: estimates.difference(
            _exponents(runs, "early", network=kind, **single),
            _exponents(runs, "early_by_rounding", network=kind, **single),
        )
        for kind in kinds
    }
    plain = estimates.mean(_exponents(runs, "largest", type="float64", statistics="none"))
    count = runs[0].setting["steps"]
    return judge(
        f"Over {count} steps in double precision, networks with and without a bias differ by "
        f"10^{max(e.value for e in exact.values()):.1f} of the largest logit at most; in single "
        f"precision, over the first {EARLY}, by 10^{max(e.value for e in beside.values()):.1f} "
        f"times what moving the first weights by one rounding makes. Without normalization the "
        f"same bias makes a difference of 10^{plain.value:.1f}.",
        [
            *(expect(f"log10 of the difference, double precision, {kind}", exact[kind], below=-8)
              for kind in kinds),
            *(expect(f"log10 of the difference / by one rounding, single, {EARLY} steps, {kind}",
                     beside[kind], below=1)
              for kind in kinds),
            expect("log10 of the difference without normalization", plain, above=-2),
        ],
    )  # fmt: skip


def show(runs: Runs) -> Shown:
    """The largest differences, and how they grow."""
    batch = Runs(run for run in runs if run["network"] == "fully connected")
    rows = curves(
        batch, "step", "difference", lambda run: f"{NAMES[run['statistics']]}, {run['type']}"
    )
    return Shown(
        [
            table(
                "Largest difference of the logits, power of ten", Runs(runs.where(**kind)),
                rows="statistics", columns="type", names=NAMES,
                value=lambda run: log10(max(run["largest"], FLOOR)),
                note=f"{kind['network']}",
            )
            for kind in ({"network": "fully connected"}, {"network": "convolutional"})
        ],
        [
            lines(
                "Difference that a bias makes", [r for r in rows if r["difference"] > 0],
                x="step", y="difference", series="series", replicate="seed", log_y=True,
                x_title="steps", y_title="largest difference / largest logit",
                description="Fully connected; mean over the seeds, the band is their range.",
            )
        ],
        [
            f"After {EARLY} steps single precision is not compared: in some runs, with a bias and "
            "with weights moved by one rounding alike, a rounding that flips one ReLU has grown to "
            "1 % of the logits after 200 steps (seen when the rule still counted all steps).",
            "Where running statistics take part in normalizing a training batch, as with Steady, "
            "the mean that is subtracted follows the bias with a delay, so a bias is not quite "
            "without effect in training."
        ],
    )  # fmt: skip


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
    settings=settings,
    run=run,
    verdict=verdict,
    show=show,
    steps=steps,
)
