"""Real networks, trained briefly and calibrated: nothing to complain of."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from tests.doctor.fixtures.case import Case
from tests.doctor.gallery.networks import batches, digits, fit, fresh
from tests.doctor.gallery.patient import seen
from tests.models.surgery.zoo import ZOO
from torch import Tensor, nn
from torch.nn import functional as F

import steadynorm as sn
from steadynorm.models.graph import tensors
from steadynorm.models.layers import is_host

SIZE, STEPS = 16, 20

HEALTHY: dict[str, Callable[[], Case]] = {}


def pictures(shape: tuple[int, ...], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Digits of any size and number of channels; in three dimensions, a digit that fades in."""
    generator = torch.Generator().manual_seed(seed)
    images, labels, *_ = digits()
    chosen = torch.randint(len(images), (count,), generator=generator)
    x = F.interpolate(images[chosen], shape[-2:], mode="bilinear", align_corners=False)
    if len(shape) == 4:
        x = x.unsqueeze(2) * torch.linspace(0.2, 1, shape[1])[:, None, None]
    x = x.expand(-1, shape[0], *(-1 for _ in shape[1:]))
    return x + 0.1 * torch.randn(x.shape, generator=generator), labels[chosen]


def loss(outputs: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Of classes, or where positions remain, of the brighter ones; by the first output's shape."""
    x, labels = batch if isinstance(batch, tuple) else (None, batch)
    logits = next(t for t in tensors(outputs) if t.is_floating_point() and t.ndim > 1)
    if x is not None and logits.ndim > x.ndim:  # several answers, stacked for deep supervision
        logits = logits[:, 0]
    classes = logits.shape[1]
    if logits.ndim == 2:
        return F.cross_entropy(logits, labels % classes)
    assert x is not None
    pooled = F.interpolate(x.mean(1, keepdim=True), logits.shape[2:])
    return F.cross_entropy(logits, (pooled[:, 0] > 0).long())


def real(name: str) -> Callable[[], Case]:
    def build() -> Case:
        entry = ZOO[name]
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MONAI's own imports
            model = entry.build()
        for module in [*model.modules()]:  # configurations made for long training start silent
            if is_host(module):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_parameters()
        shape = tuple(entry.inputs().shape[1:])
        made = [pictures(shape, SIZE, seed) for seed in range(STEPS)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        model.train()
        for x, labels in made:
            optimizer.zero_grad()
            loss(model(x), (x, labels)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.eval()
        sn.calibrate(model, made, progress=False)
        fresh_data = [((x, y),) for x, y in (pictures(shape, SIZE, 100 + i) for i in range(16))]
        return Case(model, {"batches": fresh_data, "loss": of_pair, "forward": of_images})

    return build


def of_images(model: nn.Module, batch: Any) -> Any:
    return model(batch[0][0])


def of_pair(outputs: Any, batch: Any) -> Tensor:
    return loss(outputs, batch[0])


def small(kind: str, statistics: Any, size: int) -> Callable[[], Case]:
    """A digit classifier that trained to the end, at a batch size that its policy can take."""

    def build() -> Case:
        torch.manual_seed(0)
        network = fit(fresh(kind, statistics), size=size, steps=6400 // size, rate=2e-4 * size**0.5)
        return seen(network, batches(size))

    return build


HEALTHY |= {
    "digits, fully connected, torch, batch 64": small("fully connected", "torch", 64),
    "digits, fully connected, Steady, batch 4": small("fully connected", "steady", 4),
    "digits, convolutional, torch, batch 16": small("convolutional", "torch", 16),
    "digits, convolutional, Ghost(16), batch 64": small("convolutional", sn.Ghost(16), 64),
}
QUICK = (*HEALTHY, "transformers ResNet (basic)", "transformers LeViT", "MONAI UNet 2d")
HEALTHY |= {name: real(name) for name in ZOO}
