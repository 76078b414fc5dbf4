"""A trained network is folded for shipping: the same answers in less time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.evidence.digits import load, tensors
from steadynorm.evidence.networks import build
from steadynorm.evidence.timing import Seconds, interleaved, milliseconds, speed_up
from steadynorm.evidence.tour.demo import Demo, DemoResult, Outcomes, TourOptions
from steadynorm.evidence.training import Recipe, Tick, inference_accuracy, train
from steadynorm.evidence.workers import Job
from steadynorm.report.charts import intervals
from steadynorm.report.page import Table

SIZES = (1, 64)  # digits answered at a time
ARMS = ("torch.nn", "steadynorm", "folded")


@dataclass(frozen=True)
class FoldedNetwork:
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
) -> FoldedNetwork:
    """Train, fold, compare all answers, and time inference."""
    import steadynorm as sn

    digits = load(data_dir)
    network = build("convolutional", "batch", digits, seed)
    train(network, digits, recipe, seed=seed, tick=tick)
    network.eval()
    images, labels = tensors(digits)[2:]
    shipped, changes = sn.fold(network, images[:2])
    theirs, _ = sn.convert(network, to="torch")
    with torch.no_grad():
        before, after = network(images), shipped(images)
    models = dict(zip(ARMS, (theirs, network, shipped), strict=True))
    seconds: dict[int, Seconds] = {}
    for size in SIZES:
        contenders = {name: partial(_answer, m, images[:size]) for name, m in models.items()}
        seconds[size] = interleaved(contenders, rounds, tick=tick)
    return FoldedNetwork(
        layers=changes.tally()["folded"],
        changes=[asdict(change) for change in changes],
        accuracy=inference_accuracy(shipped, images, labels),
        digits=len(labels),
        same_answers=int((before.argmax(1) == after.argmax(1)).sum()),
        logit=float(before.abs().max()),
        logit_difference=float((before - after).abs().max()),
        seconds=seconds,
    )


@torch.inference_mode()
def _answer(network: nn.Module, images: Tensor) -> None:
    network(images)


def jobs(options: TourOptions) -> Sequence[Job]:
    """One run, alone."""
    recipe = Recipe(64, samples=4_000 if options.short else 12_000, points=1)
    rounds = 60 if options.short else 300
    seed = options.seeds[0]
    steps = recipe.steps + len(SIZES) * (rounds + 2)
    arguments = (recipe, rounds, options.data_dir, seed)
    return [Job(DEMO.name, (seed,), steps, folded, arguments, alone=True)]


def result(options: TourOptions, outcomes: Outcomes) -> DemoResult:
    """That the answers are the same, and the time they take."""
    (run,) = outcomes.values()
    rows: list[tuple[int, str, float, str | None]] = []
    bars, gains = [], []
    for size, seconds in run.seconds.items():
        at_a_time = f"{size} at a time" if size > 1 else "one at a time"
        faster = {arm: speed_up(seconds[arm], seconds["folded"]) for arm in ARMS[:-1]}
        for arm in ARMS:
            gain = str(faster[arm]) if arm in faster else None
            rows.append((size, arm, milliseconds(seconds[arm]), gain))
        bars += [{"network": a, "at a time": at_a_time, **f._asdict()} for a, f in faster.items()]
        gains.append(f"{at_a_time} {faster['steadynorm'].words}")
    return DemoResult.of(
        DEMO.title,
        f"{run.layers} batch norms folded: the same answer for {run.same_answers:,} of "
        f"{run.digits:,} digits, the logits (up to {run.logit:.0f}) within "
        f"{run.logit_difference:.1g}. Inference, next to the network before: "
        f"{', '.join(gains)}.",
        Table(
            "The small convolutional network, folded",
            ("digits at a time", "layers", "median, ms", "folded is faster"),
            rows,
            note="Inference. Ratios of times from the same rounds: median and quartiles. Times are "
            "this machine's.",
            digits=3,
            emphasis=[index for index, row in enumerate(rows) if row[1] == "folded"],
        ),
        intervals(
            "How many times as fast the folded network is", bars, value="middle", low="low",
            high="high", label="network", series="at a time",
            value_title="time before / time folded", reference=1.0,
            description="Median and quartiles over the rounds; at 1 both are as fast.",
        ),
        "In inference a batch norm is a scale and a shift per channel, and the convolution before "
        "it can do both: sn.fold merges them into its weights, in float64. The folded network "
        "needs neither the layer nor this package.",
        figures={"runs": [asdict(run)]},
    )  # fmt: skip


DEMO = Demo("folding", "For shipping: batch normalization folded away", jobs, result)
