"""Derivatives beyond the second: right where our own stages serve, refused where PyTorch's do.

Before torch 2.14 its operator takes the batch's moments for constants in them, without an error. A
loss with second derivatives by the input, as of a physics-informed network, asks for the third.
"""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import steadynorm as sn
from steadynorm.kernels import aten, compat, dispatch
from steadynorm.kernels.reference import differentiable

SMALL, LARGE = (3, 4, 3, 2), (16, 64, 4, 4)
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
}
SEEN = 5  # batches before
EPS = 1e-5
REFUSAL = (
    r"does not support 3rd\+ order derivatives"
    if differentiable.REFUSED_BY_TORCH
    else 'wrong third derivatives.*numerics="exact"'
)


def made(policy: Any, shape: tuple[int, ...], **settings: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    layer = sn.BatchNorm2d(shape[1], statistics=policy, dtype=torch.float64, **settings)
    with torch.no_grad():
        for t in (layer.weight, layer.bias, layer.running_mean):
            t.normal_(generator=generator)
        layer.running_var.uniform_(0.5, 2, generator=generator)
        layer.num_batches_tracked.fill_(SEEN)
    return layer


def defined(layer: Any, x: Tensor) -> Tensor:
    """The layer's equation, for autograd to differentiate as often as it is asked."""
    axes = (0, 2, 3)
    mean, var = x.mean(axes), x.var(axes, correction=0)
    old_mean, old_var = layer.running_mean.clone(), layer.running_var.clone()
    name = type(layer.statistics).__name__
    if not layer.training:
        m, u = old_mean, old_var
    elif name == "Batch":
        m, u = mean, var
    else:
        count = x.numel() // x.shape[1]
        k = max(layer.momentum, 1 / (SEEN + 1)) if name == "Running" else count / (count + 16)
        m, u = (1 - k) * old_mean + k * mean, (1 - k) * old_var + k * var
        if name == "Steady":
            u = u + (k * (1 - k) * (mean - old_mean) ** 2).detach()

    def channels(t: Tensor) -> Tensor:
        return t.view(1, -1, 1, 1)

    normalized = (x - channels(m)) / channels(u + EPS).sqrt()
    z = channels(layer.weight) * normalized + channels(layer.bias)
    return ACTIVATIONS[layer.activation](z)


def derivatives(y: Tensor, inputs: tuple[Tensor, ...], orders: int) -> list[list[Tensor]]:
    """Of the first to the last order, each along random directions."""
    generator = torch.Generator().manual_seed(1)

    def along(t: Tensor) -> Tensor:
        return (t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum()

    total, found = along(y), []
    for _ in range(orders):
        gradients = torch.autograd.grad(total, inputs, create_graph=True, materialize_grads=True)
        found.append([g.detach().clone() for g in gradients])
        total = torch.stack([along(g) for g in gradients]).sum()
    return found


def compare(layer: Any, shape: tuple[int, ...], orders: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = (x.requires_grad_(), layer.weight, layer.bias)
    expected = derivatives(defined(layer, x), inputs, orders)
    found = derivatives(layer(x), inputs, orders)
    for order, truths in enumerate(expected):
        for ours, truth in zip(found[order], truths, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9 * float(truth.abs().max()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("policy", ["batch", "running", sn.Steady(window=None)], ids=str)
def test_four_orders(policy: Any, shape: tuple[int, ...], activation: str | None) -> None:
    layer = made(policy, shape, activation=activation, numerics="exact")
    assert dispatch.explain(torch.randn(shape), numerics="exact").kernel == "cpu"
    compare(layer, shape, 4)


@pytest.mark.parametrize("activation", ["silu", "tanh"])
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
def test_four_orders_in_inference(shape: tuple[int, ...], activation: str) -> None:
    compare(made("batch", shape, activation=activation).eval(), shape, 4)


def test_pytorchs_operator_is_wrong_or_refuses() -> None:
    """What is refused below, in all versions."""
    theirs, ours = torch.nn.BatchNorm2d(4, dtype=torch.float64), made("batch", SMALL)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(SMALL, dtype=torch.float64, requires_grad=True)
    inputs = (x, ours.weight, ours.bias)
    expected = derivatives(defined(ours, x), inputs, 3)
    if differentiable.REFUSED_BY_TORCH:
        with pytest.raises(RuntimeError, match=r"does not support 3rd\+ order derivatives"):
            derivatives(theirs(x), (x, theirs.weight, theirs.bias), 3)
    orders = 2 if differentiable.REFUSED_BY_TORCH else 3
    found = derivatives(theirs(x), (x, theirs.weight, theirs.bias), orders)
    errors = [float((a[0] - b[0]).abs().max()) for a, b in zip(found, expected, strict=False)]
    assert max(errors[:2]) < 1e-9
    assert all(error > 1e-2 for error in errors[2:])


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("wanted", ["all", "x", "weight"])
def test_a_third_derivative_by_pytorchs_operator_is_refused(wanted: str, activation: Any) -> None:
    layer = made("batch", SMALL, activation=activation)
    x = torch.randn(SMALL, dtype=torch.float64, requires_grad=True)
    inputs = {"all": (x, layer.weight, layer.bias), "x": (x,), "weight": (layer.weight,)}[wanted]
    y = layer(x)
    assert len(derivatives(y, inputs, 2)) == 2
    with pytest.raises(RuntimeError, match=REFUSAL):
        derivatives(layer(x), (x, *inputs), 3)


def test_a_loss_with_second_derivatives_by_the_input() -> None:
    """Its gradient is a third derivative, though the norm's output gradient is constant."""

    def gradient(numerics: str) -> Tensor:
        torch.manual_seed(0)
        net: Any = torch.nn.Sequential(
            torch.nn.Linear(1, 8), torch.nn.Tanh(), sn.BatchNorm1d(8, numerics=numerics),
            torch.nn.Linear(8, 1),
        ).double()  # fmt: skip
        x = torch.linspace(0, 1, 16, dtype=torch.float64).unsqueeze(1).requires_grad_()
        (first,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first * x).sum(), x, create_graph=True)
        second.square().mean().backward()
        found: Tensor = net[0].weight.grad
        return found

    with pytest.raises(RuntimeError, match=REFUSAL):
        gradient("device")
    assert gradient("exact").isfinite().all()


def test_a_gradient_penalty_is_not_refused() -> None:
    layer = made("batch", SMALL)
    x = torch.randn(SMALL, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    first.norm().backward()
    truth = made("batch", SMALL)
    (expected,) = torch.autograd.grad(defined(truth, x).pow(3).sum(), x, create_graph=True)
    (weight,) = torch.autograd.grad(expected.norm(), truth.weight)
    torch.testing.assert_close(layer.weight.grad, weight, rtol=1e-9, atol=1e-9)


ours_refuses = pytest.mark.skipif(differentiable.REFUSED_BY_TORCH, reason="torch refuses by itself")


@pytest.fixture(params=["no hooks", "hooks", "hooks, an accelerator"])
def route(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What leads to the input: what its node has saved, itself, or a tensor without values."""
    hooks = None if request.param == "no hooks" else True
    monkeypatch.setattr(compat, "saved_hooks", lambda _: hooks)
    if "accelerator" in request.param:
        refuse = aten.refuse_third_derivatives

        def elsewhere(y: Tensor, x: Tensor, weight: Tensor | None) -> None:
            refuse(y, OnAnAccelerator(x), weight)  # type: ignore[arg-type]

        monkeypatch.setattr(aten, "refuse_third_derivatives", elsewhere)


class OnAnAccelerator:
    """Passes for a tensor that is not on CPU."""

    is_cpu = False

    def __init__(self, x: Tensor) -> None:
        self.requires_grad, self.narrow = x.requires_grad, x.narrow


@ours_refuses
@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("affine", [True, False])
def test_every_way_to_the_input(affine: bool) -> None:
    layer = sn.BatchNorm2d(4, affine=affine, dtype=torch.float64)
    x = torch.randn(SMALL, dtype=torch.float64, requires_grad=True)
    assert len(derivatives(layer(x), (x,), 2)) == 2
    with pytest.raises(RuntimeError, match=REFUSAL):
        derivatives(layer(x), (x,), 3)


def test_second_derivatives_in_a_checkpointed_region() -> None:
    x = torch.randn(SMALL, dtype=torch.float64, requires_grad=True)
    found = []
    for run in (lambda f, t: f(t), lambda f, t: checkpoint(f, t, use_reentrant=False)):
        layer = made("batch", SMALL)
        found.append(derivatives(run(layer, x), (x, layer.weight), 2))
    for plain, repeated in zip(*found, strict=True):
        torch.testing.assert_close(repeated, plain, rtol=1e-12, atol=1e-12)


@ours_refuses
def test_an_output_that_is_kept_holds_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `total += loss` keeps graphs, whose saved tensors are freed."""
    refuse, seen = aten.refuse_third_derivatives, []

    def watched(y: Tensor, x: Tensor, weight: Tensor | None) -> None:
        seen.append(weakref.ref(x))
        refuse(y, x, weight)

    monkeypatch.setattr(aten, "refuse_third_derivatives", watched)
    x = torch.randn(SMALL, requires_grad=True)
    for hooks in (None, True):
        monkeypatch.setattr(compat, "saved_hooks", lambda _, hooks=hooks: hooks)
        loss = sn.functional.batch_norm(x, None, None, training=True).square().sum()
        loss.backward()
        assert (seen.pop()() is None) is (hooks is None)
        assert loss.grad_fn is not None
