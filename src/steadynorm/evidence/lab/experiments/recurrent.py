"""Digits read row by row or pixel by pixel, by an LSTM with batch normalization and without."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steadynorm.evidence.digits import Digits, batches, tensors
from steadynorm.evidence.estimates import Estimate
from steadynorm.evidence.lab.experiment import Experiment
from steadynorm.evidence.lab.figures import chart, table
from steadynorm.evidence.lab.runs import Result, Runs, Setting
from steadynorm.evidence.lab.verdict import Verdict, expect, judge
from steadynorm.evidence.training import Tick, inference_accuracy
from steadynorm.models.calibrate import calibrate
from steadynorm.nn import BatchNormLSTM
from steadynorm.report.page import Piece

BATCH, HIDDEN, RATE, CLIP = 64, 48, 2e-3, 1.0
LOOKS = 8
CALIBRATION_BATCH = 480
TASKS = {"rows": "rows", "pixels": "pixels", "permuted": "pixels, permuted"}
NETWORKS = {
    "lstm": "LSTM", "0.1": "batch-normalized, γ = 0.1", "1": "batch-normalized, γ = 1",
}  # fmt: skip
PERMUTATION_SEED = 2016  # the same for all runs: it belongs to the task


def settings(**lengths: int) -> list[Setting]:
    """All networks on each task for so many steps, but γ = 1 not on pixels in order: it is compared
    on the permuted ones.
    """
    return [
        {"task": task, "network": network, "steps": steps}
        for task, steps in lengths.items()
        for network in NETWORKS
        if (task, network) != ("pixels", "1")
    ]


class Reader(nn.Module):
    """Reads a digit in time steps and classifies it from the last hidden state."""

    def __init__(self, task: str, network: str, height: int, width: int) -> None:
        super().__init__()
        time, features = (height, width) if task == "rows" else (height * width, 1)
        self.shape = (time, features)
        order = torch.arange(time)
        if task == "permuted":
            order = torch.randperm(time, generator=torch.Generator().manual_seed(PERMUTATION_SEED))
        self.register_buffer("order", order)
        if network == "lstm":
            self.reader: nn.Module = nn.LSTM(features, HIDDEN)
        else:
            # Digits begin with black pixels, hence the noise.
            self.reader = BatchNormLSTM(
                features, HIDDEN, max_length=time, gain=float(network), initial_noise=0.1
            )
        self.classes = nn.Linear(HIDDEN, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, H, W)."""
        order: Any = self.order
        sequence = images.reshape(len(images), *self.shape).transpose(0, 1)[order]
        _, (last, _) = self.reader(sequence)
        logits: Tensor = self.classes(last[-1])
        return logits


def run(setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
    """Train by Adam; along the way loss and accuracy of inference, by running averages and by the
    statistics of the training digits, as in the paper.
    """
    images, labels, test, test_labels = tensors(digits)
    torch.manual_seed(seed)
    network = Reader(setting["task"], setting["network"], *images.shape[2:])
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    order = batches(len(labels), BATCH, seed)
    every = max(setting["steps"] // LOOKS, 1)
    at: list[int] = []
    losses: list[float] = []
    accuracy: list[float] = []
    by_average: list[float] = []
    total = 0.0
    for step in range(1, setting["steps"] + 1):
        part = next(order)
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images[part]), labels[part])
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        total += float(loss.detach())
        tick(1)
        if step % every == 0:
            at.append(step)
            losses.append(total / every)
            by_average.append(inference_accuracy(network, test, test_labels))
            accuracy.append(inference_accuracy(calibrated(network, images), test, test_labels))
            total = 0.0
    return {
        "step": at,
        "loss": losses,
        "accuracy": accuracy,
        "error": 100 * (1 - accuracy[-1]),
        "error_by_average": 100 * (1 - by_average[-1]),
        "mean_accuracy": sum(accuracy) / len(accuracy),
    }


def calibrated(network: nn.Module, images: Tensor) -> nn.Module:
    """A copy with the statistics of these images; the network itself where it has none."""
    if not any(isinstance(module, BatchNormLSTM) for module in network.modules()):
        return network
    network = copy.deepcopy(network)
    calibrate(network, torch.split(images, CALIBRATION_BATCH), progress=False)
    return network


def verdict(runs: Runs) -> Verdict:
    """Errors of the LSTM minus those of the batch-normalized one, and of γ = 1 minus γ = 0.1."""
    tasks = runs.distinct("task")

    def fewer(task: str, other: str) -> Estimate:
        return runs.difference("error", "network", other, "0.1", task=task)

    against = {task: fewer(task, "lstm") for task in tasks}
    gain = fewer("permuted", "1")
    count = runs.where(task="permuted")[0].setting["steps"]
    found = "; ".join(f"{TASKS[task]}: {against[task].text(1)}" for task in tasks)
    return judge(
        f"Points of error that batch normalization with γ = 0.1 takes off an LSTM's: {found}; and "
        f"against γ = 1 on permuted pixels, after {count} steps: {gain.text(1)}.",
        [
            *(expect(f"points fewer than the LSTM, {TASKS[task]}", against[task], above=0)
              for task in sorted(tasks, key=lambda task: task != "permuted")),
            expect("points fewer than with γ = 1, permuted pixels", gain, above=0),
        ],
    )  # fmt: skip


def shows(runs: Runs) -> Iterator[Piece]:
    """Errors, and accuracy along training."""
    lag = (
        "Momentum 0.1: the last ten batches or so. At every time step they lag a little, and what "
        "is off at one step goes on into the next."
    )
    for title, measure, times, note in (
        ("Error of inference at the end, %", "error", 1, ""),
        ("The same by running averages", "error_by_average", 1, lag),
        ("Mean accuracy over training, %", "mean_accuracy", 100, ""),
    ):
        yield table(
            title, runs, rows="network", columns="task", names={**NETWORKS, **TASKS},
            corner="network / task", measure=measure, times=times, note=note,
        )  # fmt: skip
    for task in runs.distinct("task"):
        yield chart(
            f"Accuracy of inference: {TASKS[task]}", runs.where(task=task), x="step", y="accuracy",
            series=lambda run: NETWORKS[run["network"]], order=list(NETWORKS.values()),
        )  # fmt: skip


EXPERIMENT = Experiment(
    name="recurrent",
    title="Recurrent networks",
    claim="An LSTM with batch normalization inside trains in fewer steps than one without, if γ "
    "starts at 0.1.",
    source="Cooijmans et al. 2016, sections 5.1 and 4",
    factors={
        "task": "a digit read by rows, by pixels, or by pixels in one fixed random order",
        "network": "torch's LSTM, or sn.BatchNormLSTM with γ starting at 0.1 or 1",
    },
    measure="Error of inference on the test digits after equally many steps, in per cent, by the "
    "statistics of the training digits (calibrated, as in the paper); 48 "
    "hidden units, batch 64, Adam at 2e-3, gradient norm clipped at 1.",
    rule="After equally many steps it makes fewer errors than the LSTM on every task (permuted "
    "pixels first), and on permuted pixels fewer than with γ starting at 1.",
    settings={
        "quick": settings(rows=300, permuted=200),
        "full": settings(**dict.fromkeys(TASKS, 400)),
    },
    run=run, verdict=verdict, shows=shows,
    weights={"task": {"pixels": 6, "permuted": 6}, "network": {"0.1": 3, "1": 3}},
)  # fmt: skip
