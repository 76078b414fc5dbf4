"""What each part of Steady is worth: taken away one at a time, and its two settings swept."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from steadynorm.evidence import estimates
from steadynorm.evidence.digits import Digits
from steadynorm.evidence.lab.experiment import Experiment, Figures
from steadynorm.evidence.lab.experiments.small_batches import cell, recipe, trained, weight
from steadynorm.evidence.lab.figures import table
from steadynorm.evidence.lab.runs import Profile, Result, Runs, Setting, grid
from steadynorm.evidence.lab.verdict import Verdict, expect, judge
from steadynorm.evidence.networks import KINDS, build
from steadynorm.evidence.training import Tick
from steadynorm.report.page import Table
from steadynorm.statistics import Context, Moments, Normalizer, RunningStatistics, Steady

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
class HorizonInBatches(Steady):
    """Steady whose running statistics give every batch the weight 0.1, whatever its size."""

    def update(
        self, batch: Moments, running: RunningStatistics, context: Context
    ) -> RunningStatistics:
        by_batch = Steady(self.prior, 9 * context.samples)  # N/(N + 9N) = 0.1
        return by_batch.update(batch, running, context)


@dataclass(frozen=True)
class WithoutSpread(Steady):
    """Steady without k(1 - k)·δ², both in the normalizer and in the running variance."""

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


POLICIES = {
    "whole": Steady, "gradient": WithoutGradient, "horizon": HorizonInBatches,
    "spread": WithoutSpread,
}  # fmt: skip


def parts(samples: int) -> list[Setting]:
    """The parts at batch 2 and 1 in both networks."""
    return grid(
        network=KINDS, part=tuple(PARTS), batch=SIZES, samples=samples, prior=4, horizon=640
    )


SWEEP = grid(
    network=KINDS[0], part="whole", batch=2, samples=3_000, prior=PRIORS, horizon=HORIZONS
)  # fmt: skip
SETTINGS: dict[Profile, list[Setting]] = {
    "quick": parts(2_000),
    "full": parts(3_000) + [s for s in SWEEP if (s["prior"], s["horizon"]) != (4, 640)],
}


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train and measure."""
    policy = POLICIES[setting["part"]](setting["prior"], setting["horizon"])
    network = build(setting["network"], policy, digits, seed)
    return trained(setting, network, digits, seed, tick)


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
        words: estimates.difference(errors(runs, part), whole)
        for part, words in PARTS.items()
        if part != "whole"
    }
    said = [f"{more.text(1)} points more {words}" for words, more in worse.items()]
    return judge(
        f"On average over batch 2 and batch 1 in two networks Steady makes "
        f"{estimates.mean(whole).value:.1f} % errors; {', '.join(said)}.",
        [expect(f"points more error {words}", more, above=0) for words, more in worse.items()],
    )


def figures(runs: Runs) -> Figures:
    """The parts, and the sweep."""
    default = runs.where(prior=4, horizon=640)
    places = [(network, size) for network in KINDS for size in SIZES]
    body = [
        [words, *(cell(default.where(part=part, network=n, batch=size)) for n, size in places)]
        for part, words in PARTS.items()
    ]
    head = ["Steady", *(f"{network}, batch {size}" for network, size in places)]
    tables = [Table("Error of inference, %, a part taken away", head, body, emphasis=[0])]
    sweep = runs.where(network=KINDS[0], part="whole", batch=2)
    if len(sweep.distinct("prior")) > 1:
        ordered = Runs(sorted(sweep, key=lambda run: (run["prior"], run["horizon"])))
        tables.append(
            table(
                "Error of inference, %, batch 2, fully connected: prior and horizon", ordered,
                rows="prior", columns="horizon", measure="error", corner="prior, horizon",
            )
        )  # fmt: skip
    return Figures(tables)


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
    settings=SETTINGS, run=run, verdict=verdict, figures=figures, recipe=recipe, weight=weight,
)  # fmt: skip
