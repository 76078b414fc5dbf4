"""The networks of the tour and the lab, built with any normalization or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from steadynorm.statistics import Policy, Renorm

Normalization = Callable[[int], nn.Module]
"""Makes the layer that normalizes so many features."""


def fully_connected(
    inputs: int,
    normalization: Normalization | None,
    *,
    widths: Sequence[int] = (128, 128, 128),
    classes: int = 10,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Linear, normalization, activation for each of `widths`; then Linear to the classes.

    Takes (N, `inputs`) or anything that flattens to it. A Linear that is normalized has no bias,
    since the normalization would cancel it.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for width in widths:
        layers.append(nn.Linear(inputs, width, bias=normalization is None))
        if normalization is not None:
            layers.append(normalization(width))
        layers.append(activation())
        inputs = width
    layers.append(nn.Linear(inputs, classes))
    return nn.Sequential(*layers)


def convolutional(
    normalization: Normalization | None,
    *,
    channels: Sequence[int] = (16, 32, 32),
    classes: int = 10,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """3×3 convolutions, each with normalization and activation, all but the first of stride 2;
    then the mean over positions and Linear to the classes. Takes (N, 1, H, W).
    """
    layers: list[nn.Module] = []
    inputs = 1
    for index, width in enumerate(channels):
        stride = 1 if index == 0 else 2
        bias = normalization is None
        layers.append(nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=bias))
        if normalization is not None:
            layers.append(normalization(width))
        layers.append(activation())
        inputs = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*layers)


def initialize(
    network: nn.Module, seed: int, *, nonlinearity: str = "relu", scale: float = 1.0
) -> None:
    """He's normal weights and zero biases, the same for a seed whatever normalizes the network.

    `nonlinearity`: whose gain the weights take (torch.nn.init.calculate_gain): with "sigmoid" and
    "tanh" they are those of Glorot's kind. `scale` multiplies them.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            nn.init.kaiming_normal_(
                module.weight,
                nonlinearity=nonlinearity,  # type: ignore[arg-type]
                generator=generator,
            )
            if scale != 1.0:
                with torch.no_grad():
                    module.weight.mul_(scale)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def normalization_1d(
    statistics: Policy | str | None, *, momentum: float = 0.1
) -> Normalization | None:
    """`statistics` as a maker of layers for (N, C): a policy or its name, "torch", or None."""
    return _normalization(statistics, momentum, "BatchNorm1d")


def normalization_2d(
    statistics: Policy | str | None, *, momentum: float = 0.1
) -> Normalization | None:
    """`statistics` as a maker of layers for (N, C, H, W): a policy, its name, "torch", or None."""
    return _normalization(statistics, momentum, "BatchNorm2d")


def _normalization(
    statistics: Policy | str | None, momentum: float, layer: str
) -> Normalization | None:
    if statistics is None:
        return None
    if statistics == "torch":
        return partial(getattr(nn, layer), momentum=momentum)
    from steadynorm import nn as ours

    # Does nothing unless several processes train together (`steadynorm.evidence.lab.replicas`).
    return partial(getattr(ours, layer), momentum=momentum, statistics=statistics, synchronize=True)


def renorm_for(steps: int) -> Renorm:
    """Ioffe's schedule of 40,000 steps, squeezed into the first quarter of a run of `steps`."""
    quarter = max(steps // 4, 1)
    warmup = quarter // 8
    return Renorm(warmup=warmup, r_ramp=quarter - warmup, d_ramp=quarter // 2)
