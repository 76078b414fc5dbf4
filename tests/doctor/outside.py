"""Networks that others wrote, small, from their configurations; trained on digits for a moment."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tests.doctor.gallery.networks import batches, digits, fit
from torch import Tensor, nn
from torch.nn import functional as F

Pair = tuple[Tensor, Tensor]


class Logits(nn.Module):
    """A transformers model that returns logits alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x).logits
        return logits


def classifier(kind: str, **settings: Any) -> nn.Module:
    """A classifier of digits by transformers, of random weights."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(num_channels=1, num_labels=10, **settings)
    return Logits(getattr(transformers, f"{kind}ForImageClassification")(config))


def build(kind: str, depths: tuple[int, ...] = (1, 1), layer_type: str = "basic") -> nn.Module:
    """ "ResNet" or "RegNet" of transformers, untrained, the same every time."""
    torch.manual_seed(0)
    own: Any = {"layer_type": layer_type} if kind == "ResNet" else {"groups_width": 8}
    return classifier(kind, embedding_size=8, hidden_sizes=[16, 32], depths=list(depths), **own)


def large(pairs: list[Pair]) -> list[Pair]:
    """Digits of 16×16 pixels: these networks divide by four before their first block."""
    return [(F.interpolate(x, scale_factor=2), y) for x, y in pairs]


@lru_cache
def _trained(kind: str) -> nn.Module:
    return fit(build(kind), steps=60, source=large(batches(32)) * 3, rate=5e-3)


def trained(kind: str = "ResNet") -> nn.Module:
    """A copy of a network that reads most digits."""
    return copy.deepcopy(_trained(kind))


def data(count: int = 8, size: int = 32, seed: int = 1) -> list[Pair]:
    return large(batches(size, count=count, seed=seed))


def by_class(mixed: float, seed: int = 0) -> list[Pair]:
    """Batches of one digit each, in which a share of the samples is any."""
    images, labels = digits()[:2]
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(32):
        own = (labels == number % 10).nonzero()[:, 0]
        own = own[torch.randperm(len(own), generator=generator)[:16]]
        some = torch.randint(len(labels), (16,), generator=generator)
        chosen = torch.where(torch.rand(16, generator=generator) < mixed, some, own)
        made.append((images[chosen], labels[chosen]))
    return large(made)


def shifted(pairs: list[Pair], by: Callable[[Tensor], Tensor] = lambda x: 1 - x) -> list[Pair]:
    return [(by(x), y) for x, y in pairs]


def norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@torch.no_grad()
def accuracy(model: nn.Module, by: Callable[[Tensor], Tensor] = lambda x: x) -> float:
    """In inference, on the digits that no network was trained on."""
    images, labels = digits()[2:]
    x = by(F.interpolate(images, scale_factor=2))
    return float((model.eval()(x).argmax(1) == labels).float().mean())
