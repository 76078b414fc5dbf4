"""What normalizing layers see: their running statistics against batches as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.evidence.lab.batches import batches


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
        with modes_kept(network), buffers_kept(network) as restore:
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
def modes_kept(network: nn.Module) -> Iterator[None]:
    """Every submodule is in its own mode again at the end."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def buffers_kept(network: nn.Module) -> Iterator[Callable[[], None]]:
    """Gives a function that puts all buffers back; they are put back at the end in any case."""
    kept = [(buffer, buffer.clone()) for buffer in network.buffers()]

    def restore() -> None:
        for buffer, value in kept:
            buffer.copy_(value)

    try:
        yield restore
    finally:
        restore()
