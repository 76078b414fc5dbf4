"""Interleaved timing of the contenders on a workload, as multiples of a plain copy."""

from __future__ import annotations

import math
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from steadynorm.evidence.bench.clock import Laps, Marks, device_name, mark, seconds_of
from steadynorm.evidence.bench.contenders import CONTENDERS, Inputs, make_inputs
from steadynorm.evidence.bench.workloads import Workload
from steadynorm.evidence.timing import in_turns
from steadynorm.evidence.workers import cores
from steadynorm.report.machine import processor


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
    load: Workload,
    contenders: Sequence[str],
    rounds: int,
    progress: Callable[[], None],
    device: str = "cpu",
) -> Iterator[Measurement]:
    """Time the contenders on a workload."""
    inputs = make_inputs(load, device)
    where = inputs.x.device
    runs: dict[str, Laps] = {"copy": partial(_copy, inputs)}
    for name in contenders:
        runs[name] = CONTENDERS[name](load, inputs)
        for _ in range(2):
            runs[name]()  # compiles, and warms caches and allocator
    # Three calls a round, and as many more as the quickest contender needs to take 2 ms.
    quickest = min(sum(seconds_of([run()], where)[0]) for run in runs.values())
    repeats = max(3, min(500, math.ceil(2e-3 / max(quickest, 1e-7))))
    turns = {name: partial(_typical, run, repeats, where) for name, run in runs.items()}
    laps = in_turns(turns, rounds, tick=lambda _: progress())
    copies = [copy for copy, _ in laps.pop("copy")]
    forward, backward = load.limit
    for name, times in laps.items():
        directions = {"forward": ([f for f, _ in times], forward)}
        if load.training:
            directions["backward"] = ([b for _, b in times], backward)
            directions["both"] = ([f + b for f, b in times], forward + backward)
        for direction, (taken, limit) in directions.items():
            ratios = [t / c for t, c in zip(taken, copies, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            yield Measurement(
                load, name, direction, statistics.median(taken) * 1e3, middle, low, high,
                middle / limit,
            )  # fmt: skip


def _copy(inputs: Inputs) -> Marks:
    start = mark(inputs.x.device)
    inputs.y.copy_(inputs.x)
    end = mark(inputs.x.device)
    return start, end, end


def _typical(run: Laps, repeats: int, device: torch.device) -> tuple[float, float]:
    """The median of the calls: on a shared machine single calls stall for milliseconds. The first
    does not count: it pays for what the others left, such as memory to trim.
    """
    run()
    forward, backward = zip(*seconds_of([run() for _ in range(repeats)], device), strict=True)
    return statistics.median(forward), statistics.median(backward)


def machine(device: str = "cpu") -> dict[str, str]:
    """What the figures were measured on and with."""
    import steadynorm

    accelerator = device_name(device)
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "processor": f"{processor()}, {cores()} cores",
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **({"device": accelerator} if accelerator else {"numba": version("numba")}),
        "steadynorm": steadynorm.__version__,
        "commit": _commit(),
    }


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
