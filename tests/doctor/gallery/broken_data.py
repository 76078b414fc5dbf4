"""Faults that batches show."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tests.doctor.fixtures.case import Case
from tests.doctor.gallery.networks import (
    Pair,
    batches,
    digits,
    endless,
    fit,
    fresh,
    norms,
    trained,
)
from tests.doctor.gallery.patient import patient, seen
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import steadynorm as sn


@patient("SN303", "trained at batch 2, fully connected")
def _() -> Case:
    network = fit(fresh(), size=2, steps=1200, rate=5e-3)
    return seen(network, batches(2))


@patient("SN303", "trained at batch 2, convolutional: four positions count for three values")
def _() -> Case:
    network = fit(fresh("convolutional"), size=2, steps=800, rate=4e-3)
    return seen(network, batches(2))


@patient("SN303", "ghosts of 2 samples in a batch of 64")
def _() -> Case:
    network = fit(fresh(statistics=sn.Ghost(2)))
    return seen(network, batches(64))


@patient("SN302", "averaged weights (SWA) with the statistics of the last ones")
def _() -> Case:
    network = fresh()
    average = torch.optim.swa_utils.AveragedModel(network)

    def take(step: int) -> None:
        if step > 20 and step % 10 == 9:
            average.update_parameters(network)

    fit(network, steps=200, rate=0.03, cycle=False, before=take)
    return seen(average.module.eval(), batches())


@patient("SN302", "weights of the last epoch, statistics of an early one")
def _() -> Case:
    network = fresh()
    early: list[Tensor] = []

    def keep(step: int) -> None:
        if step == 10:
            early.extend(buffer.clone() for buffer in network.buffers())

    fit(network, before=keep)
    for buffer, value in zip(network.buffers(), early, strict=True):
        buffer.copy_(value)
    return seen(network, batches())


@patient("SN302", "one layer's statistics taken from another checkpoint")
def _() -> Case:
    network = trained("convolutional")
    other = fit(fresh("convolutional", "torch"), steps=20, rate=1e-2)
    norms(network)[1].running_mean.copy_(norms(other)[1].running_mean)
    norms(network)[1].running_var.copy_(norms(other)[1].running_var)
    return seen(network, batches())


@patient("SN302", "the same digits on fifty times the scale, after a change of the pipeline")
def _() -> Case:
    network = trained("convolutional")
    return seen(network, [(50 * images, labels) for images, labels in batches()])


@patient("SN304", "a batch of one in training")
def _() -> Case:
    return seen(trained().train(), batches(1))


@patient("SN304", "the last batch of an epoch holds one sample")
def _() -> Case:
    images, labels = digits()[:2]
    dataset = TensorDataset(images[:1025], labels[:1025])
    return seen(trained(), DataLoader(dataset, batch_size=64, shuffle=True))


class Sequences(nn.Module):
    """The rows of a digit as a sequence, (N, 8, L), padded by zeros to the longest."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(8, 24, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(24)
        self.second = nn.Conv1d(24, 24, 3, padding=1, bias=False)
        self.after = nn.BatchNorm1d(24)
        self.out = nn.Linear(24, 10)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.out(self.after(self.second(x)).relu().amax(2))


def _padded(pair: Pair, seed: int, *, length: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences of 8 to 24 rows, a digit once to three times; where they are valid; labels."""
    images, labels = pair
    generator = torch.Generator().manual_seed(seed)
    repeats = torch.randint(1, 4, (len(images),), generator=generator)
    rows = images[:, 0].transpose(1, 2).repeat(1, 1, 3)
    valid = torch.arange(length)[None] < 8 * repeats[:, None]
    return (rows + 2) * valid[:, None], valid, labels


def _sequences() -> tuple[nn.Module, list[tuple[Tensor, Tensor, Tensor]]]:
    torch.manual_seed(0)
    padded = (_padded(pair, number) for number, pair in enumerate(endless(64)))
    network = fit(Sequences(), source=((x, y) for x, _, y in padded), steps=100)
    return network, [_padded(pair, -number) for number, pair in enumerate(batches(), 1)]


@patient("SN305", "sequences padded by zeros, seen by their values")
def _() -> Case:
    network, data = _sequences()
    return seen(network, [(x, y) for x, _, y in data])


@patient("SN305", "sequences padded by zeros, with a mask in the batch that no layer gets")
def _() -> Case:
    network, data = _sequences()
    named: list[dict[str, Any]] = [dict(x=x, attention_mask=valid) for x, valid, _ in data]
    labels = {id(batch["x"]): y for batch, (_, _, y) in zip(named, data, strict=True)}

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, labels[id(batch["x"])])

    return Case(network, {"batches": named, "loss": loss})


@patient("SN306", "pictures of a third of the contrast")
def _() -> Case:
    pale = [(images / 3, labels) for images, labels in batches(seed=2)]
    return Case(trained("convolutional"), {**seen(None, pale).given, "against": batches()})


@patient("SN306", "a brighter camera, met after training")
def _() -> Case:
    bright = [(images + 1.5, labels) for images, labels in batches(seed=2)]
    return Case(trained(), {**seen(None, batches()).given, "against": bright})


class Rows(nn.Module):
    """Reads a digit row by row."""

    def __init__(self, *, told: bool = True, drop: float = 0.0, axis: int = 1) -> None:
        super().__init__()
        self.told, self.drop, self.axis = told, drop, axis
        self.steps = nn.LSTM(8, 32, batch_first=True)
        self.norm = nn.BatchNorm1d(32 if axis == 2 else 8)
        self.out = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.steps(x[:, 0])[0].movedim(self.axis, 1)
        rows = F.dropout(rows, self.drop, self.training if self.told else True)
        return self.out(self.norm(rows).movedim(1, self.axis).flatten(1))


def _rows(**settings: Any) -> Case:
    torch.manual_seed(0)
    return seen(fit(Rows(**settings)), batches())


@patient("SN311", "BatchNorm1d(8) on the 8 steps of an LSTM")
def _() -> Case:
    return _rows()


@patient("SN312", "F.dropout before a batch norm")
def _() -> Case:
    return _rows(axis=2, drop=0.5)


@patient("SN313", "F.dropout without training=self.training")
def _() -> Case:
    return _rows(axis=2, drop=0.5, told=False)


@patient("SN307", "sigmoids after batch norms whose weight has grown to 30")
def _() -> Case:
    network = fit(fresh(activation=nn.Sigmoid), rate=1e-2)
    with torch.no_grad():
        norms(network)[1].weight.mul_(30)
    fit(network, steps=50, optimizer=torch.optim.SGD(network[-1:].parameters(), lr=0.1))
    return seen(network, batches())


@patient("SN307", "tanh inside our layer, carried off by its bias")
def _() -> Case:
    network = fresh("convolutional", activation=nn.Tanh)
    network, _ = sn.convert(fit(network), fuse=True)
    with torch.no_grad():
        norms(network)[0].bias.add_(4)
    fit(network, steps=100, optimizer=torch.optim.Adam(network[3:].parameters(), lr=3e-3))
    return seen(network, batches())


@patient("SN308", "ten sigmoid layers, only the first normalized")
def _() -> Case:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64)]
    for _ in range(10):
        layers += [nn.Sigmoid(), nn.Linear(64, 64)]
    network = nn.Sequential(*layers, nn.Sigmoid(), nn.Linear(64, 10))
    return seen(fit(network, steps=50), batches())


@patient("SN309", "batches sorted by class, in training and now")
def _() -> Case:
    def by_class(pair: Pair) -> list[Pair]:
        images, labels = pair
        some = [labels == kind for kind in range(10)]
        return [(images[which], labels[which]) for which in some]

    sorted_batches = [p for pair in batches(700) for p in by_class(pair)]
    sorted_batches = [(x[:32], y[:32]) for x, y in sorted_batches]
    order = torch.randint(len(sorted_batches), (150,), generator=torch.Generator().manual_seed(0))
    network = fit(fresh(), source=[sorted_batches[i] for i in order])
    return seen(network, sorted_batches)


@patient("SN310", "one broken picture")
def _() -> Case:
    data = batches()
    images, labels = data[3]
    images = images.clone()
    images[5, 0, 2, 2] = float("nan")
    return seen(trained(), [*data[:3], (images, labels), *data[4:]])


@patient("SN310", "a weight that has overflowed")
def _() -> Case:
    network = copy.deepcopy(trained("convolutional"))
    with torch.no_grad():
        network[3].weight[0] = float("inf")
    return seen(network, batches())
