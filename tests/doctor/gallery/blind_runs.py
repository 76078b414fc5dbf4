"""Faults of random strength that a watched training run shows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tests.doctor.gallery.blind import Draw, Planted, fault, larger, watched
from tests.doctor.gallery.blind_faults import all_mixed
from tests.doctor.gallery.networks import Pair, endless
from tests.doctor.outside import by_class, norms


@fault("SN401", "a picture of NaN in one batch of a run")
def _(draw: Draw) -> Planted:
    when = int(torch.randint(10, 80, (1,), generator=draw.chance))

    def spoiled() -> Iterable[Pair]:
        for step, (x, y) in enumerate(map(larger, endless(32))):
            yield (x * torch.nan, y) if when <= step < when + 3 else (x, y)

    return watched(draw.fresh(), 0.0, source=spoiled())


@fault("SN402", "a momentum too small for the run", "momentum, powers of ten")
def _(draw: Draw) -> Planted:
    network, power = draw.fresh(), -1.3 - 2 * draw.strength
    for norm in norms(network):
        norm.momentum = 10**power
    return watched(network, power)


@fault("SN405", "micro-batches in a run", "samples")
def _(draw: Draw) -> Planted:
    size = round(2 + 6 * (1 - draw.strength))
    source, steps = map(larger, endless(size)), 2880 // size
    return watched(draw.fresh(), size, source=source, steps=steps, rate=2e-3)


@fault("SN406", "inference mode that nobody ends", "share of the steps")
def _(draw: Draw) -> Planted:
    network, share = draw.fresh(), 0.1 + 0.8 * draw.strength

    def forget(step: int) -> None:
        if step >= 90 * (1 - share):
            network.eval()

    return watched(network, share, before=forget)


@fault("SN407", "classes in order in a run", "share of samples that are mixed")
def _(draw: Draw) -> Planted:
    mixed = 0.9 * (1 - draw.strength)
    made = watched(draw.fresh(), mixed, source=by_class(mixed) * 3)
    return made._replace(twin=all_mixed(draw))
