"""The policies as docs/semantics.md defines them, row by row, through the layer."""

from typing import Any

import numpy as np
import pytest
import torch
from tests import tolerances, truth
from torch import Tensor, nn

import steadynorm as sn
from steadynorm.nn import checks

EAGER = pytest.mark.parametrize("route", ["reference"], indirect=True)
pytestmark = [EAGER, pytest.mark.usefixtures("route")]

POLICIES = {
    "batch": sn.Batch(),
    "steady": sn.Steady(prior=8.0, horizon=20.0),
    "running": sn.Running(),
    "renorm": sn.Renorm(warmup=2, r_ramp=4, d_ramp=3),
    "ghost": sn.Ghost(size=3),
    "frozen": sn.Frozen(),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_of(policy: Any, channels: int = 3, **settings: Any) -> nn.Module:
    return sn.BatchNorm1d(channels, statistics=policy, dtype=torch.float64, **settings)


def seen(layer: nn.Module) -> truth.Running:
    return truth.Running(
        layer.running_mean.numpy().copy(),
        layer.running_var.numpy().copy(),
        int(layer.num_batches_tracked),
    )


def remembered(layer: nn.Module) -> np.ndarray | None:
    """The memory of the gradient, where there is one."""
    memory = dict(layer.named_buffers()).get("gradient_memory")
    return None if memory is None else memory.numpy().copy()


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    return y.detach(), torch.autograd.grad(y, leaf, grad)[0]


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_run_of_batches(policy: Any, momentum: float | None) -> None:
    """Eight steps from the first on: outputs, gradients and statistics of each, sizes varying."""
    layer = layer_of(policy, momentum=momentum)
    setting = truth.Setting(momentum=momentum)
    for t, samples in enumerate((4, 7, 2, 5, 6, 3, 8, 4)):
        x, grad = randn(samples, 3, 5, seed=t) * (1 + t) + t, randn(samples, 3, 5, seed=50 + t)
        expected = truth.train(
            x.numpy(), policy, seen(layer), setting, grad=grad.numpy(), memory=remembered(layer)
        )
        y, dx = step(layer, x, grad)
        tolerances.close(y, expected.y, "forward", f"step {t}")
        tolerances.close(dx, expected.dx, "backward", f"step {t}")
        found = seen(layer)
        # Ghost's count of batches is a tensor, and PyTorch divides 1 by an integer one in float32.
        loose = momentum is None and isinstance(policy, sn.Ghost)
        limit = 1e-7 if loose else tolerances.TABLE[torch.float64, "statistics"].limit
        assert tolerances.error(found.mean, expected.running.mean) <= limit
        assert tolerances.error(found.var, expected.running.var) <= limit
        assert found.batches == expected.running.batches


def test_steady_with_prior_0_is_batch() -> None:
    """In values and gradients; what it keeps is its own."""
    steady, batch = layer_of(sn.Steady(prior=0, window=None)), layer_of("batch")
    for t in range(4):
        x, grad = randn(6, 3, 2, seed=t) + 4, randn(6, 3, 2, seed=9 + t)
        for found, right in zip(step(steady, x, grad), step(batch, x, grad), strict=True):
            torch.testing.assert_close(found, right)


def test_steady_with_an_endless_prior_approaches_frozen() -> None:
    """Its share falls as 1/(t + 1): so does the distance from inference."""
    distances = []
    for batches in (1, 10, 100, 1000):
        layer = layer_of(sn.Steady(prior=1e12))
        layer.num_batches_tracked.fill_(batches)
        x = randn(6, 3)
        inference = truth.infer(x.numpy(), seen(layer)).y
        distances.append(np.abs(layer(x).detach().numpy() - inference).max())
    assert distances[0] > 0.1
    for near, far in zip(distances[1:], distances[:-1], strict=True):
        assert near < 0.25 * far


def test_steady_splits_of_a_stream() -> None:
    """The same samples in batches of 1 to 64: the statistics differ by no more than the weights."""
    stream = randn(2048, 2) * 3 + 5
    stream[1024:] += 2  # a drift, so that the weighting matters
    kept = {}
    for size in (1, 4, 16, 64):
        layer = layer_of(sn.Steady(horizon=640), channels=2)
        with torch.no_grad():
            for batch in stream.split(size):
                layer(batch)
        kept[size] = seen(layer)
        assert kept[size].batches == 2048 // size
    for size in (1, 4, 16):
        np.testing.assert_allclose(kept[size].mean, kept[64].mean, atol=0.15)
        np.testing.assert_allclose(kept[size].var, kept[64].var, rtol=0.08)


def test_steady_learns_the_variance_from_batches_of_one() -> None:
    layer = layer_of(sn.Steady(horizon=500), channels=2)
    with torch.no_grad():
        for one in (randn(4000, 2) * 3 + 5).split(1):
            layer(one)
    np.testing.assert_allclose(layer.running_mean, 5, atol=0.5)
    np.testing.assert_allclose(layer.running_var, 9, rtol=0.2)


def test_renorm_without_bounds_to_spare_is_batch() -> None:
    renorm, batch = layer_of(sn.Renorm(r_max=1, d_max=0, warmup=0)), layer_of("batch")
    for layer in (renorm, batch):
        layer.num_batches_tracked.fill_(10**6)
    for t in range(3):
        x, grad = randn(6, 3, 2, seed=t) * 2 + 4, randn(6, 3, 2, seed=9 + t)
        for found, right in zip(step(renorm, x, grad), step(batch, x, grad), strict=True):
            torch.testing.assert_close(found, right)
    torch.testing.assert_close(dict(renorm.named_buffers()), dict(batch.named_buffers()))


def test_renorm_unclipped_is_inference_before_the_update() -> None:
    layer = layer_of(sn.Renorm(r_max=1e6, d_max=1e6, warmup=0, r_ramp=1, d_ramp=1))
    layer.num_batches_tracked.fill_(5)
    for t in range(3):
        x = randn(6, 3, 2, seed=t) * 5 + 7
        before = seen(layer)
        tolerances.close(layer(x), truth.infer(x.numpy(), before).y, "forward")
        assert seen(layer).mean.tolist() != before.mean.tolist()


@pytest.mark.parametrize("samples", [6, 7, 8])
def test_ghost_is_batch_fed_group_by_group(samples: int) -> None:
    ghost, batch = layer_of(sn.Ghost(size=3)), layer_of("batch")
    x, grad = randn(samples, 3, 2), randn(samples, 3, 2, seed=1)
    lengths = truth.ghost_lengths(samples, 3)
    assert lengths == {6: [3, 3], 7: [3, 4], 8: [3, 3, 2]}[samples]
    parts = [step(batch, *pair) for pair in zip(x.split(lengths), grad.split(lengths), strict=True)]
    right = tuple(torch.cat(part) for part in zip(*parts, strict=True))
    torch.testing.assert_close(step(ghost, x, grad), right)
    torch.testing.assert_close(dict(ghost.named_buffers()), dict(batch.named_buffers()))
    assert int(ghost.num_batches_tracked) == len(lengths)
    torch.testing.assert_close(ghost.eval()(x), batch.eval()(x))


@pytest.mark.parametrize("policy", ["running", "steady"])
def test_the_first_batch_stands_alone(policy: str) -> None:
    """Nothing leans on the initial 0 and 1."""
    layer, batch = layer_of(policy), layer_of("batch")
    x, grad = randn(6, 3) + 3, randn(6, 3, seed=1)
    # A memory of the gradient takes off what eps leaves along x̂.
    torch.testing.assert_close(step(layer, x, grad), step(batch, x, grad), rtol=0, atol=2e-5)
    moments = truth.moments(x.numpy())
    tolerances.close(layer.running_mean, moments.mean, "statistics")
    tolerances.close(layer.running_var, moments.var, "statistics")


def test_frozen_survives_train() -> None:
    layer = layer_of("frozen").train()
    layer.running_mean.fill_(2.0)
    x, grad = randn(6, 3), randn(6, 3, seed=1)
    expected = truth.infer(x.numpy(), seen(layer), grad=grad.numpy())
    y, dx = step(layer, x, grad)
    tolerances.close(y, expected.y, "forward")
    tolerances.close(dx, expected.dx, "backward")
    assert seen(layer).mean.tolist() == [2.0] * 3
    assert seen(layer).batches == 0


@pytest.mark.parametrize("policy", ["steady", "running", "frozen"])
def test_one_value_per_channel(policy: str) -> None:
    """Works, and no Bessel factor divides by zero."""
    layer = layer_of(policy)
    layer.num_batches_tracked.fill_(3)
    x, grad = randn(1, 3) + 2, randn(1, 3, seed=1)
    memory = remembered(layer)
    expected = truth.train(
        x.numpy(), layer.statistics, seen(layer), grad=grad.numpy(), memory=memory
    )
    y, dx = step(layer, x, grad)
    tolerances.close(y, expected.y, "forward")
    tolerances.close(dx, expected.dx, "backward")
    tolerances.close(layer.running_var, expected.running.var, "statistics")


def test_one_value_per_channel_under_renorm_warns_and_keeps_the_variance_finite() -> None:
    checks._warn_of_no_gradient.cache_clear()  # it warns once a process
    layer = layer_of("renorm")
    with pytest.warns(UserWarning, match="no gradient reaches the input"):
        layer(randn(1, 3))
    np.testing.assert_allclose(layer.running_var, 0.9, rtol=1e-12)  # 0.9·1 + 0.1·0, not 0/0


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_masked_moments_are_those_of_the_valid_alone(policy: Any) -> None:
    """The valid values packed into a shorter batch give the same statistics."""
    if isinstance(policy, sn.Ghost):
        policy = sn.Ghost(size=100)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 1], [1, 0, 0, 0]]).bool()
    x = randn(3, 2, 4) + 3
    packed = x.movedim(1, 2)[mask]  # (6, C)
    masked, whole = layer_of(policy, channels=2), layer_of(policy, channels=2)
    if not isinstance(policy, sn.Steady):  # whose horizon counts samples: 3 against 6
        for layer in (masked, whole):
            layer.num_batches_tracked.fill_(4)
    y = masked(x, mask=mask)
    torch.testing.assert_close(y.movedim(1, 2)[mask], whole(packed))
    torch.testing.assert_close(dict(masked.named_buffers()), dict(whole.named_buffers()))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_inference_is_the_same_under_every_policy(policy: Any) -> None:
    layer = layer_of(policy)
    layer(randn(6, 3, 2) * 3 + 1)
    before = seen(layer)
    x = randn(4, 3, 2, seed=1)
    tolerances.close(layer.eval()(x), truth.infer(x.numpy(), before).y, "forward")
    assert seen(layer).batches == before.batches


def test_the_cumulative_average_over_ghosts_is_float64_for_float64():
    """As an integer array, the number of batches would make its weight float32."""
    layer = sn.BatchNorm1d(3, momentum=None, statistics=sn.Ghost(4)).double()
    batches = 100 + torch.randn(7, 12, 3, dtype=torch.float64)
    for x in batches:
        layer(x)
    torch.testing.assert_close(layer.running_mean, batches.mean((0, 1)), rtol=1e-14, atol=0)
    assert layer.num_batches_tracked == 21
