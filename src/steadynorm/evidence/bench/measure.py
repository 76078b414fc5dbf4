"""Interleaved timing: every round times a copy and each contender once, so drift hits all alike."""

from __future__ import annotations

import gc
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

from steadynorm.evidence.bench.contenders import CONTENDERS, Timed, make_inputs
from steadynorm.evidence.bench.workloads import Workload

DIRECTIONS = ("forward", "backward", "both")


class Measurement(NamedTuple):
    """One contender's median over the rounds of one workload, in one direction.

    `copies`: the time as a multiple of `y.copy_(x)` in the same round; `low` and `high` its
    quartiles. `of_limit`: over the least that the memory traffic would take at copy's speed.
    """

    workload: Workload
    contender: str
    direction: str
    milliseconds: float
    copies: float
    low: float
    high: float
    of_limit: float


def measure(
    load: Workload, contenders: Sequence[str], rounds: int, progress: Callable[[], None]
) -> Iterator[Measurement]:
    """Time the contenders on a workload."""
    inputs = make_inputs(load)
    runs: dict[str, Timed] = {}
    for name in contenders:
        runs[name] = CONTENDERS[name](load, inputs)
        for _ in range(2):
            runs[name]()  # compiles, and warms caches and allocator
    repeats = _repeats(inputs, runs)
    copies: list[float] = []
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    with _quiet():
        for round_ in range(rounds):
            copies.append(_typical(lambda: _copy(inputs), repeats)[0])
            # Another order in each round: whoever follows the copy finds other caches.
            names = list(runs)
            shift = round_ % len(names)
            for name in names[shift:] + names[:shift]:
                runs[name]()  # untimed: it pays for what the others left, such as memory to trim
                seconds[name].append(_typical(runs[name], repeats))
            progress()
    for name, times in seconds.items():
        for index, direction in enumerate(DIRECTIONS):
            if direction == "backward" and not load.training:
                continue
            if direction == "both" and not load.training:
                continue
            mine = [sum(pair) if index == 2 else pair[index] for pair in times]
            ratios = [t / c for t, c in zip(mine, copies, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            limit = sum(load.limit) if index == 2 else load.limit[index]
            yield Measurement(
                load, name, direction, statistics.median(mine) * 1e3, middle, low, high,
                middle / limit,
            )  # fmt: skip


def _copy(inputs: Any) -> tuple[float, float]:
    start = perf_counter()
    inputs.y.copy_(inputs.x)
    return perf_counter() - start, 0.0


def _repeats(inputs: Any, runs: dict[str, Timed]) -> int:
    """Calls a round: three, and as many more as a contender needs to take 2 ms."""
    quickest = min([sum(run()) for run in runs.values()] + [sum(_copy(inputs))])
    return max(3, min(500, math.ceil(2e-3 / max(quickest, 1e-7))))


def _typical(run: Timed, repeats: int) -> tuple[float, float]:
    """The median of the calls: on a shared machine single calls stall for milliseconds."""
    forward, backward = zip(*(run() for _ in range(repeats)), strict=True)
    return statistics.median(forward), statistics.median(backward)


@contextmanager
def _quiet() -> Iterator[None]:
    """No garbage collection while the clock runs."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def machine() -> dict[str, str]:
    """What the figures were measured on and with."""
    import numba

    import steadynorm

    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "steadynorm": steadynorm.__version__,
        "commit": _commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _commit() -> str:
    """The commit of the checkout that the package runs from, if it runs from one."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607  whichever git is on the path
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return "installed"
    return answer.stdout.strip()


def geometric_mean(values: Sequence[float]) -> float:
    """The mean of ratios."""
    return math.exp(statistics.fmean(math.log(value) for value in values))
