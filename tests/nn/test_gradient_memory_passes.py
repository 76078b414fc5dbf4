"""Ways of training that could move the memory of the gradient wrongly: passes and loss scales."""

import pytest
import torch
from tests.nn.test_gradient_memory import (
    CHANNELS,
    POLICY,
    backend,  # noqa: F401 - a fixture
    drawn,
    layer,
    trained,
    upstream,
)
from torch.utils.checkpoint import checkpoint

import steadynorm as sn

# Passes ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
def test_several_backward_passes_through_one_forward() -> None:
    """The first moves the memory; each gives what it would give alone."""
    made, alone = layer(), layer()
    x = drawn(0)
    y = made(x)
    first, second, third = (
        torch.autograd.grad(y, x, upstream(seed), retain_graph=True)[0] for seed in (0, 1, 0)
    )
    torch.testing.assert_close(first, trained(0, alone))
    torch.testing.assert_close(made.gradient_memory, alone.gradient_memory)
    torch.testing.assert_close(third, first, rtol=0, atol=0)
    again = drawn(0)
    layer()(again).backward(upstream(1))
    torch.testing.assert_close(second, again.grad)


def test_a_forward_without_a_backward_leaves_the_memory() -> None:
    made = layer()
    before = made.gradient_memory.clone()
    made(drawn(0))
    with torch.no_grad():
        made(drawn(1))
    made.eval()
    made(drawn(2)).sum().backward()
    torch.testing.assert_close(made.gradient_memory, before, rtol=0, atol=0)


def test_an_input_that_needs_no_gradient_leaves_the_memory() -> None:
    made = layer()
    before = made.gradient_memory.clone()
    made(drawn(0, requires_grad=False)).backward(upstream(0))
    torch.testing.assert_close(made.gradient_memory, before, rtol=0, atol=0)
    assert made.weight.grad is not None


def test_frozen_parameters_change_nothing() -> None:
    made, other = layer(), layer()
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    torch.testing.assert_close(trained(0, made), trained(0, other))
    torch.testing.assert_close(made.gradient_memory, other.gradient_memory)


def test_twice_in_a_forward_moves_it_twice_the_last_call_first() -> None:
    made, apart = layer(), layer()
    x, later = drawn(0), drawn(1)
    y, after = made(x), made(later)
    (y * upstream(0) + after * upstream(1)).sum().backward()
    # The running statistics move in the order of the calls, the memory in that of the backward.
    first, second = drawn(0), drawn(1)
    one, two = apart(first), apart(second)
    two.backward(upstream(1))
    one.backward(upstream(0))
    torch.testing.assert_close(made.gradient_memory, apart.gradient_memory)
    torch.testing.assert_close(x.grad, first.grad)
    torch.testing.assert_close(later.grad, second.grad)


def test_micro_batches_of_a_step_move_it_one_by_one() -> None:
    """Gradient accumulation: as often as there are backward passes, whatever the optimizer does."""
    made, single = layer(), layer()
    for seed in range(4):
        trained(seed, made)
    for seed in range(4):
        single.zero_grad()
        trained(seed, single)
    torch.testing.assert_close(made.gradient_memory, single.gradient_memory)


@pytest.mark.parametrize("divisor", [1.0, 8.0])
def test_a_loss_divided_throughout_gives_gradients_divided(divisor: float) -> None:
    """The memory is in units of the gradient: dividing the loss by a constant divides it too."""
    made, plain = layer(), layer()
    for each in (made, plain):
        each.reset_running_stats()
    for seed in range(3):
        x = drawn(seed)
        made(x).backward(upstream(seed) / divisor)
        assert x.grad is not None
        torch.testing.assert_close(x.grad * divisor, trained(seed, plain))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_moves_it_once(reentrant: bool) -> None:
    made, plain = layer(), layer()
    for seed in range(3):
        x = drawn(seed)
        checkpoint(made, x, use_reentrant=reentrant).backward(upstream(seed))
        torch.testing.assert_close(x.grad, trained(seed, plain))
    torch.testing.assert_close(made.gradient_memory, plain.gradient_memory)
    torch.testing.assert_close(made.running_var, plain.running_var)


def test_nothing_waits_for_the_device() -> None:
    """As in a CUDA graph: all state is on the device; a value read on the host would raise here."""
    made = sn.BatchNorm2d(CHANNELS, statistics=POLICY, activation="relu", device="meta")
    for _ in range(2):
        x = torch.empty(4, CHANNELS, 5, 5, device="meta", requires_grad=True)
        y = made(x, mask=torch.empty(4, 5, 5, dtype=torch.bool, device="meta"))
        y.backward(torch.empty_like(y))
        assert x.grad is not None


# Loss scaling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
@pytest.mark.usefixtures("backend")
def test_a_gradient_that_is_not_finite_never_enters(poison: float) -> None:
    made = layer()
    before = made.gradient_memory.clone()
    grad = upstream(0)
    grad[1, 2] = poison
    made(drawn(0)).backward(grad)
    assert made.gradient_memory.isfinite().all()
    torch.testing.assert_close(made.gradient_memory[:, 2], before[:, 2], rtol=0, atol=0)
    assert not torch.equal(made.gradient_memory[:, 0], before[:, 0])


def test_a_changed_loss_scale_is_forgotten_at_the_windows_rate() -> None:
    made, plain = layer(), layer()
    distance = []
    for seed in range(200):
        scale = 1.0 if seed < 2 else 2.0
        x = drawn(seed)
        made(x).backward(upstream(seed) * scale)
        trained(seed, plain)
        distance.append(float((made.gradient_memory / scale - plain.gradient_memory).abs().max()))
    assert distance[1] == 0
    assert distance[2] > 0.01
    assert distance[-1] < 1e-3 * distance[2]


def test_a_gradient_scaler_that_skips_a_step_and_changes_its_scale() -> None:
    """The infinity does not enter; the change of scale is forgotten within some windows."""
    made, plain = layer(), layer()
    for each in (made, plain):
        each.reset_running_stats()
    step = torch.optim.SGD(made.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=20)
    scales = set()
    for seed in range(210):
        scales.add(scaler.get_scale())
        x, poison = drawn(seed), seed == 5
        loss = (made(x) * upstream(seed)).sum()
        scaler.scale(loss * float("inf") if poison else loss).backward()
        if seed < 100:
            scaler.step(step)
            scaler.update()
        step.zero_grad()
        trained(seed, plain)
        assert made.gradient_memory.isfinite().all()
    assert len(scales) >= 5
    right = plain.gradient_memory * scaler.get_scale()
    torch.testing.assert_close(
        made.gradient_memory, right, rtol=1e-3, atol=1e-3 * float(right.abs().max())
    )
