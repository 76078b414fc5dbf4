"""Who is measured: our layer, our kernels with outputs given, eager PyTorch, torch.compile, JAX.

A contender is prepared for a workload and then called repeatedly.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import steadynorm as sn
from steadynorm.evidence.bench.clock import Laps, Marks, mark
from steadynorm.evidence.bench.workloads import Workload


class Inputs(NamedTuple):
    """The tensors of one workload, shared by all contenders."""

    x: Tensor
    residual: Tensor
    grad: Tensor
    y: Tensor


def make_inputs(load: Workload, device: str = "cpu") -> Inputs:
    """Random tensors of the workload's shape, type and layout, with a mean other than 0."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, load.dtype)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    kind = formats[len(load.shape)] if load.layout == "nhwc" else torch.contiguous_format

    def tensor(mean: float) -> Tensor:
        values = torch.randn(load.shape, generator=generator).add_(mean)
        return values.to(device, dtype).contiguous(memory_format=kind)

    x = tensor(1.0)
    return Inputs(x, tensor(0.0), tensor(0.0), torch.empty_like(x))


Call = Callable[[Tensor, Tensor | None], Tensor]
"""Of an input and its residual, if the workload has one."""


def _layer(load: Workload, inputs: Inputs, package: Any, **options: Any) -> Any:
    kind = {2: "1d", 3: "1d", 4: "2d", 5: "3d"}[len(load.shape)]
    layer = getattr(package, f"BatchNorm{kind}")(load.shape[1], **options)
    return layer.to(inputs.x.device).train(load.training)


def _ours(load: Workload, inputs: Inputs) -> tuple[Call, Any]:
    layer = _layer(load, inputs, sn, activation=load.activation)
    return lambda x, residual: layer(x, residual=residual), layer


def _theirs(load: Workload, inputs: Inputs) -> tuple[Call, Any]:
    layer = _layer(load, inputs, torch.nn)

    def call(x: Tensor, residual: Tensor | None) -> Tensor:
        y: Tensor = layer(x)
        if residual is not None:
            y = y + residual
        return F.relu(y) if load.activation else y

    return call, layer


def _timed(call: Call, layer: Any, inputs: Inputs, load: Workload) -> Laps:
    x = inputs.x.detach().requires_grad_(load.training)
    residual = inputs.residual.detach().requires_grad_(load.training) if load.has_residual else None
    wanted = [x, *layer.parameters(), *([residual] if residual is not None else [])]
    device = x.device

    def run() -> Marks:
        start = mark(device)
        if not load.training:
            with torch.no_grad():
                y = call(x, residual)
            end = mark(device)
            return start, end, end
        y = call(x, residual)
        middle = mark(device)
        gradients = torch.autograd.grad(y, wanted, inputs.grad)
        end = mark(device)
        del gradients
        return start, middle, end

    return run


def ours(load: Workload, inputs: Inputs) -> Laps:
    """The layer of this package, activation and residual inside."""
    return _timed(*_ours(load, inputs), inputs, load)


def ours_outputs_given(load: Workload, inputs: Inputs) -> Laps:
    """The bare kernels, writing into memory that exists already."""
    from steadynorm.kernels.cpu import stages as cpu

    x, _, grad, y = inputs
    weight, bias = torch.ones(load.shape[1]), torch.zeros(load.shape[1])
    residual = inputs.residual if load.has_residual else None
    fused: dict[str, Any] = {"residual": residual, "activation": load.activation}
    signs = cpu.empty_signs(x) if residual is not None else None
    _, batch = cpu.normalize(x, weight, bias, 1e-5, out=y, **fused)
    rho = (batch.var + 1e-5).rsqrt()
    shift = -batch.mean_low * rho
    count = x.numel() // load.shape[1]
    factors = (rho, rho / count, batch.mean_low, batch.mean_low)
    dx, dresidual = torch.empty_like(x), torch.empty_like(x) if load.has_residual else None

    def run() -> Marks:
        start = perf_counter()
        if not load.training:
            cpu.apply(x, batch.mean, rho, shift, out=y, **fused)
            end = perf_counter()
            return start, end, end
        cpu.normalize(x, weight, bias, 1e-5, signs=signs, out=y, **fused)
        middle = perf_counter()
        cpu.normalize_grad(
            grad, x, batch.mean, rho, shift, *factors, signs=signs,
            activation=load.activation, want_residual=load.has_residual, out=(dx, dresidual),
        )  # fmt: skip
        return start, middle, perf_counter()

    return run


def eager(load: Workload, inputs: Inputs) -> Laps:
    """`torch.nn`'s layer, `+` and `relu`, as most networks are written."""
    return _timed(*_theirs(load, inputs), inputs, load)


def compiled(load: Workload, inputs: Inputs) -> Laps:
    """The same under `torch.compile`."""
    call, layer = _theirs(load, inputs)
    torch._dynamo.reset()
    return _timed(torch.compile(call, dynamic=False), layer, inputs, load)


def jax(load: Workload, inputs: Inputs) -> Laps:
    """flax's layer, `+` and `relu` under `jax.jit`, channels last as flax wants them."""
    import jax as j
    import numpy as np
    from flax import nnx

    def arrived(t: Tensor) -> Any:
        array = j.numpy.asarray(np.moveaxis(t.float().numpy(), 1, -1))
        return array.astype(load.dtype)

    x, residual, grad = (arrived(t) for t in inputs[:3])
    layer = nnx.BatchNorm(load.shape[1], rngs=nnx.Rngs(0), use_running_average=not load.training)
    graph, state = nnx.split(layer)

    def forward(state: Any, x: Any, residual: Any) -> Any:
        model = nnx.merge(graph, state)
        y = model(x)
        if load.has_residual:
            y = y + residual
        return (j.nn.relu(y) if load.activation else y), nnx.state(model)

    one_way = j.jit(forward)

    def both(state: Any, x: Any, residual: Any, grad: Any) -> Any:
        y, back, after = j.vjp(forward, state, x, residual, has_aux=True)
        return y, back(grad), after

    both_ways = j.jit(both)

    def run() -> Marks:
        start = perf_counter()
        j.block_until_ready(one_way(state, x, residual))  # type: ignore[no-untyped-call]
        middle = perf_counter()
        if not load.training:
            return start, middle, middle
        j.block_until_ready(  # type: ignore[no-untyped-call]
            both_ways(state, x, residual, grad)
        )
        # One compiled program does both ways; its backward is what it takes beyond the forward.
        return start, middle, perf_counter() - (middle - start)

    return run


def graphed(load: Workload, inputs: Inputs) -> Laps:
    """The layer of this package, replayed as CUDA graphs of its forward and its backward."""
    return _graphed(*_ours(load, inputs), inputs, load)


def eager_graphed(load: Workload, inputs: Inputs) -> Laps:
    """`torch.nn`'s layer, `+` and `relu`, replayed in the same way."""
    return _graphed(*_theirs(load, inputs), inputs, load)


def _graphed(call: Call, layer: Any, inputs: Inputs, load: Workload) -> Laps:
    class WithResidual(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return call(x, residual if load.has_residual else None)

    samples = tuple(t.clone().requires_grad_(load.training) for t in inputs[:2])
    module = WithResidual().train(load.training)
    graph: Any = torch.cuda.make_graphed_callables(module, samples, allow_unused_input=True)
    return _timed(lambda x, r: graph(x, inputs.residual if r is None else r), layer, inputs, load)


CONTENDERS: dict[str, Callable[[Workload, Inputs], Laps]] = {
    "ours": ours,
    "given": ours_outputs_given,
    "eager": eager,
    "compile": compiled,
    "jax": jax,
    "graph": graphed,
    "eager_graph": eager_graphed,
}
WHERE = {"given": "cpu", "jax": "cpu", "graph": "cuda", "eager_graph": "cuda"}
"""Contenders that run on one kind of device alone."""


def available(names: Sequence[str], device: str = "cpu") -> list[str]:
    """Those of `names` that are installed here and run on the device."""
    if "jax" in names:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    has_jax = find_spec("jax") is not None and find_spec("flax") is not None
    kind = torch.device(device).type
    return [n for n in names if WHERE.get(n, kind) == kind and (n != "jax" or has_jax)]
