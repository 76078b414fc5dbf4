"""`Steady(window=...)`: a memory of the gradient, kept with the layer, moved by backward passes.

Ways of training that could move it wrongly stand in `test_gradient_memory_passes.py`.
"""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tests import truth

import steadynorm as sn
from steadynorm.kernels import dispatch
from steadynorm.kernels.reference.closed_form import REFERENCE

POLICY = sn.Steady(prior=16, horizon=64, window=16)
CHANNELS = 3


@pytest.fixture(params=["chosen", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend that the dispatcher chooses, and the reference."""
    if request.param == "reference":
        monkeypatch.setattr(dispatch, "BACKENDS", (REFERENCE,))


def layer(seed: int = 0, **settings: Any) -> sn.BatchNorm1d:
    """Parameters, statistics and memory that are not the initial ones."""
    rng = np.random.default_rng(seed)
    made = sn.BatchNorm1d(CHANNELS, **{"statistics": POLICY, "dtype": torch.float64} | settings)
    values = {
        "weight": rng.normal(1, 0.5, CHANNELS), "bias": rng.normal(size=CHANNELS),
        "running_mean": rng.normal(size=CHANNELS), "running_var": rng.uniform(0.5, 2, CHANNELS),
        "gradient_memory": rng.normal(0, 0.3, (2, CHANNELS)),
    }  # fmt: skip
    with torch.no_grad():
        for name, value in values.items():
            getattr(made, name).copy_(torch.tensor(value))
        made.num_batches_tracked.fill_(9)
    return made


def drawn(seed: int, samples: int = 2, *, requires_grad: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, CHANNELS, generator=generator, dtype=torch.float64)
    return x.requires_grad_(requires_grad)


def upstream(seed: int, samples: int = 2) -> torch.Tensor:
    return drawn(100 + seed, samples, requires_grad=False)


def trained(seed: int, made: torch.nn.Module) -> torch.Tensor:
    """The input's gradient in one training step."""
    x = drawn(seed)
    made(x).backward(upstream(seed))
    assert x.grad is not None
    return x.grad


# Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 5), (4, 3, 7)])
@pytest.mark.usefixtures("backend")
def test_fifty_steps(shape: tuple[int, ...], activation: str | None, masked: bool) -> None:
    made = layer(activation=activation)
    running = truth.Running(made.running_mean.numpy().copy(), made.running_var.numpy().copy(), 9)
    memory = made.gradient_memory.numpy().copy()
    parameters = (made.weight.detach().numpy(), made.bias.detach().numpy())
    for step in range(50):
        rng = np.random.default_rng(step)
        x, grad = rng.normal(0.5, 2, shape), rng.normal(0.2, 1, shape)
        mask = rng.random((shape[0], *shape[2:])) > 0.3 if masked else None
        right = truth.train(
            x, POLICY, running, truth.Setting(*parameters, activation), mask=mask, grad=grad,
            memory=memory,
        )  # fmt: skip
        assert right.running is not None
        assert right.memory is not None
        running, memory = right.running, right.memory
        given = torch.tensor(x, requires_grad=True)
        y = made(given, mask=None if mask is None else torch.tensor(mask))
        y.backward(torch.tensor(grad))
        assert given.grad is not None
        np.testing.assert_allclose(given.grad.numpy(), right.dx, atol=1e-12)
        np.testing.assert_allclose(made.gradient_memory.numpy(), memory, atol=1e-12)


@pytest.mark.usefixtures("backend")
def test_against_autograd_of_the_explicit_formula() -> None:
    made, x, grad = layer(), drawn(0, 5), upstream(0, 5)
    mean, var = made.running_mean.clone(), made.running_var.clone()
    memory = made.gradient_memory.clone()
    k, beta = 5 / (5 + 16), 5 / (5 + 16)
    t = x.detach().clone().requires_grad_()
    mu, v = t.mean(0), t.var(0, correction=0)
    m = (1 - k) * mean + k * mu
    u = (1 - k) * var + k * v + k * (1 - k) * (mu - mean).detach().square()
    rho = (u + made.eps).rsqrt()
    hat = (t - m) * rho
    (through_share,) = torch.autograd.grad(hat, t, grad)
    left = through_share * u.detach().add(made.eps).sqrt()  # h
    fixed = hat.detach()
    ones = torch.ones_like(fixed)
    for c in range(CHANNELS):
        rows = torch.stack([ones[:, c], fixed[:, c]])
        matrix = (1 - beta) * torch.eye(2, dtype=torch.float64) + beta * rows @ rows.T / 5
        right = (1 - beta) * memory[:, c] + beta * rows @ left[:, c] / 5
        memory[:, c] = torch.linalg.solve(matrix, right)
    expected = made.weight * rho * (left - memory[0] - memory[1] * fixed)
    made(x).backward(grad)
    torch.testing.assert_close(x.grad, expected.detach())
    torch.testing.assert_close(made.gradient_memory, memory)


@pytest.mark.usefixtures("backend")
def test_the_map_given_the_memory() -> None:
    """With an endless window the memory stands still: a one-way gradient less a fixed part.

    The one-way gradient is checked by difference quotients; δ² carries none, so about a running
    mean that is the batch's.
    """
    x, grad = drawn(0, 6), upstream(0, 6)
    made = layer(statistics=sn.Steady(prior=16, window=1e14))
    made.running_mean.copy_(x.detach().mean(0))
    one_way = copy.deepcopy(made)
    one_way.gradient_memory.zero_()
    rng = np.random.default_rng(0)
    direction = torch.tensor(rng.normal(size=x.shape))
    outputs = []
    for shift in (1e-6, -1e-6):
        y = copy.deepcopy(one_way)(x.detach() + shift * direction)
        outputs.append((y * grad).sum())
    quotient = (outputs[0] - outputs[1]) / 2e-6
    k = 6 / (6 + 16)
    mean, batch = made.running_mean.clone(), x.detach()
    u = (1 - k) * made.running_var + k * batch.var(0, correction=0)
    rho = (u + made.eps).rsqrt()
    fixed = made.gradient_memory[0] + made.gradient_memory[1] * (batch - mean) * rho
    z = x.detach().clone().requires_grad_()
    one_way(z).backward(grad)
    made(x).backward(grad)
    assert z.grad is not None
    torch.testing.assert_close((z.grad * direction).sum(), quotient.detach(), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(x.grad, z.grad - made.weight.detach() * rho * fixed)


@pytest.mark.usefixtures("backend")
def test_second_derivatives_hold_the_memory_still() -> None:
    """`gradgradcheck` of the map given the memory: with an endless window nothing moves it."""
    made = layer(statistics=sn.Steady(prior=16, window=1e14))

    def first_order(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        fresh = copy.deepcopy(made)
        (dx,) = torch.autograd.grad(fresh(x), x, grad, create_graph=True)
        return dx

    # δ² carries no gradient, which a difference quotient cannot know: only of the gradient here.
    x, grad = drawn(0, 4), upstream(0, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda g: first_order(x, g), (grad,))


@pytest.mark.usefixtures("backend")
def test_create_graph_gives_the_same_gradient_and_moves_the_memory_once() -> None:
    one, other = layer(), layer()
    x = drawn(0)
    (dx,) = torch.autograd.grad(one(x), x, upstream(0), create_graph=True)
    dx.square().sum().backward()
    torch.testing.assert_close(dx.detach(), trained(0, other))
    torch.testing.assert_close(one.gradient_memory, other.gradient_memory)


# The layer ------------------------------------------------------------------------------------


def test_the_memory_is_not_saved_and_starts_anew_after_loading() -> None:
    made = layer()
    saved = made.state_dict()
    assert set(saved) == set(torch.nn.BatchNorm1d(CHANNELS).state_dict())
    other = layer(1)
    other.load_state_dict(saved)
    assert not other.gradient_memory.any()
    made.reset_running_stats()
    assert not made.gradient_memory.any()


def test_one_way_layers_have_none() -> None:
    for policy in (sn.Batch(), sn.Running(), sn.Steady(window=None)):
        assert "gradient_memory" not in dict(sn.BatchNorm1d(2, statistics=policy).named_buffers())


def test_the_policy_may_change() -> None:
    made = sn.BatchNorm1d(CHANNELS, dtype=torch.float64)
    made.statistics = POLICY
    trained(0, made)
    memory = made.gradient_memory.clone()
    assert memory.any()
    for one_way in (sn.Steady(window=None), sn.Batch(), sn.Frozen()):
        made.statistics = one_way
        trained(1, made)
        torch.testing.assert_close(made.gradient_memory, memory, rtol=0, atol=0)


def test_lazy_layers_and_types() -> None:
    made = sn.LazyBatchNorm1d(statistics=POLICY)
    made(torch.randn(2, 5, requires_grad=True)).sum().backward()
    assert made.gradient_memory.shape == (2, 5)
    assert made.half().gradient_memory.dtype == torch.float32
    assert made.double().gradient_memory.dtype == torch.float64


def test_copies_go_their_own_way() -> None:
    made = layer()
    twin = copy.deepcopy(made)
    average = torch.optim.swa_utils.AveragedModel(made, use_buffers=True)
    trained(0, made)
    average.update_parameters(made)
    assert not torch.equal(twin.gradient_memory, made.gradient_memory)
    torch.testing.assert_close(trained(0, twin), trained(0, layer()))
    average.train()
    trained(0, average)


def test_a_functional_call_moves_the_buffer_that_it_is_given() -> None:
    made, plain = layer(), layer()
    own = made.gradient_memory.clone()
    given = {name: t.detach().clone() for name, t in made.named_buffers()}
    x = drawn(0)
    torch.func.functional_call(made, given, (x,)).backward(upstream(0))
    torch.testing.assert_close(x.grad, trained(0, plain))
    torch.testing.assert_close(given["gradient_memory"], plain.gradient_memory)
    torch.testing.assert_close(made.gradient_memory, own, rtol=0, atol=0)


# What it refuses ------------------------------------------------------------------------------


def test_function_transforms_are_refused() -> None:
    made = layer()
    with pytest.raises(NotImplementedError) as caught:
        torch.func.grad(lambda x: made(x).sum())(drawn(0).detach())
    assert str(caught.value) == (
        "statistics=Steady(prior=16, horizon=64, window=16) keeps a memory that moves in the "
        "backward pass, which torch.func, forward mode and torch.jit.trace do not follow. Use "
        "sn.Steady(window=None) there."
    )


def test_who_keeps_no_memory_refuses_the_policy() -> None:
    wanted = "statistics=Steady(prior=16, horizon=64, window=16) needs"
    mean, var = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    with pytest.raises(ValueError) as caught:
        sn.functional.batch_norm(drawn(0).float(), mean, var, training=True, statistics=POLICY)
    assert str(caught.value) == (
        f"batch_norm: {wanted} `gradient_memory`, zeros of shape (2, 3) at first. Pass it, or use "
        f"sn.Steady(window=None)."
    )


def test_forward_mode_is_refused() -> None:
    x = drawn(0).detach()
    with pytest.raises(
        NotImplementedError, match=r"torch\.func, forward mode and torch\.jit\.trace"
    ):
        torch.func.jvp(layer(), (x,), (x,))


@pytest.mark.parametrize("window", [0, -1.0, float("nan")])
def test_the_window_is_above_0(window: float) -> None:
    with pytest.raises(ValueError, match=r"^Steady: `window` must be above 0; got "):
        sn.Steady(window=window)


@pytest.mark.parametrize("way", ["to_empty", "assign", "filled as transformers does"])
def test_a_layer_made_on_the_meta_device_begins_with_zeros(way):
    with torch.device("meta"):
        layer = sn.BatchNorm1d(4, statistics="steady")
    state = sn.BatchNorm1d(4).state_dict()
    if way == "to_empty":
        layer.to_empty(device="cpu")
        layer.gradient_memory.fill_(7e30)
        layer.reset_running_stats()
    elif way == "assign":
        layer.load_state_dict(state, assign=True)
    if way != "assign":
        for name in ("weight", "bias"):
            setattr(layer, name, torch.nn.Parameter(state[name]))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(layer, name, state[name].clone())
        layer.gradient_memory = torch.full((2, 4), 7e30)
    other = sn.BatchNorm1d(4, statistics="steady")
    for _ in range(2):
        x = torch.randn(5, 4, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        grad = torch.randn(5, 4)
        layer(x).backward(grad)
        other(y).backward(grad)
        assert torch.equal(x.grad, y.grad)
    assert torch.equal(layer.gradient_memory, other.gradient_memory)
