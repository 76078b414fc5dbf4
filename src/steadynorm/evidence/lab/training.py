"""One way to train a small network, and what is measured while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steadynorm.evidence.lab.batches import batches, tensors
from steadynorm.evidence.lab.data import Digits
from steadynorm.evidence.lab.layers import Layer, buffers_kept, layer_statistics, modes_kept
from steadynorm.evidence.lab.replicas import Replicas

Tick = Callable[[int], None]
"""Told of each few steps done; may raise to end the run."""
Watch = Callable[[int, nn.Module], bool | None]
"""Called after each step with the number of steps done and the network; True ends the run."""


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum, the rate proportional to the batch, the gradient clipped.

    `samples`: digits seen over the whole run, so runs at different batch sizes see the same.
    `rate`: the highest learning rate at batch 64; at batch B it is rate·B/64. `schedule`: up and
    down in one "cycle", or "constant". `clip`: the largest norm of the gradient, None for any.
    `points`: how often loss and accuracy are written down.
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

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run, at least one."""
        return max(self.samples // self.batch_size, 1)

    def rate_at(self, step: int) -> float:
        """The rate of a step; in a cycle it goes up from 1/25 over the first 30 %, then down to 0,
        along cosines.
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
    """A moment of a run. `loss` and `training_accuracy` are means over the training batches since
    the point before; `accuracy` is that of inference on all test digits.
    """

    step: int
    samples: int
    loss: float
    training_accuracy: float
    accuracy: float


@dataclass(frozen=True)
class Training:
    """What a run gave. `accuracy` is that of inference, `accuracy_in_training` the same test digits
    normalized as in training, in batches of the recipe's size. `stopped` says why it ended early.
    """

    points: list[Point]
    accuracy: float
    accuracy_in_training: float | None
    layers: list[Layer] = field(default_factory=list)
    stopped: str | None = None

    @property
    def error(self) -> float:
        """Error of inference on the test digits, in per cent."""
        return 100 * (1 - self.accuracy)

    def record(self) -> dict[str, Any]:
        """The same as plain dicts and lists, for JSON."""
        return asdict(self)


def train(
    network: nn.Module,
    digits: Digits,
    recipe: Recipe,
    *,
    seed: int,
    tick: Tick | None = None,
    watch: Watch | None = None,
    layers: bool = True,
) -> Training:
    """Train `network` in place on `digits` and measure it; the same for the same seed and threads.

    A layer that refuses the batch (ValueError) or a loss that is not finite ends the run, and
    `stopped` says so. `tick` is called with the number of steps done since it was last called.
    `layers`: whether the layers' statistics are measured at the end.

    Where torch.distributed is initialized, every process must make this call with the same
    arguments, and takes its part of every batch.
    """
    images, labels, test_images, test_labels = tensors(digits)
    replicas = Replicas()
    trained = replicas.wrapped(network)
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=recipe.momentum, fused=True)
    order = batches(len(labels), recipe.batch_size, seed)
    every = max(recipe.steps // recipe.points, 1)
    points: list[Point] = []
    loss_sum, correct, since = 0.0, torch.zeros((), dtype=torch.int64), 0
    stopped, enough = None, False
    network.train()
    for step in range(recipe.steps):
        part = replicas.part(next(order))
        optimizer.param_groups[0]["lr"] = recipe.rate_at(step)
        optimizer.zero_grad()
        try:
            logits = trained(images[part])
        except ValueError as refusal:
            stopped = str(refusal)
            break
        loss = replicas.loss(logits, labels[part], recipe.batch_size)
        value = replicas.mean(loss)
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
        enough = watch is not None and bool(watch(step + 1, network))
        if (step + 1) % every == 0 or step + 1 == recipe.steps or enough:
            points.append(
                Point(
                    step=step + 1,
                    samples=(step + 1) * recipe.batch_size,
                    loss=loss_sum / since,
                    training_accuracy=replicas.sum(correct) / (since * recipe.batch_size),
                    accuracy=inference_accuracy(network, test_images, test_labels),
                )
            )
            loss_sum, since = 0.0, 0
            correct.zero_()
        if tick is not None and (step + 1) % 20 == 0:
            tick(20)
        if enough:
            break
    else:
        if tick is not None:
            tick(recipe.steps % 20)
    accuracy = inference_accuracy(network, test_images, test_labels)
    if stopped is not None:
        return Training(points, accuracy, None, [], stopped)
    in_training = accuracy_in_training(network, test_images, test_labels, recipe.batch_size)
    seen = layer_statistics(network, images, recipe.batch_size, seed=seed) if layers else []
    return Training(points, accuracy, in_training, seen)


@torch.no_grad()
def inference_accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of `images` classified right in inference; modes are left as they were."""
    with modes_kept(network):
        network.eval()
        return float((network(images).argmax(1) == labels).double().mean())


@torch.no_grad()
def accuracy_in_training(
    network: nn.Module, images: Tensor, labels: Tensor, batch_size: int
) -> float:
    """Share of `images` classified right when normalized as in training; a last smaller batch is
    left out. Modes and buffers are left as they were.
    """
    right, seen = 0, 0
    with modes_kept(network), buffers_kept(network) as restore:
        network.train()
        for start in range(0, len(labels) - batch_size + 1, batch_size):
            part = slice(start, start + batch_size)
            right += int((network(images[part]).argmax(1) == labels[part]).sum())
            seen += batch_size
            restore()
    return right / max(seen, 1)
