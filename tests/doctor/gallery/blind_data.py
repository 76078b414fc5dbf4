"""Faults of random strength that batches show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tests.doctor.gallery.blind import (
    Draw,
    Planted,
    activations,
    fault,
    hosts,
    larger,
    replace,
    untrained,
    with_head,
)
from tests.doctor.gallery.networks import Before, endless
from tests.doctor.outside import by_class, classifier, data, norms
from torch import Tensor, nn
from torch.nn import functional as F


@fault("SN302", "statistics of another time in one layer", "standard deviations")
def _(draw: Draw) -> Planted:
    network, off = draw.network(), 0.1 * 30**draw.strength
    norm = draw.one(norms(network))
    signs = torch.randint(2, (norm.num_features,), generator=draw.chance) * 2.0 - 1
    norm.running_mean.add_(off * signs * norm.running_var.sqrt())
    return draw.seen(network, off)


@fault("SN303", "trained at small batches, with a norm in the head", "samples")
def _(draw: Draw) -> Planted:
    size = round(2 + 6 * (1 - draw.strength))
    network = draw.train(
        with_head(draw.fresh()), steps=min(480, 2880 // size), size=size, rate=2e-3
    )
    made = draw.seen(network, size, draw.data(32, size))
    return made._replace(twin=draw.train(with_head(draw.fresh())))


@fault("SN304", "a last batch of one, with a norm in the head")
def _(draw: Draw) -> Planted:
    network = draw.train(with_head(draw.fresh()))
    made = draw.seen(network, pairs=[*draw.data(), *draw.data(1, 1)])
    return made._replace(twin=network)


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
    source = ((padded(x), y) for x, y in map(larger, endless(32, draw.seed)))
    network = draw.train(untrained(kind, draw.seed), source=source)
    made = draw.seen(network, value, [(padded(x), y) for x, y in draw.data(10)])
    return Planted(made.case, network, value, padded)


@fault("SN306", "the data that it meets are brighter", "brightness")
def _(draw: Draw) -> Planted:
    network, more = draw.network(), 0.03 * 50**draw.strength

    def brighter(x: Tensor) -> Tensor:
        return x + more

    against = [(brighter(x), y) for x, y in data(10, seed=draw.seed + 3)]
    return Planted(draw.seen(network, more, against=against).case, network, more, brighter)


@fault("SN307", "large scales before sigmoids", "scale, powers of ten")
def _(draw: Draw) -> Planted:
    power = 2 * draw.strength

    def with_sigmoids(scale: float) -> nn.Module:
        network = draw.fresh()
        for norm, activation in activations(network):
            replace(network, activation, nn.Sigmoid())
            nn.init.constant_(norm.weight, scale)
        return draw.train(network)

    return draw.seen(with_sigmoids(10**power), power)._replace(twin=with_sigmoids(1.0))


@fault("SN308", "sigmoid layers, the first alone with a norm", "layers")
def _(draw: Draw) -> Planted:
    from monai.networks.blocks import Convolution  # imports TensorFlow

    depth = round(2 + 10 * draw.strength)

    def plain(norm: str | None, activation: str) -> nn.Module:
        torch.manual_seed(draw.seed)
        first = Convolution(2, 1, 16, strides=2, norm="BATCH", act=activation)
        others = [Convolution(2, 16, 16, norm=norm, act=activation) for _ in range(depth)]
        last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
        return draw.train(nn.Sequential(first, *others, *last))

    return draw.seen(plain(None, "SIGMOID"), depth)._replace(twin=plain("BATCH", "RELU"))


@fault("SN309", "batches sorted by class", "share of samples that are mixed")
def _(draw: Draw) -> Planted:
    mixed = 0.9 * (1 - draw.strength)
    network = draw.train(draw.fresh(), source=by_class(mixed, draw.seed) * 3)
    return draw.seen(network, mixed, by_class(mixed, draw.seed))._replace(twin=all_mixed(draw))


def all_mixed(draw: Draw, **given: Any) -> nn.Module:
    """A network that trained on as many digits, in batches of any."""
    return draw.train(draw.fresh(), source=by_class(1.0, draw.seed) * 3, **given)


@fault("SN310", "a weight that has overflowed")
def _(draw: Draw) -> Planted:
    network = draw.network()
    with torch.no_grad():
        draw.one(hosts(network))[0].weight.view(-1)[0] = torch.inf
    return draw.seen(network)


@fault("SN311", "a norm along a transformer's positions")
def _(draw: Draw) -> Planted:
    def vision(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
        torch.manual_seed(draw.seed)
        network = classifier(
            "ViT", image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2,
            num_attention_heads=4, intermediate_size=64,
        )  # fmt: skip
        place = torch.Generator().manual_seed(draw.seed)
        layers = [m for m in network.modules() if isinstance(m, nn.LayerNorm)][:-1]
        chosen = layers[int(torch.randint(len(layers), (1,), generator=place))]
        replace(network, chosen, norm(chosen))
        return draw.train(network, steps=200)

    network = vision(lambda _: nn.BatchNorm1d(17))  # 16 patches and the class's token
    return draw.seen(network)._replace(twin=vision(lambda _: ByFeature(32)))


class ByFeature(nn.BatchNorm1d):
    """Of (N, L, C), along C."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(-1, 1)).movedim(1, -1)


@fault("SN312", "dropout as a function before a norm", "probability")
def _(draw: Draw) -> Planted:
    network, p = draw.fresh(), 0.05 + 0.65 * draw.strength
    norm = draw.one(norms(network))
    replace(network, norm, Before(lambda m, x: F.dropout(x, p, m.training), norm))
    return draw.seen(draw.train(network), p)


@fault("SN313", "dropout as a function, in inference too", "probability")
def _(draw: Draw) -> Planted:
    network, p = draw.fresh(), 0.05 + 0.65 * draw.strength
    norm = draw.one(norms(network))
    replace(network, norm, Before(lambda _, x: F.dropout(x, p), norm))
    return draw.seen(draw.train(network), p)
