"""How far loss and gradient change along the step that training takes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steadynorm.evidence import estimates
from steadynorm.evidence.digits import Digits, batches, tensors
from steadynorm.evidence.estimates import Estimate
from steadynorm.evidence.lab.experiment import Experiment
from steadynorm.evidence.lab.figures import chart, sentences, table
from steadynorm.evidence.lab.runs import Result, Runs, Setting, grid
from steadynorm.evidence.lab.two_networks import BATCH, GOOD_RATES, NETWORKS, build, recipe
from steadynorm.evidence.lab.verdict import Verdict, expect, judge
from steadynorm.evidence.training import Tick, train
from steadynorm.models.untouched import untouched
from steadynorm.report.page import Piece

LENGTHS = (0.5, 1.0, 2.0, 4.0)  # of the step, in multiples of the learning rate
NAMES = {"none": "no normalization", "batch": "batch normalization"}
MEASURES = {
    "range": "range of the loss along the step",
    "mean_turn": "change of the gradient along the step",
    "mean_smoothness": "change of the gradient over the length walked",
}


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train at a rate that both arms tolerate; thirty times on the way, measure along the gradient
    of a batch.
    """
    rate = GOOD_RATES[setting["network"]]
    network = build(setting["network"], setting["normalization"], digits, seed)
    images, labels, _, _ = tensors(digits)
    order = batches(len(labels), BATCH, seed + 10_000)
    every = max(recipe(setting).steps // 30, 1)
    found: dict[str, list[float]] = {
        name: [] for name in ("step", "lowest", "highest", "turn", "smoothness")
    }

    def look(step: int, _: nn.Module) -> None:
        if step % every == 0:
            batch = next(order)
            measured = along(network, images[batch], labels[batch], rate)
            for name, value in ({"step": step} | measured).items():
                found[name].append(value)

    done = train(network, digits, recipe(setting), seed=seed, tick=tick, after_step=look)
    span = [high - low for low, high in zip(found["lowest"], found["highest"], strict=True)]
    return {
        "accuracy": done.accuracy, "range": middle(span),
        "mean_turn": middle(found["turn"]), "mean_smoothness": middle(found["smoothness"]),
        **found,
    }  # fmt: skip


def middle(values: list[float]) -> float:
    """The lower median."""
    return float(torch.tensor(values).median())


def along(network: nn.Module, images: Tensor, labels: Tensor, rate: float) -> dict[str, float]:
    """What changes from the present weights along the step that gradient descent would take on this
    batch, at several lengths: the lowest and the highest loss, the largest distance of the gradient
    from the one at the start ("turn"), and the largest ratio of that distance to the length walked
    ("smoothness", a lower bound of the gradient's Lipschitz constant). Weights and buffers are
    restored.
    """
    parameters = list(network.parameters())
    before = {name: value.clone() for name, value in network.state_dict().items()}

    def at() -> tuple[float, Tensor]:
        loss = F.cross_entropy(network(images), labels)
        gradients = torch.autograd.grad(loss, parameters)
        return float(loss.detach()), torch.cat([part.flatten() for part in gradients])

    losses, turns, ratios = [], [], []
    try:
        with untouched(network):
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
        network.load_state_dict(before)
    return {
        "lowest": min(losses), "highest": max(losses), "turn": max(turns),
        "smoothness": max(ratios),
    }  # fmt: skip


def ratio(runs: Runs, network: str, measure: str) -> Estimate:
    """The measure without batch normalization over that with it."""
    without, with_it = (
        [max(v, 1e-12) for v in runs.values(measure, network=network, normalization=kind)]
        for kind in NAMES
    )
    return estimates.ratio(without, with_it)


def verdict(runs: Runs) -> Verdict:
    """All three measures must be smaller with it, in both networks."""
    findings, said = [], []
    for network in NETWORKS:
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
    return judge(sentences(said), findings)


def shows(runs: Runs) -> Iterator[Piece]:
    """The measures, and their course over training."""
    for measure, words in MEASURES.items():
        yield table(
            f"{words[0].upper()}{words[1:]}, ×1000", runs, rows="network",
            columns="normalization", measure=measure, times=1000, names=NAMES,
        )  # fmt: skip
    spans = runs.derived(
        range=lambda run: [h - lo for lo, h in zip(run["lowest"], run["highest"], strict=True)]
    )
    for network in NETWORKS:
        for title, y in (
            ("Range of the loss along the step", "range"),
            ("Change of the gradient along the step", "turn"),
        ):
            yield chart(
                f"{title}: {network}", spans.where(network=network), x="step", y=y,
                series=lambda run: NAMES[run["normalization"]], log_y=True,
            )  # fmt: skip


def settings(samples: int) -> list[Setting]:
    """Both networks, with and without, at the same learning rate."""
    return grid(network=NETWORKS, normalization=tuple(NAMES), samples=samples)


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
    settings={"quick": settings(9_600), "full": settings(19_200)}, run=run, verdict=verdict,
    shows=shows, recipe=recipe,
)  # fmt: skip
