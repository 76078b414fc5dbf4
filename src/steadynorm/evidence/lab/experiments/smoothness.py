"""How far loss and gradient change along the step that training takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steadynorm.evidence.lab import estimates
from steadynorm.evidence.lab.batches import batches, tensors
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
from steadynorm.evidence.lab.experiments import convergence
from steadynorm.evidence.lab.layers import modes_kept
from steadynorm.evidence.lab.show import curves, scaled, table
from steadynorm.evidence.lab.training import Recipe, Tick, train
from steadynorm.report.charts import lines

BATCH = 32
# Of the plain network's good rates, so that both arms walk at a pace that both can bear.
RATES = {convergence.SIGMOID: 0.9, convergence.RELU: 0.09}
LENGTHS = (0.5, 1.0, 2.0, 4.0)  # of the step, in multiples of the learning rate


def settings(profile: Profile) -> Sequence[Setting]:
    """Both networks, with and without, at the same learning rate."""
    samples = 9_600 if profile == "quick" else 19_200
    return [
        {"network": network, "normalization": kind, "samples": samples}
        for network in RATES
        for kind in ("none", "batch")
    ]


def recipe(setting: Setting) -> Recipe:
    """SGD at a constant rate, without momentum and clipping."""
    return Recipe(
        BATCH, setting["samples"], rate=RATES[setting["network"]] * 64 / BATCH, momentum=0.0,
        clip=None, schedule="constant", points=1,
    )  # fmt: skip


def steps(setting: Setting) -> int:
    """The length of a run, for the order."""
    return recipe(setting).steps


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train; thirty times on the way look along the gradient of a batch."""
    network = convergence.build(setting, digits.train_images[0].size, seed)
    images, labels, _, _ = tensors(digits)
    order = batches(len(labels), BATCH, seed + 10_000)
    every = max(recipe(setting).steps // 30, 1)
    found: dict[str, list[float]] = {
        name: [] for name in ("step", "lowest", "highest", "turn", "smoothness")
    }

    def watch(step: int, _: nn.Module) -> None:
        if step % every == 0:
            batch = next(order)
            look = along(network, images[batch], labels[batch], RATES[setting["network"]])
            found["step"].append(step)
            for name, value in look.items():
                found[name].append(value)

    done = train(network, digits, recipe(setting), seed=seed, tick=tick, watch=watch, layers=False)

    def middle(values: list[float]) -> float:
        return float(torch.tensor(values).median())

    span = [high - low for low, high in zip(found["lowest"], found["highest"], strict=True)]
    return {
        "accuracy": done.accuracy, "range": middle(span), "mean_turn": middle(found["turn"]),
        "mean_smoothness": middle(found["smoothness"]), **found,
    }  # fmt: skip


def along(network: nn.Module, images: Tensor, labels: Tensor, rate: float) -> dict[str, float]:
    """From the present weights along the step that gradient descent would take on this batch, at
    several lengths: the lowest and the highest loss, the largest distance of the gradient from the
    one at the start ("turn"), and the largest of that distance over the length walked
    ("smoothness", from below the Lipschitz constant of the gradient). Weights and buffers are left
    as they were.
    """
    parameters = list(network.parameters())
    kept = {name: value.clone() for name, value in network.state_dict().items()}

    def at() -> tuple[float, Tensor]:
        loss = F.cross_entropy(network(images), labels)
        gradients = torch.autograd.grad(loss, parameters)
        return float(loss.detach()), torch.cat([part.flatten() for part in gradients])

    losses, turns, ratios = [], [], []
    try:
        with modes_kept(network):
            network.train()
            _, start = at()
            origin = nn.utils.parameters_to_vector(parameters).detach().clone()
            for length in LENGTHS:
                with torch.no_grad():
                    nn.utils.vector_to_parameters(origin - length * rate * start, parameters)
                loss, gradient = at()
                turn = float((gradient - start).norm())
                losses.append(loss)
                turns.append(turn)
                ratios.append(turn / max(length * rate * float(start.norm()), 1e-30))
    finally:
        network.load_state_dict(kept)
    return {
        "lowest": min(losses), "highest": max(losses), "turn": max(turns),
        "smoothness": max(ratios),
    }  # fmt: skip


MEASURES = {
    "range": "range of the loss along the step",
    "mean_turn": "change of the gradient along the step",
    "mean_smoothness": "change of the gradient over the length walked",
}


def ratio(runs: Runs, network: str, measure: str) -> Estimate:
    """The measure without batch normalization over that with it."""
    without, with_it = (
        [max(v, 1e-12) for v in runs.values(measure, network=network, normalization=kind)]
        for kind in ("none", "batch")
    )
    return estimates.ratio(without, with_it)


def verdict(runs: Runs) -> Verdict:
    """All three measures must be smaller with it, in both networks."""
    findings, said = [], []
    for network in RATES:
        ratios = {measure: ratio(runs, network, measure) for measure in MEASURES}
        findings += [
            expect(f"{words}, without / with, {network}", ratios[measure], above=1)
            for measure, words in MEASURES.items()
        ]
        loss, turn, smooth = ratios.values()
        said.append(
            f"{network}: without batch normalization the loss ranges {loss.text(2)} times as far "
            f"along the step, the gradient changes {turn.text(2)} times as much, and "
            f"{smooth.text(2)} times as much for the length walked"
        )
    sentence = ". ".join(said)
    return judge(f"{sentence[0].upper()}{sentence[1:]}.", findings)


def show(runs: Runs) -> Shown:
    """The measures, and their course over training."""
    names = {"none": "no normalization", "batch": "batch normalization"}

    def called(run: Run) -> str:
        return names[run["normalization"]]

    charts = []
    for network in RATES:
        some = runs.where(network=network)
        span = [
            {"series": called(run), "seed": run.seed, "step": step, "range": high - low}
            for run in some
            for step, low, high in zip(run["step"], run["lowest"], run["highest"], strict=True)
        ]
        for title, rows, y in (
            ("Range of the loss along the step", span, "range"),
            ("Change of the gradient along the step", curves(some, "step", "turn", called), "turn"),
        ):
            charts.append(
                lines(
                    f"{title}: {network}", [row for row in rows if row[y] > 0], x="step", y=y,
                    series="series", replicate="seed", log_y=True, x_title="steps", y_title=y,
                    description="Mean over the seeds; the band is their range.",
                )
            )  # fmt: skip
    return Shown(
        [
            table(
                f"{words[0].upper()}{words[1:]}, ×1000", runs, rows="network",
                columns="normalization", value=scaled(measure, 1000),
                names=names,
            )
            for measure, words in MEASURES.items()
        ],
        charts,
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="smoothness",
    title="Smoothness of the loss",
    claim="Batch normalization makes loss and gradient change less along the step.",
    source="Santurkar et al. 2018, figure 4",
    factors={
        "network": "three sigmoid layers of 100 with small weights; ten ReLU layers of 64",
        "normalization": "none, or batch normalization before every activation",
    },
    measure="Thirty times during training, along the gradient of a batch at half to four times the "
    "learning rate: the range of the loss, the gradient's largest change, and the same over the "
    "length walked; the median of the thirty.",
    rule="All three are smaller with batch normalization, in both networks.",
    settings=settings,
    run=run,
    verdict=verdict,
    show=show,
    steps=steps,
)
