"""How many Triton kernels torch.compile makes of the layer on CUDA, counted without a device.

    python benchmarks/inductor_kernels.py [--policies batch,steady] [--layouts contiguous]

Needs triton (3.7.1 with torch 2.13). Inductor's scheduler decides what it fuses before anything is
compiled for a device, so the count needs its code alone: the tensors lie on the CPU, Inductor is
told to write Triton for it, and the target is sm_90. The layer is traced as on an accelerator, in
plain operations. Passes are the bytes that Inductor counts for its kernels, over the input's size:
an upper bound, since what a kernel reads twice may come from a cache.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import steadynorm as sn

SHAPE = (32, 64, 56, 56)
CASES = {"BN": (None, False), "BN + ReLU": ("relu", False), "BN + add + ReLU": ("relu", True)}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Count(NamedTuple):
    """Of one graph: Triton kernels, calls of anything else, and passes over the input."""

    kernels: int
    others: int
    passes: float


class _CountedError(Exception):
    """Inductor has written its code; nothing is to be compiled."""


def pretend_device() -> None:
    """Make Inductor write Triton for sm_90 where there is no device."""
    import triton
    from torch._inductor import config
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    triton.runtime.driver.set_active(Driver())
    config.cpu_backend = "triton"
    config.force_disable_caches = True
    config.compile_threads = 1


def counted(graph: Any, inputs: Any) -> Count:
    """What Inductor makes of a graph."""
    from torch._inductor import metrics
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.exc import InductorError
    from torch._inductor.graph import GraphLowering

    found: list[Count] = []

    def stop(lowering: Any) -> Any:
        code = lowering.codegen()[0]
        text = getattr(code, "value", code)
        kernels = text.count("async_compile.triton(")
        others = len(re.findall(r"^ +(?!#).*?(?:extern_kernels|torch\.ops)\.[\w.]+\(", text, re.M))
        size = torch.Size(SHAPE).numel() * 4
        moved, *_ = lowering.count_bytes()
        found.append(Count(kernels, others, moved / size))
        raise _CountedError

    metrics.reset()
    with mock.patch.object(GraphLowering, "_compile_to_module", stop):
        try:
            compile_fx_inner(graph, inputs)
        except (_CountedError, InductorError):
            if not found:
                raise
    return found[0]


def count(function: Callable[..., Tensor], *inputs: Tensor | None) -> tuple[Count, Count]:
    """Of the forward and the backward graph of a function."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    found: list[Count] = []

    def compiler(graph: Any, example: Any) -> Any:
        found.append(counted(graph, example))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=compiler, bw_compiler=compiler, decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )  # fmt: skip
    torch._dynamo.reset()
    y = torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    y.backward(torch.ones_like(y))
    forward, backward = found
    return forward, backward


def function_for(policy: str, case: str) -> Callable[..., Tensor]:
    """A layer of ours as a network calls it; for "torch.nn" torch's operations."""
    activation, _ = CASES[case]
    if policy != "torch.nn":
        layer = sn.BatchNorm2d(SHAPE[1], statistics=policy, activation=activation)
        return lambda x, residual=None: layer(x, residual=residual)
    norm = torch.nn.BatchNorm2d(SHAPE[1])

    def unfused(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = norm(x)
        y = y if residual is None else y + residual
        return y if activation is None else torch.relu(y)

    return unfused


def counts(policy: str, case: str, layout: str) -> tuple[Count, Count]:
    """Forward and backward of one case, traced as on an accelerator."""
    from steadynorm.kernels import autograd
    from steadynorm.kernels.cpu import operators

    def serve(call: Any) -> bool:
        return False

    def by_device(call: Any) -> bool:
        return bool(call.basic and not call.exact)

    inputs = [torch.empty(SHAPE).to(memory_format=LAYOUTS[layout]).requires_grad_() for _ in "xr"]
    with (
        mock.patch.object(operators, "serve", serve),
        mock.patch.object(autograd, "by_device", by_device),
    ):
        return count(function_for(policy, case), inputs[0], inputs[1] if CASES[case][1] else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies", default="torch.nn,batch,steady,running")
    parser.add_argument("--layouts", default="contiguous,channels_last")
    options = parser.parse_args()
    pretend_device()
    print("| | layout | forward: kernels, passes | backward: kernels, passes |\n|---|---|---|---|")
    for case in CASES:
        for policy in options.policies.split(","):
            for layout in options.layouts.split(","):
                cells = (
                    f"{c.kernels}{f' + {c.others} others' if c.others else ''}, {c.passes:.1f}"
                    for c in counts(policy, case, layout)
                )
                print(f"| {case}, {policy} | {layout} | {' | '.join(cells)} |", flush=True)
    print(f"torch {torch.__version__}, float32, input {SHAPE}")


if __name__ == "__main__":
    main()
