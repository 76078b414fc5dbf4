"""What faults are planted in: networks that others wrote, trained on digits; and healthy ones.

A fault plants itself by a draw: which network, where, how strong. `strength` runs from 0 to 1 and
means something else in each: its `unit` says what. The faults are in `blind_faults.py`.
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
from tests.doctor.outside import accuracy, build, data, large
from torch import Tensor, nn
from torch.nn import functional as F

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
    settings: dict[str, Any] = {"steps": 90, "rate": 5e-3, "source": map(larger, endless(32))}
    return fit(model, **{**settings, **given})


def larger(pair: Pair) -> Pair:
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


def sound(number: int) -> Case:
    """A healthy network, trained at random settings, shown with and without a loss."""
    chance = torch.Generator().manual_seed(number)

    def between(low: float, high: float) -> float:
        return low * (high / low) ** float(torch.rand((), generator=chance))

    kind = list(KINDS)[number % len(KINDS)]
    network = untrained(kind, 1000 + number)
    size, steps = round(between(16, 64)), round(between(80, 160))
    train(network, steps=steps, rate=between(2e-3, 8e-3), source=map(larger, endless(size)))
    loss = F.cross_entropy if number // len(KINDS) % 2 else None
    return Case(network, {"batches": data(round(between(8, 24)), size, seed=number), "loss": loss})
