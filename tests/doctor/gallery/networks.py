"""Healthy networks trained on real digits, for faults to be planted in, one at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steadynorm.evidence import digits as data
from steadynorm.evidence import training
from steadynorm.evidence.networks import (
    convolutional,
    fully_connected,
    initialize,
    normalization_1d,
    normalization_2d,
)

Pair = tuple[Tensor, Tensor]


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, 8, 8) and labels to train on, then those to test on."""
    return data.tensors(data.load())


def batches(size: int = 64, *, count: int | None = None, seed: int = 1) -> list[Pair]:
    """Training digits in random order, in whole batches."""
    images, labels = digits()[:2]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = [part for part in order.split(size) if len(part) == size]
    return [(images[part], labels[part]) for part in parts[:count]]


def endless(size: int, seed: int = 0) -> Iterator[Pair]:
    images, labels = digits()[:2]
    for part in data.batches(len(labels), size, seed=seed):
        yield images[part], labels[part]


def fit(
    network: nn.Module,
    *,
    steps: int = 150,
    source: Iterable[Pair] | None = None,
    size: int = 64,
    rate: float = 3e-3,
    before: Callable[[int], None] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    cycle: bool = True,
) -> nn.Module:
    """Train on digits; `before` is called with the number of each step. Ends in inference mode."""
    optimizer = optimizer or torch.optim.Adam(network.parameters(), lr=rate)
    rates = [group["lr"] for group in optimizer.param_groups]
    network.train()
    for step, (images, labels) in zip(range(steps), source or endless(size), strict=False):
        if before is not None:
            before(step)
        for group, start in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = start * (1 - step / steps if cycle else 1)
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network.eval()


def fresh(kind: str = "fully connected", statistics: Any = "torch", **settings: Any) -> Any:
    """An untrained network, the same every time."""
    if kind == "convolutional":
        network = convolutional(normalization_2d(statistics), **settings)
    else:
        network = fully_connected(64, normalization_1d(statistics), **settings)
    initialize(network, 0)
    return network


@lru_cache(maxsize=4)
def _trained(kind: str, statistics: Any) -> nn.Module:
    torch.manual_seed(0)
    return fit(fresh(kind, statistics))


def trained(kind: str = "fully connected", statistics: Any = "torch") -> Any:
    """A healthy network, in inference mode; a copy that may be broken."""
    return copy.deepcopy(_trained(kind, statistics))


def norms(network: nn.Module) -> list[Any]:
    return [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def accuracy(network: nn.Module) -> float:
    """Of inference on the test digits."""
    return training.inference_accuracy(network, *digits()[2:])


class Before(nn.Module):
    """A function of the input straight before a norm."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], norm: nn.Module) -> None:
        super().__init__()
        self.function, self.norm = function, norm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.function(self, x))
        return out
