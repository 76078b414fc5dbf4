"""Which backend serves a call: what `explain` says, what runs, and the road that leads there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import steadynorm as sn
from steadynorm.kernels import dispatch
from steadynorm.kernels.cpu import runtime

SHAPES = [(128, 16), (64, 16), (2, 16, 4, 4), (40, 16), (5, 7, 3), (16, 32, 20, 20), (9, 300, 7)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture
def ran(monkeypatch):
    """The names of the backends whose forward has run."""
    names = []
    for backend in dispatch.BACKENDS:

        def spy(call, backend=backend, forward=backend.forward):
            names.append(backend.name)
            return forward(call)

        monkeypatch.setattr(backend, "forward", spy)
    return names


def layer_for(x, policy, activation, training):
    kind = {2: sn.BatchNorm1d, 3: sn.BatchNorm1d, 4: sn.BatchNorm2d}[x.ndim]
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    layer = kind(x.shape[1], statistics=policy, activation=activation, dtype=dtype)
    return layer.train(training)


@pytest.mark.parametrize("policy", ["batch", "steady", "renorm", "ghost", "frozen"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_explain_says_what_runs(dtype, training, policy, ran):
    for shape in SHAPES:
        for layout in ("first", "last", "strided"):
            x = torch.randn(shape).to(dtype)
            if layout != "first":
                x = x.movedim(1, -1).contiguous().movedim(-1, 1)
            x = x[::2] if layout == "strided" else x
            for residual, activation in ((None, None), (x, "relu"), (None, "gelu")):
                layer = layer_for(x, policy, activation, training)
                said = dispatch.explain(
                    x, layer.weight, layer.bias, layer.running_mean, layer.running_var,
                    training=training, residual=residual, statistics=policy, activation=activation,
                )  # fmt: skip
                ran.clear()
                layer(x, residual=residual)
                assert ran == [said.kernel], (shape, layout, activation)
                order = [backend.name for backend in dispatch.BACKENDS]
                assert list(said.refusals) == order[: order.index(said.kernel)]
                assert all(said.refusals.values())


def test_explain_knows_the_mask_and_the_compiler(ran):
    x = torch.randn(4, 8, 5, 5)
    mask = torch.ones(4, 5, 5, dtype=torch.bool)
    assert dispatch.explain(x).kernel == "aten"
    assert dispatch.explain(x, mask=mask).kernel == "cpu"
    assert "more is asked" in dispatch.explain(x, mask=mask).why
    sn.BatchNorm2d(8)(x, mask=mask)
    assert ran == ["cpu"]
    ran.clear()
    torch.func.grad(lambda t: sn.BatchNorm2d(8)(t).square().sum())(x)
    assert ran == ["traced"]


# Tensors that a kernel cannot read by their address -----------------------------------------------


class Elsewhere(torch.Tensor):
    """Holds its values in another tensor, as a DTensor does: its own address is null."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError("only its own operators know this tensor")


LARGE = (16, 32, 20, 20)
ARGUMENTS = ("weight", "bias", "running_mean", "running_var", "residual")


def arguments():
    torch.manual_seed(3)
    named = {name: torch.rand(32) + 0.5 for name in ARGUMENTS[:4]}
    return torch.randn(LARGE), {**named, "residual": torch.randn(LARGE)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_view_that_negates_later_is_read_right(name, training):
    x, named = arguments()
    expected = sn.functional.batch_norm(x, training=training, **named)
    x, named = arguments()
    named[name] = torch._neg_view(-named[name])
    said = dispatch.explain(x, training=training, **named)
    assert said.refusals["cpu"] == f"`{name}` is a view whose values are not in memory"
    y = sn.functional.batch_norm(x, training=training, **named)
    torch.testing.assert_close(y, expected)


def test_an_input_and_a_gradient_that_negate_later_are_read_right():
    x, named = arguments()
    grad = torch.randn(LARGE)
    results = []
    for values, upstream in ((x, grad), (torch._neg_view(-x), torch._neg_view(-grad))):
        leaf = values.detach().requires_grad_()
        y = sn.functional.batch_norm(leaf, None, None, training=True, weight=named["weight"])
        y.backward(upstream)
        results.append((y, leaf.grad))
    torch.testing.assert_close(results[1], results[0])
    leaf = x.detach().requires_grad_()
    y = sn.functional.batch_norm(leaf, None, None, training=True, weight=named["weight"])
    y.backward(torch._neg_view(-grad))
    torch.testing.assert_close((y, leaf.grad), results[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("size", ["small", "large"])
def test_a_tensor_that_lives_elsewhere_never_counts_as_absent(name, training, size):
    x, named = arguments()
    if size == "small":
        x, named["residual"] = x[:2, :, :4, :4].clone(), named["residual"][:2, :, :4, :4].clone()
    named[name] = Elsewhere(named[name])
    with pytest.raises(RuntimeError, match="only its own operators"):
        sn.functional.batch_norm(x, training=training, **named)


def test_a_weight_on_another_device_is_refused():
    x, named = arguments()
    with pytest.raises((RuntimeError, NotImplementedError)):
        sn.functional.batch_norm(
            x, None, None, named["weight"].to("meta"), training=True
        ).sum().item()


# What autograd hears of ---------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["batch", "steady"])
def test_autograd_hears_that_buffers_were_written(policy):
    layer = sn.BatchNorm2d(32, statistics=policy)
    buffers = [layer.running_mean, layer.running_var, layer.num_batches_tracked]
    before = [buffer._version for buffer in buffers]
    layer(torch.randn(LARGE))
    assert all(b._version > old for b, old in zip(buffers, before, strict=True))
    saved = (torch.ones(32, requires_grad=True) * layer.running_mean).sum()
    layer(torch.randn(LARGE))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


# The road -----------------------------------------------------------------------------------------

PACKAGE = str(Path(sn.__file__).parent)
ROAD = [
    "BatchNorm2d.forward", "normalize", "normalize", "Normalize.forward", "CpuKernels.forward",
    "Plan.forward",
]  # fmt: skip


def road_of(call):
    """The package's functions on the stack when the kernel begins, and how many were entered."""
    stack, entered = [], 0
    found = []

    def profile(frame, event, argument):
        nonlocal entered
        if not frame.f_code.co_filename.startswith(PACKAGE) or found:
            return
        if event == "call":
            entered += 1
            stack.append(frame.f_code.co_qualname)
            if frame.f_code is runtime.Kernel.__call__.__code__:
                found.extend(stack[:-1])
        elif event == "return":
            stack.pop()

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found, entered - 1


def test_a_training_call_passes_six_functions_before_the_kernel():
    layer, x = sn.BatchNorm2d(32), torch.randn(LARGE, requires_grad=True)
    layer(x)  # prepares the plan
    road, entered = road_of(lambda: layer(x))
    assert [name.split(".")[-1] for name in road] == [name.split(".")[-1] for name in ROAD]
    assert len(road) == 6
    assert entered <= 33, "helpers that return count too"
