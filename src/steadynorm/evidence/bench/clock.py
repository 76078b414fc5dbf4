"""Marks in time: the host's clock on CPU, events in the queue of an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch

Marks = tuple[Any, Any, Any]
"""When a call began, when its forward ended, and when its backward did."""
Laps = Callable[[], Marks]
"""A call of a contender."""


def check_device(device: str) -> None:
    """Raise ValueError if there is no such device to measure on."""
    kind = torch.device(device).type
    found = torch.accelerator.current_accelerator(check_available=True)
    if kind != "cpu" and (found is None or found.type != kind):
        there = "cpu alone" if found is None else f"cpu and {found.type}"
        raise ValueError(f"--device {device}: PyTorch sees {there}.")


def device_name(device: str) -> str:
    """The accelerator's name, and the version of what drives it; empty on CPU."""
    kind = torch.device(device)
    if kind.type == "cpu":
        return ""
    name = torch.get_device_module(kind).get_device_name(kind)
    version = torch.version.hip or torch.version.cuda
    return f"{name}, {'ROCm' if torch.version.hip else 'CUDA'} {version}"


def mark(device: torch.device) -> Any:
    """Now, as work on this device sees it."""
    if device.type == "cpu":
        return perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event


def seconds_of(laps: Sequence[Marks], device: torch.device) -> list[tuple[float, float]]:
    """Seconds of forward and backward of each call; waits for an accelerator to be done.

    The queue of an accelerator is not emptied between calls, so what the host does meanwhile costs
    nothing unless it is the slower of the two.
    """
    if device.type == "cpu":
        return [(middle - start, end - middle) for start, middle, end in laps]
    torch.accelerator.synchronize(device)
    return [
        (start.elapsed_time(middle) / 1e3, middle.elapsed_time(end) / 1e3)
        for start, middle, end in laps
    ]
