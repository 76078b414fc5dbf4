"""What two ways to touch memory cost: loads under a condition, and results past the caches.

    python benchmarks/memory_traffic.py [--rounds 25]

First a sum of some values of a tensor, chosen one by one, as by a ReLU in its gradient: the
compiler puts the condition on the load, unless `kernels.cpu.pointers.widen` loads all. Then the
layer with a residual and a ReLU, with its results written through the caches and past them. All as
multiples of `y.copy_(x)` in the same round, median over the rounds, whose order rotates.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from numba import njit
from torch import Tensor

from steadynorm.evidence.bench.measure import machine
from steadynorm.evidence.timing import in_turns, seconds
from steadynorm.kernels.cpu import slabs as cpu_slabs
from steadynorm.kernels.cpu.pointers import like, widen
from steadynorm.kernels.cpu.prepared import CpuPlan
from steadynorm.kernels.spec import Call
from steadynorm.statistics import Batch

SHAPES = [(32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 512, 14, 14)]
SUM = {"error_model": "numpy", "fastmath": {"reassoc", "contract"}}


@njit(**SUM)
def under_a_condition(values, chosen):
    total = like(0.0, values[0])
    for i in range(len(values)):
        total += values[i] if chosen[i] else like(0.0, values[i])
    return total


@njit(**SUM)
def whole(values, chosen):
    total = like(0.0, values[0])
    for i in range(len(values)):
        v = widen(values[i])
        total += v if chosen[i] else like(0.0, v)
    return total


def medians(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each step's second call in a round."""

    def second(step: Callable[[], object]) -> float:
        step()
        return seconds(step)

    found = in_turns({name: partial(second, step) for name, step in steps.items()}, rounds)
    return {name: statistics.median(times) for name, times in found.items()}


def loads(rounds: int) -> None:
    x, y = torch.randn(2, 32 * 256 * 56 * 56)
    values, chosen = x.numpy(), (torch.rand(len(x)) > 0.5).numpy()
    found = medians(
        {
            "copy": lambda: y.copy_(x),
            "under a condition": lambda: under_a_condition(values, chosen),
            "whole": lambda: whole(values, chosen),
        },
        rounds,
    )
    print("Sum of those of 103 MB that are chosen, one thread against a copy on all:")
    for name in ("under a condition", "whole"):
        print(f"  {name:20} {found[name] / found['copy']:5.2f} copies")


def steps(
    x: Tensor, residual: Tensor, grad: Tensor, stream_from: int
) -> dict[str, Callable[[], object]]:
    """The layer's forward, its backward, and its inference, with results past the caches or not."""
    for name in ("STREAM_FROM", "STREAM_VISITS_FROM", "STREAM_MAPS_FROM"):
        setattr(cpu_slabs, name, stream_from)
    plan = CpuPlan(x.shape, x.stride(), x.dtype, "relu", residual=True)
    channels = x.shape[1]
    training, inference = (
        Call(
            x, torch.ones(channels), torch.zeros(channels), residual, policy=policy, momentum=0.1,
            activation="relu", running_mean=torch.zeros(channels), running_var=torch.ones(channels),
        )
        for policy in (Batch(), None)
    )  # fmt: skip
    training.gradient = True
    _, saved = plan.forward(training)
    return {
        "forward": lambda: plan.forward(training),
        "backward": lambda: plan.backward(*saved, grad, (True,) * 4),
        "inference": lambda: plan.forward(inference),
    }


def results(rounds: int) -> None:
    print("Layer with residual and ReLU, in copies: through the caches, past them")
    print(f"{'input':>18} {'layout':>7} {'forward':>15} {'backward':>15} {'inference':>15}")
    for shape in SHAPES:
        for layout in (torch.contiguous_format, torch.channels_last):
            x, residual, grad, y = (
                torch.randn(shape).contiguous(memory_format=layout) for _ in range(4)
            )
            ways = {
                "through": steps(x, residual, grad, 1 << 60),
                "past": steps(x, residual, grad, 0),
            }
            found = medians(
                {"copy": lambda x=x, y=y: y.copy_(x)}
                | {
                    f"{name} {stage}": run[stage]
                    for stage in ("forward", "backward", "inference")
                    for name, run in ways.items()
                },
                rounds,
            )
            shown = " ".join(
                f"{found[f'through {stage}'] / found['copy']:8.2f}"
                f"{found[f'past {stage}'] / found['copy']:7.2f}"
                for stage in ("forward", "backward", "inference")
            )
            kind = "nhwc" if layout is torch.channels_last else "nchw"
            print(f"{'x'.join(map(str, shape)):>18} {kind:>7} {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    loads(rounds)
    results(rounds)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))


if __name__ == "__main__":
    main()
