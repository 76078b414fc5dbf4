"""What faults are planted in: networks that others wrote, trained on digits; and healthy ones.

A fault plants itself by a draw: which network, where, how strong. `strength` runs from 0 to 1 and
means something else in each: its `unit` says what. The faults are in
`blind_state.py`, `blind_model.py`, `blind_data.py` and `blind_runs.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from tests.doctor.fixtures.case import Case
from tests.doctor.gallery.networks import Pair, endless, fit
from tests.doctor.gallery.patient import Diagnosed
from tests.doctor.outside import build, data, large
from torch import Tensor, nn
from torch.nn import functional as F

import steadynorm as sn
from steadynorm.doctor import Report


def monai(name: str) -> nn.Module:
    from monai.networks import nets

    if name == "ResNet":
        return nets.ResNet(
            "basic", [1, 1, 1, 1], [8, 16, 16, 32], spatial_dims=2, n_input_channels=1,
            num_classes=10, conv1_t_size=3,
        )  # fmt: skip
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
    "transformers ResNet with bottlenecks": lambda: build("ResNet", layer_type="bottleneck"),
    "transformers ResNet with more layers": lambda: build("ResNet", (2, 3)),
    "transformers RegNet": lambda: build("RegNet"),
    "MONAI ResNet": lambda: monai("ResNet"),
    "MONAI DenseNet": lambda: monai("DenseNet"),
    "MONAI Classifier": lambda: monai("Classifier"),
}


def untrained(kind: str, seed: int) -> nn.Module:
    """Weights of a normal distribution (He), which do not depend on how a class starts."""
    torch.manual_seed(seed)
    model = KINDS[kind]()
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


def train(model: nn.Module, seed: int = 0, size: int = 32, **given: Any) -> nn.Module:
    settings: dict[str, Any] = {"steps": 90, "rate": 5e-3}
    if "source" not in given:
        settings["source"] = map(larger, endless(size, seed))
    return fit(model, **{**settings, **given})


def larger(pair: Pair) -> Pair:
    return large([pair])[0]


@lru_cache
def healthy(kind: str, seed: int) -> nn.Module:
    """A network that reads digits."""
    return train(untrained(kind, seed), seed)


@dataclass
class Draw:
    """One trial: which network, how strong a fault; `chance` decides where."""

    kind: str
    seed: int
    strength: float
    chance: torch.Generator

    def network(self) -> nn.Module:
        return copy.deepcopy(healthy(self.kind, self.seed))

    def fresh(self) -> nn.Module:
        return untrained(self.kind, self.seed)

    def train(self, network: nn.Module, **given: Any) -> nn.Module:
        return train(network, self.seed, **given)

    def data(self, count: int = 10, size: int = 32) -> list[Pair]:
        return data(count, size, seed=self.seed + 1)

    def seen(
        self, network: nn.Module, amount: float = 0.0, pairs: list[Pair] | None = None, **more: Any
    ) -> Planted:
        """The network with labelled batches."""
        given = {"batches": self.data() if pairs is None else pairs, "loss": F.cross_entropy}
        return Planted(Case(network, {**given, **more}), network, amount)

    def watched(self, network: nn.Module, amount: float = 0.0, **given: Any) -> Planted:
        """A run of training that `monitor` has seen; the twin trains at the same rate, too."""
        with sn.monitor(network, every=3) as watch:
            self.train(network, cycle=False, **given)
        twin = self.train(self.fresh(), cycle=False)
        return Planted(Run(watch.report()), network, amount, twin=twin)

    def one(self, things: list[Any]) -> Any:
        return things[int(torch.randint(len(things), (1,), generator=self.chance))]

    def some(self, things: list[Any]) -> list[Any]:
        """A share of them, as large as the fault is strong; one at least."""
        order = torch.randperm(len(things), generator=self.chance).tolist()
        return [things[i] for i in order[: max(1, round(self.strength * len(things)))]]


class Planted(NamedTuple):
    """What the doctor gets; `network`, whose accuracy the fault costs; the strength by its unit.

    `seen`: what the network sees of a digit. `twin`: the same network without the fault, where it
    is another than the healthy one of its kind. `answers`: how the network is asked.
    """

    case: Diagnosed
    network: nn.Module
    amount: float
    seen: Callable[[Tensor], Tensor] = lambda x: x
    twin: nn.Module | None = None
    answers: Callable[[nn.Module, Tensor], Tensor] = lambda network, x: network.eval()(x)


def by_twos(network: nn.Module, x: Tensor) -> Tensor:
    """Answers of a network in the mode that it was left in, asked about two digits at a time."""
    return torch.cat([network(two) for two in x.split(2)])


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


@dataclass(frozen=True)
class Run:
    """A training run that is over."""

    report: Report

    def diagnose(self) -> Report:
        return self.report


def activations(network: nn.Module) -> list[Any]:
    """The ReLUs and their kin that stand straight after a batch norm, each with that norm."""
    modules = [m for m in network.modules() if not list(m.children())]
    kinds = (nn.ReLU, nn.PReLU)
    return [
        (n, a)
        for n, a in pairwise(modules)
        if isinstance(n, nn.BatchNorm2d) and isinstance(a, kinds)
    ]


def with_head(network: nn.Module) -> nn.Module:
    """The same with a batch norm in its last layers, as projection heads have."""
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    width = 32
    head = nn.Sequential(
        nn.Linear(last.in_features, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10)
    )
    replace(network, last, head)
    return network


def hosts(network: nn.Module) -> list[Any]:
    """The layers before the batch norms, as far as the order of the modules shows them."""
    found, last = [], None
    for module in network.modules():
        fits = last is not None and last.out_channels == getattr(module, "num_features", None)
        if isinstance(module, nn.BatchNorm2d) and fits:
            found.append((last, module))
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            last = module if isinstance(module, nn.Conv2d) else None
    return found


def replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)


def sound(number: int) -> tuple[Run, Case]:
    """A healthy network, trained at random settings: the run, and the network with batches, with
    and without a loss.
    """
    chance = torch.Generator().manual_seed(number)

    def between(low: float, high: float) -> float:
        return low * (high / low) ** float(torch.rand((), generator=chance))

    kind = list(KINDS)[number % len(KINDS)]
    network = untrained(kind, number)
    size, steps = round(between(16, 64)), round(between(80, 160))
    with sn.monitor(network, every=3) as watch:
        train(network, number, size, steps=steps, rate=between(2e-3, 8e-3))
    loss = F.cross_entropy if number // len(KINDS) % 2 else None
    batches = data(round(between(8, 24)), size, seed=number + 1)
    return Run(watch.report()), Case(network, {"batches": batches, "loss": loss})
