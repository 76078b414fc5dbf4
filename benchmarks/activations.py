"""Every activation inside the layer, against the layer with the activation as a call after it.

    python benchmarks/activations.py [--rounds 7] [--dtypes float32,bfloat16]

Forward with backward in training, and inference, on (16, 256, 1000) and one thread: milliseconds of
processor time, each the least of interleaved rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import process_time

import torch
from torch.nn import functional as F

import steadynorm as sn
from steadynorm.evidence.bench.measure import machine
from steadynorm.evidence.timing import in_turns
from steadynorm.kernels.activations import ACTIVATIONS

SHAPE = (16, 256, 1000)
CALLS = 3


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """Milliseconds of processor time of a call."""

    def milliseconds() -> float:
        start = process_time()
        for _ in range(CALLS):
            call()
        return 1e3 * (process_time() - start) / CALLS

    return milliseconds


def contenders(activation: str, dtype: torch.dtype) -> dict[str, Callable[[], float]]:
    """torch.nn, our layer with a call after it, and the activation inside; both modes."""
    after = getattr(F, activation)
    x = torch.randn(SHAPE).to(dtype).requires_grad_()
    grad, plain = torch.randn(SHAPE).to(dtype), x.detach()
    found = {}
    for name, layer, act in (
        ("torch.nn", torch.nn.BatchNorm1d(SHAPE[1]), after),
        ("ours, call after", sn.BatchNorm1d(SHAPE[1]), after),
        ("inside", sn.BatchNorm1d(SHAPE[1], activation=activation), lambda y: y),
    ):

        def training(layer: torch.nn.Module = layer, act: Callable = act) -> None:
            act(layer.train()(x)).backward(grad)
            x.grad = None

        def inference(layer: torch.nn.Module = layer, act: Callable = act) -> None:
            with torch.no_grad():
                act(layer.eval()(plain))

        found |= {f"{name}, training": timed(training), f"{name}, inference": timed(inference)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = ("torch.nn", "ours, call after", "inside")
    print("| type | activation | " + " | ".join(f"{n}, training" for n in names), end="")
    print(" | " + " | ".join(f"{n}, inference" for n in names) + " |")
    print("|---" * (2 + 2 * len(names)) + "|")
    for dtype in options.dtypes.split(","):
        for activation in ACTIVATIONS:
            sides = contenders(activation, getattr(torch, dtype))
            found = in_turns(sides, options.rounds, warm_up=1)
            row = [
                f"{min(found[f'{n}, {m}']):.1f}" for m in ("training", "inference") for n in names
            ]
            print(f"| {dtype} | {activation} | " + " | ".join(row) + " |", flush=True)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))


if __name__ == "__main__":
    main()
