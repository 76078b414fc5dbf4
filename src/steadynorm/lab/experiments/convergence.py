"""Steps to a target accuracy, without batch normalization and with it at higher learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from steadynorm.lab import estimates
from steadynorm.lab.data import Digits
from steadynorm.lab.experiment import (
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
from steadynorm.lab.networks import fully_connected, initialize, normalization_1d
from steadynorm.lab.show import curves, first_reaching, table
from steadynorm.lab.training import Recipe, Tick, train
from steadynorm.report.charts import lines

BATCH = 32
BASE = 0.03  # the learning rate called 1×: about the plain network's best, as the runs show
TARGET = 0.95
ARMS: tuple[tuple[str, float], ...] = (
    ("none", 0.3), ("none", 1), ("none", 3), ("none", 5), ("none", 30),
    ("batch", 1), ("batch", 5), ("batch", 30),
)  # fmt: skip


def settings(profile: Profile) -> Sequence[Setting]:
    """Every arm for as many steps."""
    samples = 24_000 if profile == "quick" else 40_000
    return [
        {"normalization": normalization, "rate": times, "samples": samples}
        for normalization, times in ARMS
    ]


def recipe(setting: Setting) -> Recipe:
    """SGD at a constant rate, without momentum and clipping: nothing but the rate is varied."""
    steps = setting["samples"] // BATCH
    return Recipe(
        BATCH, setting["samples"], rate=BASE * setting["rate"] * 64 / BATCH, momentum=0.0,
        clip=None, schedule="constant", points=steps // 10,
    )  # fmt: skip


def steps(setting: Setting) -> int:
    """The length of a run, for the order."""
    return recipe(setting).steps


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train, and note the accuracy of inference on the test digits every ten steps."""
    policy = None if setting["normalization"] == "none" else setting["normalization"]
    network = fully_connected(
        digits.train_images[0].size, normalization_1d(policy), widths=(64,) * 10
    )
    initialize(network, seed)
    done = train(network, digits, recipe(setting), seed=seed, tick=tick, layers=False)
    at = [point.step for point in done.points]
    accuracy = [point.accuracy for point in done.points]
    reached = first_reaching(at, accuracy, TARGET)
    return {
        "reached": reached,
        "budget": recipe(setting).steps,
        "best": max(accuracy, default=done.accuracy),
        "final": done.accuracy,
        "stopped": done.stopped,
        "step": at[::2],
        "accuracy": accuracy[::2],
    }


def needed(run: Run) -> float:
    """Steps to the target; where it was not reached, the whole run's, which is too few."""
    return float(run["reached"] or run["budget"])


def verdict(runs: Runs) -> Verdict:
    """Against the plain network at the best of its rates, on average over the seeds."""
    of = {arm: [needed(r) for r in runs.where(normalization=arm[0], rate=arm[1])] for arm in ARMS}
    best = min((arm for arm in ARMS if arm[0] == "none"), key=lambda arm: fmean(of[arm]))
    fewer = estimates.ratio(of[best], of["batch", 5])
    higher = estimates.ratio(of["batch", 1], of["batch", 5])
    plain = estimates.mean(runs.values("final", normalization="none", rate=30))
    normalized = estimates.mean(runs.values("final", normalization="batch", rate=30))
    return judge(
        f"With batch normalization at 5× the learning rate, 95 % accuracy takes "
        f"{fewer.text(1)} times fewer steps than without it at the best of its rates ({best[1]:g}×"
        f"). At 30× the network with it ends at {100 * normalized.value:.0f} % and the one "
        f"without at {100 * plain.value:.0f} %.",
        [
            expect("steps without (best rate) / steps with it at 5×", fewer, above=2),
            expect("steps with it at 1× / at 5×", higher, above=1),
            expect("accuracy without it at 30×", plain, below=0.5),
            expect("accuracy with it at 30×", normalized, above=0.9),
        ],
    )


def show(runs: Runs) -> Shown:
    """Steps and accuracy of every arm, and the curves."""
    names = {"none": "no normalization", "batch": "batch normalization"}

    def called(run: Run) -> str:
        return f"{'BN' if run['normalization'] == 'batch' else 'none'}, {run['rate']:g}×"

    reached = all(run["reached"] for run in runs)
    return Shown(
        [
            table(
                "Steps to 95 % accuracy", runs, rows="normalization", columns="rate",
                value=lambda run: run["reached"], names=names, corner="learning rate ×",
                note="" if reached else "A dash where at least one seed never got there.",
            ),
            table(
                "Accuracy at the end, %", runs, rows="normalization", columns="rate",
                value=lambda run: 100 * run["final"], names=names, corner="learning rate ×",
            ),
        ],
        [
            lines(
                "Accuracy of inference", curves(runs, "step", "accuracy", called), x="step",
                y="accuracy", series="series", replicate="seed", percent=True,
                x_title="steps", y_title="accuracy on the test digits",
                description="Mean over the seeds; the band is their range.",
            )
        ],
        [f"1× is a learning rate of {BASE:g} at batch {BATCH}."],
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="convergence",
    title="Steps to a target accuracy",
    claim="With batch normalization and a higher learning rate, training needs several times "
    "fewer steps.",
    source="Ioffe & Szegedy 2015, section 4.2.2: 14 times fewer at 5×",
    factors={
        "normalization": "none, or batch normalization before every ReLU",
        "rate": "learning rate, in multiples of the plain network's",
    },
    measure="Steps until the accuracy of inference on the test digits is 95 %, looked at every ten "
    "steps; ten hidden layers of 64 units, ReLU, He's initial weights, SGD at a constant rate.",
    rule="At 5× it takes less than half the steps of the plain network at the best of its five "
    "rates, and fewer than at 1×; at 30× it ends above 90 % and the plain network below 50 %.",
    settings=settings,
    run=run,
    verdict=verdict,
    show=show,
    steps=steps,
)
