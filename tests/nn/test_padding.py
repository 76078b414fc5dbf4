"""NaN or infinity in padding: the output there, and no gradient that leaves it out.

The truth is the same layer over padding of zeros, whose gradients other tests hold to float64.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad as gradient_of

import steadynorm as sn
from steadynorm.kernels import dispatch

POLICIES: dict[str, Any] = {
    "batch": sn.Batch(),
    "steady": sn.Steady(),
    "one-way": sn.Steady(window=None),
    "running": sn.Running(),
    "renorm": sn.Renorm(warmup=0, r_ramp=2, d_ramp=2),
    "ghost": sn.Ghost(4),
    "frozen": sn.Frozen(),
}
everywhere = pytest.mark.parametrize("policy", POLICIES)
ACTIVATIONS = (None, "relu", "silu", "tanh")
SHAPE = (8, 3, 5)


def made(policy: str, activation: Any = None, **settings: Any) -> Any:
    return sn.BatchNorm1d(3, statistics=POLICIES[policy], activation=activation, **settings)


def data(fill: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, residual, and an upstream gradient of 0 at padding; the mask."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(SHAPE[0], SHAPE[2], generator=generator) > 0.3
    mask[::4] = mask[1::4] = True  # two whole samples in every ghost
    valid = mask.unsqueeze(1)
    x, residual, upstream = (torch.randn(SHAPE, generator=generator) for _ in range(3))
    x, residual = (torch.where(valid, t, fill).to(dtype) for t in (x, residual))
    return x.requires_grad_(), residual.requires_grad_(), (upstream * valid).to(dtype), mask


def trained(layer: Any, fill: float, beside: bool) -> dict[str, Tensor]:
    """Gradients, valid outputs and buffers after one step."""
    x, residual, upstream, mask = data(fill, layer.weight.dtype)
    y = layer(x, residual=residual if beside else None, mask=mask)
    y.backward(upstream)
    found = {name: t.grad for name, t in layer.named_parameters()} | dict(layer.named_buffers())
    found |= {"x": x.grad, "y": torch.where(mask.unsqueeze(1), y.detach(), 0)}
    return found | ({"residual": residual.grad} if beside else {})


def compare(found: Any, truth: Any, said: object) -> None:
    for name, t in truth.items():
        torch.testing.assert_close(
            found[name], t, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{said} {n}: {m}"
        )


@pytest.mark.parametrize("beside", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("fill", [float("nan"), float("inf"), -float("inf")])
@everywhere
def test_it_spoils_no_gradient(policy: str, fill: float, beside: bool) -> None:
    for activation in ACTIVATIONS:
        found, truth = (trained(made(policy, activation), f, beside) for f in (fill, 0.0))
        compare(found, truth, activation)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "ghost"])
def test_samples_of_padding_alone_change_nothing(policy: str, compiled: bool) -> None:
    """As where a last batch of 2 is filled up to 64."""
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(64, 3, 5, generator=generator) for _ in range(2))
    mask = torch.arange(5) < torch.tensor([3, 5] + [0] * 62).unsqueeze(1)
    upstream *= mask.unsqueeze(1)
    found: list[Any] = []
    for rows in (64, 2):
        layer = made(policy)
        layer.num_batches_tracked.fill_(10_000)  # the horizon, not the count, decides
        call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        given = x[:rows].clone().requires_grad_()
        y = call(given, mask=mask[:rows])
        y.backward(upstream[:rows])
        found.append({"y": y.detach()[:2], "x": given.grad[:2]} | dict(layer.named_buffers()))
    compare(*found, policy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("policy", ["batch", "steady", "ghost"])
def test_by_plain_operations_too(
    policy: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS", dispatch.BACKENDS[-1:])
    for activation in ACTIVATIONS:
        layers = [made(policy, activation, dtype=dtype) for _ in range(2)]
        compare(*(trained(t, f, True) for t, f in zip(layers, (float("nan"), 0.0), strict=True)),
                activation)  # fmt: skip


def test_the_gradient_of_the_residual_alone() -> None:
    """No sums are taken then."""
    x, residual, upstream, mask = data(float("nan"))
    layer = made("batch", "silu").requires_grad_(False)
    layer(x.detach(), residual=residual, mask=mask).backward(upstream)
    assert residual.grad is not None
    assert residual.grad.isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@everywhere
def test_second_derivatives(policy: str, activation: Any) -> None:
    found = []
    for fill in (float("nan"), 0.0):
        x, residual, upstream, mask = data(fill)
        layer = made(policy, activation)
        y = torch.where(mask.unsqueeze(1), layer(x, residual=residual, mask=mask), 0)
        inputs = (x, residual, layer.weight)
        first = torch.autograd.grad((y * upstream).pow(2).sum(), inputs, create_graph=True)
        sum(t.square().sum() for t in first).backward()  # type: ignore[union-attr]
        found.append({name: t.grad for name, t in zip("xrw", inputs, strict=True)})
    compare(*found, "")


def transformed(layer: Any, fill: float) -> dict[str, Tensor]:
    """Gradients by torch.func."""
    x, residual, upstream, mask = data(fill)

    def loss(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        beside = {"residual": residual, "mask": mask}
        y = torch.func.functional_call(layer, {"weight": weight}, (x,), beside)
        return (torch.where(mask.unsqueeze(1), y, 0) * upstream).sum()

    found = gradient_of(loss, argnums=(0, 1, 2))(x, residual, layer.weight.detach())
    return dict(zip("xrw", found, strict=True))


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "steady"])
def test_under_transforms(policy: str) -> None:
    """But for a memory of the gradient, which moves in no transform."""
    for activation in ACTIVATIONS:
        found, truth = (transformed(made(policy, activation), fill) for fill in (float("nan"), 0.0))
        compare(found, truth, activation)


def test_the_output_there_is_what_it_was() -> None:
    """Under transforms it is computed in two pieces."""
    x, residual, _, mask = data(float("inf"))
    with torch.no_grad():
        x[1, 0, 0], x[2, 0, 0] = torch.nan, -torch.inf
        mask[1, 0] = mask[2, 0] = False
        wanted = made("batch", "relu")(x, residual=residual, mask=mask)
    made_again = made("batch", "relu")
    found = torch.func.vjp(lambda t: made_again(t, residual=residual, mask=mask), x)[0]
    torch.testing.assert_close(found, wanted, equal_nan=True)
    assert not wanted.isfinite().all()


def test_what_is_not_padding_still_shows() -> None:
    """A NaN that the mask counts, and a gradient of NaN at padding that is finite."""
    x, residual, upstream, mask = data(0.0)
    layer = made("batch", "silu")
    with torch.no_grad():
        x[0, 1, 0] = torch.nan
    layer(x, mask=mask).backward(upstream)
    assert x.grad is not None
    assert x.grad.isfinite().all(dim=2).all(dim=0).tolist() == [True, False, True]
    upstream[tuple((~mask.unsqueeze(1).expand(SHAPE)).nonzero()[0])] = torch.nan
    layer(residual, mask=mask).backward(upstream)
    assert residual.grad is not None
    assert residual.grad.isnan().any()


def finished(fill: float, *, whole: bool) -> dict[str, Tensor]:
    """Gradients of a recurrent network, or of its cell in a loop, over sequences of two lengths."""
    torch.manual_seed(0)
    lstm = sn.BatchNormLSTM(2, 4, max_length=5)
    x = torch.randn(5, 4, 2)
    x[3:, 2:] = fill
    x.requires_grad_()
    if whole:
        h = lstm(x, lengths=[5, 5, 3, 3])[1][0][0]
    else:
        state = None
        for step in range(5):
            goes_on = torch.tensor([True, True, step < 3, step < 3])
            state = lstm.cells[0](x[step], state, step=step, mask=goes_on)
        h = state[0]  # type: ignore[index]
    h.square().sum().backward()
    return {"x": x.grad, "h": h} | {name: t.grad for name, t in lstm.named_parameters()}


def test_past_the_end_of_a_sequence() -> None:
    truth = finished(0.0, whole=True)
    for whole in (True, False):
        compare(finished(float("nan"), whole=whole), truth, whole)
