"""Where the time of one training step goes, with torch.nn's batch norms and with ours.

    python benchmarks/network_time.py [ResNet-50] [--steps 5]

Milliseconds of the profiler's own time by kind of operator, the median over steps that take turns.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from functools import partial

import torch
from torch.profiler import profile

from steadynorm import convert
from steadynorm.evidence.bench.measure import machine
from steadynorm.evidence.bench.networks import NETWORKS, loss_of, prepared
from steadynorm.evidence.timing import in_turns

KINDS = {
    "convolution": ("convolution",),
    "batch norm": ("batch_norm", "normalize"),
    "activation": ("clamp", "threshold", "hardtanh", "relu"),
    "sum": ("aten::add",),
}


def kind_of(name: str) -> str:
    found = (kind for kind, parts in KINDS.items() if any(part in name.lower() for part in parts))
    return next(found, "other")


def spent(model: torch.nn.Module, x: torch.Tensor) -> dict[str, float]:
    model.zero_grad(set_to_none=True)
    with profile() as watched:
        loss_of(model, x).backward()
    times: dict[str, float] = defaultdict(float)
    for event in watched.key_averages():
        times[kind_of(event.key)] += event.self_cpu_time_total / 1e3
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", nargs="?", default="ResNet-50", choices=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    model, x = prepared(options.network)
    models = {"torch.nn": model, "ours": convert(model, example_inputs=x[:2])[0]}
    contenders = {name: partial(spent, one, x) for name, one in models.items()}
    # The first steps compile, and warm caches and allocator.
    runs = in_turns(contenders, options.steps, warm_up=2)
    kinds = [*KINDS, "other"]
    print(f"{options.network}, milliseconds {'':6}" + "".join(f"{kind:>13}" for kind in kinds))
    for name, steps in runs.items():
        medians = (statistics.median(one[kind] for one in steps) for kind in kinds)
        print(f"{name:>27}" + "".join(f"{median:13.1f}" for median in medians))
    print(", ".join(f"{key} {value}" for key, value in machine().items()))


if __name__ == "__main__":
    main()
