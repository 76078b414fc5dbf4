"""Faults of random strength at random places, that state alone shows."""

from __future__ import annotations

import copy

import torch
from tests.doctor.fixtures.case import Case
from tests.doctor.gallery.blind import Draw, Planted, fault, hosts
from tests.doctor.outside import norms
from torch import Tensor, nn

import steadynorm as sn


@fault("SN101", "statistics never updated", "share of the layers")
def _(draw: Draw) -> Planted:
    network = draw.network()
    chosen = draw.some(norms(network))
    for norm in chosen:
        norm.reset_running_stats()
    return draw.seen(network, len(chosen) / len(norms(network)))


@fault("SN102", "NaN in a layer's variances", "share of its channels")
def _(draw: Draw) -> Planted:
    network = draw.network()
    var = draw.one(norms(network)).running_var
    chosen = draw.some(list(range(len(var))))
    var[chosen] = torch.nan
    return draw.seen(network, len(chosen) / len(var))


@fault("SN103", "negative variances", "share of a layer's channels")
def _(draw: Draw) -> Planted:
    network = draw.network()
    var = draw.one(norms(network)).running_var
    chosen = draw.some(list(range(len(var))))
    var[chosen] *= -1
    return draw.seen(network, len(chosen) / len(var))


@fault("SN104", "weights shrunk until eps decides", "factor, powers of ten")
def _(draw: Draw) -> Planted:
    network, power = draw.network(), -1 - 4 * draw.strength
    conv, norm = draw.one(hosts(network))
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.mul_(10**power)
    norm.running_mean.mul_(10**power)
    norm.running_var.mul_(100**power)
    return draw.seen(network, power)


@fault("SN105", "scales held at 0", "share of each layer's channels")
def _(draw: Draw) -> Planted:
    network = draw.fresh()
    dead = {norm: draw.some(list(range(norm.num_features))) for norm in norms(network)}

    def hold(_: int) -> None:
        with torch.no_grad():
            for norm, channels in dead.items():
                norm.weight[channels] = 0

    draw.train(network, before=hold)
    hold(0)
    return draw.seen(network, draw.strength)


class InHalf(nn.Module):
    """Folded and in half precision, as it is shipped."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.inner = sn.fold(
            copy.deepcopy(network).double(), torch.zeros(2, 1, 16, 16, dtype=torch.float64)
        )[0].half()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.half()).float()
        return out


@fault("SN106", "inputs in small units, weights that make up for it", "unit, powers of ten")
def _(draw: Draw) -> Planted:
    network, power = draw.network(), -2 - 5 * draw.strength
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and module.in_channels == 1:
                module.weight.div_(10**power)

    def scaled(x: Tensor) -> Tensor:
        return 10**power * x

    made = draw.seen(network, power, [(scaled(x), y) for x, y in draw.data()])
    return made._replace(network=InHalf(network), seen=scaled)


class InBFloat16(nn.Module):
    """A network in bfloat16 that takes float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.inner = network.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.bfloat16()).float()
        return out


@fault("SN109", "trained with statistics in bfloat16", "momentum, powers of ten")
def _(draw: Draw) -> Planted:
    network, power = draw.fresh(), -1 - 1.5 * draw.strength
    for norm in norms(network):
        norm.momentum = 10**power
    twin = draw.train(copy.deepcopy(network))
    network = draw.train(InBFloat16(network)).train()
    return draw.seen(network, power)._replace(twin=twin)


@fault("SN107", "momentum as Keras means it", "momentum")
def _(draw: Draw) -> Planted:
    network, momentum = draw.network(), 0.9 + 0.0999 * draw.strength
    for norm in norms(network):
        norm.momentum = momentum
    with torch.no_grad():
        for x, _ in draw.data(4, 8):
            network.train()(x)
    return draw.seen(network, momentum)


@fault("SN108", "weights of Keras's eps under torch's", "size of the weights, powers of ten")
def _(draw: Draw) -> Planted:
    network, power = draw.fresh(), -1 - 1.2 * draw.strength
    before = [conv.weight for conv, _ in hosts(network)]
    with torch.no_grad():
        for weight in before:
            weight.mul_(10**power)
    for norm in norms(network):
        norm.eps = 1e-3
    held = {id(weight) for weight in before}
    others = [p for p in network.parameters() if id(p) not in held]
    groups = [{"params": before, "lr": 5e-3 * 10**power}, {"params": others, "lr": 5e-3}]
    draw.train(network, optimizer=torch.optim.Adam(groups))
    for norm in norms(network):
        norm.eps = 1e-5
    return draw.seen(network, power)


@fault("SN110", "an average that has lost its count", "samples of the batch that replaces it")
def _(draw: Draw) -> Planted:
    size = round(2 + 30 * (1 - draw.strength))
    network = draw.network().train()
    for norm in norms(network):
        norm.momentum = None
        norm.num_batches_tracked.zero_()
    trained_on = copy.deepcopy(network)
    with torch.no_grad():
        trained_on(draw.data(1, size)[0][0])
    return draw.seen(network, size)._replace(network=trained_on)


@fault("SN111", "Caffe's scale factor, in a checkpoint alone", "factor, powers of ten")
def _(draw: Draw) -> Planted:
    network, power = draw.network(), 2.5 + draw.strength
    for norm in norms(network):
        norm.running_mean.mul_(10**power)
        norm.running_var.mul_(10**power)
    return Planted(Case(network.state_dict()), network, power)
