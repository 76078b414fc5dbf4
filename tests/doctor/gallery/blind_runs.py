"""Faults of random strength that a watched training run shows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tests.doctor.gallery.blind import Draw, Planted, activations, fault, larger, replace, with_head
from tests.doctor.gallery.blind_data import all_mixed
from tests.doctor.gallery.networks import Pair, endless
from tests.doctor.outside import by_class, norms
from torch import Tensor, nn


@fault("SN401", "a picture of NaN in one batch of a run")
def _(draw: Draw) -> Planted:
    when = int(torch.randint(10, 80, (1,), generator=draw.chance))

    def spoiled() -> Iterable[Pair]:
        for step, (x, y) in enumerate(map(larger, endless(32, draw.seed))):
            yield (x * torch.nan, y) if when <= step < when + 3 else (x, y)

    return draw.watched(draw.fresh(), 0.0, source=spoiled())


@fault("SN402", "a momentum too small for the run", "momentum, powers of ten")
def _(draw: Draw) -> Planted:
    network, power = draw.fresh(), -1.3 - 2 * draw.strength
    for norm in norms(network):
        norm.momentum = 10**power
    return draw.watched(network, power)


@fault("SN403", "shifts so low that a ReLU answers nothing", "share of each layer's channels")
def _(draw: Draw) -> Planted:
    network = draw.fresh()
    for norm, activation in activations(network):
        replace(network, activation, nn.ReLU())
        with torch.no_grad():
            norm.bias[draw.some(list(range(norm.num_features)))] = -20
    return draw.watched(network, draw.strength)


@fault("SN404", "a detach behind a norm")
def _(draw: Draw) -> Planted:
    network = draw.fresh()
    norm = draw.one(norms(network))
    replace(network, norm, Detached(norm))
    return draw.watched(network)


class Detached(nn.Module):
    """What a layer gives, without a gradient."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x).detach()


@fault("SN405", "micro-batches in a run, with a norm in the head", "samples")
def _(draw: Draw) -> Planted:
    size = round(2 + 6 * (1 - draw.strength))
    network = with_head(draw.fresh())
    made = draw.watched(network, size, size=size, steps=min(480, 2880 // size), rate=2e-3)
    return made._replace(twin=draw.train(with_head(draw.fresh()), cycle=False))


@fault("SN406", "inference mode that nobody ends", "share of the steps")
def _(draw: Draw) -> Planted:
    network, share = draw.fresh(), 0.1 + 0.8 * draw.strength

    def forget(step: int) -> None:
        if step >= 90 * (1 - share):
            network.eval()

    return draw.watched(network, share, before=forget)


@fault("SN407", "classes in order in a run", "share of samples that are mixed")
def _(draw: Draw) -> Planted:
    mixed = 0.9 * (1 - draw.strength)
    made = draw.watched(draw.fresh(), mixed, source=by_class(mixed, draw.seed) * 3)
    return made._replace(twin=all_mixed(draw, cycle=False))
