"""A trained network is folded for shipping: the same answers in less time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.evidence.lab.batches import tensors
from steadynorm.evidence.lab.jobs import Job
from steadynorm.evidence.lab.networks import convolutional, initialize, normalization_2d
from steadynorm.evidence.lab.training import Recipe, Tick, inference_accuracy, train
from steadynorm.evidence.tour.stop import Setting, StopResult
from steadynorm.evidence.tour.timing import Seconds, interleaved, milliseconds, ratio
from steadynorm.report.charts import intervals
from steadynorm.report.page import Chart, Table

SIZES = (1, 64)  # digits answered at a time
ARMS = ("torch.nn", "steadynorm", "folded")


@dataclass(frozen=True)
class Folded:
    """A network before and after. `layers`: batch norms folded. `same_answers`: of the `digits` for
    testing. `logit_difference`: the largest of any logit; `logit`: the largest logit.
    `seconds`: by digits at a time.
    """

    layers: int
    changes: list[dict[str, Any]]
    accuracy: float
    digits: int
    same_answers: int
    logit: float
    logit_difference: float
    seconds: dict[int, Seconds]


def folded(
    recipe: Recipe, rounds: int, data_dir: str | None, seed: int, *, tick: Tick | None = None
) -> Folded:
    """Train, fold, compare all answers, and time inference."""
    import steadynorm as sn
    from steadynorm.evidence.lab.data import load

    digits = load(data_dir)
    network = convolutional(normalization_2d("batch"))
    initialize(network, seed)
    train(network, digits, recipe, seed=seed, tick=tick)
    network.eval()
    images, labels = tensors(digits)[2:]
    shipped, changes = sn.fold(network, images[:2])
    theirs, _ = sn.convert(network, to="torch")
    with torch.no_grad():
        before, after = network(images), shipped(images)
    return Folded(
        layers=changes.tally()["folded"],
        changes=[asdict(change) for change in changes],
        accuracy=inference_accuracy(shipped, images, labels),
        digits=len(labels),
        same_answers=int((before.argmax(1) == after.argmax(1)).sum()),
        logit=float(before.abs().max()),
        logit_difference=float((before - after).abs().max()),
        seconds={
            size: interleaved(
                {
                    name: _answers(model, images[:size])
                    for name, model in zip(ARMS, (theirs, network, shipped), strict=True)
                },
                rounds,
                tick=tick,
            )
            for size in SIZES
        },
    )


def _answers(network: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    def answer() -> Tensor:
        with torch.inference_mode():
            answers: Tensor = network(images)
            return answers

    return answer


class Folding:
    """The same answers without batch normalization, which inference no longer needs."""

    name = "folding"
    title = "For shipping: batch normalization folded away"

    def jobs(self, setting: Setting) -> Sequence[Job]:
        recipe = Recipe(64, samples=4_000 if setting.short else 12_000, points=1)
        rounds = 60 if setting.short else 300
        return [
            Job(
                self.name,
                (setting.seeds[0],),
                recipe.steps + len(SIZES) * (rounds + 2),
                folded,
                (recipe, rounds, setting.data_dir, setting.seeds[0]),
                alone=True,
            )
        ]

    def result(self, setting: Setting, outcomes: Mapping[tuple[Any, ...], Any]) -> StopResult:
        (run,) = outcomes.values()
        rows, bars = [], []
        for size, seconds in run.seconds.items():
            for arm in ARMS:
                faster = ratio(seconds[arm], seconds["folded"])
                rows.append(
                    (
                        size,
                        arm,
                        milliseconds(seconds[arm]),
                        None if arm == "folded" else str(faster),
                    )
                )
                if arm != "folded":
                    bars.append({"network": arm, "at a time": _at_a_time(size)} | faster._asdict())
        gains = [
            f"{_at_a_time(size)} {ratio(seconds['steadynorm'], seconds['folded']).words}"
            for size, seconds in run.seconds.items()
        ]
        return StopResult(
            f"{run.layers} batch norms folded: the same answer for {run.same_answers:,} of "
            f"{run.digits:,} digits, the logits (up to {run.logit:.0f}) within "
            f"{run.logit_difference:.1g}. Inference, next to the network before: "
            f"{', '.join(gains)}.",
            [
                Table(
                    "The small convolutional network, folded",
                    ("digits at a time", "layers", "median, ms", "folded is faster"),
                    rows,
                    note="Inference. Ratios of times from the same rounds: median and quartiles. "
                    "Times are this machine's.",
                    digits=3,
                    emphasis=[index for index, row in enumerate(rows) if row[1] == "folded"],
                )
            ],
            [self._chart(bars)],
            text=[
                "In inference a batch norm is a scale and a shift per channel, and the convolution "
                "before it can do both: sn.fold merges them into its weights, in float64. The "
                "folded network needs neither the layer nor this package."
            ],
            figures={"runs": [asdict(run)]},
        )

    def _chart(self, bars: Sequence[dict[str, Any]]) -> Chart:
        return intervals(
            "How many times as fast the folded network is",
            bars,
            value="middle",
            low="low",
            high="high",
            label="network",
            series="at a time",
            value_title="time before / time folded",
            reference=1.0,
            description="Median and quartiles over the rounds; at 1 both are as fast.",
        )


def _at_a_time(size: int) -> str:
    return f"{size} at a time" if size > 1 else "one at a time"
