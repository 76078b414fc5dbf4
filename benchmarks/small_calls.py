"""Small calls of the layer against torch.nn's, side by side, where overhead and not memory decides.

    python benchmarks/small_calls.py [--rounds 60]

Each round times 300 calls of each layer, in turn; the ratio is the median over rounds, with its
quartiles. One thread: such inputs are too small for more.
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

CALLS = 300


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


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        step()
    return (time.perf_counter() - start) / CALLS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"{'input':>18}  {'':18}  torch.nn    ours   ratio (quartiles)")
    cases = [
        (shape, last) for shape in SMALL for last in (False, True) if len(shape) == 4 or not last
    ]
    for shape, last in cases:
        kind = {2: "BatchNorm1d", 4: "BatchNorm2d"}[len(shape)]
        layers = [getattr(home, kind)(shape[1]) for home in (torch.nn, sn)]
        x = torch.randn(shape) + 1
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        both = [steps(layer, x) for layer in layers]
        for name in both[0]:
            for layer in layers:
                layer.train(name != "inference")
            for part in both:
                seconds(part[name])
            times = [[seconds(part[name]) for part in both] for _ in range(rounds)]
            ratios = [ours / theirs for theirs, ours in times]
            low, middle, high = statistics.quantiles(ratios, n=4)
            theirs, ours = (statistics.median(t[i] for t in times) * 1e6 for i in (0, 1))
            label = "x".join(map(str, shape)) + (" last" if last else "")
            print(
                f"{label:>18}  {name:18}  {theirs:5.1f} us {ours:5.1f} us"
                f"   {middle:.2f} ({low:.2f} to {high:.2f})"
            )
    print(", ".join(f"{key} {value}" for key, value in machine().items()))


if __name__ == "__main__":
    main()
