"""One way to train a small network, and what is measured on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steadynorm.evidence.data_parallel import DataParallelGroup
from steadynorm.evidence.digits import Digits, batches, load, tensors
from steadynorm.evidence.networks import Kind, Statistics, build
from steadynorm.models.untouched import untouched

Tick = Callable[[int], None]
"""Called with the number of steps done since the last call; may raise to end the run."""
StepCallback = Callable[[int, nn.Module], None]
"""Called after each step with the number of steps done and the network."""


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum, a learning rate in proportion to the batch, gradient clipping.

    `samples`: digits seen in the whole run, so that runs at different batch sizes see the same
    number. `rate`: the highest learning rate at batch 64; at batch B it is rate·B/64. `schedule`:
    one "cycle" up and down, or "constant". `clip`: the largest norm of the gradient, or None.
    `points`: how often loss and accuracy are recorded.
    """

    batch_size: int
    samples: int
    rate: float = 0.1
    momentum: float = 0.9
    clip: float | None = 5.0
    points: int = 12
    schedule: Literal["cycle", "constant"] = "cycle"

    def __post_init__(self) -> None:
        for name in ("batch_size", "samples", "points"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"Recipe: `{name}` must be at least 1; got {value!r}.")

    @classmethod
    def constant(cls, batch_size: int, samples: int, rate: float, points: int = 1) -> Recipe:
        """Plain SGD at this learning rate: no schedule, momentum or clipping."""
        rate = rate * 64 / batch_size
        return cls(batch_size, samples, rate, 0.0, None, points, "constant")

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run, at least one."""
        return max(self.samples // self.batch_size, 1)

    def rate_at(self, step: int) -> float:
        """The learning rate of a step. A cycle rises from 1/25 of the peak over the first 30 % and
        falls to 0, both along a cosine.
        """
        peak = self.rate * self.batch_size / 64
        if self.schedule == "constant":
            return peak
        done = step / self.steps
        if done < 0.3:
            return peak * (1 + (1 / 25 - 1) * (1 + math.cos(math.pi * done / 0.3)) / 2)
        return peak * (1 + math.cos(math.pi * (done - 0.3) / 0.7)) / 2


@dataclass(frozen=True)
class Point:
    """One record of a run. `loss` and `training_accuracy` are means over the training batches since
    the record before; `accuracy` is that of inference on all test digits.
    """

    step: int
    samples: int
    loss: float
    training_accuracy: float
    accuracy: float


@dataclass(frozen=True)
class TrainingResult:
    """`accuracy` is that of inference, `accuracy_in_training` that of the same test digits
    normalized as in training, in batches of the recipe's size; None where they fill no batch, or
    the run ended early. `stopped`: why it did.
    """

    points: list[Point]
    accuracy: float
    accuracy_in_training: float | None
    stopped: str | None = None

    @property
    def error(self) -> float:
        """Error of inference on the test digits, in per cent."""
        return 100 * (1 - self.accuracy)

    @property
    def error_in_training(self) -> float | None:
        """The same normalized as in training."""
        accuracy = self.accuracy_in_training
        return None if accuracy is None else 100 * (1 - accuracy)

    def record(self) -> dict[str, Any]:
        """The same as plain dicts and lists, for JSON."""
        return asdict(self)


def execute(
    kind: Kind,
    statistics: Statistics,
    recipe: Recipe,
    data_dir: str | None,
    seed: int,
    *,
    tick: Tick | None = None,
) -> TrainingResult:
    """Build the network from `seed`, train it on the digits of `data_dir` and measure it."""
    digits = load(data_dir)
    return train(build(kind, statistics, digits, seed), digits, recipe, seed=seed, tick=tick)


def train(
    network: nn.Module,
    digits: Digits,
    recipe: Recipe,
    *,
    seed: int,
    tick: Tick | None = None,
    after_step: StepCallback | None = None,
) -> TrainingResult:
    """Train `network` in place on `digits` and measure it; the same for the same seed and threads.

    A layer that refuses the batch (ValueError) or a loss that is not finite ends the run; `stopped`
    gives the reason.

    Where torch.distributed is initialized, every process must make this call with the same
    arguments, and takes its part of every batch.
    """
    images, labels, test_images, test_labels = tensors(digits)
    group = DataParallelGroup()
    trained = group.wrapped(network)
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=recipe.momentum, fused=True)
    order = batches(len(labels), recipe.batch_size, seed)
    every = max(recipe.steps // recipe.points, 1)
    points: list[Point] = []
    loss_sum, correct, since = 0.0, torch.zeros((), dtype=torch.int64), 0
    stopped = None
    network.train()
    for step in range(recipe.steps):
        part = group.part(next(order))
        optimizer.param_groups[0]["lr"] = recipe.rate_at(step)
        optimizer.zero_grad()
        try:
            logits = trained(images[part])
        except ValueError as refusal:
            stopped = str(refusal)
            break
        loss = group.loss(logits, labels[part], recipe.batch_size)
        value = group.mean(loss)
        if not math.isfinite(value):
            stopped = f"the loss was {value} at step {step}"
            break
        loss.backward()
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        loss_sum += value
        correct += (logits.argmax(1) == labels[part]).sum()
        since += 1
        if after_step is not None:
            after_step(step + 1, network)
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            points.append(
                Point(
                    step=step + 1,
                    samples=(step + 1) * recipe.batch_size,
                    loss=loss_sum / since,
                    training_accuracy=group.sum(correct) / (since * recipe.batch_size),
                    accuracy=inference_accuracy(network, test_images, test_labels),
                )
            )
            loss_sum, since = 0.0, 0
            correct.zero_()
        if tick is not None and (step + 1) % 20 == 0:
            tick(20)
    else:
        if tick is not None:
            tick(recipe.steps % 20)
    accuracy = inference_accuracy(network, test_images, test_labels)
    if stopped is not None:
        return TrainingResult(points, accuracy, None, stopped)
    in_training = accuracy_in_training(network, test_images, test_labels, recipe.batch_size)
    return TrainingResult(points, accuracy, in_training)


@torch.no_grad()
def inference_accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of `images` classified correctly in inference. The network is left as it was."""
    with untouched(network):
        network.eval()
        return float((network(images).argmax(1) == labels).double().mean())


@torch.no_grad()
def accuracy_in_training(
    network: nn.Module, images: Tensor, labels: Tensor, batch_size: int
) -> float | None:
    """Share of `images` classified correctly when normalized as in training, without the last
    incomplete batch; None where there is no other. The network is left as it was.
    """
    right, seen = 0, 0
    with untouched(network) as original:
        network.train()
        for start in range(0, len(labels) - batch_size + 1, batch_size):
            part = slice(start, start + batch_size)
            right += int((network(images[part]).argmax(1) == labels[part]).sum())
            seen += batch_size
            original.restore_buffers()
    return right / seen if seen else None
