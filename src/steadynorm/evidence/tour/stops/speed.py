"""One training step with torch.nn's layers and with ours, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steadynorm.evidence.lab.batches import batches, tensors
from steadynorm.evidence.lab.jobs import Job
from steadynorm.evidence.lab.networks import convolutional, initialize, normalization_2d
from steadynorm.evidence.lab.training import Tick
from steadynorm.evidence.tour.stop import Setting, StopResult
from steadynorm.evidence.tour.timing import interleaved, milliseconds, ratio
from steadynorm.report.charts import lines
from steadynorm.report.page import Table

BATCH, SIDE, CHANNELS = 32, 32, (64, 64, 128)
ARMS = ("torch.nn", "steadynorm")


@dataclass(frozen=True)
class Steps:
    """`seconds` of a step, round by round; `losses` of all steps, the first two being untimed."""

    seconds: dict[str, list[float]]
    losses: dict[str, list[float]]
    changes: list[dict[str, Any]]


def stepped(rounds: int, data_dir: str | None, seed: int, *, tick: Tick | None = None) -> Steps:
    """Train a network and its converted copy on the same batches, a step of each in turn."""
    import steadynorm as sn
    from steadynorm.evidence.lab.data import load

    images, labels = tensors(load(data_dir))[:2]
    # Digits are too small for the kernels to matter: shown at the size of common small pictures.
    images = F.interpolate(images, size=(SIDE, SIDE), mode="nearest")
    network = convolutional(normalization_2d("torch"), channels=CHANNELS)
    initialize(network, seed)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ours, changes = sn.convert(network)
    losses: dict[str, list[float]] = {arm: [] for arm in ARMS}
    steps = {
        arm: _stepper(model, images, labels, seed, losses[arm])
        for arm, model in zip(ARMS, (network, ours), strict=True)
    }
    seconds = interleaved(steps, rounds, least=0.0, tick=tick)
    return Steps(seconds, losses, [asdict(change) for change in changes])


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


class Speed:
    """The same training, the same losses, another time."""

    name = "speed"
    title = "A training step, side by side"

    def jobs(self, setting: Setting) -> Sequence[Job]:
        rounds = 12 if setting.short else 80
        arguments = (rounds, setting.data_dir, setting.seeds[0])
        key = (setting.seeds[0],)
        return [Job(self.name, key, rounds + 2, stepped, arguments, alone=True)]

    def result(self, setting: Setting, outcomes: Mapping[tuple[Any, ...], Any]) -> StopResult:
        (run,) = outcomes.values()
        faster = ratio(*(run.seconds[arm] for arm in ARMS))
        apart = max(abs(a - b) for a, b in zip(*run.losses.values(), strict=True))
        count = len(run.seconds["steadynorm"])
        return StopResult(
            f"A training step with our layers, next to one with torch.nn's: {faster.words}. That "
            f"is the median of {count} of each in turn, with quartiles {faster.low:.2f} and "
            f"{faster.high:.2f}; the two losses are never more than {apart:.1g} apart.",
            [
                Table(
                    f"A convolutional network, channels-last, {BATCH} digits at {SIDE}×{SIDE}",
                    ("layers", "median step, ms", "faster", "loss of the last step"),
                    [
                        (
                            arm,
                            milliseconds(run.seconds[arm]),
                            str(faster) if arm == "steadynorm" else None,
                            run.losses[arm][-1],
                        )
                        for arm in ARMS
                    ],
                    note="Forward, backward and SGD. Ratios of times from the same rounds: median "
                    "and quartiles, which other work on the machine widens. With all its threads.",
                    digits=3,
                    emphasis=(1,),
                )
            ],
            [
                lines(
                    "Time of a step",
                    [
                        {"layers": arm, "step": number + 3, "ms": 1e3 * value}
                        for arm in ARMS
                        for number, value in enumerate(run.seconds[arm])
                    ],
                    x="step",
                    y="ms",
                    series="layers",
                    y_title="milliseconds",
                    description="Every step of both, taken in turn. Without the first two of each, "
                    "in which kernels may compile.",
                )
            ],
            text=[
                f"sn.convert changed {len(run.changes)} things: every batch norm became ours and "
                "took the ReLU after it in, so one visit to memory does both. What a network "
                "gains depends on how much of its time is batch normalization: steadynorm bench "
                "measures the layer alone and whole networks."
            ],
            figures={"runs": [asdict(run)]},
        )
