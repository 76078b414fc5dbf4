"""Faults that a watched training run shows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tests.doctor.gallery.networks import Pair, endless, fit, fresh, norms
from tests.doctor.gallery.patient import patient
from torch import Tensor, nn

import steadynorm as sn
from steadynorm.doctor import Report


@dataclass(frozen=True)
class Watched:
    """A run that is over."""

    report: Report

    def diagnose(self) -> Report:
        return self.report


def watched(
    network: nn.Module, *, steps: int = 100, source: Iterable[Pair] | None = None
) -> Watched:
    with sn.monitor(network, every=2) as watch:
        fit(network, steps=steps, source=source, cycle=False)
    return Watched(watch.report())


@patient("SN401", "one picture of NaN, in one batch of the run")
def _() -> Watched:
    def broken() -> Iterable[Pair]:
        for step, (images, labels) in enumerate(endless(64)):
            if step == 60:
                yield images.index_fill(0, torch.tensor([3]), torch.nan), labels
            yield images, labels

    return watched(fresh(), source=broken())


@patient("SN402", "momentum 0.001 in a run of 100 steps")
def _() -> Watched:
    network = fresh()
    for norm in norms(network):
        norm.momentum = 0.001
    return watched(network)


@patient("SN403", "biases so low that most units never answer")
def _() -> Watched:
    network = fresh("convolutional")
    with torch.no_grad():
        norms(network)[1].bias[8:] = -20
    return watched(network)


class Detached(nn.Module):
    """A branch that somebody detached while looking for an error."""

    def __init__(self) -> None:
        super().__init__()
        network = fresh()
        self.first, self.rest = network[:4], network[4:]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rest(self.first(x).detach())
        return out


@patient("SN404", "a .detach() left between two layers")
def _() -> Watched:
    return watched(Detached())


@patient("SN405", "micro-batches of 2, fully connected")
def _() -> Watched:
    return watched(fresh(), steps=100, source=endless(2))


@patient("SN407", "classes in order: each batch holds one digit")
def _() -> Watched:
    def one_by_one() -> Iterable[Pair]:
        rest: list[Pair] = [(torch.empty(0, 1, 8, 8), torch.empty(0, dtype=torch.int64))] * 10
        for images, labels in endless(64):
            for digit in range(10):
                some = labels == digit
                held, kinds = rest[digit]
                rest[digit] = torch.cat([held, images[some]]), torch.cat([kinds, labels[some]])
                if len(rest[digit][1]) >= 32:
                    yield rest[digit]
                    rest[digit] = rest[digit][0][:0], rest[digit][1][:0]

    return watched(fresh("convolutional"), source=one_by_one())


@patient("SN406", "a validation after 30 steps that nobody ends")
def _() -> Watched:
    network = fresh("convolutional")
    with sn.monitor(network, every=2) as watch:
        fit(network, steps=30, cycle=False)
        fit(network, steps=70, cycle=False, before=lambda _: network.eval())
    return Watched(watch.report())
