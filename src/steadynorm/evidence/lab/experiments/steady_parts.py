"""What each part of Steady is worth at a batch of one, its settings swept, and how the defaults of
`prior`, `horizon` and `window` are chosen.

The rule of choice, written down before any run:

- A setting is scored by its worst network: the largest ratio, over the networks, of the mean error
  of a batch of one to that of `Batch` at 64, both with running statistics.
- A setting that loses a seed (`is_lost`) is out.
- The default is the setting with the lowest score; but prior 16, horizon 640 and window 16, found
  beforehand, stay unless another setting's score is lower by more than chance, that is, unless the
  95 % interval of the difference in the worst network lies below 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from steadynorm.evidence import estimates
from steadynorm.evidence.digits import Digits
from steadynorm.evidence.lab.experiment import Experiment
from steadynorm.evidence.lab.experiments import batch_of_one
from steadynorm.evidence.lab.experiments.batch_of_one import (
    CONV,
    DEEP,
    FLAT,
    SAMPLES,
    WEIGHTS,
    by_network,
    cell,
    is_lost,
    micro_batched,
    trained,
)
from steadynorm.evidence.lab.micro_batches import MicroBatchNorm
from steadynorm.evidence.lab.runs import Profile, Result, Runs, Setting
from steadynorm.evidence.lab.verdict import Verdict, expect, judge
from steadynorm.evidence.training import Recipe, Tick
from steadynorm.report.page import Piece, Table
from steadynorm.statistics import (
    Batch,
    Context,
    GradientMemory,
    Moments,
    Normalizer,
    RunningStatistics,
    Steady,
)
from steadynorm.statistics.moments import at_least_one

NETWORKS = (FLAT, CONV, DEEP)
PARTS = {
    "whole": "whole",
    "constant": "without M",
    "slope": "without R",
    "present": "M and R without the present batch",
    "averages": "averages instead of the regression",
    "samples": "the share counts positions",
    "single": "a step for each sample, a quarter of the digits",
    "clipped": "the same, the gradient clipped in each step",
}
ONLY = {"samples": (CONV,), "single": (CONV,), "clipped": (CONV,)}
BY_SAMPLE = ("single", "clipped")
DEFAULT: tuple[float, ...] = (16, 640, 16)  # prior, horizon, window
SWEPT = (
    *((16, 640, window) for window in (4, 64, 640)),
    *((prior, 640, 16) for prior in (2, 64)),
    *((both, 640, both) for both in (4, 64)),
    *((16, horizon, 16) for horizon in (160, 2560)),
)


class WithoutConstant(MicroBatchNorm):
    """M is not taken off."""

    def follow(self, *seen: Any) -> tuple[GradientMemory, GradientMemory]:
        memory, _ = super().follow(*seen)
        return memory, memory._replace(constant=0 * memory.constant)


class WithoutSlope(MicroBatchNorm):
    """R is not taken off."""

    def follow(self, *seen: Any) -> tuple[GradientMemory, GradientMemory]:
        memory, _ = super().follow(*seen)
        return memory, memory._replace(slope=0 * memory.slope)


class WithoutPresent(MicroBatchNorm):
    """What is taken off are M and R from before the batch."""

    def follow(self, memory: GradientMemory, *seen: Any) -> tuple[GradientMemory, GradientMemory]:
        after, _ = super().follow(memory, *seen)
        return after, memory


class Averages(MicroBatchNorm):
    """M and R are averages of g and g·x̂, taken off for the part 1 - k that the share leaves."""

    def follow(
        self, memory: GradientMemory, rate: Any, *seen: Any
    ) -> tuple[GradientMemory, GradientMemory]:
        normalizer, batch, rho, sum_grad, sum_grad_x = seen
        n, left = at_least_one(batch.count), 1 - normalizer.share
        about_mean = rho * (sum_grad_x - normalizer.mean_low * sum_grad)
        after = GradientMemory(
            memory.constant + rate * (sum_grad / n - memory.constant),
            memory.slope + rate * (about_mean / n - memory.slope),
        )
        return after, GradientMemory(left * after.constant, left * after.slope)


class CountsPositions(Steady):
    """Steady whose share counts values per channel, with a memory of the gradient."""

    def normalizer(
        self, batch: Moments, running: RunningStatistics | None, context: Context
    ) -> Normalizer:
        return Steady(self.prior, self.horizon, None).normalizer(batch, running, context)


LAYERS = {
    "constant": WithoutConstant, "slope": WithoutSlope, "present": WithoutPresent,
    "averages": Averages,
}  # fmt: skip


def settings(
    samples: int, networks: int, parts: tuple[str, ...], swept: tuple[tuple[float, ...], ...]
) -> list[Setting]:
    """`Batch` at 64, the parts at the defaults, and the whole at other settings."""
    cells = [("batch", SAMPLES, DEFAULT)]
    cells += [(part, 1, DEFAULT) for part in parts] + [("whole", 1, values) for values in swept]
    return [
        {"network": network, "part": part, "batch": batch, "networks": networks}
        | {"samples": samples // 4 if part in BY_SAMPLE else samples}
        | dict(zip(("prior", "horizon", "window"), values, strict=True))
        for network in NETWORKS
        for part, batch, values in cells
        if network in ONLY.get(part, NETWORKS)
    ]


SETTINGS: dict[Profile, list[Setting]] = {
    "quick": settings(2_000, 3, ("whole", "constant", "slope"), ()),
    "full": settings(4_800, 6, tuple(PARTS), SWEPT),
}


def recipe(setting: Setting) -> Recipe:
    """Steps of 64 samples, or of one."""
    if setting["part"] in BY_SAMPLE:
        clip = 5.0 if setting["part"] == "clipped" else None
        return Recipe(1, setting["samples"], clip=clip, points=1)
    return batch_of_one.recipe(setting)


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train and measure."""
    part = setting["part"]
    values = (setting["prior"], setting["horizon"], setting["window"])
    steady = (CountsPositions if part == "samples" else Steady)(*values)
    policy = Batch() if part == "batch" else steady
    layers = micro_batched(policy, setting["batch"], LAYERS.get(part, MicroBatchNorm))
    return trained(setting, seed, digits, tick, layers, recipe(setting))


def at(runs: Runs, part: str, values: tuple[float, ...] = DEFAULT) -> Runs:
    """The runs of a part with these settings."""
    return runs.where(part=part, **dict(zip(("prior", "horizon", "window"), values, strict=True)))


def verdict(runs: Runs) -> Verdict:
    """Without a part the error must be higher, on average over the networks."""
    runs = by_network(runs)

    def errors(part: str) -> list[float]:
        some = at(runs, part)
        return [fmean(run["error"] for run in some if run.seed == seed) for seed in runs.seeds]

    whole = errors("whole")
    present = [part for part in ("constant", "slope", "present") if at(runs, part)]
    more = {part: estimates.difference(errors(part), whole) for part in present}
    said = [f"{found.text(1)} points more {PARTS[part]}" for part, found in more.items()]
    return judge(
        f"At a batch of one, on average over the networks, Steady makes {fmean(whole):.1f} % "
        f"errors; {', '.join(said)}.",
        [
            expect(f"points more error {PARTS[part]}", found, above=0)
            for part, found in more.items()
        ],
    )


def score(runs: Runs, values: tuple[float, ...]) -> tuple[float, str, int]:
    """By the rule above: the worst network's ratio to `Batch` at 64, its name, and seeds lost."""
    ratios, lost = {}, 0
    for network in runs.distinct("network"):
        some = runs.where(network=network)
        goal = fmean(run["error"] for run in at(some, "batch"))
        errors = [run["error"] for run in at(some, "whole", values)]
        ratios[network] = fmean(errors) / goal
        lost += sum(is_lost(error, goal) for error in errors)
    worst = max(ratios, key=lambda network: ratios[network])
    return ratios[worst], worst, lost


def shows(runs: Runs) -> Iterator[Piece]:
    """The parts, and the settings with the score that chooses among them."""
    runs = by_network(runs)
    networks = runs.distinct("network")

    def cells(part: str, values: tuple[float, ...] = DEFAULT) -> list[str]:
        return [cell(at(runs.where(network=network), part, values)) for network in networks]

    body = [["Batch at 64", *cells("batch")]]
    body += [[words, *cells(part)] for part, words in PARTS.items() if at(runs, part)]
    title = "Error at a batch of one, %, a part taken away"
    yield Table(title, ["Steady", *networks], body, note=NOTE, emphasis=[1])
    whole = runs.where(part="whole")
    swept = sorted({(run["prior"], run["horizon"], run["window"]) for run in whole})
    if len(swept) > 1:
        rows = []
        for values in swept:
            ratio, worst, lost = score(runs, values)
            setting = ", ".join(f"{value:g}" for value in values)
            rows.append([setting, *cells("whole", values), f"{ratio:.2f}, {worst}", str(lost)])
        head = ["prior, horizon, window", *networks, "worst ratio to Batch at 64", "seeds lost"]
        bold = [index for index, values in enumerate(swept) if values == DEFAULT]
        title = "Error at a batch of one, %, by Steady's settings"
        yield Table(title, head, rows, note=NOTE, emphasis=bold)


NOTE = "Mean ± half its 95 % interval with running statistics, in brackets the mean calibrated."
EXPERIMENT = Experiment(
    name="steady-parts",
    title="The parts of Steady",
    claim="At a batch of one Steady needs both of its memories of the gradient, M and R, and the "
    "present batch in them.",
    source="ours",
    factors={
        "part": "; ".join(PARTS.values()),
        "network": "; ".join(NETWORKS),
        "prior, horizon, window": "swept about the defaults",
    },
    measure="Error of inference on the test digits, in per cent, with running statistics; every "
    f"step adds up the gradients of {SAMPLES} samples, each normalized alone.",
    rule="Without M, without R and without the present batch the error is higher, on average over "
    "the networks.",
    settings=SETTINGS, run=run, verdict=verdict, shows=shows, recipe=recipe,
    weights={"network": WEIGHTS}, seeds={"quick": 1, "full": 1}, revision=2,
)  # fmt: skip
