"""`torch.compile(fullgraph=True)`: one graph, forward and backward, the values of eager."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

import steadynorm as sn

POLICIES = {
    "batch": sn.Batch(),
    "steady": sn.Steady(),
    "running": sn.Running(),
    "renorm": sn.Renorm(warmup=0, r_ramp=2, d_ramp=2),
    "ghost": sn.Ghost(2),
    "frozen": sn.Frozen(),
}


def layer(policy: sn.Batch, **settings: Any) -> Any:
    made = sn.BatchNorm2d(3, statistics=policy, **settings)
    torch.manual_seed(5)
    with torch.no_grad():
        made.weight.uniform_(0.5, 1.5)
        made.bias.uniform_(-1, 1)
    return made


def run(call: Any, made: Any, *, extras: bool, steps: int = 3) -> dict[str, torch.Tensor]:
    """Values, gradients and buffers of some steps, in which the statistics move."""
    random = torch.Generator().manual_seed(9)
    found = {}
    for step in range(steps):
        x = (torch.randn(5, 3, 4, 2, generator=random) * 2 + 1).requires_grad_()
        residual = torch.randn(5, 3, 4, 2, generator=random).requires_grad_()
        mask = torch.rand(5, 4, 2, generator=random) > 0.3
        grad = torch.randn(5, 3, 4, 2, generator=random)
        made.zero_grad()
        y = call(x, residual=residual, mask=mask) if extras else call(x)
        y.backward(grad)
        found |= {f"output {step}": y.detach(), f"gradient of input {step}": x.grad}
        if extras:
            found[f"gradient of residual {step}"] = residual.grad
        for name, parameter in made.named_parameters():
            found[f"gradient of {name} {step}"] = parameter.grad.clone()
    return found | {name: buffer.clone() for name, buffer in made.named_buffers()}


def assert_compiles(made: Any, backend: str, *, extras: bool) -> None:
    twin = copy.deepcopy(made)
    torch._dynamo.reset()
    expected = run(made, made, extras=extras)
    found = run(torch.compile(twin, fullgraph=True, backend=backend), twin, extras=extras)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)
    assert found["num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "mask and residual"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_training_in_one_graph_has_the_values_of_eager(policy: Any, extras: bool) -> None:
    made = layer(policy, activation="silu" if extras else None)
    assert_compiles(made, "aot_eager", extras=extras)


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "mask and residual"])
def test_inference_in_one_graph_has_the_values_of_eager(extras: bool) -> None:
    """Whatever the policy, inference normalizes by the running statistics."""
    made = layer(sn.Steady(), activation="silu" if extras else None).eval()
    assert_compiles(made, "aot_eager", extras=extras)


@pytest.mark.parametrize("name", ["batch", "steady"])
def test_inductor(name: str) -> None:
    """Its partitioner computes again in the backward what it did not keep (see recomputation)."""
    assert_compiles(layer(POLICIES[name], activation="relu"), "inductor", extras=True)


@pytest.mark.parametrize(
    "settings", [{"affine": False}, {"momentum": None}, {"track_running_stats": False}], ids=repr
)
def test_settings(settings: dict[str, Any]) -> None:
    made = sn.BatchNorm2d(3, **settings)
    twin = copy.deepcopy(made)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(4, 3, 2, 2)
        torch.testing.assert_close(compiled(x), made(x), rtol=1e-5, atol=1e-5)
    for name, buffer in made.named_buffers():
        torch.testing.assert_close(twin.get_buffer(name), buffer, rtol=1e-5, atol=1e-5)


def test_two_modes_and_batch_sizes_of_one_network() -> None:
    made = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3, bias=False), layer(sn.Steady(), activation="relu")
    )
    twin = copy.deepcopy(made)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for samples, training in ((4, True), (7, True), (5, False), (1, True)):
        x = torch.randn(samples, 2, 6, 6)
        made.train(training)
        twin.train(training)
        torch.testing.assert_close(compiled(x), made(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(twin.state_dict(), made.state_dict(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [None, True])
def test_ghosts_of_batches_of_changing_size(dynamic: Any) -> None:
    """From the second size on the compiler knows the length of the batch by a symbol alone."""
    made = sn.BatchNorm1d(3, statistics=sn.Ghost(2))
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for samples in (4, 5, 7, 6):
        x = torch.randn(samples, 3, 6)
        groups = np.split(x.double().numpy(), range(2, samples - 1, 2))
        truth = [
            (group - group.mean((0, 2), keepdims=True))
            / np.sqrt(group.var((0, 2), keepdims=True) + 1e-5)
            for group in groups
        ]
        found = compiled(x).detach().numpy()
        np.testing.assert_allclose(found, np.concatenate(truth), rtol=1e-5, atol=1e-5)
