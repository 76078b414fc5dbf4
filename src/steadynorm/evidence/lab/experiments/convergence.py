"""Steps to a target accuracy, without batch normalization and with it at higher learning rates."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from steadynorm.evidence import estimates
from steadynorm.evidence.digits import Digits
from steadynorm.evidence.estimates import Estimate
from steadynorm.evidence.lab.experiment import Experiment
from steadynorm.evidence.lab.figures import chart, first_reaching, table
from steadynorm.evidence.lab.runs import FinishedRun, Result, Runs, Setting
from steadynorm.evidence.lab.two_networks import BATCH, NETWORKS, RELU, SIGMOID, build, needed
from steadynorm.evidence.lab.verdict import Verdict, expect, judge
from steadynorm.evidence.training import Recipe, Tick, train
from steadynorm.report.page import Piece

# The learning rates called 1×: about the plain networks' best, as the runs show.
BASE = {SIGMOID: 0.3, RELU: 0.03}
TARGET = 0.95
ARMS: tuple[tuple[str, float], ...] = (
    ("none", 0.3), ("none", 1), ("none", 3), ("none", 5), ("none", 30),
    ("batch", 1), ("batch", 5), ("batch", 30),
)  # fmt: skip


def settings(samples: int) -> list[Setting]:
    """Every arm for as many steps."""
    return [
        {"network": network, "normalization": normalization, "rate": times, "samples": samples}
        for network in NETWORKS
        for normalization, times in ARMS
    ]


def recipe(setting: Setting) -> Recipe:
    """Plain SGD, so that nothing but the rate is varied; accuracy is measured every ten steps."""
    steps = setting["samples"] // BATCH
    rate = BASE[setting["network"]] * setting["rate"]
    return Recipe.constant(BATCH, setting["samples"], rate, points=steps // 10)


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train, and record the accuracy of inference on the test digits every ten steps."""
    network = build(setting["network"], setting["normalization"], digits, seed)
    done = train(network, digits, recipe(setting), seed=seed, tick=tick)
    at = [point.step for point in done.points]
    accuracy = [point.accuracy for point in done.points]
    return {
        "reached": first_reaching(at, accuracy, TARGET),
        "budget": recipe(setting).steps,
        "best": max(accuracy, default=done.accuracy),
        "final": done.accuracy,
        "stopped": done.stopped,
        "step": at[::2],
        "accuracy": accuracy[::2],
    }


def fewer(runs: Runs, network: str) -> tuple[Estimate, float]:
    """How many times fewer steps batch normalization at 5× needs than the plain network at the
    rate that is best for it on average, and that rate.
    """
    of = {arm: needed(runs, network=network, normalization=arm[0], rate=arm[1]) for arm in ARMS}
    best = min((arm for arm in ARMS if arm[0] == "none"), key=lambda arm: fmean(of[arm]))
    return estimates.ratio(of[best], of["batch", 5]), best[1]


def verdict(runs: Runs) -> Verdict:
    """Fewer steps in both networks, and a rate that only the normalized ones tolerate."""
    ratios = {network: fewer(runs, network) for network in NETWORKS}
    findings = [
        expect(f"times fewer steps, {network}", ratio, above=2)
        for network, (ratio, _) in ratios.items()
    ]
    for network in NETWORKS:
        plain, normalized = (
            runs.mean("final", network=network, normalization=kind, rate=30)
            for kind in ("none", "batch")
        )
        findings += [
            expect(f"accuracy at 30× without, {network}", plain, below=0.5),
            expect(f"accuracy at 30× with, {network}", normalized, above=0.9),
        ]
    (small, at_small), (he, at_he) = ratios[SIGMOID], ratios[RELU]
    return judge(
        f"With batch normalization at 5× the learning rate, 95 % accuracy takes {small.text(1)} "
        f"times fewer steps in the paper's sigmoid network and {he.text(1)} times fewer in ten "
        f"layers of ReLU with He's weights; the plain networks had the best of five rates "
        f"({at_small:g}× and {at_he:g}×).",
        findings,
    )


def shows(runs: Runs) -> Iterator[Piece]:
    """Steps and accuracy of every arm, and the curves."""
    names = {"none": "no normalization", "batch": "batch normalization"}

    def called(run: FinishedRun) -> str:
        return f"{'BN' if run['normalization'] == 'batch' else 'none'}, {run['rate']:g}×"

    for network in NETWORKS:
        some = runs.where(network=network)
        for title, measure, times, note in (
            ("Steps to 95 % accuracy", "reached", 1, "A dash where a seed never got there."),
            ("Accuracy at the end, %", "final", 100, ""),
        ):
            yield table(
                f"{title}: {network}", some, rows="normalization", columns="rate", measure=measure,
                times=times, names=names, corner="learning rate ×", note=note,
            )  # fmt: skip
        yield chart(f"Accuracy: {network}", some, x="step", y="accuracy", series=called)
    rates = " and ".join(f"{rate:g} ({network})" for network, rate in BASE.items())
    yield f"1× is a learning rate of {rates} at batch {BATCH}."


EXPERIMENT = Experiment(
    name="convergence",
    title="Steps to a target accuracy",
    claim="With batch normalization and a higher learning rate, training needs several times "
    "fewer steps.",
    source="Ioffe & Szegedy 2015, section 4.2.2: 14 times fewer at 5×",
    factors={
        "network": "the paper's first one, three hidden layers of 100 sigmoid units with small "
        "normal weights; ten hidden layers of 64 ReLU units with He's weights",
        "normalization": "none, or batch normalization before every activation",
        "rate": "learning rate, in multiples of the plain network's",
    },
    measure="Steps until the accuracy of inference on the test digits is 95 %, looked at every ten "
    "steps and still so at the next look; SGD at a constant rate.",
    rule="In both networks it takes less than half the steps at 5× than the plain network at the "
    "best of its five rates, and at 30× ends above 90 % where the plain network ends below 50 %.",
    settings={"quick": settings(24_000), "full": settings(40_000)}, run=run, verdict=verdict,
    shows=shows, recipe=recipe, weights={"normalization": {"batch": 3}},
)  # fmt: skip
