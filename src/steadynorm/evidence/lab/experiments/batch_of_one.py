"""Gradients of 64 samples, normalized together or in micro-batches down to one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from statistics import fmean
from typing import Any, get_args

from torch import nn

from steadynorm.evidence import estimates
from steadynorm.evidence.digits import Digits
from steadynorm.evidence.lab.experiment import Experiment
from steadynorm.evidence.lab.figures import chart, plus_minus
from steadynorm.evidence.lab.micro_batches import MicroBatchNorm
from steadynorm.evidence.lab.runs import FinishedRun, Profile, Result, Runs, Setting
from steadynorm.evidence.lab.side_by_side import train
from steadynorm.evidence.lab.verdict import Verdict, expect, judge
from steadynorm.evidence.networks import Kind, Normalization, build, renorm_for
from steadynorm.evidence.training import Recipe, Tick
from steadynorm.report.page import Piece, Table
from steadynorm.statistics import Batch, Policy, Steady

SAMPLES = 64  # in one step
FLAT, CONV, DEEP, RESIDUAL = get_args(Kind)
OPTIONS: dict[str, Any] = {CONV: {"channels": (16, 32, 32, 64), "strides": (1, 2, 1, 2)}}
ALLOWED = {CONV: 0.7, FLAT: 0.7, DEEP: 2.5, RESIDUAL: 1.5}
"""Points of error that a batch of one may have more than `Batch` at 64."""
WEIGHTS = {FLAT: 1, CONV: 3, DEEP: 3, RESIDUAL: 7}  # of a step, in its time
ONE_WAY = Steady(prior=4, horizon=640, window=None)
TWO_WAY = Steady(prior=16, horizon=640, window=16)
OUTSIDE: dict[str, Normalization | None] = {
    "none": None, "group": partial(nn.GroupNorm, 4), "layer": partial(nn.GroupNorm, 1),
}  # fmt: skip
NAMES = {
    "none": "no normalization",
    "group": "GroupNorm",
    "layer": "LayerNorm",
    "batch": "Batch",
    "renorm": "Renorm",
    "one-way": "Steady, one-way",
    "two-way": "Steady",
}


NOTE = (
    "Mean over the networks ± half its 95 % interval, in brackets the mean after calibration. What "
    f"never looks across samples is the same at every size and stands at {SAMPLES}."
)


def settings(samples: int, networks: int, sizes: Mapping[str, tuple[int, ...]]) -> list[Setting]:
    """Every kind at its sizes; the residual network, which takes longest, at fewer of them."""
    return [
        {"network": network, "kind": kind, "batch": size}
        | {"samples": samples, "networks": networks}
        for network in ALLOWED
        for kind, some in sizes.items()
        for size in some
        if network != RESIDUAL or (kind != "renorm" and size in (1, 2, SAMPLES))
    ]


SETTINGS: dict[Profile, list[Setting]] = {
    "quick": settings(
        2_000, 3, {"batch": (SAMPLES,), "one-way": (1, SAMPLES), "two-way": (1, SAMPLES)}
    ),
    "full": settings(
        4_800, 6,
        {"none": (SAMPLES,), "group": (SAMPLES,), "layer": (SAMPLES,), "batch": (2, 4, 8, SAMPLES),
         "renorm": (2, 8), "one-way": (1, 2, SAMPLES), "two-way": (1, 2, 4, 8, SAMPLES)},
    ),
}  # fmt: skip


def recipe(setting: Setting) -> Recipe:
    """A step for `SAMPLES` samples, whatever is normalized together."""
    return Recipe(SAMPLES, setting["samples"], points=1)


def trained(
    setting: Setting,
    seed: int,
    digits: Digits,
    tick: Tick,
    normalization: Normalization | None,
    recipe: Recipe,
) -> Result:
    """Errors of as many networks as the setting says, each of its own seed."""
    seeds = range(seed * setting["networks"], (seed + 1) * setting["networks"])
    network = setting["network"]
    options = OPTIONS.get(network, {})
    networks = [build(network, normalization, digits, one, **options) for one in seeds]
    return train(networks, digits, recipe, seeds, tick=tick)


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train and measure."""
    kind, size, steps = setting["kind"], setting["batch"], recipe(setting)
    if kind in OUTSIDE:
        return trained(setting, seed, digits, tick, OUTSIDE[kind], steps)
    policies: dict[str, Policy] = {
        "batch": Batch(), "one-way": ONE_WAY, "two-way": TWO_WAY,
        "renorm": renorm_for(steps.steps * SAMPLES // size),
    }  # fmt: skip
    return trained(setting, seed, digits, tick, micro_batched(policies[kind], size), steps)


def micro_batched(
    policy: Policy, size: int, layer: type[MicroBatchNorm] = MicroBatchNorm
) -> Normalization:
    """A maker of layers that normalize `size` samples together."""
    return partial(layer, policy=policy, size=size)


def by_network(runs: Runs) -> Runs:
    """A run for each network, of its own seed."""
    found = []
    for run in runs:
        count = run.setting["networks"]
        for index in range(count):
            result = {name: values[index] for name, values in run.result.items()}
            found.append(FinishedRun(run.setting, run.seed * count + index, result))
    return Runs(found)


def is_lost(error: float, batch: float) -> bool:
    """Whether an error is more than twice that of `Batch` at 64 and three points."""
    return error > 2 * batch + 3


def verdict(runs: Runs) -> Verdict:
    """A batch of one against `Batch` at 64, by network; no seed lost at any size."""
    runs = by_network(runs)
    findings, said = [], []
    count = lost = 0
    for network in runs.distinct("network"):
        some = runs.where(network=network)
        goal = some.values("error", kind="batch", batch=SAMPLES)
        one = some.values("error", kind="two-way", batch=1)
        more = estimates.difference(one, goal)
        words = f"points of error more than Batch at {SAMPLES}, {network}"
        findings.append(expect(words, more, below=ALLOWED[network]))
        said.append(f"{fmean(one):.1f} % ({network}; {fmean(goal):.1f})")
        two_way = some.where(kind="two-way")
        count += len(two_way)
        lost += sum(is_lost(run["error"], fmean(goal)) for run in two_way)
    return judge(
        f"Normalized one at a time with Steady, errors are {', '.join(said)}; in brackets those of "
        f"Batch at {SAMPLES}. Of {count} networks trained with Steady at all batch sizes {lost} "
        f"{'was' if lost == 1 else 'were'} lost.",
        findings,
    )


def cell(runs: Runs) -> str:
    """Mean ± half the 95 % interval with running statistics, in brackets the mean calibrated."""
    if not runs:
        return "–"
    calibrated = fmean(run["error_calibrated"] for run in runs)
    return f"{plus_minus(run['error'] for run in runs)} ({calibrated:.1f})"


def shows(runs: Runs) -> Iterator[Piece]:
    """Errors by batch size, for each network."""
    runs = by_network(runs)
    for network in runs.distinct("network"):
        some = runs.where(network=network)
        sizes = sorted(some.distinct("batch"))
        body = [
            [NAMES[kind], *(cell(some.where(kind=kind, batch=size)) for size in sizes)]
            for kind in some.distinct("kind")
        ]
        title = f"Error of inference, %: {network}"
        head = ["normalized together", *map(str, sizes)]
        bold = [index for index, row in enumerate(body) if row[0] == NAMES["two-way"]]
        yield Table(title, head, body, note=NOTE, emphasis=bold)
        rows = [
            FinishedRun({**run.setting, "batch": size}, run.seed, run.result)
            for run in some
            for size in (sizes if run["kind"] in OUTSIDE else [run["batch"]])
        ]
        yield chart(
            title, rows, x="batch", y="error", series="kind", names=NAMES, log_x=True, log_y=True,
            order=list(NAMES.values()), highlight=NAMES["two-way"],
            x_title="samples normalized together", y_title="error on the test digits, %",
        )  # fmt: skip


EXPERIMENT = Experiment(
    name="batch-of-one",
    title="A batch of one",
    claim="Normalized one at a time, 64 samples train a network as well as normalized together.",
    source="ours; kin of Yan et al. 2020 and Chiley et al. 2019",
    factors={
        "network": "; ".join(ALLOWED),
        "kind": ", ".join(NAMES.values()),
        "batch": f"samples normalized together; every step adds up the gradients of {SAMPLES}",
    },
    measure="Error of inference on the test digits, in per cent, with running statistics and after "
    "calibration; SGD with momentum, one cycle, rate 0.1.",
    rule="In every network a batch of one has at most "
    + ", ".join(f"{points} points ({network})" for network, points in ALLOWED.items())
    + " more than Batch at 64, with running statistics.",
    settings=SETTINGS, run=run, verdict=verdict, shows=shows, recipe=recipe,
    weights={"network": WEIGHTS}, seeds={"quick": 1, "full": 1}, revision=2,
)  # fmt: skip
