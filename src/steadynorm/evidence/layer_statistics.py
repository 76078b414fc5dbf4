"""Running statistics of normalizing layers, compared with batches of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.evidence.digits import batches
from steadynorm.models.untouched import untouched


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's running statistics compared with batches of training.

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
) -> list[LayerStatistics]:
    """`LayerStatistics` of every normalizing layer over `count` training batches. The network
    is left as it was.
    """
    found = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    }
    seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in found}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: seen[name].append(_deviations(module, inputs[0]))

    with untouched(network) as original:
        for name, module in found.items():
            module.register_forward_pre_hook(recorder(name))
        network.train()
        order = batches(len(images), batch_size, seed)
        for _, batch in zip(range(count), order, strict=False):
            network(images[batch])
            original.restore_buffers()
    return [
        LayerStatistics(name, *(_percentiles(torch.stack(p)) for p in zip(*triples, strict=True)))
        for name, triples in seen.items()
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
    used, eps = var, vars(layer)["eps"]
    policy = getattr(layer, "statistics", None)  # torch's own layers have none
    if policy is not None:
        context = Context(len(x), layer.momentum, eps, torch)
        normalizer = policy.normalizer(moments, running, context)
        # x is multiplied by gain/√(u + ε): the effective variance is (u + ε)/gain² - ε.
        used = (normalizer.var + eps) / normalizer.gain**2 - eps
    unit = (running.var + eps).sqrt()
    return (mean - running.mean) / unit, var.sqrt() / unit, used.clamp(min=0).sqrt() / unit


def _percentiles(values: Tensor) -> tuple[float, float, float]:
    at = torch.tensor([0.1, 0.5, 0.9], dtype=values.dtype)
    low, middle, high = torch.quantile(values.flatten(), at).tolist()
    return low, middle, high
