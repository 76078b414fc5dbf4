"""The small networks of tour and lab, with any normalization or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from steadynorm import nn as ours
from steadynorm.evidence.digits import Digits
from steadynorm.statistics import Policy, Renorm

Kind = Literal["fully connected", "convolutional", "ten sigmoid layers", "residual"]
KINDS: tuple[Kind, Kind] = ("fully connected", "convolutional")
CLASSES = 10
Normalization = Callable[[int], nn.Module]
"""Makes the layer that normalizes so many features."""
Statistics = Policy | str | Normalization | None


def _normalized(
    layer: nn.Module, features: int, normalization: Normalization | None
) -> list[nn.Module]:
    return [layer] if normalization is None else [layer, normalization(features)]


def fully_connected(
    inputs: int,
    normalization: Normalization | None,
    *,
    widths: Sequence[int] = (128, 128, 128),
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Linear, normalization, activation for each of `widths`; then Linear to the classes.

    Takes (N, `inputs`) or anything that flattens to it. A Linear that is normalized has no bias,
    since the normalization would cancel it.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for width in widths:
        linear = nn.Linear(inputs, width, bias=normalization is None)
        layers += [*_normalized(linear, width, normalization), activation()]
        inputs = width
    layers.append(nn.Linear(inputs, CLASSES))
    return nn.Sequential(*layers)


def convolutional(
    normalization: Normalization | None,
    *,
    channels: Sequence[int] = (16, 32, 32),
    strides: Sequence[int] | None = None,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """3×3 convolutions, each with normalization and activation; then the mean over positions and
    Linear to the classes. Takes (N, 1, H, W). `strides`: 1 for the first, 2 for the others.
    """
    layers: list[nn.Module] = []
    inputs = 1
    strides = strides or (1, *(2,) * (len(channels) - 1))
    for width, stride in zip(channels, strides, strict=True):
        bias = normalization is None
        conv = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=bias)
        layers += [*_normalized(conv, width, normalization), activation()]
        inputs = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES)]
    return nn.Sequential(*layers)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut, as in He et al. 2015, each normalized. Where the size
    changes the shortcut is a normalized 1×1 convolution.
    """

    def __init__(
        self, inputs: int, width: int, stride: int, normalization: Normalization | None
    ) -> None:
        super().__init__()

        def normalized(inputs: int, kernel: int, stride: int) -> nn.Sequential:
            bias = normalization is None
            conv = nn.Conv2d(inputs, width, kernel, stride, padding=kernel // 2, bias=bias)
            return nn.Sequential(*_normalized(conv, width, normalization))

        self.first, self.second = normalized(inputs, 3, stride), normalized(width, 3, 1)
        same = stride == 1 and inputs == width
        self.shortcut = nn.Identity() if same else normalized(inputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, width, H/stride, W/stride)."""
        y = self.second(torch.relu(self.first(x)))
        return torch.relu(y + self.shortcut(x))


def residual(
    normalization: Normalization | None,
    *,
    widths: Sequence[int] = (8, 16, 32),
    blocks: int = 2,
) -> nn.Sequential:
    """A convolution, `blocks` residual blocks of each width, all but the first width at half the
    size of the one before, the mean over positions and Linear: by default 14 layers deep. Takes
    (N, 1, H, W).
    """
    inputs = widths[0]
    conv = nn.Conv2d(1, inputs, 3, padding=1, bias=normalization is None)
    layers: list[nn.Module] = [*_normalized(conv, inputs, normalization), nn.ReLU()]
    for index, width in enumerate(widths):
        for block in range(blocks):
            stride = 2 if block == 0 and index > 0 else 1
            layers.append(ResidualBlock(inputs, width, stride, normalization))
            inputs = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES)]
    return nn.Sequential(*layers)


def initialize(
    network: nn.Module,
    seed: int,
    *,
    nonlinearity: str = "relu",
    scale: float = 1.0,
    std: float | None = None,
) -> None:
    """He's normal weights and zero biases: the same for a seed, whatever normalizes the network.

    `nonlinearity`: whose gain (torch.nn.init.calculate_gain) over the square root of the inputs is
    the weights' standard deviation: He's for "relu", LeCun's for "sigmoid". `scale` multiplies
    them. `std`: their standard deviation instead.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            if std is not None:
                nn.init.normal_(module.weight, std=std, generator=generator)
            else:
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


def build(
    kind: Kind,
    statistics: Statistics,
    digits: Digits,
    seed: int,
    **options: Any,
) -> nn.Sequential:
    """The small network of a kind for these digits, initialized by `seed`. `statistics`: what
    `normalization_1d` takes. `options` go to the function that builds the kind; ten sigmoid layers
    are fully connected, 64 wide, and do not train unless they are normalized.
    """
    saturating = kind == "ten sigmoid layers"
    if saturating:
        options = {"widths": (64,) * 10, "activation": nn.Sigmoid} | options
    if saturating or kind == "fully connected":
        network = fully_connected(digits.pixels, normalization_1d(statistics), **options)
    elif kind == "convolutional":
        network = convolutional(normalization_2d(statistics), **options)
    elif kind == "residual":
        network = residual(normalization_2d(statistics), **options)
    else:
        raise ValueError(f"build: `kind` must be one of {', '.join(get_args(Kind))}; got {kind!r}.")
    initialize(network, seed, nonlinearity="sigmoid" if saturating else "relu")
    return network


def normalization_1d(statistics: Statistics) -> Normalization | None:
    """A maker of layers for (N, C). `statistics`: a policy or its name, "torch" for torch's own
    layer, None or "none" for no normalization; another maker of layers is returned as it is.
    """
    return _normalization(statistics, nn.BatchNorm1d, ours.BatchNorm1d)


def normalization_2d(statistics: Statistics) -> Normalization | None:
    """The same for (N, C, H, W)."""
    return _normalization(statistics, nn.BatchNorm2d, ours.BatchNorm2d)


def _normalization(
    statistics: Statistics, torch_layer: Normalization, own_layer: Callable[..., nn.Module]
) -> Normalization | None:
    if statistics is None or statistics == "none":
        return None
    if callable(statistics):
        return statistics
    if statistics == "torch":
        return torch_layer
    # Synchronized only where several processes train together (see `data_parallel`).
    return partial(own_layer, statistics=statistics, synchronize=True)


def renorm_for(steps: int) -> Renorm:
    """Ioffe's schedule of 40,000 steps, compressed into the first quarter of a run of `steps`."""
    quarter = max(steps // 4, 1)
    warmup = quarter // 8
    return Renorm(warmup=warmup, r_ramp=quarter - warmup, d_ramp=quarter // 2)
