"""Device time of a training step's kernels: ours by Triton against eager PyTorch's.

    python benchmarks/gpu_kernels.py [--dtypes bfloat16,float32] [--layouts nhwc,nchw] [--json FILE]
    python benchmarks/gpu_kernels.py --network            torchvision's ResNet-50, if installed

`steadynorm bench --device cuda` times calls, the host included, which decides for small tensors.
Here torch.profiler tells how long each kernel of the bench's contenders runs. Inputs take turns,
more than 250 MB in all, so that no step finds its own in the cache. `copies`: times of `y.copy_(x)`
in the same run.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import steadynorm as sn
from steadynorm.evidence.bench.contenders import CONTENDERS, Inputs, make_inputs
from steadynorm.evidence.bench.workloads import RESNET50, Workload

SHAPES = (*RESNET50, (256, 256, 56, 56), (256, 512, 14, 14))
OURS = ("normalize_grad", "normalize", "moments", "apply_grad", "reduce_grad", "apply")
CACHE = 250e6


def drawn(load: Workload) -> list[Inputs]:
    """The bench's inputs, and copies of them, so many that they exceed the cache together."""
    first = make_inputs(load, "cuda")
    number = max(2, min(12, int(CACHE / (3 * first.x.nbytes)) + 1))
    return [first, *(Inputs(*(t.clone() for t in first)) for _ in range(number - 1))]


def kernels(steps: Sequence[Callable[[], object]], repeats: int = 3) -> dict[str, float]:
    """Microseconds that a step spends in each kernel."""
    for step in steps:
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            for step in steps:
                step()
        torch.cuda.synchronize()
    times = defaultdict(list)
    for event in found.events():
        if event.device_type == DeviceType.CUDA:
            times[event.name].append(event.device_time)
    number = repeats * len(steps)
    return {name: statistics.median(t) * len(t) / number for name, t in times.items()}


def short(name: str) -> str:
    """The name of one of our kernels; of others the beginning."""
    return next((ours for ours in OURS if name.startswith(ours)), name[:40])


def measure(shape: tuple[int, ...], dtype: str, layout: str) -> dict[str, Any]:
    """One row: microseconds of a copy, of eager PyTorch and of ours, kernel by kernel."""
    load = Workload("resnet50", shape, layout, dtype, "bn+add+relu", training=True)
    data = drawn(load)
    copies = [partial(inputs.y.copy_, inputs.x) for inputs in data]
    row: dict[str, Any] = {"shape": load.size, "layout": layout, "dtype": dtype}
    row["copy"] = sum(kernels(copies).values())
    for who in ("eager", "ours"):
        sn.kernels.use("gpu", on=who == "ours")
        found = kernels([CONTENDERS[who](load, inputs) for inputs in data])
        row[who] = {short(name): round(t, 1) for name, t in found.items()}
        row[f"{who}_total"] = sum(found.values())
    sn.kernels.use("gpu", on=False)
    return row


def line(row: dict[str, Any]) -> str:
    """A row of the table in Markdown."""
    copies, theirs, ours = row["copy"], row["eager_total"], row["ours_total"]
    each = ", ".join(f"{name} {t:.0f}" for name, t in row["ours"].items())
    cells = (
        row["shape"], row["layout"], row["dtype"], f"{copies:.1f}", f"{theirs:.0f}", f"{ours:.0f}",
        f"{theirs / ours:.2f}", f"{ours / copies:.1f}", each,
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


COLUMNS = ("input", "layout", "type", "copy, µs", "eager, µs", "ours, µs", "ratio", "ours, copies",
           "kernels, µs")  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n|" + "---|" * len(COLUMNS)


def network(batch: int = 128) -> None:
    """A step of ResNet-50, bfloat16 by autocast, channels-last: wall time and device time."""
    from torchvision.models import resnet50

    x = torch.randn(batch, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, 1000, (batch,), device="cuda")
    base = resnet50().cuda().to(memory_format=torch.channels_last).train()
    converted, _ = sn.convert(copy.deepcopy(base), example_inputs=x[:2])
    for who, model in (("eager", base), ("ours", converted)):
        sn.kernels.use("gpu", on=who == "ours")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def step(model: Any = model, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()

        for _ in range(5):
            step()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            step()
        torch.cuda.synchronize()
        wall = (time.perf_counter() - start) / 20
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            step()
            torch.cuda.synchronize()
        events = (e for e in found.events() if e.device_type == DeviceType.CUDA)
        busy = sum(e.device_time for e in events)
        print(f"ResNet-50, batch {batch}, {who}: {wall * 1e3:.1f} ms a step, kernels "
              f"{busy / 1e3:.1f} ms", flush=True)  # fmt: skip
    sn.kernels.use("gpu", on=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--layouts", default="nhwc,nchw")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--network", action="store_true", help="a step of ResNet-50 instead")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu_kernels.py: PyTorch sees no CUDA or ROCm device.", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    if options.network:
        network()
        return 0
    print(HEAD)
    rows = []
    for dtype in options.dtypes.split(","):
        for layout in options.layouts.split(","):
            for shape in SHAPES:
                rows.append(measure(shape, dtype, layout))
                print(line(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
