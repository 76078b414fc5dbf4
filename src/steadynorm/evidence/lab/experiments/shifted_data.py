"""Noise, contrast and blur at test time, with the statistics adapted to them and without."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from steadynorm.evidence import estimates
from steadynorm.evidence.digits import Digits, tensors
from steadynorm.evidence.lab.experiment import Experiment, one_cycle
from steadynorm.evidence.lab.figures import table
from steadynorm.evidence.lab.runs import FinishedRun, Result, Runs, Setting, grid
from steadynorm.evidence.lab.verdict import Verdict, expect, judge
from steadynorm.evidence.networks import build
from steadynorm.evidence.training import Tick, inference_accuracy, train
from steadynorm.models.calibrate import adapt
from steadynorm.report.page import Piece

SHIFTS = ("none", "noise", "contrast", "brightness", "blur")
STATISTICS = {"none": "running averages", "16": "adapted to 16 digits", "all": "adapted to all"}
PRIOR = 16


def shifted(images: Tensor, kind: str, seed: int) -> Tensor:
    """The test digits changed, in units of the training digits' standard deviation."""
    if kind == "noise":
        random = torch.Generator().manual_seed(seed)
        return images + 0.8 * torch.randn(images.shape, generator=random)
    if kind == "contrast":
        return images.mean() + 0.25 * (images - images.mean())
    if kind == "brightness":
        return images + 1.5
    if kind == "blur":
        return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return images


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train one network on the digits as they are; its errors under every shift, as it is and
    adapted. With 16, every 16 test digits are adapted to by themselves, from the trained
    statistics.
    """
    _, _, test, labels = tensors(digits)
    network = build("convolutional", "batch", digits, seed)
    train(network, digits, one_cycle(setting), seed=seed, tick=tick)
    result: dict[str, float] = {}
    for kind in SHIFTS:
        images = shifted(test, kind, seed)
        result[f"{kind}, none"] = 100 * (1 - inference_accuracy(network, images, labels))
        for statistics, size in (("16", 16), ("all", len(images))):
            right = 0.0
            for part, own in zip(images.split(size), labels.split(size), strict=True):
                model = copy.deepcopy(network)
                adapt(model, [part], prior=PRIOR, progress=False)
                right += len(own) * inference_accuracy(model, part, own)
            result[f"{kind}, {statistics}"] = 100 * (1 - right / len(labels))
    return result


def verdict(runs: Runs) -> Verdict:
    """How many points adapting takes off, for each shift; and what it costs where there is none."""
    gains = {
        kind: estimates.difference(runs.values(f"{kind}, none"), runs.values(f"{kind}, all"))
        for kind in SHIFTS
    }
    words = ", ".join(f"{gains[kind].text(1)} with {kind}" for kind in SHIFTS[1:])
    return judge(
        f"Statistics mixed with those of the shifted digits take off points of error: {words}; "
        f"where nothing shifted, {gains['none'].text(1)}.",
        [
            *(expect(f"points of error that adapting takes off, {kind}", gains[kind], above=0)
              for kind in SHIFTS[1:]),
            expect("the same where nothing has shifted", gains["none"], above=-1),
        ],
    )  # fmt: skip


def shows(runs: Runs) -> Iterator[Piece]:
    """Errors by shift and by what was adapted to."""
    by_kind = Runs(
        FinishedRun({"shift": kind, "statistics": called}, one.seed,
                    {"error": one[f"{kind}, {name}"]})
        for one in runs for kind in SHIFTS for name, called in STATISTICS.items()
    )  # fmt: skip
    yield table(
        "Error on the test digits, %", by_kind, rows="statistics", columns="shift",
        corner="statistics / shift", measure="error",
        note=f"adapt(prior={PRIOR}): the trained statistics count as {PRIOR} digits.",
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="shifted-data",
    title="Shifted data",
    claim="Where data at test time differ from training, statistics adapted to them, without "
    "labels, take errors off.",
    source="Schneider et al. 2020; Wu & Johnson 2021, section 5",
    factors={
        "shift": "gaussian noise (0.8 standard deviations of the pixels), contrast (a quarter), "
        "brightness (1.5 standard deviations), blur (means of 3×3)",
        "statistics": "of training; mixed with those of 16 test digits, or of all",
    },
    measure="Error on the changed test digits, in per cent; three convolutions trained at batch 64 "
    "on the digits as they are.",
    rule="Adapting to all test digits takes errors off for every shift, and adds less than a point "
    "where nothing shifted.",
    settings={"quick": grid(samples=8_000, batch=64), "full": grid(samples=16_000, batch=64)},
    run=run, verdict=verdict, shows=shows,
)  # fmt: skip
