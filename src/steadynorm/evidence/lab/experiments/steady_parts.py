"""What each part of Steady is worth: taken away one at a time, and its two settings swept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from steadynorm.evidence.lab import estimates
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
from steadynorm.evidence.lab.experiments.small_batches import (
    NETWORKS,
    build,
    cell,
    normalization,
    trained,
)
from steadynorm.evidence.lab.show import table
from steadynorm.evidence.lab.training import Recipe, Tick
from steadynorm.report.page import Table
from steadynorm.statistics import (
    Context,
    Moments,
    Normalizer,
    Policy,
    RunningStatistics,
    Steady,
)  # fmt: skip

SIZES = (2, 1)
PARTS = {
    "whole": "whole",
    "gradient": "without the share's gradient",
    "horizon": "with the horizon in batches, momentum 0.1",
    "spread": "without the δ² term",
}
PRIORS = (1, 4, 16)
HORIZONS = (160, 640, 2560)


@dataclass(frozen=True)
class WithoutGradient(Steady):
    """Steady whose statistics are constants for the gradient."""

    def normalizer(
        self, batch: Moments, running: RunningStatistics | None, context: Context
    ) -> Normalizer:
        return super().normalizer(batch, running, context)._replace(share=0.0)


@dataclass(frozen=True)
class InBatches(Steady):
    """Steady whose running statistics forget by the batch, with weight 0.1, whatever its size."""

    def update(
        self, batch: Moments, running: RunningStatistics, context: Context
    ) -> RunningStatistics:
        samples = context.samples
        forgetful = Steady(self.prior, 9 * samples)  # N/(N + 9N) = 0.1
        return forgetful.update(batch, running, context)


@dataclass(frozen=True)
class WithoutSpread(Steady):
    """Steady without k(1 - k)·δ², in what normalizes and in what is kept."""

    def normalizer(
        self, batch: Moments, running: RunningStatistics | None, context: Context
    ) -> Normalizer:
        assert running is not None
        found = super().normalizer(batch, running, context)
        share = found.share
        return found._replace(var=(1 - share) * running.var + share * batch.var)

    def update(
        self, batch: Moments, running: RunningStatistics, context: Context
    ) -> RunningStatistics:
        after = super().update(batch, running, context)
        weight = self._weight(context.samples, self.horizon, running, context)
        return after._replace(var=(1 - weight) * running.var + weight * batch.var)


KINDS = {
    "whole": Steady, "gradient": WithoutGradient, "horizon": InBatches, "spread": WithoutSpread
}  # fmt: skip


def settings(profile: Profile) -> Sequence[Setting]:
    """The parts at batch 2 and 1 in both networks; the settings in the fully connected one."""
    samples = 2_000 if profile == "quick" else 3_000
    default = {"prior": 4, "horizon": 640}
    parts = [
        {"network": network, "part": part, "batch": size, "samples": samples, **default}
        for network in NETWORKS
        for part in PARTS
        for size in SIZES
    ]
    if profile == "quick":
        return parts
    return parts + [
        {"network": NETWORKS[0], "part": "whole", "batch": 2, "samples": samples, "prior": prior,
         "horizon": horizon}
        for prior in PRIORS
        for horizon in HORIZONS
        if (prior, horizon) != (4, 640)
    ]  # fmt: skip


def recipe(setting: Setting) -> Recipe:
    """That of the experiment with small batches."""
    return Recipe(setting["batch"], setting["samples"], points=1)


def steps(setting: Setting) -> int:
    """The length of a run; a convolution takes twice the time."""
    return recipe(setting).steps * (2 if setting["network"] == "convolutional" else 1)


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train and measure."""
    policy: Policy = KINDS[setting["part"]](setting["prior"], setting["horizon"])
    layers = normalization(setting["network"], policy)
    network = build(setting["network"], layers, digits.train_images[0].size, seed)
    return trained(setting, network, digits, recipe(setting), seed, tick)


def errors(runs: Runs, part: str) -> list[float]:
    """By seed, the error's mean over the four places; a run that failed counts as 100 %."""
    default = runs.where(prior=4, horizon=640, part=part)
    return [
        fmean(
            100.0 if run["error"] is None else run["error"] for run in default if run.seed == seed
        )
        for seed in default.seeds
    ]


def verdict(runs: Runs) -> Verdict:
    """Without a part the error must be higher, on average over the four places."""
    whole = errors(runs, "whole")
    worse = {
        part: estimates.difference(errors(runs, part), whole) for part in PARTS if part != "whole"
    }
    said = [f"{more.text(1)} points more {PARTS[part]}" for part, more in worse.items()]
    return judge(
        f"On average over batch 2 and batch 1 in two networks Steady makes "
        f"{estimates.mean(whole).value:.1f} % errors; {', '.join(said)}.",
        [expect(f"points more error {PARTS[part]}", more, above=0) for part, more in worse.items()],
    )


def show(runs: Runs) -> Shown:
    """The parts, and the sweep."""
    default = runs.where(prior=4, horizon=640)
    places = [(network, size) for network in NETWORKS for size in SIZES]
    body = [
        [
            words,
            *(cell(default.where(part=part, network=n, batch=size)) for n, size in places),
        ]
        for part, words in PARTS.items()
    ]
    head = ["Steady", *(f"{network}, batch {size}" for network, size in places)]
    tables = [Table("Error of inference, %, a part taken away", head, body, emphasis=[0])]
    sweep = runs.where(network=NETWORKS[0], part="whole", batch=2)
    if len(sweep.distinct("prior")) > 1:
        ordered = Runs(sorted(sweep, key=lambda run: (run["prior"], run["horizon"])))
        tables.append(
            table(
                "Error of inference, %, batch 2, fully connected: prior and horizon", ordered,
                rows="prior", columns="horizon", value=lambda run: run["error"],
                corner="prior, horizon",
            )
        )  # fmt: skip
    return Shown(tables)


EXPERIMENT = Experiment(
    name="steady-parts",
    title="The parts of Steady",
    claim="The gradient through the share, the horizon counted in samples and the δ² term each "
    "lower Steady's error in small batches.",
    source="ours",
    factors={
        "part": "; ".join(PARTS.values()),
        "network, batch": "fully connected or convolutional, batch 2 or 1",
        "prior, horizon": "swept at batch 2 in the fully connected network",
    },
    measure="Error of inference on the test digits, in per cent.",
    rule="Without any one of the three the error is higher, on average over batch 2 and batch 1 in "
    "both networks.",
    settings=settings,
    run=run,
    verdict=verdict,
    show=show,
    steps=steps,
)
