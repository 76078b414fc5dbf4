"""Faults in how a network is made, at random places."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from tests.doctor.gallery.blind import Draw, Planted, by_twos, fault, hosts, replace
from tests.doctor.outside import norms
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import steadynorm as sn


@fault("SN201", "a bias before a norm")
def _(draw: Draw) -> Planted:
    network = draw.network()
    conv, _ = draw.one(hosts(network))
    if conv.bias is None:
        conv.register_parameter("bias", nn.Parameter(torch.zeros(conv.out_channels)))
    return draw.seen(network)


@fault("SN202", "weight decay on scales and shifts")
def _(draw: Draw) -> Planted:
    network = draw.network()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.1**draw.strength)
    return draw.seen(network, optimizer=optimizer)


@fault("SN203", "frozen by requires_grad alone")
def _(draw: Draw) -> Planted:
    network = draw.network().train()
    for norm in draw.some(norms(network)):
        norm.requires_grad_(False)
    return draw.seen(network)


@fault("SN204", "a norm without running statistics")
def _(draw: Draw) -> Planted:
    network = draw.network()
    norm = draw.one(norms(network))
    new = nn.BatchNorm2d(norm.num_features, track_running_stats=False).eval()
    new.weight, new.bias = norm.weight, norm.bias
    replace(network, norm, new)
    return draw.seen(network)._replace(answers=by_twos)


@fault("SN205", "a dropout module before a norm", "probability")
def _(draw: Draw) -> Planted:
    network, p = draw.fresh(), 0.05 + 0.65 * draw.strength
    norm = draw.one(norms(network))
    replace(network, norm, nn.Sequential(nn.Dropout(p), norm))
    return draw.seen(draw.train(network), p)


@fault("SN206", "a second norm behind one")
def _(draw: Draw) -> Planted:
    network = draw.fresh()
    norm = draw.one(norms(network))
    replace(network, norm, nn.Sequential(norm, nn.BatchNorm2d(norm.num_features)))
    return draw.seen(draw.train(network))


@fault("SN207", "one norm in the place of several", "share of those that fit")
def _(draw: Draw) -> Planted:
    network = draw.fresh()
    alike = defaultdict(list)
    for norm in norms(network):
        alike[norm.num_features].append(norm)
    first, *others = draw.one([some for some in alike.values() if len(some) > 1])
    chosen = draw.some(others)
    for norm in chosen:
        replace(network, norm, first)
    return draw.seen(draw.train(network), len(chosen) / len(others))


class Checkpointed(nn.Module):
    """A part that is computed again in the backward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)


@fault("SN208", "a norm inside activation checkpointing")
def _(draw: Draw) -> Planted:
    network = draw.fresh()
    norm = draw.one(norms(network))
    replace(network, norm, Checkpointed(norm))
    return draw.seen(draw.train(network))


@fault("SN209", "two replicas of small batches, unsynchronized", "samples in a replica")
def _(draw: Draw) -> Planted:
    size = round(2 + 10 * (1 - draw.strength))
    network = draw.network()
    wrapped = nn.DataParallel(network, device_ids=None)
    wrapped.device_ids = [0, 1]  # as on a machine with two devices; nothing is run on them
    made = draw.seen(wrapped, size, draw.data(16, 2 * size))
    return made._replace(network=network)


@fault("SN210", "training mode in a network about to be exported")
def _(draw: Draw) -> Planted:
    network = draw.network().train()
    return draw.seen(network, exporting=True)._replace(answers=by_twos)


@fault("SN211", "layers in training mode inside inference")
def _(draw: Draw) -> Planted:
    network = draw.network()
    for norm in draw.some(norms(network)):
        norm.train()
    return draw.seen(network)._replace(answers=by_twos)


@fault("SN212", "a norm as the last layer")
def _(draw: Draw) -> Planted:
    network = nn.Sequential(draw.fresh(), nn.BatchNorm1d(10))
    return draw.seen(draw.train(network))


@fault("SN213", "an average that nothing moves")
def _(draw: Draw) -> Planted:
    network = draw.network().train()
    for norm in norms(network):
        norm.momentum = None
        norm.num_batches_tracked.fill_(int(10 ** (3 + 3 * draw.strength)))
    return draw.seen(network)


@fault("SN214", "averaged weights, the last model's statistics", "learning rate, powers of ten")
def _(draw: Draw) -> Planted:
    network, power = draw.fresh(), -3 + 1.7 * draw.strength
    average = AveragedModel(network)

    def take(step: int) -> None:
        if step > 20 and step % 5 == 4:
            average.update_parameters(network)

    draw.train(network, rate=10**power, cycle=False, before=take)
    measured = copy.deepcopy(average.eval())
    sn.calibrate(measured, draw.data(40), progress=False)
    return draw.seen(average, power)._replace(twin=measured)
