"""Faults of random strength at random places, that state, model or batches show."""

from __future__ import annotations

import copy

import torch
from tests.doctor.fixtures.case import Case
from tests.doctor.gallery.blind import (
    Draw,
    Planted,
    fault,
    hosts,
    larger,
    replace,
    seen,
    train,
    untrained,
)
from tests.doctor.gallery.networks import Before, endless
from tests.doctor.outside import by_class, data, norms
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import steadynorm as sn

# --- what a layer keeps


@fault("SN101", "statistics never updated", "share of the layers")
def _(draw: Draw) -> Planted:
    network = draw.network()
    chosen = draw.some(norms(network))
    for norm in chosen:
        norm.reset_running_stats()
    return seen(network, len(chosen) / len(norms(network)))


@fault("SN102", "NaN in a layer's variances", "share of its channels")
def _(draw: Draw) -> Planted:
    network = draw.network()
    var = draw.one(norms(network)).running_var
    chosen = draw.some(list(range(len(var))))
    var[chosen] = torch.nan
    return seen(network, len(chosen) / len(var))


@fault("SN103", "negative variances", "share of a layer's channels")
def _(draw: Draw) -> Planted:
    network = draw.network()
    var = draw.one(norms(network)).running_var
    chosen = draw.some(list(range(len(var))))
    var[chosen] *= -1
    return seen(network, len(chosen) / len(var))


@fault("SN104", "weights shrunk until eps decides", "factor, powers of ten")
def _(draw: Draw) -> Planted:
    network, power = draw.network(), -1 - 4 * draw.strength
    conv, norm = draw.one(hosts(network))
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.mul_(10**power)
    norm.running_mean.mul_(10**power)
    norm.running_var.mul_(100**power)
    return seen(network, power)


@fault("SN107", "momentum as Keras means it", "momentum")
def _(draw: Draw) -> Planted:
    network, momentum = draw.network(), 0.9 + 0.0999 * draw.strength
    for norm in norms(network):
        norm.momentum = momentum
    with torch.no_grad():
        for x, _ in data(4, 8, seed=draw.seed + 7):
            network.train()(x)
    return seen(network, momentum)


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
    train(network, optimizer=torch.optim.Adam(groups))
    for norm in norms(network):
        norm.eps = 1e-5
    return seen(network, power)


@fault("SN111", "Caffe's scale factor, in a checkpoint alone", "factor, powers of ten")
def _(draw: Draw) -> Planted:
    network, power = draw.network(), 2.5 + draw.strength
    for norm in norms(network):
        norm.running_mean.mul_(10**power)
        norm.running_var.mul_(10**power)
    return Planted(Case(network.state_dict()), network, power)


# --- how a network is made


@fault("SN201", "a bias before a norm")
def _(draw: Draw) -> Planted:
    network = draw.network()
    conv, _ = draw.one(hosts(network))
    if conv.bias is None:
        conv.register_parameter("bias", nn.Parameter(torch.zeros(conv.out_channels)))
    return seen(network, 0.0)


@fault("SN202", "weight decay on scales and shifts")
def _(draw: Draw) -> Planted:
    network = draw.network()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.1**draw.strength)
    return seen(network, 0.0, optimizer=optimizer)


@fault("SN203", "frozen by requires_grad alone")
def _(draw: Draw) -> Planted:
    network = draw.network().train()
    for norm in draw.some(norms(network)):
        norm.requires_grad_(False)
    return seen(network, 0.0)


@fault("SN204", "a norm without running statistics")
def _(draw: Draw) -> Planted:
    network = draw.network()
    norm = draw.one(norms(network))
    new = nn.BatchNorm2d(norm.num_features, track_running_stats=False).eval()
    new.weight, new.bias = norm.weight, norm.bias
    replace(network, norm, new)
    return seen(network, 0.0)


@fault("SN205", "a dropout module before a norm", "probability")
def _(draw: Draw) -> Planted:
    network, p = draw.fresh(), 0.05 + 0.65 * draw.strength
    norm = draw.one(norms(network))
    replace(network, norm, nn.Sequential(nn.Dropout(p), norm))
    return seen(train(network), p)


@fault("SN211", "layers in training mode inside inference")
def _(draw: Draw) -> Planted:
    network = draw.network()
    for norm in draw.some(norms(network)):
        norm.train()
    return seen(network, 0.0)


@fault("SN212", "a norm as the last layer")
def _(draw: Draw) -> Planted:
    network = nn.Sequential(draw.fresh(), nn.BatchNorm1d(10))
    return seen(train(network), 0.0)


@fault("SN213", "an average that nothing moves")
def _(draw: Draw) -> Planted:
    network = draw.network().train()
    for norm in norms(network):
        norm.momentum = None
        norm.num_batches_tracked.fill_(int(10 ** (3 + 3 * draw.strength)))
    return seen(network, 0.0)


@fault("SN214", "averaged weights, the last model's statistics", "learning rate, powers of ten")
def _(draw: Draw) -> Planted:
    network, power = draw.fresh(), -3 + 1.7 * draw.strength
    average = AveragedModel(network)

    def take(step: int) -> None:
        if step > 20 and step % 5 == 4:
            average.update_parameters(network)

    train(network, rate=10**power, cycle=False, before=take)
    measured = copy.deepcopy(average.eval())
    sn.calibrate(measured, data(40), progress=False)
    return seen(average, power)._replace(twin=measured)


# --- what batches show


@fault("SN302", "statistics of another time in one layer", "standard deviations")
def _(draw: Draw) -> Planted:
    network, off = draw.network(), 0.1 * 30**draw.strength
    norm = draw.one(norms(network))
    signs = torch.randint(2, (norm.num_features,), generator=draw.chance) * 2.0 - 1
    norm.running_mean.add_(off * signs * norm.running_var.sqrt())
    return seen(network, off)


@fault("SN303", "trained at small batches", "samples")
def _(draw: Draw) -> Planted:
    size = round(2 + 6 * (1 - draw.strength))
    network = train(
        draw.fresh(), steps=min(720, 2880 // size), source=map(larger, endless(size)), rate=3e-3
    )
    return seen(network, size, data(32, size))


@fault("SN305", "pictures of many widths, padded to one", "value of the padding")
def _(draw: Draw) -> Planted:
    value = 5 * draw.strength

    def padded(x: Tensor) -> Tensor:
        x = x + 0.1 * torch.randn(x.shape, generator=draw.chance)
        out = torch.full((len(x), 1, 16, 48), value)
        for some, to in zip(x.split(4), out.split(4), strict=True):
            width = int(torch.randint(16, 33, (1,), generator=draw.chance))
            to[..., :width] = F.interpolate(some, (16, width))
        return out

    kind = draw.kind if draw.kind != "MONAI Classifier" else "MONAI DenseNet"  # fixed in size
    source = ((padded(x), y) for x, y in map(larger, endless(32)))
    network = train(untrained(kind, draw.seed), source=source)
    made = seen(network, value, [(padded(x), y) for x, y in data(10)])
    return Planted(made.case, network, value, padded)


@fault("SN306", "the data that it meets are brighter", "brightness")
def _(draw: Draw) -> Planted:
    network, more = draw.network(), 0.03 * 50**draw.strength

    def brighter(x: Tensor) -> Tensor:
        return x + more

    against = [(brighter(x), y) for x, y in data(10, seed=3)]
    return Planted(seen(network, more, against=against).case, network, more, brighter)


@fault("SN309", "batches sorted by class", "share of samples that are mixed")
def _(draw: Draw) -> Planted:
    mixed = 0.9 * (1 - draw.strength)
    network = train(draw.fresh(), source=by_class(mixed) * 3)
    return seen(network, mixed, by_class(mixed))._replace(twin=all_mixed(draw))


def all_mixed(draw: Draw) -> nn.Module:
    """A network that trained on as many digits, in batches of any."""
    return train(draw.fresh(), source=by_class(1.0) * 3)


@fault("SN310", "a weight that has overflowed")
def _(draw: Draw) -> Planted:
    network = draw.network()
    with torch.no_grad():
        draw.one(hosts(network))[0].weight.view(-1)[0] = torch.inf
    return seen(network, 0.0)


@fault("SN312", "dropout as a function before a norm", "probability")
def _(draw: Draw) -> Planted:
    network, p = draw.fresh(), 0.05 + 0.65 * draw.strength
    norm = draw.one(norms(network))
    replace(network, norm, Before(lambda m, x: F.dropout(x, p, m.training), norm))
    return seen(train(network), p)


@fault("SN313", "dropout as a function, in inference too", "probability")
def _(draw: Draw) -> Planted:
    network, p = draw.fresh(), 0.05 + 0.65 * draw.strength
    norm = draw.one(norms(network))
    replace(network, norm, Before(lambda _, x: F.dropout(x, p), norm))
    return seen(train(network), p)
