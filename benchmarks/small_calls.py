"""Small calls, where overhead and not memory decides; and what the memory of the gradient costs.

    python benchmarks/small_calls.py [--rounds 60] [--only Batch|Steady|memory] [--against SRC]

`Batch` against torch.nn and `Steady` against `Batch` on small inputs, and two-way `Steady` against
one-way on inputs above 1 MB (`memory`). Each round times both sides in turn; the ratio is the
median over rounds, with its quartiles, and that of both sides' lowest times. One thread, since
small inputs are too small for more, and its processor time, in which neighbours on the machine
have less of a say.

`--against SRC` compares `Batch` with `Batch` of another checkout instead, whose `src` it names.
Each runs in a process of its own; the two take turns.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import steadynorm as sn
from steadynorm.evidence.bench.measure import machine
from steadynorm.evidence.bench.workloads import SMALL

CALLS = 300  # of small inputs
LARGE = ((32, 64, 14, 14), (256, 2048), (32, 64, 28, 28), (32, 256, 28, 28))
STEADY = {"one-way": None, "two-way": 16}  # windows


def steps(layer: torch.nn.Module, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Forward, and forward with backward, in training; forward in inference, two ways."""
    leaf = x.clone().requires_grad_()
    grad = torch.randn_like(x)

    def inference() -> None:
        with torch.no_grad():
            layer(x)

    return {
        "forward": lambda: layer(x),
        "forward + backward": lambda: layer(leaf).backward(grad),
        "inference": inference,
        "inference + backward": lambda: layer(leaf).backward(grad),
    }


class Here:
    """A layer of torch.nn, or ours under `Batch` or one of `STEADY`, in this process."""

    def __init__(self, name: str, shape: tuple[int, ...], *, last: bool) -> None:
        kind = {2: "BatchNorm1d", 4: "BatchNorm2d"}[len(shape)]
        if name == "torch.nn":
            self.layer = getattr(torch.nn, kind)(shape[1])
        else:
            steady = name in STEADY
            policy = sn.Steady(prior=16, window=STEADY[name]) if steady else sn.Batch()
            self.layer = getattr(sn, kind)(shape[1], statistics=policy)
        x = torch.randn(shape) + 1
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        self.steps = steps(self.layer, x)

    def seconds(self, step: str, calls: int) -> float:
        """Of processor time, a call."""
        self.layer.train(not step.startswith("inference"))
        run = self.steps[step]
        start = time.process_time()
        for _ in range(calls):
            run()
        return (time.process_time() - start) / calls


class There:
    """The same in a process of its own, which imports steadynorm from `source`."""

    def __init__(self, source: Path, shape: tuple[int, ...], *, last: bool) -> None:
        words = [sys.executable, __file__, "--serve", *map(str, (int(last), *shape))]
        self.process = subprocess.Popen(
            words, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(source)},
        )  # fmt: skip

    def seconds(self, step: str, calls: int) -> float:
        """Of processor time, a call."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(calls, step, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def serve(last: int, *shape: int) -> None:
    """Time what the lines of standard input ask for."""
    side = Here("Batch", shape, last=bool(last))
    for line in sys.stdin:
        calls, step = line.strip().split(" ", 1)
        print(side.seconds(step, int(calls)), flush=True)


def compare(
    names: tuple[str, str], sides: tuple[Here | There, ...], label: str, *, calls: int, rounds: int
) -> dict[str, float]:
    """Print a line for every way to call: the second side against the first."""
    ratios = {}
    for step in ("forward", "forward + backward", "inference", "inference + backward"):
        if step.startswith("inference") and names[1] in STEADY:
            continue  # the same code for every policy
        for side in sides:
            side.seconds(step, calls)
        times = [[side.seconds(step, calls) for side in sides] for _ in range(rounds)]
        low, middle, high = statistics.quantiles([b / a for a, b in times], n=4)
        least = min(b for _, b in times) / min(a for a, _ in times)
        first, second = (statistics.median(t[i] for t in times) * 1e6 for i in (0, 1))
        print(
            f"{label:>18}  {step:20}  {names[0]:>8} {first:7.1f} us  {names[1]:>8} {second:7.1f} us"
            f"   {middle:.2f} ({low:.2f} to {high:.2f}), of the lowest times {least:.2f}",
            flush=True,
        )
        ratios[step] = least
    return ratios


def shapes_of(shapes: tuple[tuple[int, ...], ...]) -> list[tuple[tuple[int, ...], bool, str, int]]:
    """Each shape, channels-last or not, what to call it, and how often to run it in a row."""
    return [
        (shape, last, "x".join(map(str, shape)) + (" last" if last else ""),
         max(2, min(CALLS, 10**7 // math.prod(shape))))
        for shape in shapes
        for last in (False, True)[: 2 if len(shape) == 4 else 1]
    ]  # fmt: skip


def against(source: Path, shapes: tuple[tuple[int, ...], ...], rounds: int) -> None:
    """This checkout against another one, and geometric means over the shapes."""
    found = []
    for shape, last, label, calls in shapes_of(shapes):
        here = Path(sn.__file__).parents[1]
        sides = tuple(There(each, shape, last=last) for each in (source.resolve(), here))
        found.append(compare(("before", "now"), sides, label, calls=calls, rounds=rounds))
        for side in sides:
            side.close()
    for step in found[0]:
        print(f"{step}: geometric mean of the lowest times' ratios "
              f"{statistics.geometric_mean([each[step] for each in found]):.3f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--only", choices=["Batch", "Steady", "memory"])
    parser.add_argument("--against", type=Path, help="the src of another checkout")
    parser.add_argument("--serve", type=int, nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    small = (*SMALL, (32, 64))
    if options.serve:
        serve(*options.serve)
        return
    parts = {
        "Batch": ([("torch.nn", "Batch")], small),
        "Steady": ([("Batch", "one-way"), ("Batch", "two-way")], small),
        "memory": ([("one-way", "two-way")], LARGE),
    }
    for part, (pairs, shapes) in parts.items():
        if options.against or options.only not in (None, part):
            continue
        for pair in pairs:
            for shape, last, label, calls in shapes_of(shapes):
                sides = tuple(Here(name, shape, last=last) for name in pair)
                compare(pair, sides, label, calls=calls, rounds=options.rounds)
    if options.against:
        against(options.against, small, options.rounds)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))


if __name__ == "__main__":
    main()
