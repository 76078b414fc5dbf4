"""Small calls, where overhead and not memory decides; and what the memory of the gradient costs.

    python benchmarks/small_calls.py [--rounds 60] [--only Batch|Steady|memory]

`Batch` against torch.nn and `Steady` against `Batch` on small inputs, and two-way `Steady` against
one-way on inputs above 1 MB (`memory`). Each round times both sides in turn; the ratio is the
median over rounds, with its quartiles, and that of both sides' lowest times. One thread, since
small inputs are too small for more, and its processor time, in which neighbours on the machine
have less of a say.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import steadynorm as sn
from steadynorm.evidence.bench.measure import machine
from steadynorm.evidence.bench.workloads import SMALL

CALLS = 300  # of small inputs
LARGE = ((32, 64, 14, 14), (256, 2048), (32, 64, 28, 28), (32, 256, 28, 28))
STEADY = {"one-way": sn.Steady(prior=16, window=None), "two-way": sn.Steady(prior=16, window=16)}


def steps(layer: torch.nn.Module, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Forward, and forward with backward, in training; forward in inference."""
    leaf = x.clone().requires_grad_()
    grad = torch.randn_like(x)

    def inference() -> None:
        with torch.no_grad():
            layer(x)

    return {
        "forward": lambda: layer(x),
        "forward + backward": lambda: layer(leaf).backward(grad),
        "inference": inference,
    }


def seconds(step: Callable[[], object], calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        step()
    return (time.process_time() - start) / calls


def layer(name: str, shape: tuple[int, ...]) -> torch.nn.Module:
    """A layer of torch.nn, or ours under `Batch` or one of `STEADY`."""
    kind = {2: "BatchNorm1d", 4: "BatchNorm2d"}[len(shape)]
    if name == "torch.nn":
        return getattr(torch.nn, kind)(shape[1])
    return getattr(sn, kind)(shape[1], statistics=STEADY.get(name, sn.Batch()))


def compare(pair: tuple[str, str], shape: tuple[int, ...], *, last: bool, rounds: int) -> None:
    """Print a line for every way to call: the second of the pair against the first."""
    layers = [layer(name, shape) for name in pair]
    x = torch.randn(shape) + 1
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    calls = max(2, min(CALLS, 10**7 // x.numel()))
    both = [steps(each, x) for each in layers]
    for name in both[0]:
        if name == "inference" and "torch.nn" not in pair:
            continue  # the same code for every policy
        for each in layers:
            each.train(name != "inference")
        for part in both:
            seconds(part[name], calls)
        times = [[seconds(part[name], calls) for part in both] for _ in range(rounds)]
        low, middle, high = statistics.quantiles([b / a for a, b in times], n=4)
        least = min(b for _, b in times) / min(a for a, _ in times)
        first, second = (statistics.median(t[i] for t in times) * 1e6 for i in (0, 1))
        label = "x".join(map(str, shape)) + (" last" if last else "")
        print(
            f"{label:>18}  {name:18}  {pair[0]:>8} {first:7.1f} us  {pair[1]:>8} {second:7.1f} us"
            f"   {middle:.2f} ({low:.2f} to {high:.2f}), of the lowest times {least:.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--only", choices=["Batch", "Steady", "memory"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    small = (*SMALL, (32, 64))
    parts = {
        "Batch": ([("torch.nn", "Batch")], small),
        "Steady": ([("Batch", "one-way"), ("Batch", "two-way")], small),
        "memory": ([("one-way", "two-way")], LARGE),
    }
    for part, (pairs, shapes) in parts.items():
        if options.only not in (None, part):
            continue
        for pair in pairs:
            for shape in shapes:
                for last in (False, True)[: 2 if len(shape) == 4 else 1]:
                    compare(pair, shape, last=last, rounds=options.rounds)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))


if __name__ == "__main__":
    main()
