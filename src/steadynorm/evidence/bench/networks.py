"""Training steps of whole networks, before and after their batch norms become ours."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from multiprocessing import get_context
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

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


def _output(answer: Any) -> Tensor:
    tensor: Tensor = answer if isinstance(answer, Tensor) else answer.last_hidden_state
    return tensor


def _stepper(model: nn.Module, x: Tensor) -> Callable[[], float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> float:
        start = perf_counter()
        optimizer.zero_grad(set_to_none=True)
        _output(model(x)).square().mean().backward()
        optimizer.step()
        return perf_counter() - start

    return step


def _measure(name: str, rounds: int) -> list[str | float | None]:
    """One network's row of the table; steps with torch.nn's layers and with ours take turns."""
    from steadynorm import convert

    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().train()
    x = torch.randn(shape)
    if len(shape) == 4:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    converted, changes = convert(model, example_inputs=x[:2])
    steps = [_stepper(model, x), _stepper(converted, x)]
    for step in steps:
        step()
        step()
    times: tuple[list[float], list[float]] = ([], [])
    gc.collect()
    gc.disable()
    for round_ in range(rounds):
        for which in (0, 1) if round_ % 2 else (1, 0):
            times[which].append(steps[which]())
    ratios = [a / b for a, b in zip(*times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    before, after = (statistics.median(t) for t in times)
    size = "x".join(map(str, shape))
    spread = f"{low:.2f}x to {high:.2f}x"
    return [name, size, before, after, f"{middle:.2f}x", spread, len(changes)]


def measure_networks(names: list[str], rounds: int, progress: Callable[[], None]) -> Table:
    """Median training step with `torch.nn`'s layers and with ours, in the same interleaved run.

    Each network in a process of its own, as it is trained: what others leave in the heap decides
    how often fresh memory has to be faulted in, which is much of what a step costs.
    """
    lines: list[list[str | float | None]] = []
    for name in names:
        with get_context("spawn").Pool(1) as own:
            lines.append(own.apply(_measure, (name, rounds)))
        progress()
    return Table(
        "One training step, torch.nn's batch norm against ours",
        ("network", "input", "before, s", "after, s", "faster", "quartiles", "changes"),
        lines,
        digits=3,
        note="2-d networks channels-last; SGD; the same weights, steps in turns; each network in "
        "a process of its own.",
    )
