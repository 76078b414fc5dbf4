"""Error of inference from batch 64 down to 1, under every policy and outside references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from steadynorm.evidence.lab import estimates
from steadynorm.evidence.lab.data import Digits
from steadynorm.evidence.lab.estimates import Estimate
from steadynorm.evidence.lab.experiment import (
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
from steadynorm.evidence.lab.networks import (
    Normalization,
    convolutional,
    fully_connected,
    initialize,
    normalization_1d,
    normalization_2d,
    renorm_for,
)  # fmt: skip
from steadynorm.evidence.lab.runs import interval
from steadynorm.evidence.lab.training import Recipe, Tick, Watch, train
from steadynorm.report.charts import lines
from steadynorm.report.page import Table
from steadynorm.statistics import Batch, Frozen, Ghost, Policy, Running, Steady

NETWORKS = ("fully connected", "convolutional")
SIZES = (64, 16, 8, 4, 2, 1)
GHOST = 8
TAIL = 0.75  # of the run, after which "frozen tail" normalizes with what it has kept
NAMES = {
    "none": "none",
    "outside": "LayerNorm or GroupNorm",
    "batch": "Batch",
    "ghost": f"Ghost({GHOST})",
    "frozen tail": "Batch, frozen tail",
    "renorm": "Renorm",
    "running": "Running",
    "steady": "Steady",
}
IN_QUICK = ("outside", "batch", "running", "steady")


def settings(profile: Profile) -> Sequence[Setting]:
    """Every policy at every batch size; ghosts only where a batch holds several."""
    quick = profile == "quick"
    return [
        {"network": network, "policy": policy, "batch": size, "samples": 2_000 if quick else 3_000}
        for network in NETWORKS
        for policy in (IN_QUICK if quick else NAMES)
        for size in ((64, 8, 2, 1) if quick else SIZES)
        if policy != "ghost" or size > GHOST
    ]


def recipe(setting: Setting) -> Recipe:
    """One cycle, the rate in proportion to the batch, as in the tour."""
    return Recipe(setting["batch"], setting["samples"], points=1)


def steps(setting: Setting) -> int:
    """The length of a run; a convolution takes twice the time."""
    return recipe(setting).steps * (2 if setting["network"] == "convolutional" else 1)


def policy_of(name: str, steps: int) -> Policy:
    """The policy that a training starts with."""
    kinds: dict[str, Policy] = {
        "batch": Batch(), "ghost": Ghost(GHOST), "frozen tail": Batch(),
        "renorm": renorm_for(steps), "running": Running(), "steady": Steady(),
    }  # fmt: skip
    return kinds[name]


def build(network: str, normalize: Normalization | None, inputs: int, seed: int) -> nn.Module:
    """The tour's network, fully connected or convolutional."""
    made = (
        fully_connected(inputs, normalize)
        if network == "fully connected"
        else convolutional(normalize)
    )
    initialize(made, seed)
    return made


def normalization(network: str, policy: Policy | str) -> Normalization | None:
    """The layers of a policy, or of "none" and "outside"."""
    flat = network == "fully connected"
    if policy == "none":
        return None
    if policy == "outside":
        return nn.LayerNorm if flat else partial(nn.GroupNorm, 8)
    return (normalization_1d if flat else normalization_2d)(policy)


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train and measure."""
    plan = recipe(setting)
    name = setting["policy"]
    policy = name if name in ("none", "outside") else policy_of(name, plan.steps)
    layers = normalization(setting["network"], policy)
    network = build(setting["network"], layers, digits.train_images[0].size, seed)
    return trained(setting, network, digits, plan, seed, tick,
                   freeze if name == "frozen tail" else None)  # fmt: skip


def freeze(network: nn.Module) -> None:
    """Every batch normalization normalizes with what it has kept from now on."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.statistics = Frozen()  # type: ignore[assignment]


def trained(
    setting: Setting, network: nn.Module, digits: Digits, plan: Recipe, seed: int, tick: Tick,
    late: Callable[[nn.Module], None] | None = None,
) -> Result:  # fmt: skip
    """Train `network`, with `late` called on it after `TAIL` of the run."""
    each = 2 if setting["network"] == "convolutional" else 1

    def watch(step: int, watched: nn.Module) -> None:
        if late is not None and step == int(TAIL * plan.steps):
            late(watched)

    followed: Watch | None = watch if late is not None else None

    def tell(some: int) -> None:
        tick(some * each)

    done = train(network, digits, plan, seed=seed, tick=tell, watch=followed, layers=False)
    in_training = done.accuracy_in_training
    return {
        "error": None if done.stopped else done.error,
        "error_in_training": None if in_training is None else 100 * (1 - in_training),
        "stopped": done.stopped,
    }


def rise(runs: Runs, network: str, policy: str, small: int, large: int = 8) -> Estimate:
    """Points of error that the small batch has more than the large one."""
    first, second = (
        runs.values("error", network=network, policy=policy, batch=size) for size in (small, large)
    )
    return estimates.difference(first, second)


def against_batch(runs: Runs, network: str, size: int) -> Estimate:
    """Points of error that Steady has more than Batch."""
    first, second = (
        runs.values("error", network=network, policy=policy, batch=size)
        for policy in ("steady", "batch")
    )
    return estimates.difference(first, second)


def verdict(runs: Runs) -> Verdict:
    """Batch rises from 8 to 2 where a channel has few values; Steady is flat down to 1."""
    flat, conv = NETWORKS
    falls = rise(runs, flat, "batch", 2)
    findings = [expect(f"Batch at 2 minus at 8, {flat}", falls, above=5)]
    flatness = {}
    for network in NETWORKS:
        for small in (2, 1):
            flatness[network, small] = rise(runs, network, "steady", small)
            words = f"Steady at {small} minus at 8, {network}"
            findings.append(expect(words, flatness[network, small], below=2))
    for network in NETWORKS:
        same = against_batch(runs, network, 64)
        findings.append(expect(f"Steady minus Batch at 64, {network}", same, above=-1, below=1))
    return judge(
        f"From batch 8 to batch 2 the error of Batch rises by {falls.text(1)} points in the fully "
        f"connected network, that of Steady by {flatness[flat, 2].text(1)}, and down to batch 1, "
        f"where Batch cannot train, by {flatness[flat, 1].text(1)}. In the convolutional network, "
        f"where a channel has 64 times the values, that of Steady rises by "
        f"{flatness[conv, 2].text(1)} and {flatness[conv, 1].text(1)} points.",
        findings,
    )


def show(runs: Runs) -> Shown:
    """Errors by batch size."""
    tables, charts = [], []
    for network in NETWORKS:
        some = runs.where(network=network)
        sizes = some.distinct("batch")
        body = [
            [NAMES[policy], *(cell(some.where(policy=policy, batch=size)) for size in sizes)]
            for policy in some.distinct("policy")
        ]
        title = f"Error of inference, %: {network}"
        head = ["policy", *(f"batch {size}" for size in sizes)]
        bold = [index for index, row in enumerate(body) if row[0] == "Steady"]
        tables.append(Table(title, head, body, emphasis=bold))
        charts.append(
            lines(
                title,
                [
                    {"policy": NAMES[run["policy"]], "seed": run.seed, "batch": run["batch"],
                     "error": run["error"]}
                    for run in some
                    if run["error"] is not None
                ],
                x="batch", y="error", series="policy", replicate="seed", log_x=True,
                order=list(NAMES.values()), highlight="Steady", log_y=True, x_title="batch size",
                y_title="error on the test digits, %",
                description="Mean over the seeds; the band is their range.",
            )
        )  # fmt: skip
    return Shown(tables, charts, refusals(runs))


def cell(runs: Runs) -> str:
    """Mean and interval, or why there is none."""
    errors = [run["error"] for run in runs]
    if not errors:
        return "–"
    return "cannot train" if None in errors else str(interval(errors))


def refusals(runs: Sequence[Run]) -> list[str]:
    """What layers said that refused to train."""
    said = sorted({f"{NAMES[r['policy']]}: “{r['stopped']}”" for r in runs if r["stopped"]})
    return [f"Where a policy cannot train, it says so. {line}" for line in said[:1]]


EXPERIMENT = Experiment(
    name="small-batches",
    title="Small batches",
    claim="Batch statistics fall apart in small batches; Steady holds at every batch size.",
    source="Wu & He 2018: 23.7 % error at 16 images, 34.7 % at 2; the second half is ours",
    factors={
        "network": "three fully connected layers of 128, or three convolutions",
        "policy": ", ".join(NAMES.values()) + f"; the frozen tail begins after {TAIL:.0%}",
        "batch": "batch size, the learning rate in proportion; all see the same number of digits",
    },
    measure="Error of inference on the test digits, in per cent.",
    rule="In the fully connected network the error of Batch rises by more than 5 points from 8 to "
    "2; in both networks that of Steady rises by less than 2 points from 8 to 2 and from 8 to 1, "
    "and lies within 1 point of Batch at 64.",
    settings=settings,
    run=run,
    verdict=verdict,
    show=show,
    steps=steps,
)
