"""Whether the noise of batch statistics regularizes, and less so in larger batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from steadynorm.evidence.lab import estimates
from steadynorm.evidence.lab.batches import tensors
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
from steadynorm.evidence.lab.layers import modes_kept
from steadynorm.evidence.lab.networks import (
    Normalization,
    fully_connected,
    initialize,
    normalization_1d,
)
from steadynorm.evidence.lab.show import scaled, table
from steadynorm.evidence.lab.training import Recipe, Tick, train
from steadynorm.report.charts import lines
from steadynorm.statistics import Ghost

FEW = 300  # digits to train on: few enough that the gap to the test digits is plain to see
SIZES = (8, 32, 128)
COMPANY = 300  # all training digits once: their statistics are the population's
GHOST = 8
ARMS = {
    "none": "none",
    "dropout": "dropout 0.2",
    "batch": "BN",
    "population": "BN, population",
    "ghost": f"BN, ghosts of {GHOST}",
}


class InCompany(nn.Module):
    """A network that in training always sees all training digits besides the batch, so that the
    statistics of its layers are those of the population, gradient included, and without noise.
    """

    def __init__(self, network: nn.Module, company: Tensor) -> None:
        super().__init__()
        self.network = network
        self.company = company

    def forward(self, input: Tensor) -> Tensor:
        """The outputs of `input` alone."""
        if not self.training:
            output: Tensor = self.network(input)
            return output
        both: Tensor = self.network(torch.cat([input, self.company]))
        return both[: len(input)]


def settings(profile: Profile) -> Sequence[Setting]:
    """Every arm at every batch size; ghosts only where a batch holds several."""
    samples = 6_400 if profile == "quick" else 9_600
    return [
        {"arm": arm, "batch": size, "samples": samples}
        for arm in ARMS
        for size in SIZES
        if arm != "ghost" or size > GHOST
    ]


def recipe(setting: Setting) -> Recipe:
    """One cycle over as many digits at every batch size, the rate the same for all: a rate in
    proportion to the batch would change the noise of the gradient as well.
    """
    size = setting["batch"]
    return Recipe(size, setting["samples"], rate=0.1 * (64 / size) * (size / 64) ** 0.5, points=1)


def steps(setting: Setting) -> int:
    """The length of a run, for the order; in company a step takes longer."""
    return recipe(setting).steps * (4 if setting["arm"] == "population" else 1)


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train on few digits, measure loss and error on them and on the test digits."""
    few = digits._replace(
        train_images=digits.train_images[:FEW], train_labels=digits.train_labels[:FEW]
    )
    arm = setting["arm"]
    kinds: dict[str, Normalization | None] = {
        "none": None, "dropout": None, "batch": normalization_1d("batch"),
        "population": normalization_1d("batch"), "ghost": normalization_1d(Ghost(GHOST)),
    }  # fmt: skip
    network: nn.Module = fully_connected(
        digits.train_images[0].size, kinds[arm],
        activation=(lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.2))) if arm == "dropout"
        else nn.ReLU,
    )  # fmt: skip
    initialize(network, seed)
    images, labels, test_images, test_labels = tensors(few)
    if arm == "population":
        network = InCompany(network, images[:COMPANY])
    torch.manual_seed(seed)  # dropout's
    each = 4 if arm == "population" else 1

    def tell(some: int) -> None:
        tick(some * each)

    train(network, few, recipe(setting), seed=seed, tick=tell, layers=False)
    loss, error = measure(network, images, labels)
    test_loss, test_error = measure(network, test_images, test_labels)
    return {
        "train_loss": loss, "train_error": error, "test_loss": test_loss,
        "test_error": test_error, "gap": test_error - error, "loss_gap": test_loss - loss,
    }  # fmt: skip


@torch.no_grad()
def measure(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Loss, and error in per cent, of inference."""
    with modes_kept(network):
        network.eval()
        logits = network(images).double()
    loss = nn.functional.cross_entropy(logits, labels)
    return float(loss), 100 * float((logits.argmax(1) != labels).double().mean())


def verdict(runs: Runs) -> Verdict:
    """Noise against no noise at the smallest batch, and a small batch against a large one."""
    small, large = SIZES[0], SIZES[-1]
    gap = {
        (arm, size): runs.values("gap", arm=arm, batch=size)
        for arm in ARMS
        for size in SIZES
        if arm != "ghost" or size > GHOST
    }
    noise = estimates.difference(gap["population", small], gap["batch", small])
    more = {
        arm: [b - s for b, s in zip(gap[arm, large], gap[arm, small], strict=True)]
        for arm in ("batch", "none")
    }
    with_it = estimates.difference(more["batch"], more["none"])
    ghosts = estimates.difference(gap["batch", large], gap["ghost", large])
    dropout = estimates.difference(gap["none", large], gap["dropout", large])
    means = {key: estimates.mean(values).value for key, values in gap.items()}
    return judge(
        f"Trained on {FEW} digits, the error on test digits is {means['batch', small]:.1f} points "
        f"above that on training digits with batches of {small}, and "
        f"{means['population', small]:.1f} with population statistics in their place, "
        f"{noise.text(1)} more. From there to batches of {large} it grows by {with_it.text(1)} "
        f"more than without it, to {means['batch', large]:.1f}; of those ghosts of {GHOST} "
        f"take {ghosts.text(1)} off, and dropout {dropout.text(1)} off the plain network's "
        f"{means['none', large]:.1f}.",
        [
            expect(f"gap of population statistics minus batch statistics, batch {small}", noise,
                   above=0),
            expect(f"growth of the gap from batch {small} to {large}, minus the plain network's",
                   with_it, above=0),
            expect(f"gap of batches minus gap of ghosts, batch {large}", ghosts, above=0),
        ],
    )  # fmt: skip


def show(runs: Runs) -> Shown:
    """Gaps and errors by batch size."""
    measures = {
        "gap": "Error on test digits minus error on training digits, points",
        "test_error": "Error on the test digits, %",
        "loss_gap": "Loss on test digits minus loss on training digits, ×100",
    }
    return Shown(
        [
            table(
                title, runs, rows="arm", columns="batch", names=ARMS, corner="batch size",
                value=scaled(name, 100 if name == "loss_gap" else 1),
            )
            for name, title in measures.items()
        ],
        [
            lines(
                "Gap by batch size",
                [
                    {"arm": ARMS[run["arm"]], "seed": run.seed, "batch": run["batch"],
                     "gap": run["gap"]}
                    for run in runs
                ],
                x="batch", y="gap", series="arm", replicate="seed", log_x=True,
                x_title="batch size", y_title="points between test and training error",
                description="Mean over the seeds; the band is their range.",
            )
        ],
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
    settings=settings,
    run=run,
    verdict=verdict,
    show=show,
    steps=steps,
    seeds={"quick": 4, "full": 10},
)
