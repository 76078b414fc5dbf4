"""Several networks of one form, trained side by side as one: each operation serves all of them.

Small networks are dominated by the overhead of single operations, so six side by side take little
longer than one. They share nothing: weights, digits and the order of these are each one's own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steadynorm import calibrate
from steadynorm.evidence.digits import Digits, batches, tensors
from steadynorm.evidence.lab.micro_batches import MicroBatchNorm
from steadynorm.evidence.training import Recipe, Tick

PART = 256  # digits at a time, where nothing is trained


class SideBySideLinear(nn.Module):
    """(N, S·I) to (N, S·O): a `torch.nn.Linear` for each of S networks."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        biased = layers[0].bias is not None
        self.bias = _joined([layer.bias for layer in layers]) if biased else None

    def forward(self, input: Tensor) -> Tensor:
        """Each network's part by its own layer."""
        count = len(self.weight)
        parts = input.unflatten(1, (count, -1)).transpose(0, 1)
        y = torch.bmm(parts, self.weight.mT).transpose(0, 1).flatten(1)
        return y if self.bias is None else y + self.bias


def side_by_side(networks: Sequence[nn.Module]) -> nn.Module:
    """The networks as one, of (N, S·C, *). Linear and Conv2d become S in one, layers that normalize
    are made anew for S times the channels; all else acts on every channel alone and is kept.
    """
    together, count = copy.deepcopy(networks[0]), len(networks)
    for name, module in list(together.named_modules()):
        layers: Any = [network.get_submodule(name) for network in networks]
        if isinstance(module, nn.Linear):
            together.set_submodule(name, SideBySideLinear(layers))
        elif isinstance(module, nn.Conv2d):
            module.in_channels *= count
            module.out_channels *= count
            module.groups *= count
            module.weight = _joined([layer.weight for layer in layers])
            if module.bias is not None:
                module.bias = _joined([layer.bias for layer in layers])
        elif isinstance(module, nn.GroupNorm):
            groups, channels = count * module.num_groups, count * module.num_channels
            together.set_submodule(name, nn.GroupNorm(groups, channels, module.eps))
        elif isinstance(module, MicroBatchNorm):
            channels = count * module.num_features
            made_anew = type(module)(channels, module.statistics, module.size)
            together.set_submodule(name, made_anew)
    return together


def _joined(tensors: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.cat([t.detach() for t in tensors]))


def train(
    networks: Sequence[nn.Module],
    digits: Digits,
    recipe: Recipe,
    seeds: Sequence[int],
    *,
    tick: Tick | None = None,
) -> dict[str, list[float]]:
    """Train each network in the order of its seed; the errors of inference on the test digits in
    per cent, by network, with running and with calibrated statistics.

    As `evidence.training.train` does it, gradients clipped for each network by itself. A network
    whose loss is not finite goes on and ends with as many errors as guessing makes.
    """
    images, labels, test_images, test_labels = tensors(digits)
    count = len(seeds)
    together = side_by_side(networks).train()
    parameters = list(together.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=recipe.momentum)
    orders = zip(*(batches(len(labels), recipe.batch_size, s) for s in seeds), strict=True)
    for step, order in enumerate(islice(orders, recipe.steps)):
        part = torch.stack(order, dim=1)  # (N, S)
        optimizer.param_groups[0]["lr"] = recipe.rate_at(step)
        optimizer.zero_grad()
        logits = together(images[part].flatten(1, 2)).unflatten(1, (count, -1))
        loss = F.cross_entropy(logits.flatten(0, 1), labels[part].flatten(), reduction="sum")
        (loss / recipe.batch_size).backward()
        if recipe.clip is not None:
            _clip(parameters, recipe.clip, count)
        optimizer.step()
        if tick is not None:
            tick(1)
    together.eval()
    found = {"error": _errors(together, test_images, test_labels, count)}
    calibrate(together, _for_all(images, count)[:8], progress=False)
    return found | {"error_calibrated": _errors(together, test_images, test_labels, count)}


def _clip(parameters: Sequence[nn.Parameter], norm: float, count: int) -> None:
    """Each network's gradient to a norm of at most `norm`."""
    parts = [p.grad.view(count, -1) for p in parameters if p.grad is not None]
    squares = torch.stack([part.square().sum(1) for part in parts]).sum(0)
    scale = (norm / (squares.sqrt() + 1e-6)).clamp(max=1)
    for part in parts:
        part.mul_(scale[:, None])


@torch.no_grad()
def _errors(network: nn.Module, images: Tensor, labels: Tensor, count: int) -> list[float]:
    wrong = torch.zeros(count, dtype=torch.int64)
    for part, right in zip(_for_all(images, count), labels.split(PART), strict=True):
        answers = network(part).unflatten(1, (count, -1)).argmax(2)
        wrong += (answers != right[:, None]).sum(0)
    return [100 * number / len(labels) for number in wrong.tolist()]


def _for_all(images: Tensor, count: int) -> list[Tensor]:
    """The same images, in parts, for every network."""
    return [part.expand(-1, count, -1, -1) for part in images.split(PART)]
