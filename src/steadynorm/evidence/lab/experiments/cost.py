"""What batch normalization adds to a training step and to inference."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm import nn as ours
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
from steadynorm.evidence.lab.networks import convolutional, fully_connected, initialize
from steadynorm.evidence.lab.show import table
from steadynorm.evidence.lab.training import Tick
from steadynorm.models.convert import convert
from steadynorm.models.fold import fold

KINDS = {"none": "no normalization", "torch": "torch.nn", "apart": "ours", "fused": "ours, fused",
         "folded": "ours, folded"}  # fmt: skip
WARM_UP = 3


def settings(profile: Profile) -> Sequence[Setting]:
    """Networks of two kinds; all their variants are timed in turns, within one run."""
    rounds = 15 if profile == "quick" else 40
    return [
        {"network": "fully connected", "batch": 256, "width": 512, "size": 28, "rounds": rounds},
        {"network": "convolutional", "batch": 32, "width": 64, "size": 28, "rounds": rounds},
    ]


def steps(setting: Setting) -> int:
    """Rounds, each of all variants."""
    return int(setting["rounds"]) + WARM_UP


def build(setting: Setting, kind: str) -> nn.Module:
    """One variant of the network."""
    width = setting["width"]
    if setting["network"] == "fully connected":
        norm: Any = nn.BatchNorm1d if kind == "torch" else ours.BatchNorm1d
        made = fully_connected(setting["size"] ** 2, None if kind == "none" else norm,
                               widths=(width,) * 4)  # fmt: skip
    else:
        norm = nn.BatchNorm2d if kind == "torch" else ours.BatchNorm2d
        made = convolutional(None if kind == "none" else norm, channels=(width,) * 4)
    initialize(made, 0)
    if kind == "fused":
        made, _ = convert(made)
    if kind == "folded":
        made, _ = fold(made.eval())
    return made


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Milliseconds of a training step and of inference for each variant: medians of rounds in
    which all take their turn, so that whatever else the machine does meets them alike.
    """
    size = setting["size"]
    images = torch.randn(setting["batch"], 1, size, size)
    labels = torch.arange(setting["batch"]) % 10
    networks = {kind: build(setting, kind) for kind in KINDS}
    found: dict[str, list[float]] = {}

    def training(network: nn.Module) -> None:
        network.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()

    def inference(network: nn.Module) -> None:
        with torch.inference_mode():
            network(images)

    for turn in range(setting["rounds"] + WARM_UP):
        for kind, network in networks.items():
            for name, call in (("training", training), ("inference", inference)):
                if name == "training" and kind == "folded":
                    continue
                network.train(name == "training")
                took = _milliseconds(call, network)
                if turn >= WARM_UP:
                    found.setdefault(f"{name}, {kind}", []).append(took)
        tick(1)
    return {name: median(times) for name, times in found.items()}


def _milliseconds(call: Callable[[nn.Module], Tensor | None], network: nn.Module) -> float:
    start = time.perf_counter()
    call(network)
    return 1e3 * (time.perf_counter() - start)


def added(runs: Runs, name: str, kind: str, network: str) -> list[float]:
    """How many times as long as without normalization, in each run."""
    of = runs.where(network=network)
    return [one[f"{name}, {kind}"] / one[f"{name}, none"] for one in of]


def verdict(runs: Runs) -> Verdict:
    """Ratios of times from the same run; what the machine does otherwise drops out."""
    networks = runs.distinct("network")
    folded = {n: estimates.mean(added(runs, "inference", "folded", n)) for n in networks}
    fused = {
        n: estimates.ratio(added(runs, "training", "fused", n), added(runs, "training", "torch", n))
        for n in networks
    }
    step = {
        kind: estimates.mean(added(runs, "training", kind, "convolutional"))
        for kind in ("torch", "fused")
    }
    return judge(
        f"In the convolutional network torch's batch normalization makes a training step "
        f"{step['torch'].value:.2f} times as long, ours, fused, {step['fused'].value:.2f} times; "
        f"folded, inference takes {folded['convolutional'].value:.2f} times that without.",
        [
            *(expect(f"inference, folded / without, {n}", folded[n], below=1.1) for n in networks),
            *(expect(f"training step, fused / torch's, {n}", fused[n], below=1) for n in networks),
        ],
    )


def show(runs: Runs) -> Shown:
    """Milliseconds, and multiples of the network without normalization."""
    rows = [
        Run({"kind": KINDS[kind], "what": f"{name}, {one['network']}"}, one.seed,
            {"ratio": one[f"{name}, {kind}"] / one[f"{name}, none"],
             "ms": one[f"{name}, {kind}"]})
        for one in runs for name in ("training", "inference") for kind in KINDS
        if f"{name}, {kind}" in one.result
    ]  # fmt: skip
    ragged = Runs(rows)
    return Shown(
        [
            table(
                "Per cent of time that normalization adds", ragged, rows="kind",
                columns="what", corner="normalization", value=lambda run: 100 * (run["ratio"] - 1),
                note="Training: forward and backward. A folded network does not train.",
            ),
            table(
                "Milliseconds", ragged, rows="kind", columns="what", corner="normalization",
                value=lambda run: run["ms"],
            ),
        ]
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="cost",
    title="What it costs",
    claim="Batch normalization costs little: fused, a training step takes less time than with "
    "torch's layers, and folded, inference takes no more than without.",
    source="this package's own promise (docs/speed.md)",
    factors={
        "network": "four hidden layers of 512 at batch 256, or four convolutions of 64 channels "
        "at batch 32, on 28×28",
        "kind": "no normalization; torch's; ours; ours with the activation inside; ours folded",
    },
    measure="Milliseconds of a training step (forward, backward) and of inference, medians of "
    "rounds in which all variants take turns; a seed is a repetition.",
    rule="Folded inference takes less than 1.1 times that without normalization, and a training "
    "step with ours, fused, less than with torch's, in both networks.",
    settings=settings,
    run=run,
    verdict=verdict,
    show=show,
    steps=steps,
    timed=True,
)
