"""Whether the noise of batch statistics regularizes, and less so in larger batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from steadynorm.evidence import estimates
from steadynorm.evidence.digits import Digits, tensors
from steadynorm.evidence.lab.experiment import Experiment
from steadynorm.evidence.lab.figures import chart, table
from steadynorm.evidence.lab.runs import Result, Runs, Setting, grid
from steadynorm.evidence.lab.verdict import Verdict, expect, judge
from steadynorm.evidence.networks import Statistics, build
from steadynorm.evidence.training import Recipe, Tick, train
from steadynorm.models.untouched import untouched
from steadynorm.report.page import Piece
from steadynorm.statistics import Ghost

FEW = 300  # digits to train on: few enough that the gap to the test digits is plain to see
SIZES = (8, 32, 128)
GHOST = 8
ARMS = {
    "none": "none",
    "dropout": "dropout 0.2",
    "batch": "BN",
    "population": "BN, population",
    "ghost": f"BN, ghosts of {GHOST}",
}
STATISTICS: dict[str, Statistics] = {
    "none": None, "dropout": None, "batch": "batch", "population": "batch", "ghost": Ghost(GHOST)
}  # fmt: skip


class WithPopulation(nn.Module):
    """A network that in training sees the whole population beside every batch, so that the
    statistics of its layers are those of the population, gradient included, and without noise.
    """

    def __init__(self, network: nn.Module, population: Tensor) -> None:
        super().__init__()
        self.network = network
        self.population = population

    def forward(self, input: Tensor) -> Tensor:
        """The outputs of `input` alone."""
        if not self.training:
            output: Tensor = self.network(input)
            return output
        both: Tensor = self.network(torch.cat([input, self.population]))
        return both[: len(input)]


def settings(samples: int) -> list[Setting]:
    """Every arm at every batch size; ghosts only where a batch holds several."""
    found = grid(arm=tuple(ARMS), batch=SIZES, samples=samples)
    return [s for s in found if s["arm"] != "ghost" or s["batch"] > GHOST]


def recipe(setting: Setting) -> Recipe:
    """One cycle over as many digits at every batch size, the rate as the square root of the batch:
    in proportion to it the noise of the gradient would change as well.
    """
    size = setting["batch"]
    return Recipe(size, setting["samples"], rate=0.1 * (64 / size) * (size / 64) ** 0.5, points=1)


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train on few digits; loss and error on them and on the test digits."""
    few = digits._replace(
        train_images=digits.train_images[:FEW], train_labels=digits.train_labels[:FEW]
    )
    arm = setting["arm"]
    network: nn.Module = build(
        "fully connected", STATISTICS[arm], digits, seed,
        activation=dropped_relu if arm == "dropout" else nn.ReLU,
    )  # fmt: skip
    images, labels, test_images, test_labels = tensors(few)
    if arm == "population":
        network = WithPopulation(network, images)
    torch.manual_seed(seed)  # dropout's
    train(network, few, recipe(setting), seed=seed, tick=tick)
    loss, error = measure(network, images, labels)
    test_loss, test_error = measure(network, test_images, test_labels)
    return {
        "train_loss": loss, "train_error": error, "test_loss": test_loss,
        "test_error": test_error, "gap": test_error - error, "loss_gap": test_loss - loss,
    }  # fmt: skip


def dropped_relu() -> nn.Module:
    """ReLU and dropout."""
    return nn.Sequential(nn.ReLU(), nn.Dropout(0.2))


@torch.no_grad()
def measure(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Loss, and error in per cent, of inference."""
    with untouched(network):
        network.eval()
        logits = network(images).double()
    loss = nn.functional.cross_entropy(logits, labels)
    return float(loss), 100 * float((logits.argmax(1) != labels).double().mean())


def verdict(runs: Runs) -> Verdict:
    """Noise against no noise at the smallest batch, and a small batch against a large one."""
    small, large = SIZES[0], SIZES[-1]

    def gap(arm: str, size: int) -> float:
        return runs.mean("gap", arm=arm, batch=size).value

    noise = runs.difference("gap", "arm", "population", "batch", batch=small)
    ghosts = runs.difference("gap", "arm", "batch", "ghost", batch=large)
    dropout = runs.difference("gap", "arm", "none", "dropout", batch=large)
    growth = {
        arm: [
            b - s
            for b, s in zip(
                *(runs.values("gap", arm=arm, batch=size) for size in (large, small)), strict=True
            )
        ]
        for arm in ("batch", "none")
    }
    with_it = estimates.difference(growth["batch"], growth["none"])
    return judge(
        f"Trained on {FEW} digits, the error on test digits is {gap('batch', small):.1f} points "
        f"above that on training digits with batches of {small}, and "
        f"{gap('population', small):.1f} with population statistics in their place, "
        f"{noise.text(1)} more. From there to batches of {large} it grows by {with_it.text(1)} "
        f"more than without it, to {gap('batch', large):.1f}; of those ghosts of {GHOST} "
        f"take {ghosts.text(1)} off, and dropout {dropout.text(1)} off the plain network's "
        f"{gap('none', large):.1f}.",
        [
            expect(f"gap of population statistics minus batch statistics, batch {small}", noise,
                   above=0),
            expect(f"growth of the gap from batch {small} to {large}, minus the plain network's",
                   with_it, above=0),
            expect(f"gap of batches minus gap of ghosts, batch {large}", ghosts, above=0),
        ],
    )  # fmt: skip


def shows(runs: Runs) -> Iterator[Piece]:
    """Gaps and errors by batch size."""
    for measure, title, times in (
        ("gap", "Error on test digits minus error on training digits, points", 1),
        ("test_error", "Error on the test digits, %", 1),
        ("loss_gap", "Loss on test digits minus loss on training digits, ×100", 100),
    ):
        yield table(
            title, runs, rows="arm", columns="batch", names=ARMS, corner="batch size",
            measure=measure, times=times,
        )  # fmt: skip
    yield chart(
        "Gap by batch size", runs, x="batch", y="gap", series="arm", names=ARMS, log_x=True,
        y_title="points between test and training error",
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="regularization-by-noise",
    title="Regularization by noise",
    claim="The noise of batch statistics regularizes, and the less so the larger the batch.",
    source="Ioffe & Szegedy 2015, section 3.4; Hoffer et al. 2017; classic notes",
    factors={
        "arm": "no normalization; the same with dropout 0.2; batch normalization; the same with "
        f"the statistics of all training digits in training; with ghosts of {GHOST}",
        "batch": "batch size; the same number of digits is seen, and the learning rate goes with "
        "its square root",
    },
    measure=f"Error on the test digits minus error on the {FEW} training digits, in points, both "
    "in inference.",
    rule="The gap is smaller with batch statistics than with population statistics at batch "
    f"{SIZES[0]}, grows more from there to batch {SIZES[-1]} than without batch normalization, and "
    f"is smaller with ghosts of {GHOST} than without at batch {SIZES[-1]}.",
    settings={"quick": settings(6_400), "full": settings(9_600)}, run=run, verdict=verdict,
    shows=shows, recipe=recipe, weights={"arm": {"population": 4}},
    seeds={"quick": 4, "full": 10},
)  # fmt: skip
