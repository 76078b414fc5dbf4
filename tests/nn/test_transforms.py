"""`torch.func` over layers in training: grad, vmap, jvp, ensembles; forward-mode derivatives."""

import copy
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap

import steadynorm as sn

POLICIES = {
    "batch": sn.Batch(),
    "steady": sn.Steady(window=None),
    "running": sn.Running(),
    "renorm": sn.Renorm(warmup=0, r_ramp=2, d_ramp=2),
    "ghost": sn.Ghost(3),
    "frozen": sn.Frozen(),
}
everywhere = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def layer(policy: sn.Batch) -> Any:
    made = sn.BatchNorm1d(3, statistics=policy, activation="tanh", dtype=torch.float64)
    torch.manual_seed(5)
    with torch.no_grad():
        for tensor in (made.weight, made.bias, made.running_mean, made.running_var):
            tensor.uniform_(0.5, 1.5)
        made.num_batches_tracked.fill_(4)
    return made


def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(6)
    return torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)


def assert_same_buffers(made: Any, truth: Any) -> None:
    for name, buffer in truth.named_buffers():
        torch.testing.assert_close(made.get_buffer(name), buffer, rtol=1e-12, atol=1e-12)


@everywhere
def test_grad(policy: sn.Batch) -> None:
    made, truth = layer(policy), layer(policy)
    x, upstream = data()
    found = grad(lambda t: (made(t) * upstream).sum())(x)
    x.requires_grad_()
    truth(x).backward(upstream)
    torch.testing.assert_close(found, x.grad, rtol=1e-10, atol=1e-12)
    assert_same_buffers(made, truth)


@everywhere
def test_jvp_and_forward_mode(policy: sn.Batch) -> None:
    """Against the reverse mode, by the dual pairing <u, J v> = <Jᵀ u, v>."""
    x, upstream = data()
    tangent = torch.randn_like(x)
    truth = layer(policy)
    start = x.clone().requires_grad_()
    truth(start).backward(upstream)
    pairing = (start.grad * tangent).sum()
    made = layer(policy)
    value, pushed = jvp(made, (x,), (tangent,))
    torch.testing.assert_close((pushed * upstream).sum(), pairing, rtol=1e-10, atol=1e-12)
    assert_same_buffers(made, truth)
    made = layer(policy)
    with forward_ad.dual_level():
        dual = made(forward_ad.make_dual(x, tangent))
        primal, pushed = forward_ad.unpack_dual(dual)
    torch.testing.assert_close(primal, value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close((pushed * upstream).sum(), pairing, rtol=1e-10, atol=1e-12)
    assert_same_buffers(made, truth)


@everywhere
def test_jacobian_and_hessian(policy: sn.Batch) -> None:
    """Against differences of float64, which are good to about 1e-7 here."""
    x, upstream = data()
    made = layer(policy)

    def loss(t: torch.Tensor) -> torch.Tensor:
        return (copy.deepcopy(made)(t) * upstream).sum()

    step = 1e-5
    moved = [
        (x.flatten() + sign * step * torch.eye(18, dtype=x.dtype)).reshape(18, 6, 3)
        for sign in (1, -1)
    ]
    if isinstance(policy, sn.Batch | sn.Ghost | sn.Frozen):  # no stop-gradients inside
        values = torch.stack([torch.stack([loss(t) for t in side]) for side in moved])
        slopes = ((values[0] - values[1]) / (2 * step)).detach()
        torch.testing.assert_close(jacrev(loss)(x).flatten(), slopes, rtol=1e-6, atol=1e-7)
        slopes_there = torch.stack([torch.stack([grad(loss)(t) for t in side]) for side in moved])
        second = ((slopes_there[0] - slopes_there[1]) / (2 * step)).reshape(18, 18)
        found = hessian(loss)(x).reshape(18, 18)
        torch.testing.assert_close(found, second, rtol=1e-5, atol=1e-6)
    else:  # the share of the statistics is held still: reverse over reverse says the same
        start = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(start), start, create_graph=True)
        rows = [torch.autograd.grad(one, start, retain_graph=True)[0] for one in first.flatten()]
        found = hessian(loss)(x).reshape(18, 18)
        torch.testing.assert_close(found, torch.stack(rows).reshape(18, 18), rtol=1e-8, atol=1e-10)


@everywhere
def test_vmap_of_grad(policy: sn.Batch) -> None:
    made = layer(policy)
    buffers = {name: torch.stack([buffer] * 3) for name, buffer in made.named_buffers()}
    upstream = data()[1]
    x = torch.stack([data()[0] + shift for shift in range(3)])

    def loss(t: torch.Tensor, own: dict[str, torch.Tensor]) -> torch.Tensor:
        return (functional_call(made, own, (t,)) * upstream).sum()

    found = vmap(grad(loss))(x, buffers)
    for part, t in zip(found, x, strict=True):
        start = t.clone().requires_grad_()
        layer(policy)(start).backward(upstream)
        torch.testing.assert_close(part, start.grad, rtol=1e-10, atol=1e-12)


@everywhere
def test_an_ensemble_with_stacked_parameters_and_buffers(policy: sn.Batch) -> None:
    members = [layer(policy) for _ in range(3)]
    for shift, member in enumerate(members):
        with torch.no_grad():
            member.weight.add_(shift)
            member.running_mean.sub_(shift)
    twins = copy.deepcopy(members)
    parameters, buffers = stack_module_state(members)
    x = data()[0]
    found = vmap(lambda p, b: functional_call(members[0], (p, b), (x,)))(parameters, buffers)
    expected = torch.stack([twin(x) for twin in twins])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for name, stacked in buffers.items():
        truth = torch.stack([twin.get_buffer(name) for twin in twins])
        torch.testing.assert_close(stacked, truth, rtol=1e-10, atol=1e-12)
