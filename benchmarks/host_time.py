"""What the host does for a training step by the GPU kernels, timed without a GPU.

    .venv-triton/bin/python -m benchmarks.host_time [--rounds 200] [--write]

Needs Triton (`make test-triton` makes an environment with it), and TRITON_INTERPRET unset. Kernels
are compiled for sm_90 and launched by a driver that launches nothing (no_device.py), on tensors in
this machine's memory: what is left is Python, PyTorch's dispatcher and its allocator. Not in it:
the launcher's own part and the driver's, and the backward's change of thread on a device.

PyTorch's three operators, torch.nn's layer, `+` and `relu`, run on 128 values of float32 in this
machine's memory: their time has the arithmetic on these in it, and no launch on a device.

Contenders take turns. Times are of the processor, in which neighbours on the machine have less of
a say; medians over rounds with quartiles. `--write` puts the rows into docs/gpu.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import triton
from benchmarks.gpu_static import put
from benchmarks.no_device import no_device
from torch import Tensor

import steadynorm as sn
from steadynorm.evidence.bench.measure import machine
from steadynorm.evidence.timing import in_turns
from steadynorm.kernels.gpu import prepared, replay

CALLS = 100
PARTS, WHOLE, FEW = (2048, 2), (4, 8, 2, 2), (4, 8, 2, 2)
"""A channel in several programs, a channel in one, and torch's operators."""
HEAD = ("", "forward", "backward", "both", "both, against torch.nn's")

Call = Callable[[], Any]


class Step:
    """A layer, what it is given, and its forward, its backward and both."""

    def __init__(self, layer: Any, forward: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
        x, residual = (torch.randn(shape, requires_grad=True) for _ in range(2))
        grad, wanted = torch.randn(shape), [x, residual, *layer.parameters()]
        self.forward: Call = partial(forward, x, residual)
        y = self.forward()
        self.backward: Call = lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True)
        self.both: Call = lambda: torch.autograd.grad(forward(x, residual), wanted, grad)


def theirs() -> Step:
    """torch.nn's layer, `+` and `relu`."""
    layer = torch.nn.BatchNorm2d(FEW[1])
    return Step(layer, lambda x, residual: torch.relu(layer(x) + residual), FEW)


def ours(shape: tuple[int, ...]) -> Step:
    """Our layer, residual and ReLU inside."""
    kind = sn.BatchNorm1d if len(shape) == 2 else sn.BatchNorm2d
    layer = kind(shape[1], activation="relu")
    return Step(layer, lambda x, residual: layer(x, residual=residual), shape)


def launches() -> dict[str, Call]:
    """Two launches, `moments` and `apply`, by Triton and repeated with other addresses."""
    noted: list[Call] = []
    launch = replay.launch

    def noting(kernel: Any, plan: Any, x: Any, *arguments: Any, **constants: Any) -> None:
        noted.append(lambda: kernel[plan.grid](*arguments, **constants))
        launch(kernel, plan, x, *arguments, **constants)

    with mock.patch.object(replay, "launch", noting):
        ours(PARTS)
    again = next(iter(prepared.KINDS.values())).replays_forward[True]
    addresses = tuple(range(0, 14 * replay.ALIGNED, replay.ALIGNED))
    return {
        "Triton": lambda: [call() for call in noted],
        "repeated": lambda: again(0, addresses),
    }


def seconds(call: Call, calls: int = CALLS) -> float:
    """Of processor time, a call."""
    start = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - start) / calls


def measured(contenders: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Microseconds a call, round by round."""
    timed = {name: partial(seconds, call) for name, call in contenders.items()}
    found = in_turns(timed, rounds, warm_up=3)
    return {name: [t * 1e6 for t in times] for name, times in found.items()}


def cell(values: list[float], digits: int = 1) -> str:
    """The median and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(rounds: int) -> str:
    """Rows in Markdown."""
    with no_device():
        alone = {("launch", name): call for name, call in launches().items()}
        steps = {
            "torch.nn's layer, `+`, `relu`": theirs(),
            "ours, two launches each way": ours(PARTS),
            "ours, one launch each way": ours(WHOLE),
        }
        calls = {
            (name, way): getattr(step, way)
            for name, step in steps.items()
            for way in ("forward", "backward", "both")
        }
        found: Any = measured(calls | alone, rounds)  # type: ignore[arg-type]
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    base = found[next(iter(steps)), "both"]
    for name in steps:
        ratios = [b / a for a, b in zip(base, found[name, "both"], strict=True)]
        cells = [cell(found[name, way]) for way in ("forward", "backward", "both")]
        lines.append("| " + " | ".join((name, *cells, cell(ratios, 2))) + " |")
    by_triton, repeated = (
        [t / 2 for t in found["launch", name]] for name in ("Triton", "repeated")
    )
    lines += [
        "",
        f"One launch of two: Triton's {cell(by_triton)}, a repeated one {cell(repeated)}.",
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--write", action="store_true", help="put the rows into docs/gpu.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = table(options.rounds)
    known = machine()
    where = (
        f"{known['date']}, {known['processor']}, one thread; Python {known['python']}, torch "
        f"{known['torch']}, Triton {triton.__version__}. Microseconds of processor time: medians "
        f"over {options.rounds} rounds, with quartiles."
    )
    print(where, "", rows, sep="\n")
    if options.write:
        put("host", f"{where}\n\n{rows}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
