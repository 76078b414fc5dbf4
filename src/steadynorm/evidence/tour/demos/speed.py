"""One training step with torch.nn's layers and with ours, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steadynorm.evidence.digits import batches, load, tensors
from steadynorm.evidence.networks import build
from steadynorm.evidence.timing import interleaved, milliseconds, speed_up
from steadynorm.evidence.tour.demo import Demo, DemoResult, Outcomes, TourOptions
from steadynorm.evidence.training import Tick
from steadynorm.evidence.workers import Job
from steadynorm.report.charts import lines
from steadynorm.report.page import Table

BATCH, SIDE, CHANNELS = 32, 32, (64, 64, 128)
ARMS = ("torch.nn", "steadynorm")


@dataclass(frozen=True)
class TimedSteps:
    """`seconds` of a step, round by round; `losses` of all steps, the first two being untimed."""

    seconds: dict[str, list[float]]
    losses: dict[str, list[float]]
    changes: list[dict[str, Any]]


def stepped(
    rounds: int, data_dir: str | None, seed: int, *, tick: Tick | None = None
) -> TimedSteps:
    """Train a network and its converted copy on the same batches, a step of each in turn."""
    import steadynorm as sn

    digits = load(data_dir)
    images, labels = tensors(digits)[:2]
    # On 8×8 digits kernels do not matter; 32×32 is a common size of small pictures.
    images = F.interpolate(images, size=(SIDE, SIDE), mode="nearest")
    network = build("convolutional", "torch", digits, seed, channels=CHANNELS)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ours, changes = sn.convert(network)
    losses: dict[str, list[float]] = {arm: [] for arm in ARMS}
    steps = {
        arm: _stepper(model, images, labels, seed, losses[arm])
        for arm, model in zip(ARMS, (network, ours), strict=True)
    }
    seconds = interleaved(steps, rounds, least=0.0, tick=tick)
    return TimedSteps(seconds, losses, [asdict(change) for change in changes])


def _stepper(
    network: nn.Module, images: Tensor, labels: Tensor, seed: int, losses: list[float]
) -> Callable[[], None]:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, fused=True)
    order = batches(len(labels), BATCH, seed)
    network.train()

    def step() -> None:
        batch = next(order)
        x = images[batch].contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))

    return step


def jobs(options: TourOptions) -> Sequence[Job]:
    """One run, alone."""
    rounds = 12 if options.short else 80
    seed = options.seeds[0]
    arguments = (rounds, options.data_dir, seed)
    return [Job(DEMO.name, (seed,), rounds + 2, stepped, arguments, alone=True)]


def result(options: TourOptions, outcomes: Outcomes) -> DemoResult:
    """Time of a step with both, and how far their losses differ."""
    (run,) = outcomes.values()
    faster = speed_up(*(run.seconds[arm] for arm in ARMS))
    difference = max(abs(a - b) for a, b in zip(*run.losses.values(), strict=True))
    rows = [
        (
            arm, milliseconds(run.seconds[arm]), str(faster) if arm == "steadynorm" else None,
            run.losses[arm][-1],
        )
        for arm in ARMS
    ]  # fmt: skip
    points = [
        {"layers": arm, "step": number + 3, "ms": 1e3 * value}
        for arm in ARMS
        for number, value in enumerate(run.seconds[arm])
    ]
    return DemoResult.of(
        DEMO.title,
        f"A training step with our layers, next to one with torch.nn's: {faster.words}. That "
        f"is the median of {len(run.seconds['steadynorm'])} of each in turn, with quartiles "
        f"{faster.low:.2f} and {faster.high:.2f}; the two losses are never more than "
        f"{difference:.1g} apart.",
        Table(
            f"A convolutional network, channels-last, {BATCH} digits at {SIDE}×{SIDE}",
            ("layers", "median step, ms", "faster", "loss of the last step"),
            rows,
            note="Forward, backward and SGD. Ratios of times from the same rounds: median and "
            "quartiles, which other work on the machine widens. With all its threads.",
            digits=3,
            emphasis=(1,),
        ),
        lines(
            "Time of a step", points, x="step", y="ms", series="layers", y_title="milliseconds",
            description="Every step of both, taken in turn. Without the first two of each, in "
            "which kernels may compile.",
        ),
        f"sn.convert changed {len(run.changes)} things: every batch norm became ours and took the "
        "ReLU after it in, so one visit to memory does both. What a network gains depends on how "
        "much of its time is batch normalization: steadynorm bench measures the layer alone and "
        "whole networks.",
        figures={"runs": [asdict(run)]},
    )  # fmt: skip


DEMO = Demo("speed", "A training step, side by side", jobs, result)
