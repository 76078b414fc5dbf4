"""Thousands of calls: what they leave in memory, and how many objects."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import steadynorm as sn

TITLE = "leaks: memory and objects after thousands of calls"

MEMORY, OBJECTS = 8 << 20, 200
"""What may remain, in bytes and objects: less than one in a hundred calls leaves."""


FILLED = 6000
"""Calls of as many shapes fill every cache of what is prepared for a shape."""


def resident() -> int:
    """Bytes of this process that are in memory; 0 where the system does not tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0


def measured(call: Callable[[], object], before: int, calls: int) -> tuple[int, int]:
    """How much more memory and how many more objects there are after the calls."""
    for _ in range(before):
        call()
    gc.collect()
    memory, objects = resident(), len(gc.get_objects())
    for _ in range(calls):
        call()
    gc.collect()
    return resident() - memory, len(gc.get_objects()) - objects


def repeat(call: Callable[[], object], calls: int, before: int = 50) -> None:
    memory, objects = measured(call, before, calls)
    assert memory <= MEMORY, f"{memory >> 20} MiB more after {calls} calls"
    assert objects <= OBJECTS, f"{objects} more objects after {calls} calls"


def training(layer: Any, shape: tuple[int, ...]) -> object:
    x = torch.randn(shape).requires_grad_()
    layer(x).sum().backward()
    return x.grad


def changing_shapes(layer: Any, rng: random.Random) -> object:
    """Hardly two calls alike: of what is prepared for a shape, a bounded number is kept."""
    with torch.no_grad():
        return layer(
            torch.randn(rng.randrange(2, 40), 8, rng.randrange(1, 40), rng.randrange(1, 40))
        )


def refused(layer: Any) -> None:
    """Errors keep neither their input nor their frames."""
    try:
        layer(torch.randn(1, 8, 1, 1))
    except ValueError:
        return
    raise AssertionError("one value per channel was not refused")


def cases(rng: random.Random, long: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """20,000 calls in all in the long form."""
    calls = 4000 if long else 300
    small, large = sn.BatchNorm2d(8), sn.BatchNorm2d(8, activation="relu")
    yield "small training", partial(repeat, partial(training, small, (2, 8, 4, 4)), calls)
    yield "training", partial(repeat, partial(training, large, (16, 8, 32, 32)), calls)
    steady = sn.BatchNorm2d(8, statistics="steady")
    yield "steady", partial(repeat, partial(training, steady, (2, 8, 4, 4)), calls)
    yield "changing shapes", partial(repeat, partial(changing_shapes, large, rng), calls, FILLED)
    yield "errors", partial(repeat, partial(refused, small), calls)
