"""Faults that a layer's parameters and statistics show, in models and in checkpoints."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tests.doctor.fixtures.case import Case
from tests.doctor.gallery.networks import batches, endless, fit, fresh, norms, trained
from tests.doctor.gallery.patient import patient, seen
from torch import nn

import steadynorm as sn


@patient("SN213", "fine-tuning with momentum=None after 50,000 batches")
def _() -> Case:
    network = trained("convolutional")
    for norm in norms(network):
        norm.momentum = None
        norm.num_batches_tracked.fill_(50_000)
    return seen(fit(network, steps=30).train(), batches())


@patient("SN214", "torch's AveragedModel with the statistics of the last model")
def _() -> Case:
    network = fresh()
    average = torch.optim.swa_utils.AveragedModel(network)

    def take(step: int) -> None:
        if step > 20 and step % 10 == 9:
            average.update_parameters(network)

    fit(network, steps=200, rate=0.03, cycle=False, before=take)
    return seen(average.eval(), batches())


@patient("SN110", "statistics of a checkpoint whose count of batches was lost, momentum=None")
def _() -> Case:
    network = trained("convolutional")
    for norm in norms(network):
        norm.momentum = None
        norm.num_batches_tracked.zero_()
    return seen(network.train(), batches())


@patient("SN111", "means and variances as Caffe stores them, in a checkpoint alone")
def _() -> Case:
    network = trained("convolutional")
    for norm in norms(network):
        norm.running_mean.mul_(999.982)
        norm.running_var.mul_(999.982)
    return stored(network.state_dict())


def stored(weights: Any, name: str = "checkpoint.pt") -> Case:
    """A checkpoint file alone; it is read at once, so the folder may go."""
    folder = tempfile.mkdtemp()
    path = Path(folder, name)
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    return Case(path)


@patient("SN101", "batch norms in inference mode while the rest trained")
def _() -> Case:
    network = fresh()
    fit(network, before=lambda _: [norm.eval() for norm in norms(network)] and None)
    return seen(network, batches())


@patient("SN101", "momentum 0")
def _() -> Case:
    network = fresh()
    for norm in norms(network):
        norm.momentum = 0.0
    return seen(fit(network), batches())


@patient("SN101", "an average of the weights (EMA) that leaves buffers as they were made")
def _() -> Case:
    network = fresh("convolutional")
    average = copy.deepcopy(network)

    def follow(_: int) -> None:
        for mine, theirs in zip(average.parameters(), network.parameters(), strict=True):
            mine.data.lerp_(theirs.data, 0.1)

    fit(network, before=follow)
    return seen(average.eval(), batches())


@patient("SN101", "a checkpoint saved without buffers, read into a new model and saved again")
def _() -> Case:
    network = fresh()
    network.load_state_dict(dict(trained().named_parameters()), strict=False)
    return stored(network.state_dict())


@patient("SN102", "one picture with an infinite value in a forward in training mode")
def _() -> Case:
    network = trained("convolutional").train()
    images = batches()[0][0].clone()
    images[0, 0, 3, 3] = float("inf")
    with torch.no_grad():
        network(images)
    return seen(network.eval(), batches())


@patient("SN102", "a checkpoint in half precision of a network fed with pictures from 0 to 25,500")
def _() -> Case:
    network = fit(fresh(), source=((25_500 * x, y) for x, y in endless(64)))
    return stored({name: value.half() for name, value in network.state_dict().items()})


@patient("SN103", "a variance computed as E[x²] - E[x]² in float32, with a large mean")
def _() -> Case:
    images, labels = zip(*((x + 3_000, y) for x, y in batches()), strict=True)
    network = fit(fresh(), source=zip(images * 8, labels * 8, strict=True))
    with torch.no_grad():
        x = network[1](network[0](torch.cat(images)))
        norms(network)[0].running_var.copy_((x * x).mean(0) - x.mean(0) ** 2)
    if (norms(network)[0].running_var >= 0).all():
        raise AssertionError("no variance went below 0")
    return seen(network, list(zip(images, labels, strict=True)))


@patient("SN104", "statistics measured on one constant picture")
def _() -> Case:
    network = trained()
    sn.calibrate(network, [torch.zeros(8, 1, 8, 8)], progress=False)
    return seen(network, batches())


@patient("SN105", "most scales of a layer driven to 0 by weight decay on them alone")
def _() -> Case:
    network = fresh()
    scale = norms(network)[1].weight
    others = [p for p in network.parameters() if p is not scale]
    optimizer = torch.optim.Adam(others, lr=3e-3)
    fit(network, optimizer=optimizer)
    with torch.no_grad():
        weak = scale.abs().argsort()[: len(scale) * 2 // 3]
        for _ in range(400):
            scale[weak] *= 1 - 0.1 * 0.3
    fit(network, steps=50, optimizer=torch.optim.Adam(others, lr=1e-3))
    return seen(network, batches())


@patient("SN106", "large scales that the next layer's weights take back, for half precision")
def _() -> Case:
    network = trained("convolutional")
    with torch.no_grad():  # relu(c·z) = c·relu(z): what the network computes stays the same
        for parameter in network[4].parameters():
            parameter.mul_(3e6)
        network[6].weight.div_(3e6)
    return seen(network, batches())


@patient("SN107", "momentum 0.99, as Keras means it")
def _() -> Case:
    network = fresh()
    for norm in norms(network):
        norm.momentum = 0.99
    return seen(fit(network).train(), batches())


@patient("SN108", "eps 1e-3 carried over from Keras, under inputs of small variance")
def _() -> Case:
    network = fit(fresh(), source=((0.01 * x, y) for x, y in endless(64)))
    for norm in norms(network):
        norm.eps = 1e-3
    return seen(network, [(0.01 * x, y) for x, y in batches()])


@patient("SN109", "statistics that moved in bfloat16")
def _() -> Case:
    network = fresh()
    for norm in norms(network):
        norm.running_mean, norm.running_var = (
            norm.running_mean.bfloat16(),
            norm.running_var.bfloat16(),
        )
        norm.momentum = 0.003
    return stored(fit_in_bfloat16(network).state_dict(), "checkpoint.safetensors")


def fit_in_bfloat16(network: nn.Module) -> nn.Module:
    """Training with the statistics' own type, as a module cast whole has it."""
    wide = {norm: (norm.running_mean, norm.running_var) for norm in norms(network)}

    def step(_: int) -> None:
        for norm, (mean, var) in wide.items():
            mean.copy_(norm.running_mean)
            var.copy_(norm.running_var)
            norm.running_mean, norm.running_var = mean.float(), var.float()

    fit(network, before=step)
    for norm, (mean, var) in wide.items():
        norm.running_mean, norm.running_var = mean, var
    return network
