"""One way to train a small network, and what is measured while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steadynorm.lab.data import Digits

Tick = Callable[[int], None]
"""Told of each few steps done; may raise to end the run."""


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum in one cycle, the rate proportional to the batch, the gradient clipped.

    `samples`: digits seen over the whole run, so runs at different batch sizes see the same.
    `rate`: the highest learning rate at batch 64; at batch B it is rate·B/64.
    `points`: how often loss and accuracy are written down.
    """

    batch_size: int
    samples: int
    rate: float = 0.1
    momentum: float = 0.9
    clip: float = 5.0
    points: int = 12

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
        """The rate of a step: up from 1/25 over the first 30 %, then down to 0, along cosines."""
        peak = self.rate * self.batch_size / 64
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
class Layer:
    """One layer's running statistics against batches as it meets them in training.

    Each triple holds the 10th, 50th and 90th percentile over channels and batches, in units of the
    running standard deviation: `mean` of the batch's mean minus the running mean, `std` of the
    batch's standard deviation, `used_std` of the one the policy normalizes the batch with.
    """

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    used_std: tuple[float, float, float]


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


def tensors(digits: Digits) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then test ones: images (N, 1, H, W), scaled to mean 0 and
    standard deviation 1 over the training set.
    """
    mean, std = digits.train_images.mean(), digits.train_images.std()
    train, test = (
        torch.from_numpy((images - mean) / std).unsqueeze(1)
        for images in (digits.train_images, digits.test_images)
    )
    return (
        train,
        torch.from_numpy(digits.train_labels),
        test,
        torch.from_numpy(digits.test_labels),
    )


def batches(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Index tensors of exactly `batch_size`, epoch after epoch without end; what is left over at
    the end of an epoch joins the next one's beginning.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        batch, order = order[:batch_size], order[batch_size:]
        yield batch


def train(
    network: nn.Module, digits: Digits, recipe: Recipe, *, seed: int, tick: Tick | None = None
) -> Training:
    """Train `network` in place on `digits` and measure it; the same for the same seed and threads.

    A layer that refuses the batch (ValueError) or a loss that is not finite ends the run, and
    `stopped` says so. `tick` is called with the number of steps done since it was last called.
    """
    images, labels, test_images, test_labels = tensors(digits)
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=recipe.momentum, fused=True)
    order = batches(len(labels), recipe.batch_size, seed)
    every = max(recipe.steps // recipe.points, 1)
    points: list[Point] = []
    loss_sum, correct, since = 0.0, torch.zeros((), dtype=torch.int64), 0
    stopped = None
    network.train()
    for step in range(recipe.steps):
        batch = next(order)
        optimizer.param_groups[0]["lr"] = recipe.rate_at(step)
        optimizer.zero_grad()
        try:
            logits = network(images[batch])
        except ValueError as refusal:
            stopped = str(refusal)
            break
        loss = F.cross_entropy(logits, labels[batch])
        value = float(loss.detach())
        if not math.isfinite(value):
            stopped = f"the loss was {value} at step {step}"
            break
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        loss_sum += value
        correct += (logits.argmax(1) == labels[batch]).sum()
        since += 1
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            accuracy = inference_accuracy(network, test_images, test_labels)
            seen = since * recipe.batch_size
            points.append(
                Point(
                    step=step + 1,
                    samples=(step + 1) * recipe.batch_size,
                    loss=loss_sum / since,
                    training_accuracy=int(correct) / seen,
                    accuracy=accuracy,
                )
            )
            loss_sum, since = 0.0, 0
            correct.zero_()
        if tick is not None and (step + 1) % 20 == 0:
            tick(20)
    if tick is not None:
        tick(recipe.steps % 20 if stopped is None else 0)
    accuracy = inference_accuracy(network, test_images, test_labels)
    if stopped is not None:
        return Training(points, accuracy, None, [], stopped)
    in_training = accuracy_in_training(network, test_images, test_labels, recipe.batch_size)
    layers = layer_statistics(network, images, recipe.batch_size, seed=seed)
    return Training(points, accuracy, in_training, layers)


@torch.no_grad()
def inference_accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of `images` classified right in inference; modes are left as they were."""
    with _modes_kept(network):
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
    with _modes_kept(network), _buffers_kept(network) as restore:
        network.train()
        for start in range(0, len(labels) - batch_size + 1, batch_size):
            part = slice(start, start + batch_size)
            right += int((network(images[part]).argmax(1) == labels[part]).sum())
            seen += batch_size
            restore()
    return right / max(seen, 1)


@torch.no_grad()
def layer_statistics(
    network: nn.Module, images: Tensor, batch_size: int, *, seed: int, count: int = 64
) -> list[Layer]:
    """Running statistics of every normalizing layer against `count` training batches; see `Layer`.

    Modes and buffers are left as they were.
    """
    found = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    }
    seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in found}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: seen[name].append(_deviations(module, inputs[0]))

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in found.items()]
    try:
        with _modes_kept(network), _buffers_kept(network) as restore:
            network.train()
            order = batches(len(images), batch_size, seed)
            for _, batch in zip(range(count), order, strict=False):
                network(images[batch])
                restore()
    finally:
        for hook in hooks:
            hook.remove()
    return [
        Layer(name, *(_percentiles(torch.stack(part)) for part in zip(*seen[name], strict=True)))
        for name in found
    ]


def _deviations(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, std, and the std that the layer's policy uses, per channel, in running stds."""
    from steadynorm.statistics import Context, Moments, RunningStatistics

    x = x.detach().double().movedim(1, -1).flatten(0, -2)
    mean, var = x.mean(0), x.var(0, correction=0)
    moments = Moments(float(len(x)), mean, var, torch.zeros_like(mean))
    running = RunningStatistics(
        layer.running_mean.double(), layer.running_var.double(), layer.num_batches_tracked
    )
    used = var
    policy = getattr(layer, "statistics", None)  # torch's own layers have none
    if policy is not None:
        samples = len(x)
        context = Context(samples, layer.momentum, layer.eps, torch)
        normalizer = policy.normalizer(moments, running, context)
        # What multiplies x is gain/√(u + ε), so u/gain² is the variance that acts.
        used = (normalizer.var + layer.eps) / normalizer.gain**2 - layer.eps
    unit = (running.var + layer.eps).sqrt()
    return (mean - running.mean) / unit, var.sqrt() / unit, used.clamp(min=0).sqrt() / unit


def _percentiles(values: Tensor) -> tuple[float, float, float]:
    at = torch.tensor([0.1, 0.5, 0.9], dtype=values.dtype)
    low, middle, high = torch.quantile(values.flatten(), at).tolist()
    return low, middle, high


@contextmanager
def _modes_kept(network: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _buffers_kept(network: nn.Module) -> Iterator[Callable[[], None]]:
    """Gives a function that puts all buffers back; they are put back at the end in any case."""
    kept = [(buffer, buffer.clone()) for buffer in network.buffers()]

    def restore() -> None:
        for buffer, value in kept:
            buffer.copy_(value)

    try:
        yield restore
    finally:
        restore()
