"""Training steps of whole networks, before and after their batch norms become ours."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.evidence.timing import interleaved, speed_up
from steadynorm.report.page import Table


def _huggingface(name: str, **settings: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(**settings)
    model: nn.Module = getattr(transformers, f"{name}Model")(config)
    return model


def _unet3d() -> nn.Module:
    from monai.networks.nets.unet import UNet

    net: nn.Module = UNet(
        spatial_dims=3, in_channels=1, out_channels=2, channels=(16, 32, 64, 128),
        strides=(2, 2, 2), num_res_units=2, norm="batch",
    )  # fmt: skip
    return net


PACKAGES = ("transformers", "monai")
"""What the networks are made of."""
_IMAGE = (16, 3, 160, 160)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-18": (
        lambda: _huggingface(
            "ResNet", layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512]
        ),
        _IMAGE,
    ),
    "ResNet-50": (lambda: _huggingface("ResNet"), _IMAGE),
    "MobileNetV2": (lambda: _huggingface("MobileNetV2"), _IMAGE),
    "U-Net 3-d": (_unet3d, (2, 1, 64, 64, 64)),
}


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """A loss to be differentiated: the mean square of the output."""
    answer = model(x)
    output: Tensor = getattr(answer, "last_hidden_state", answer)
    return output.square().mean()


def prepared(name: str, device: str = "cpu") -> tuple[nn.Module, Tensor]:
    """A network in training and its input, channels-last where it is 2-d."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model, x = make().train().to(device), torch.randn(shape).to(device)
    if len(shape) == 4:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    return model, x


def _stepper(model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(model, x).backward()
        optimizer.step()
        if x.device.type != "cpu":
            torch.accelerator.synchronize(x.device)

    return step


def _measure(name: str, rounds: int, device: str) -> list[str | float | None]:
    """One network's row of the table; steps with torch.nn's layers and with ours take turns."""
    from steadynorm import convert

    model, x = prepared(name, device)
    converted, changes = convert(model, example_inputs=x[:2])
    steps = {"before": _stepper(model, x), "after": _stepper(converted, x)}
    before, after = interleaved(steps, rounds, least=0.0).values()
    faster = speed_up(before, after)
    size = "x".join(map(str, x.shape))
    quartiles = f"{faster.low:.2f}x to {faster.high:.2f}x"
    medians = (statistics.median(times) for times in (before, after))
    return [name, size, *medians, f"{faster.middle:.2f}x", quartiles, len(changes)]


def measure_networks(rounds: int, progress: Callable[[], None], device: str) -> Table:
    """Median training step with `torch.nn`'s layers and with ours, in the same interleaved run.

    Each network runs in a process of its own: page faults on fresh memory are much of a
    step's cost, and their number depends on what others left in the heap.
    """
    lines: list[list[str | float | None]] = []
    for name in NETWORKS:
        with get_context("spawn").Pool(1) as own:
            lines.append(own.apply(_measure, (name, rounds, device)))
        progress()
    return Table(
        "One training step, torch.nn's batch norm against ours",
        ("network", "input", "before, s", "after, s", "faster", "quartiles", "changes"),
        lines,
        digits=3,
        note="2-d networks channels-last; SGD; the same weights, steps in turns; each network in "
        "a process of its own.",
    )
