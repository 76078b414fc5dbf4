"""The memory of the gradient in compiled and exported graphs: the values of eager PyTorch."""

import copy
from typing import Any

import pytest
import torch
from tests.nn.test_gradient_memory import CHANNELS, POLICY, drawn, layer, trained, upstream
from torch.utils.checkpoint import checkpoint

import steadynorm as sn


def assert_same_steps(made: torch.nn.Module, call: Any, twin: torch.nn.Module) -> None:
    """`call` trains `twin` as eager PyTorch trains `made`: outputs, gradients and buffers."""
    for seed, samples in enumerate((4, 2, 4, 7, 2, 4)):
        x, z = drawn(seed, samples), drawn(seed, samples)
        y, found = made(x), call(z)
        y.backward(upstream(seed, samples))
        found.backward(upstream(seed, samples))
        torch.testing.assert_close(found, y)
        torch.testing.assert_close(z.grad, x.grad)
        torch.testing.assert_close(dict(twin.named_buffers()), dict(made.named_buffers()))
    for one, other in zip(twin.parameters(), made.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_compiler_keeps_it_in_one_graph(backend: str) -> None:
    made = layer(activation="relu")
    twin = copy.deepcopy(made)
    torch.compiler.reset()
    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    assert_same_steps(made, compiled, twin)


def test_a_layer_called_twice_in_a_compiled_graph() -> None:
    made = layer()
    twin = copy.deepcopy(made)
    torch.compiler.reset()

    def twice(net: torch.nn.Module) -> Any:
        return lambda x: net(net(x).relu())

    compiled = torch.compile(twice(twin), backend="aot_eager", fullgraph=True)
    assert_same_steps(_Calls(made, twice(made)), compiled, twin)


class _Calls(torch.nn.Module):
    """A layer's buffers and parameters, and a function that calls it."""

    def __init__(self, net: torch.nn.Module, call: Any) -> None:
        super().__init__()
        self.net, self.call = net, call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.call(x)
        return y

    def named_buffers(self, *arguments: Any, **options: Any) -> Any:
        return self.net.named_buffers(*arguments, **options)


def test_two_compiled_forwards_before_their_backwards() -> None:
    """As of a network that sees two views of a sample; the memory moves between the two."""
    made = layer()
    twin = copy.deepcopy(made)
    torch.compiler.reset()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for call in (made, compiled):
        one, two = call(drawn(0)), call(drawn(1))
        (one * upstream(0) + two * upstream(1)).sum().backward()
    torch.testing.assert_close(twin.gradient_memory, made.gradient_memory)


def test_types_and_layouts_that_no_kernel_takes_compile() -> None:
    made = sn.BatchNorm2d(CHANNELS, statistics=POLICY, activation="relu")
    twin = copy.deepcopy(made)
    torch.compiler.reset()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        x = torch.randn(4, CHANNELS, 5, 6, dtype=torch.float16).transpose(2, 3).requires_grad_()
        z = x.detach().clone().requires_grad_()
        residual = torch.randn(x.shape).contiguous(memory_format=torch.channels_last)
        mask = torch.rand(4, 6, 5) > 0.3
        y = made(x, residual=residual, mask=mask)
        found = compiled(z, residual=residual, mask=mask)
        grad = torch.randn_like(y)
        y.backward(grad)
        found.backward(grad)
        torch.testing.assert_close(found, y)
        torch.testing.assert_close(z.grad, x.grad)
        torch.testing.assert_close(twin.gradient_memory, made.gradient_memory)


def test_compiled_without_a_gradient_of_the_input_it_stays() -> None:
    made = layer()
    before = made.gradient_memory.clone()
    torch.compiler.reset()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    compiled(drawn(0, requires_grad=False)).backward(upstream(0))
    torch.testing.assert_close(made.gradient_memory, before, rtol=0, atol=0)
    assert made.weight.grad is not None


def test_compiled_every_backward_through_one_forward_moves_it() -> None:
    """Unlike in eager mode: a compiled backward has nowhere to keep what the first one found."""
    made, alone = layer(), layer()
    x = drawn(0)
    torch.compiler.reset()
    y = torch.compile(made, backend="aot_eager", fullgraph=True)(x)
    for _ in range(2):
        torch.autograd.grad(y, x, upstream(0), retain_graph=True)
    trained(0, alone)
    assert not torch.allclose(made.gradient_memory, alone.gradient_memory)
    with pytest.raises(RuntimeError, match="aot_autograd does not"):
        torch.autograd.grad(y, x, upstream(0), create_graph=True)


def test_checkpointing_inside_a_compiled_graph_is_refused() -> None:
    made, x = layer(), drawn(0)
    torch.compiler.reset()
    call = torch.compile(
        lambda x: checkpoint(made, x, use_reentrant=False), backend="aot_eager", fullgraph=True
    )
    with pytest.raises(Exception, match="activation checkpointing inside a compiled graph"):
        call(x)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("policy", [sn.Steady(), sn.Steady(window=None), sn.Running()], ids=str)
def test_checkpointing_around_a_compiled_module_is_refused(policy, reentrant, backend) -> None:
    made = sn.BatchNorm1d(4, statistics=policy)
    torch.compiler.reset()
    compiled = torch.compile(made, backend=backend, fullgraph=True)
    for _ in range(2):
        x = torch.randn(8, 4, requires_grad=True)
        y = checkpoint(compiled, x, use_reentrant=reentrant)
        with pytest.raises(Exception, match="activation checkpointing around a compiled module"):
            y.sum().backward()
    made.statistics = sn.Batch()
    x, grad = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4)
    checkpoint(compiled, x, use_reentrant=reentrant).backward(grad)
    right = torch.autograd.grad(torch.nn.BatchNorm1d(4)(x), x, grad)[0]
    torch.testing.assert_close(x.grad, right, rtol=1e-4, atol=1e-5)


def test_the_compiler_may_leave_the_layer_out() -> None:
    made, plain = layer(), layer()
    torch.compiler.reset()
    made.forward = torch.compiler.disable(made.forward)  # type: ignore[method-assign]
    compiled = torch.compile(torch.nn.Sequential(torch.nn.Identity(), made), backend="aot_eager")
    torch.testing.assert_close(trained(0, compiled), trained(0, plain))
    torch.testing.assert_close(made.gradient_memory, plain.gradient_memory)


@pytest.mark.filterwarnings("ignore:A layer is exported in training")
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_graph_trains_the_same(strict: bool) -> None:
    made = layer()
    rows = torch.export.Dim("rows", min=1, max=64)
    exported = torch.export.export(
        copy.deepcopy(made), (drawn(0, 4),), dynamic_shapes={"input": {0: rows}}, strict=strict
    ).module()  # which keeps the tensors of the layer that was exported
    assert_same_steps(made, exported, exported)
