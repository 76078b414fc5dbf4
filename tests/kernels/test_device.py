"""The layer on a device, by PyTorch's operator and by the Triton kernels, against float64.

`make gpu` runs this where there is one; elsewhere tests/kernels/gpu runs the kernels in Triton's
interpreter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import tolerances, truth

import steadynorm as sn
from steadynorm.kernels import dispatch

if not torch.cuda.is_available():
    pytest.skip("PyTorch sees no CUDA or ROCm device", allow_module_level=True)

NEAR = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""How near to 0 an activation's input may be rounded to the other side, by type."""
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
SHAPES = [(8, 64, 16, 16), (3, 5, 7, 9), (40, 24, 20, 20), (2, 16, 91, 47)]
"""Channels-first the first two are held in registers, the others are shared by programs."""
POLICIES = {
    "batch": sn.Batch(),
    "steady": sn.Steady(),
    "one-way": sn.Steady(window=None),
    "running": sn.Running(),
    "ghost": sn.Ghost(size=2),
    "frozen": sn.Frozen(),
}
CASES = {"bn": (None, False), "relu": ("relu", False), "add+relu": ("relu", True),
         "add+gelu": ("gelu", True)}  # fmt: skip


@pytest.fixture(params=["operator", "gpu"])
def kernels(request):
    """Who serves the calls."""
    sn.kernels.use("gpu", on=request.param == "gpu")
    yield request.param
    sn.kernels.use("gpu", on=False)


def drawn(shape, dtype, layout, seed, mean=0.0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean
    return values.to("cuda", dtype).contiguous(memory_format=LAYOUTS[layout])


def array(t: Any) -> Any:
    return None if t is None else t.detach().to("cpu", torch.float64).numpy()


def layer_for(policy, channels, activation, **settings):
    """With parameters other than 1 and 0, and statistics of earlier batches."""
    random = torch.Generator().manual_seed(9)
    layer = sn.BatchNorm2d(channels, statistics=policy, activation=activation, **settings)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(channels, generator=random) + 0.5)
        layer.bias.copy_(torch.randn(channels, generator=random))
        layer.running_mean.copy_(torch.randn(channels, generator=random) / 4)
        layer.running_var.copy_(torch.rand(channels, generator=random) + 0.5)
        layer.num_batches_tracked.fill_(20)
    return layer.to("cuda")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_three_steps(kernels, shape, policy, case, dtype, layout):
    """Outputs, gradients, running statistics and the memory of the gradient of each."""
    activation, add = CASES[case]
    layer = layer_for(POLICIES[policy], shape[1], activation)
    setting = truth.Setting(array(layer.weight), array(layer.bias), activation)
    memory = layer._buffers.get("gradient_memory")
    for step in range(3):
        x = drawn(shape, dtype, layout, step, mean=step).requires_grad_()
        residual = drawn(shape, dtype, layout, 10 + step).requires_grad_() if add else None
        grad = drawn(shape, dtype, layout, 20 + step)
        before = truth.Running(
            array(layer.running_mean), array(layer.running_var), int(layer.num_batches_tracked)
        )
        parts = {"residual": array(residual), "memory": array(memory)}
        given = (array(x), POLICIES[policy], before)
        z = truth.train(*given, setting._replace(activation=None), **parts).y
        # At a kink of the derivative rounding decides: no gradient comes from there.
        grad[torch.from_numpy(np.abs(z) < NEAR[dtype]).cuda()] = 0
        right = truth.train(*given, setting, grad=array(grad), **parts)
        y = layer(x, residual=residual)
        wanted = [x, layer.weight, layer.bias, *([residual] if add else [])]
        dx, dweight, dbias, *rest = torch.autograd.grad(y, wanted, grad)
        tolerances.close(y, right.y, "forward", f"step {step}, y")
        tolerances.close(dx, right.dx, "backward", f"step {step}, dx")
        if rest:
            tolerances.close(rest[0], right.dresidual, "backward", f"step {step}, dresidual")
        loose = 1e-5 if dtype is torch.float32 else 2e-2
        assert tolerances.error(dweight, right.dweight) <= loose
        assert tolerances.error(dbias, right.dbias) <= loose
        assert tolerances.error(layer.running_mean, right.running.mean) <= 1e-5
        assert tolerances.error(layer.running_var, right.running.var) <= 1e-5
        if memory is not None:
            assert tolerances.error(memory, right.memory) <= loose


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean", [1e3, 1e6])
def test_a_large_mean_is_exact_where_our_own_kernels_run(mean, layout):
    x = drawn((16, 32, 28, 28), torch.float32, layout, 0, mean)
    right = truth.train(array(x), sn.Batch())
    sn.kernels.use("gpu")
    try:
        tolerances.within_bar(sn.BatchNorm2d(32).cuda()(x), right.y, "gpu: ")
    finally:
        sn.kernels.use("gpu", on=False)
    tolerances.within_bar(sn.BatchNorm2d(32, numerics="exact").cuda()(x), right.y, "stages: ")


def test_the_kernels_serve_what_they_say(kernels):
    x = drawn((8, 64, 16, 16), torch.bfloat16, "nhwc", 0)
    buffers = [t.to("cuda") for t in (torch.ones(64), torch.zeros(64))]
    chosen = dispatch.explain(x, *buffers, buffers[1], buffers[0], activation="relu", residual=x)
    assert chosen.kernel == ("gpu" if kernels == "gpu" else "aten")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_input_gives_the_same_bits(kernels, layout):
    """Whatever order the device runs its programs in."""
    x = drawn((32, 64, 56, 56), torch.float32, layout, 0).requires_grad_()
    grad = drawn(x.shape, torch.float32, layout, 1)

    def both():
        layer = layer_for(sn.Batch(), 64, "relu")
        y = layer(x)
        return y, torch.autograd.grad(y, x, grad)[0], layer.running_var

    first = both()
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, both(), strict=True))


def test_streams_do_not_share_what_a_launch_writes(kernels):
    """Two streams at once give what each gives alone."""
    inputs = [drawn((16, 64, 28, 28), torch.float32, "nchw", seed) for seed in range(2)]
    layers = [layer_for(sn.Steady(), 64, "relu") for _ in inputs]
    alone = [layer_for(sn.Steady(), 64, "relu")(x).clone() for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    found = []
    for stream, layer, x in zip(streams, layers, inputs, strict=True):
        with torch.cuda.stream(stream):
            found.append(layer(x))
    torch.cuda.synchronize()
    for a, b in zip(found, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_graph_replays_training_steps(kernels):
    """Captured once, replayed: running statistics, count and memory move as in eager steps."""
    eager, captured = (layer_for(sn.Steady(), 64, "relu") for _ in range(2))
    x = drawn((8, 64, 16, 16), torch.float32, "nchw", 0).requires_grad_()
    grad = drawn(x.shape, torch.float32, "nchw", 1)
    start = {name: t.clone() for name, t in captured.named_buffers()}

    def step(layer):
        return torch.autograd.grad(layer(x), x, grad)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(captured)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dx = step(captured)
    for name, t in captured.named_buffers():
        t.copy_(start[name])
    for _ in range(4):
        graph.replay()
        right = step(eager)
        torch.testing.assert_close(dx, right, rtol=1e-5, atol=1e-6)
    for name, t in captured.named_buffers():
        torch.testing.assert_close(t, dict(eager.named_buffers())[name], rtol=1e-5, atol=1e-6)
