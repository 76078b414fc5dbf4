"""Faults that the model's structure, modes and optimizer show."""

from __future__ import annotations

from typing import Any

import torch
from tests.doctor.fixtures.case import Case
from tests.doctor.gallery.networks import batches, fit, fresh, norms, trained
from tests.doctor.gallery.patient import patient, seen
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@patient("SN201", "convolutions with biases before batch norms")
def _() -> Case:
    network = fresh("convolutional")
    for index in (0, 3, 6):
        network[index].register_parameter(
            "bias", nn.Parameter(torch.zeros(network[index].out_channels))
        )
    return seen(fit(network), batches())


@patient("SN202", "weight decay on every parameter")
def _() -> Case:
    network = fresh("convolutional")
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    return seen(fit(network, optimizer=optimizer), batches(), optimizer=optimizer)


@patient("SN203", "a backbone frozen by requires_grad=False, in training mode")
def _() -> Case:
    network = trained("convolutional")
    for parameter in network[:9].parameters():
        parameter.requires_grad_(False)
    head = torch.optim.Adam(network[9:].parameters(), lr=1e-3)
    return seen(fit(network, steps=30, optimizer=head).train(), batches())


@patient("SN204", "track_running_stats=False in one layer")
def _() -> Case:
    network = fresh()
    network[5] = nn.BatchNorm1d(128, track_running_stats=False)
    return seen(fit(network), batches())


@patient("SN205", "dropout straight before a batch norm")
def _() -> Case:
    network = fresh()
    network = nn.Sequential(*network[:5], nn.Dropout(0.5), *network[5:])
    return seen(fit(network), batches())


@patient("SN206", "two batch norms, one after the other")
def _() -> Case:
    network = fresh("convolutional")
    network = nn.Sequential(*network[:5], nn.BatchNorm2d(32), *network[5:])
    return seen(fit(network), batches())


@patient("SN212", "a classifier that ends in a batch norm")
def _() -> Case:
    network = fresh()
    return seen(fit(nn.Sequential(*network, nn.BatchNorm1d(10))), batches())


class Twins(nn.Module):
    """Both halves of a picture through the same layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64, bias=False)
        self.norm = nn.BatchNorm1d(64)
        self.out = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        top, bottom = x.flatten(1).chunk(2, dim=1)
        halves = [self.norm(self.first(part)).relu() for part in (top, bottom)]
        return self.out(torch.cat(halves, 1))


@patient("SN207", "one batch norm for two inputs")
def _() -> Case:
    torch.manual_seed(0)
    return seen(fit(Twins()), batches())


class Checkpointed(nn.Module):
    """Its first layers are computed again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        network = fresh("convolutional")
        self.first, self.rest = network[:6], network[6:]

    def forward(self, x: Tensor) -> Any:
        return self.rest(checkpoint(self.first, x, use_reentrant=False))


@patient("SN208", "torch's batch norms inside activation checkpointing")
def _() -> Case:
    return seen(fit(Checkpointed()), batches())


@patient("SN209", "two replicas of 8 samples in DataParallel, without synchronization")
def _() -> Case:
    network = nn.DataParallel(trained("convolutional"), device_ids=None)
    network.device_ids = [0, 1]  # as on a machine with two devices; nothing is run on them
    return seen(network, batches(8, count=32))


@patient("SN210", "training mode on a model about to be exported")
def _() -> Case:
    return seen(trained("convolutional").train(), batches(), exporting=True)


@patient("SN211", "one layer left in training mode inside a model in inference")
def _() -> Case:
    network = trained("convolutional")
    norms(network)[1].train()
    return seen(network, batches())
