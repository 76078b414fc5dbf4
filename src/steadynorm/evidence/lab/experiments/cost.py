"""What batch normalization adds to a training step and to inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from steadynorm import nn as ours
from steadynorm.evidence import estimates
from steadynorm.evidence.digits import Digits
from steadynorm.evidence.lab.experiment import Experiment
from steadynorm.evidence.lab.figures import table
from steadynorm.evidence.lab.runs import FinishedRun, Profile, Result, Runs, Setting
from steadynorm.evidence.lab.verdict import Verdict, expect, judge
from steadynorm.evidence.networks import convolutional, fully_connected, initialize
from steadynorm.evidence.timing import in_turns, milliseconds, seconds
from steadynorm.evidence.training import Tick
from steadynorm.models.convert import convert
from steadynorm.models.fold import fold
from steadynorm.report.page import Piece

KINDS = {"none": "no normalization", "torch": "torch.nn", "apart": "ours", "fused": "ours, fused",
         "folded": "ours, folded"}  # fmt: skip
WARM_UP = 3


def settings(rounds: int) -> list[Setting]:
    """Networks of two kinds; all their variants are timed in turns, within one run."""
    return [
        {"network": "fully connected", "batch": 256, "width": 512, "size": 28, "rounds": rounds},
        {"network": "convolutional", "batch": 32, "width": 64, "size": 28, "rounds": rounds},
    ]


SETTINGS: dict[Profile, list[Setting]] = {"quick": settings(15), "full": settings(40)}


def steps(setting: Setting) -> int:
    """Rounds, each of all variants."""
    return int(setting["rounds"]) + WARM_UP


def build(setting: Setting, kind: str) -> nn.Module:
    """One variant of the network."""
    width = setting["width"]
    package: Any = nn if kind == "torch" else ours
    if setting["network"] == "fully connected":
        norm = None if kind == "none" else package.BatchNorm1d
        made = fully_connected(setting["size"] ** 2, norm, widths=(width,) * 4)
    else:
        made = convolutional(None if kind == "none" else package.BatchNorm2d, channels=(width,) * 4)
    initialize(made, 0)
    if kind == "fused":
        made, _ = convert(made)
    if kind == "folded":
        made, _ = fold(made.eval())
    return made


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Milliseconds of a training step and of inference for each variant: medians of rounds in
    which all take their turn, so that whatever else the machine does affects them alike.
    """
    size = setting["size"]
    images = torch.randn(setting["batch"], 1, size, size)
    labels = torch.arange(setting["batch"]) % 10

    def training(network: nn.Module) -> None:
        network.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()

    def inference(network: nn.Module) -> None:
        with torch.inference_mode():
            network(images)

    def turn(network: nn.Module, step: Callable[[nn.Module], None]) -> float:
        network.train(step is training)
        return seconds(lambda: step(network))

    contenders = {}
    for kind in KINDS:
        network = build(setting, kind)
        if kind != "folded":
            contenders[f"training, {kind}"] = partial(turn, network, training)
        contenders[f"inference, {kind}"] = partial(turn, network, inference)
    found = in_turns(contenders, setting["rounds"], warm_up=WARM_UP, tick=tick)
    return {name: milliseconds(times) for name, times in found.items()}


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


def shows(runs: Runs) -> Iterator[Piece]:
    """Milliseconds, and multiples of the network without normalization."""
    by_kind = Runs(
        FinishedRun({"kind": called, "what": f"{name}, {one['network']}"}, one.seed,
                    {"added": one[f"{name}, {kind}"] / one[f"{name}, none"] - 1,
                     "ms": one[f"{name}, {kind}"]})
        for one in runs for name in ("training", "inference") for kind, called in KINDS.items()
        if f"{name}, {kind}" in one.result
    )  # fmt: skip
    across: dict[str, Any] = {"rows": "kind", "columns": "what", "corner": "normalization"}
    yield table(
        "Per cent of time that normalization adds", by_kind, **across, measure="added", times=100,
        note="Training: forward and backward. A folded network does not train.",
    )  # fmt: skip
    yield table("Milliseconds", by_kind, **across, measure="ms")


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
    settings=SETTINGS, run=run, verdict=verdict, shows=shows, steps=steps, timed=True,
)  # fmt: skip
