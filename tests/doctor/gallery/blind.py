"""Faults of random strength at random places in networks that others wrote, and healthy networks.

Each fault plants itself by a draw: which network, where, how strong. `strength` runs from 0 to 1
and means something else in each: its `unit` says what.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from tests.doctor.fixtures.case import Case
from tests.doctor.gallery.networks import Pair, endless, fit
from tests.doctor.gallery.patient import Diagnosed
from tests.doctor.outside import accuracy, build, by_class, data, large, norms
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import steadynorm as sn
from steadynorm.doctor import Report


def monai(name: str) -> nn.Module:
    from monai.networks import nets

    if name == "DenseNet":
        return nets.DenseNet(
            spatial_dims=2, in_channels=1, out_channels=10, init_features=8, growth_rate=8,
            block_config=(2, 2),
        )  # fmt: skip
    return nets.Classifier(
        in_shape=(1, 16, 16), classes=10, channels=(8, 16, 16), strides=(1, 2, 2), norm="BATCH"
    )


KINDS: dict[str, Callable[[], nn.Module]] = {
    "transformers ResNet": lambda: build("ResNet"),
    "transformers RegNet": lambda: build("RegNet"),
    "MONAI DenseNet": lambda: monai("DenseNet"),
    "MONAI Classifier": lambda: monai("Classifier"),
}


def untrained(kind: str, seed: int) -> nn.Module:
    """Weights of a normal distribution (He), which do not depend on how a class starts."""
    model = KINDS[kind]()
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


def train(model: nn.Module, **given: Any) -> nn.Module:
    settings: dict[str, Any] = {"steps": 90, "rate": 5e-3, "source": map(_large, endless(32))}
    return fit(model, **{**settings, **given})


def _large(pair: Pair) -> Pair:
    return large([pair])[0]


@lru_cache
def healthy(kind: str, seed: int) -> tuple[nn.Module, float]:
    """A network that reads digits, and how many of those that it never saw."""
    model = train(untrained(kind, seed))
    return model, accuracy(model)


@dataclass
class Draw:
    """One trial: which network, how strong a fault; `chance` decides where."""

    kind: str
    seed: int
    strength: float
    chance: torch.Generator

    def network(self) -> nn.Module:
        return copy.deepcopy(healthy(self.kind, self.seed)[0])

    def fresh(self) -> nn.Module:
        return untrained(self.kind, self.seed)

    def one(self, things: list[Any]) -> Any:
        return things[int(torch.randint(len(things), (1,), generator=self.chance))]

    def some(self, things: list[Any]) -> list[Any]:
        """A share of them, as large as the fault is strong; one at least."""
        order = torch.randperm(len(things), generator=self.chance).tolist()
        return [things[i] for i in order[: max(1, round(self.strength * len(things)))]]


class Planted(NamedTuple):
    """What the doctor gets; `network`, whose accuracy the fault costs; the strength by its unit.

    `seen`: what the network sees of a digit. `twin`: the same network without the fault, where it
    is another than the healthy one of its kind.
    """

    case: Diagnosed
    network: nn.Module
    amount: float
    seen: Callable[[Tensor], Tensor] = lambda x: x
    twin: nn.Module | None = None


@dataclass(frozen=True)
class Fault:
    """A fault whose name the doctor is to say first."""

    code: str
    unit: str
    plant: Callable[[Draw], Planted]


FAULTS: dict[str, Fault] = {}


def fault(code: str, name: str, unit: str = "") -> Callable[[Callable[[Draw], Planted]], None]:
    def add(plant: Callable[[Draw], Planted]) -> None:
        FAULTS[name] = Fault(code, unit, plant)

    return add


def seen(
    network: nn.Module, amount: float, pairs: Iterable[Pair] | None = None, **more: Any
) -> Planted:
    given = {"batches": data(10) if pairs is None else pairs, "loss": F.cross_entropy, **more}
    return Planted(Case(network, given), network, amount)


@dataclass(frozen=True)
class Run:
    """A training run that is over."""

    report: Report

    def diagnose(self) -> Report:
        return self.report


def watched(network: nn.Module, amount: float, **given: Any) -> Planted:
    with sn.monitor(network, every=3) as watch:
        train(network, cycle=False, **given)
    return Planted(Run(watch.report()), network, amount)


def hosts(network: nn.Module) -> list[Any]:
    """The layers before the batch norms, as far as the order of the modules shows them."""
    found, last = [], None
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and last is not None:
            found.append((last, module))
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            last = module if isinstance(module, nn.Conv2d) else None
    return found


def replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)


class Before(nn.Module):
    """A function of the input straight before a norm."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], norm: nn.Module) -> None:
        super().__init__()
        self.function, self.norm = function, norm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.function(self, x))
        return out


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


@fault("SN104", "weights before a norm shrunk until eps decides", "factor, powers of ten")
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
        draw.fresh(), steps=min(720, 2880 // size), source=map(_large, endless(size)), rate=3e-3
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
    source = ((padded(x), y) for x, y in map(_large, endless(32)))
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


# --- what a run shows


@fault("SN401", "a picture of NaN in one batch of a run")
def _(draw: Draw) -> Planted:
    when = int(torch.randint(10, 80, (1,), generator=draw.chance))

    def spoiled() -> Iterable[Pair]:
        for step, (x, y) in enumerate(map(_large, endless(32))):
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
    source, steps = map(_large, endless(size)), 2880 // size
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


# --- nothing


def sound(number: int) -> Case:
    """A healthy network, trained at random settings, shown with and without a loss."""
    chance = torch.Generator().manual_seed(number)

    def between(low: float, high: float) -> float:
        return low * (high / low) ** float(torch.rand((), generator=chance))

    kind = list(KINDS)[number % len(KINDS)]
    network = untrained(kind, 1000 + number)
    size, steps = round(between(16, 64)), round(between(80, 160))
    train(network, steps=steps, rate=between(2e-3, 8e-3), source=map(_large, endless(size)))
    loss = F.cross_entropy if number // len(KINDS) % 2 else None
    return Case(network, {"batches": data(round(between(8, 24)), size, seed=number), "loss": loss})
