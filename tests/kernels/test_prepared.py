"""Prepared calls on CPU: values, running statistics and gradients against the truth."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests import truth

import steadynorm as sn
from steadynorm.kernels import aten
from steadynorm.kernels.cpu import kernels, prepared, slabs

pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")

SHAPES = {
    "visit": (8, 6, 9, 7),
    "planes": (3, 4, 30, 40),
    "planes together": (3, 36, 24, 24),
    "odd planes together": (3, 37, 13, 11),
    "parts": (64, 3, 5, 7),
    "wide": (5, 1500, 2, 1),
}


@pytest.fixture(autouse=True)
def only_compiled(monkeypatch):
    monkeypatch.setattr(aten, "LIMIT", 0)


@pytest.fixture
def ran(monkeypatch):
    """Which of a plan's methods have served."""
    names = []
    for name in ("forward", "backward"):
        method = getattr(prepared.CpuPlan, name)

        def spy(*arguments, name=name, method=method):
            result = method(*arguments)
            if result is not None:  # else the stages serve
                names.append(name)
            return result

        monkeypatch.setattr(prepared.CpuPlan, name, spy)
    return names


@pytest.fixture(params=["one visit", "two passes", "two passes past the caches"])
def visits(request, monkeypatch):
    """The ways to cut the work, whatever the size."""
    usual = slabs.cut.__wrapped__

    def cut(*arguments):
        return usual(*arguments)._replace(visit=request.param == "one visit")

    monkeypatch.setattr(slabs, "cut", cut)
    if "past the caches" in request.param:
        for name in ("STREAM_FROM", "STREAM_VISITS_FROM", "STREAM_MAPS_FROM"):
            monkeypatch.setattr(slabs, name, 0)
        monkeypatch.setattr(slabs.Cut, "begins_lines", lambda *_: True)
    prepared.prepared.cache_clear()
    yield request.param
    prepared.prepared.cache_clear()


def make(shape, layout, mean=0.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)
    kind = torch.channels_last if layout == "last" else torch.contiguous_format
    return values.contiguous(memory_format=kind)


def layer_for(channels, activation, dtype=torch.float32, statistics="batch"):
    layer = sn.BatchNorm2d(channels, activation=activation, dtype=dtype, statistics=statistics)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(channels, generator=generator) + 0.5)
        layer.bias.copy_(torch.randn(channels, generator=generator))
        layer.running_mean.copy_(torch.randn(channels, generator=generator))
        layer.running_var.copy_(torch.rand(channels, generator=generator) + 0.5)
    return layer


def close(mine, wanted, tolerance, what):
    error = np.abs(mine.detach().double().numpy() - wanted).max()
    assert error <= tolerance * max(1.0, np.abs(wanted).max()), f"{what}: off by {error}"


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("case", ["bn", "relu", "relu6+residual", "silu+residual", "tanh"])
def test_a_training_step_is_the_truths(name, layout, case, visits, ran):
    shape = SHAPES[name]
    activation, _, more = case.partition("+")
    activation = None if activation == "bn" else activation
    x, residual, grad = (make(shape, layout, 3.0 if i == 0 else 0.0, i) for i in range(3))
    x.requires_grad_()
    residual.requires_grad_()
    layer = layer_for(shape[1], activation)
    setting = truth.Setting(
        layer.weight.detach().numpy(), layer.bias.detach().numpy(), activation=activation
    )
    before = truth.Running(layer.running_mean.numpy().copy(), layer.running_var.numpy().copy(), 0)
    wanted = truth.train(
        x.detach().numpy(), sn.Batch(), before, setting,
        residual=residual.detach().numpy() if more else None, grad=grad.numpy(),
    )  # fmt: skip
    y = layer(x, residual=residual if more else None)
    y.backward(grad)
    assert ran == ["forward", "backward"]
    assert y.stride() == x.stride()
    close(y, wanted.y, 2e-6, "y")
    close(layer.running_mean, wanted.running.mean, 1e-6, "running_mean")
    close(layer.running_var, wanted.running.var, 1e-6, "running_var")
    assert int(layer.num_batches_tracked) == 1
    close(x.grad, wanted.dx, 5e-6, "dx")
    close(layer.weight.grad, wanted.dweight, 5e-6, "dweight")
    close(layer.bias.grad, wanted.dbias, 5e-6, "dbias")
    if more:
        close(residual.grad, wanted.dresidual, 5e-6, "dresidual")


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("case", ["bn", "relu6+residual", "silu+residual"])
@pytest.mark.parametrize("window", [None, 16], ids=["one-way", "two-way"])
def test_training_steps_of_steady_are_the_truths(window, name, layout, case, visits, ran):
    """The kernels blend the statistics, move the running ones, and move the memory."""
    shape = SHAPES[name]
    activation, _, more = case.partition("+")
    activation = None if activation == "bn" else activation
    policy = sn.Steady(prior=16 if window else 900, window=window)
    layer = layer_for(shape[1], activation, statistics=policy)
    layer.num_batches_tracked.fill_(9)
    setting = truth.Setting(
        layer.weight.detach().numpy(), layer.bias.detach().numpy(), activation=activation
    )
    running = truth.Running(layer.running_mean.numpy().copy(), layer.running_var.numpy().copy(), 9)
    memory = None if window is None else np.zeros((2, shape[1]))
    for step in range(3):
        made = (make(shape, layout, 2.0 if i == 0 else 0.5, 10 * step + i) for i in range(3))
        x, residual, grad = made
        x.requires_grad_()
        residual.requires_grad_()
        wanted = truth.train(
            x.detach().numpy(), policy, running, setting, grad=grad.numpy(), memory=memory,
            residual=residual.detach().numpy() if more else None,
        )  # fmt: skip
        running, memory = wanted.running, wanted.memory
        layer.zero_grad()
        y = layer(x, residual=residual if more else None)
        y.backward(grad)
        assert y.stride() == x.stride()
        close(y, wanted.y, 2e-6, "y")
        close(layer.running_mean, running.mean, 1e-6, "running_mean")
        close(layer.running_var, running.var, 1e-6, "running_var")
        assert int(layer.num_batches_tracked) == 10 + step
        close(x.grad, wanted.dx, 5e-6, "dx")
        close(layer.weight.grad, wanted.dweight, 5e-6, "dweight")
        close(layer.bias.grad, wanted.dbias, 5e-6, "dbias")
        if more:
            close(residual.grad, wanted.dresidual, 5e-6, "dresidual")
        if window is not None:
            close(layer.gradient_memory, memory, 2e-6, "memory")
    assert ran == ["forward", "backward"] * 3


@pytest.mark.parametrize("mean", [1e4, 1e6])
def test_the_blend_of_large_means_is_within_the_bar(mean, ran):
    """2e-6 from float64: the part of the blended mean that float32 cannot hold is not lost."""
    x = make((16, 5, 6, 7), "first", mean)
    layer = layer_for(5, None, statistics=sn.Steady(prior=200))
    layer.num_batches_tracked.fill_(9)
    with torch.no_grad():
        layer.running_mean.add_(mean)
        layer.weight.fill_(1)
        layer.bias.zero_()
    running = truth.Running(layer.running_mean.numpy().copy(), layer.running_var.numpy().copy(), 9)
    wanted = truth.train(x.numpy(), layer.statistics, running)
    error = np.abs(layer(x).detach().double().numpy() - wanted.y).max()
    assert error <= 2e-6 * max(1.0, np.abs(wanted.y).max())
    assert ran == ["forward"]


def test_a_pretrained_layer_without_a_count_leans_on_its_statistics(ran):
    """A count of 0 beside statistics that are not 0 and 1 reads as many, as in the stages."""
    layer = layer_for(5, None, statistics=sn.Steady(prior=200))
    x = make((4, 5, 6, 7), "first")
    running = truth.Running(
        layer.running_mean.numpy().copy(), layer.running_var.numpy().copy(), 1 << 30
    )
    setting = truth.Setting(layer.weight.detach().numpy(), layer.bias.detach().numpy())
    wanted = truth.train(x.numpy(), layer.statistics, running, setting)
    close(layer(x), wanted.y, 2e-6, "y")
    assert ran == ["forward"]


@pytest.mark.parametrize("window", [None, 16], ids=["one-way", "two-way"])
def test_second_derivatives_of_steady_come_from_what_the_kernels_left(window, ran):
    layer = layer_for(5, "silu", torch.float64, statistics=sn.Steady(prior=200, window=window))
    layer.num_batches_tracked.fill_(9)
    twin = copy.deepcopy(layer)
    x, grad = (make((4, 5, 3, 2), "first", 1.0, i, torch.float64) for i in range(2))
    mask = torch.ones(4, 3, 2, dtype=torch.bool)  # the stages, which no plan serves
    found = []
    for each, extra in ((layer, None), (twin, mask)):
        given = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(each(given, mask=extra), given, grad, create_graph=True)
        (ddx,) = torch.autograd.grad(dx.square().sum(), given)
        found.append((dx.detach(), ddx))
    torch.testing.assert_close(*found)
    assert ran == ["forward"]


@pytest.mark.parametrize(("rows", "together"), [(32, 5), (64, 5), (128, 2), (256, 1)])
def test_planes_are_together_as_long_as_one_visit_serves(rows, together):
    plan = slabs.cut(rows, 256, 56 * 56, 4, 2)
    assert plan.visit
    assert plan.block == together


@pytest.mark.parametrize(
    ("sizes", "itemsize", "streams"),
    [
        ((32, 512, 28, 28), 4, True),
        ((32, 512, 28, 28), 2, False),  # a plane is 24.5 cache lines
        ((32, 512, 32, 32), 2, True),
        ((32, 2048, 7, 7), 4, True),  # strips of 16 planes
        ((32, 2048, 7, 7), 2, False),
        ((32, 256, 30, 30), 4, False),
        ((64, 64, 112, 112), 2, True),
    ],
)
def test_non_temporal_stores_only_where_pieces_begin_at_cache_lines(sizes, itemsize, streams):
    samples, channels, height, width = sizes
    slab = slabs.Slab(slabs.Shape(samples, 1, channels, height * width), itemsize)
    assert bool(slab.arguments.streams) == streams


@pytest.mark.parametrize("layout", ["first", "last"])
def test_running_statistics_move_once_when_the_pivot_has_to(layout, visits):
    """The values that the pivot is drawn from lie far from all the others: a second reduction."""
    x = make((64, 8, 12, 12), layout, 0.0)
    total = 64 * 144
    for k in range(16):
        at = k * total // 16
        x[at // 144, :, at % 144 // 12, at % 12] = 1e4
    layer = sn.BatchNorm2d(8)
    wanted = truth.train(x.numpy(), sn.Batch(), truth.Running(np.zeros(8), np.ones(8), 0))
    y = layer(x)
    close(y, wanted.y, 2e-6, "y")
    close(layer.running_mean, wanted.running.mean, 1e-6, "running_mean")
    close(layer.running_var, wanted.running.var, 1e-6, "running_var")


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", kernels.SCALARS, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES.values(), (2, 700, 6, 6)], ids=str)
def test_inference_is_the_truths(shape, layout, dtype, visits, ran):
    x = make(shape, layout, 1.0, dtype=dtype)
    residual = make(shape, layout, 0.0, 1, dtype=dtype)
    layer = layer_for(
        shape[1], "relu", torch.float64 if dtype == torch.float64 else torch.float32
    ).eval()
    mean, var, weight, bias = (
        truth.beside(t.detach().double().numpy(), 4)
        for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    wanted = np.maximum(
        (x.double().numpy() - mean) / np.sqrt(var + 1e-5) * weight + bias
        + residual.double().numpy(),
        0,
    )  # fmt: skip
    with torch.no_grad():
        y = layer(x, residual=residual)
    assert ran == ["forward"]
    close(y, wanted, {torch.bfloat16: 2e-2, torch.float16: 2.5e-3}.get(dtype, 2e-6), "y")


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("case", ["bn", "relu6+residual", "silu+residual", "tanh"])
def test_gradients_in_inference_are_the_truths(name, layout, case, visits, ran):
    """Also when the running statistics move before the backward: it reads copies."""
    shape = SHAPES[name]
    activation, _, more = case.partition("+")
    activation = None if activation == "bn" else activation
    x, residual, grad = (make(shape, layout, 1.0 if i == 0 else 0.0, i) for i in range(3))
    x.requires_grad_()
    residual.requires_grad_()
    layer = layer_for(shape[1], activation).eval()
    setting = truth.Setting(
        layer.weight.detach().numpy(), layer.bias.detach().numpy(), activation=activation
    )
    running = truth.Running(layer.running_mean.numpy().copy(), layer.running_var.numpy().copy(), 0)
    wanted = truth.infer(
        x.detach().numpy(), running, setting, grad=grad.numpy(),
        residual=residual.detach().numpy() if more else None,
    )  # fmt: skip
    versions = [buffer._version for buffer in layer.buffers()]
    y = layer(x, residual=residual if more else None)
    assert [buffer._version for buffer in layer.buffers()] == versions
    close(layer.running_mean, running.mean, 0, "running_mean")
    close(layer.running_var, running.var, 0, "running_var")
    layer.reset_running_stats()
    y.backward(grad)
    assert ran == ["forward", "backward"]
    assert y.stride() == x.stride()
    close(y, wanted.y, 2e-6, "y")
    close(x.grad, wanted.dx, 5e-6, "dx")
    close(layer.weight.grad, wanted.dweight, 5e-6, "dweight")
    close(layer.bias.grad, wanted.dbias, 5e-6, "dbias")
    if more:
        close(residual.grad, wanted.dresidual, 5e-6, "dresidual")


@pytest.mark.parametrize("learns", [True, False], ids=["parameters learn", "parameters do not"])
def test_in_inference_one_infinity_spoils_no_other_gradient(learns, ran):
    """Sums over the batch are not finite then, and have no part in the input's gradient."""
    x, grad = make((8, 6, 9, 7), "first", 1.0), make((8, 6, 9, 7), "first", 0.0, 1)
    x[0, 0, 0, 0] = torch.inf
    layer = layer_for(6, None, statistics="frozen").requires_grad_(learns)
    weight, var = (
        truth.beside(t.detach().double().numpy(), 4) for t in (layer.weight, layer.running_var)
    )
    wanted = grad.double().numpy() * weight / np.sqrt(var + 1e-5)
    layer(x.requires_grad_()).backward(grad)
    assert ran == ["forward", "backward"]
    finite = torch.isfinite(x.detach())
    close(x.grad[finite], wanted[finite.numpy()], 5e-6, "dx")
    assert (layer.weight.grad is not None) == learns


def test_second_derivatives_in_inference(ran):
    x = make((3, 2, 3, 2), "first", 1.0, dtype=torch.float64).requires_grad_()
    layer = layer_for(2, "silu", torch.float64)
    mean, var = layer.running_mean, layer.running_var

    def call(x, weight, bias):
        return sn.functional.batch_norm(x, mean, var, weight, bias, activation="silu")

    inputs = (x, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    assert "forward" in ran


def test_without_parameters_and_running_statistics():
    x = make((8, 6, 9, 7), "last", 2.0).requires_grad_()
    grad = make((8, 6, 9, 7), "last", 0.0, 1)
    layer = sn.BatchNorm2d(6, affine=False, track_running_stats=False)
    wanted = truth.train(x.detach().numpy(), sn.Batch(), grad=grad.numpy())
    y = layer(x)
    y.backward(grad)
    close(y, wanted.y, 2e-6, "y")
    close(x.grad, wanted.dx, 5e-6, "dx")


def test_an_input_without_gradient_still_gives_the_parameters_theirs(ran):
    x, grad = make((8, 6, 9, 7), "first", 2.0), make((8, 6, 9, 7), "first", 0.0, 1)
    layer = layer_for(6, "relu")
    setting = truth.Setting(
        layer.weight.detach().numpy(), layer.bias.detach().numpy(), activation="relu"
    )
    wanted = truth.train(x.numpy(), sn.Batch(), setting=setting, grad=grad.numpy())
    layer(x).backward(grad)
    assert ran == ["forward"]
    close(layer.weight.grad, wanted.dweight, 5e-6, "dweight")
    close(layer.bias.grad, wanted.dbias, 5e-6, "dbias")


@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
def test_second_derivatives(activation, ran):
    x = make((3, 2, 3, 2), "first", 1.0, dtype=torch.float64).requires_grad_()
    layer = layer_for(2, activation, torch.float64)

    def call(x, weight, bias):
        return sn.functional.batch_norm(
            x, layer.running_mean, layer.running_var, weight, bias, True, activation=activation
        )

    inputs = (x, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    assert "forward" in ran


def test_what_the_kernels_cannot_write_goes_to_the_stages(ran):
    x = make((8, 6, 9, 7), "first").requires_grad_()
    strided = torch.zeros(12)[::2]
    y = sn.functional.batch_norm(x, strided, torch.ones(6), training=True)
    assert ran == []
    wanted = truth.train(x.detach().numpy(), sn.Batch(), truth.Running(np.zeros(6), np.ones(6), 0))
    close(y, wanted.y, 2e-6, "y")
    close(strided, wanted.running.mean, 1e-6, "running_mean")
