"""Defects that were seen in other implementations (docs/semantics.md), and that ours has not."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests import tolerances, truth
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import steadynorm as sn
from steadynorm.statistics import Moments, pool

POLICIES = {
    "batch": sn.Batch(),
    "steady": sn.Steady(prior=8.0, horizon=20.0, window=None),
    "running": sn.Running(),
    "renorm": sn.Renorm(warmup=0, r_ramp=4, d_ramp=4),
    "ghost": sn.Ghost(size=3),
    "frozen": sn.Frozen(),
}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
every_route = pytest.mark.usefixtures("route")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def buffers(layer: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


# Numbers ------------------------------------------------------------------------------------------


@every_policy
@every_route
@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_small_std_at_a_large_mean(policy: Any, mean: float) -> None:
    """E[x²] - E[x]² gives NaN in Keras at mean 1e3, std 0.1, and std 31.7 in flax at 1e4."""
    x = (randn(64, 4, dtype=torch.float64) * 0.1 + mean).float()
    layer = sn.BatchNorm1d(4, statistics=policy)
    running = truth.Running(np.full(4, mean), np.full(4, np.float32(0.01)), 50)
    layer.running_mean.fill_(mean)
    layer.running_var.fill_(0.01)
    layer.num_batches_tracked.fill_(50)
    expected = truth.train(x.numpy(), policy, running)
    assert 0.8 < expected.y.std() < 1.3
    tolerances.close(layer(x), expected.y, "forward")
    tolerances.close(layer.running_var, expected.running.var, "statistics")


@every_route
@pytest.mark.parametrize(("mean", "peer"), [(1e4, 6e-3), (1e6, 1.0)])
def test_forward_error_at_a_large_mean(mean: float, peer: float) -> None:
    """torch is off by 6e-3 at mean 1e4 and 4.2 at 1e6 on (N, C)."""
    x = (randn(256, 8, dtype=torch.float64) + mean).float()
    expected = truth.train(x.numpy(), sn.Batch()).y
    tolerances.within_bar(sn.BatchNorm1d(8)(x), expected)
    assert tolerances.error(nn.BatchNorm1d(8)(x), expected) > 100 * tolerances.BAR, peer


@every_policy
@every_route
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_one_bad_value_is_kept_out(policy: Any, bad: float) -> None:
    """One infinity makes torch's running_mean infinite and its running_var NaN for ever."""
    layer = sn.BatchNorm2d(3, statistics=policy, nonfinite="skip")
    layer(randn(6, 3, 4, 4))
    before = buffers(layer)
    x = randn(6, 3, 4, 4, seed=1)
    x[2, 1, 3, 3] = bad
    layer(x)
    torch.testing.assert_close(buffers(layer), before, rtol=0, atol=0)
    good = randn(6, 3, 4, 4, seed=2)
    running = truth.Running(
        before["running_mean"].numpy(),
        before["running_var"].numpy(),
        int(before["num_batches_tracked"]),
    )
    expected = truth.train(good.numpy(), policy, running)
    tolerances.close(layer(good), expected.y, "forward")
    tolerances.close(layer.running_mean, expected.running.mean, "statistics")


@every_route
def test_a_bad_value_propagates_by_default_as_in_torch() -> None:
    ours, theirs = sn.BatchNorm1d(2), nn.BatchNorm1d(2)
    x = randn(8, 2)
    x[3, 1] = float("inf")
    for layer in (ours, theirs):
        layer(x)
        assert layer.running_mean.isfinite().tolist() == [True, False]
        assert layer.running_var.isnan().tolist() == [False, True]


@every_route
def test_bfloat16_statistics_do_not_get_stuck() -> None:
    """torch: momentum 0.001 after `.bfloat16()` leaves running_mean at 1.0 where 3 is right."""
    layer = sn.BatchNorm1d(2, momentum=0.001).bfloat16()
    x = (randn(16, 2) + 3).bfloat16()
    batch = truth.moments(x.double().numpy())
    steps = 3000
    with torch.no_grad():
        for _ in range(steps):
            layer(x)
    left = 0.999**steps
    expected_var = left + (1 - left) * batch.var * 16 / 15
    np.testing.assert_allclose(layer.running_mean, (1 - left) * batch.mean, rtol=1e-4)
    np.testing.assert_allclose(layer.running_var, expected_var, rtol=1e-4)


# Activation checkpointing, transforms, replicas -------------------------------------------------


@every_policy
@every_route
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_checkpointing_updates_once_and_recomputes_the_same(policy: Any, reentrant: bool) -> None:
    """torch updates the statistics in the recomputation too, and so differs from no checkpoint.

    Two segments and two forwards before the backward: every recomputation meets statistics that
    have moved on since its first run.
    """

    def train(checkpointed: bool) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(5, 4),
            sn.BatchNorm1d(4, statistics=policy, activation="relu"),
            nn.Linear(4, 4),
            sn.BatchNorm1d(4, statistics=policy),
        ).double()
        loss = torch.zeros(())
        inputs = []
        for step in range(3):
            x = (randn(7, 5, seed=step, dtype=torch.float64) * (1 + step)).requires_grad_()
            inputs.append(x)
            for part in (model[:2], model[2:]):
                x = checkpoint(part, x, use_reentrant=reentrant) if checkpointed else part(x)
            loss = loss + (x * randn(7, 4, seed=9 + step, dtype=torch.float64)).sum()
        loss.backward()
        gradients = [t.grad for t in (*inputs, *model.parameters())]
        return loss.detach(), gradients, buffers(model)

    torch.testing.assert_close(train(True), train(False))
    tracked = 0 if isinstance(policy, sn.Frozen) else 6 if isinstance(policy, sn.Ghost) else 3
    assert int(train(True)[2]["1.num_batches_tracked"]) == tracked


@every_policy
def test_vmap_over_a_training_layer(policy: Any) -> None:
    """torch raises; so do we where examples would share running statistics, and say what to do."""
    x = randn(4, 6, 3, 5, dtype=torch.float64)
    layer = sn.BatchNorm1d(3, statistics=policy).double()
    before = truth.Running(np.zeros(3), np.ones(3), 0)
    expected = [truth.train(one.numpy(), policy, before) for one in x]
    if not isinstance(policy, sn.Frozen):
        with pytest.raises(RuntimeError, match="Give each its own"):
            torch.func.vmap(layer)(x)
        assert int(layer.num_batches_tracked) == 0
    buffers = {name: torch.stack([b.clone()] * 4) for name, b in layer.named_buffers()}
    y = torch.func.vmap(lambda b, t: torch.func.functional_call(layer, b, (t,)))(buffers, x)
    tolerances.close(y, np.stack([one.y for one in expected]), "forward")
    for name in ("mean", "var"):
        wanted = np.stack([getattr(one.running, name) for one in expected])
        tolerances.close(buffers[f"running_{name}"], wanted, "statistics")
    tracked = [one.running.batches for one in expected]
    assert buffers["num_batches_tracked"].tolist() == tracked


@every_policy
def test_grad_through_a_training_layer(policy: Any) -> None:
    """torch.func.grad in training: torch raises."""
    x, grad = randn(6, 3, 5, dtype=torch.float64), randn(6, 3, 5, seed=1, dtype=torch.float64)
    layer = sn.BatchNorm1d(3, statistics=policy).double()
    layer.num_batches_tracked.fill_(9)
    before = truth.Running(np.zeros(3), np.ones(3), 9)
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return (torch.func.functional_call(layer, parameters, (x,)) * grad).sum()

    found, dx = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    expected = truth.train(x.numpy(), policy, before, grad=grad.numpy())
    tolerances.close(dx, expected.dx, "backward")
    tolerances.close(found["weight"], expected.dweight, "backward")
    tolerances.close(found["bias"], expected.dbias, "backward")
    tolerances.close(layer.running_mean, expected.running.mean, "statistics")


@pytest.fixture
def one_replica() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def check_synchronized() -> None:
    x, grad = randn(6, 3, 4, 4), randn(6, 3, 4, 4, seed=1)
    layer = sn.BatchNorm2d(3, synchronize=True)
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(grad)
    expected = truth.train(
        x.numpy(), sn.Batch(), truth.Running(np.zeros(3), np.ones(3)), grad=grad.numpy()
    )
    tolerances.close(y, expected.y, "forward")
    tolerances.close(leaf.grad, expected.dx, "backward")
    tolerances.close(layer.running_var, expected.running.var, "statistics")


@pytest.mark.usefixtures("one_replica")
def test_synchronizing_one_replica_on_cpu() -> None:
    """torch's SyncBatchNorm raises on CPU, even with one replica."""
    check_synchronized()


def test_synchronizing_without_a_process_group() -> None:
    assert not dist.is_initialized()
    check_synchronized()


def test_devices_weigh_by_their_counts() -> None:
    """flax takes the mean of the devices' means: 6.25 where 4.0 is right."""
    parts = [np.array([10.0]), np.array([1.0, 2.0, 3.0])]
    assert np.mean([part.mean() for part in parts]) == 6.0
    stacked = Moments(
        np.array([[len(part)] for part in parts], dtype=float),
        np.array([[part.mean()] for part in parts]),
        np.array([[part.var()] for part in parts]),
        np.zeros((2, 1)),
    )
    pooled, whole = pool(stacked, xp=np), np.concatenate(parts)
    np.testing.assert_allclose(pooled.mean + pooled.mean_low, [whole.mean()], rtol=1e-15)
    np.testing.assert_allclose(pooled.var, [whole.var()], rtol=1e-15)


# Masks ----------------------------------------------------------------------------------------


@every_policy
@every_route
@pytest.mark.parametrize("channels", [1, 4, 6], ids=["one", "as_time", "other"])
def test_masks_channels_first(policy: Any, channels: int) -> None:
    """Keras: fails, or is silently wrong when C equals T, or raises with C = 1."""
    x, grad = randn(6, channels, 4), randn(6, channels, 4, seed=1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]] * 2).bool()
    layer = sn.BatchNorm1d(channels, statistics=policy)
    running = truth.Running(np.zeros(channels), np.ones(channels), 7)
    layer.num_batches_tracked.fill_(7)
    leaf = x.clone().requires_grad_()
    y = layer(leaf, mask=mask)
    y.backward(grad)
    expected = truth.train(x.numpy(), policy, running, mask=mask.numpy(), grad=grad.numpy())
    tolerances.close(y, expected.y, "forward")
    tolerances.close(leaf.grad, expected.dx, "backward")
    tolerances.close(layer.running_mean, expected.running.mean, "statistics")
    tolerances.close(layer.running_var, expected.running.var, "statistics")


@every_policy
@every_route
def test_what_is_masked_does_not_matter(policy: Any) -> None:
    """Whatever stands at masked positions, the valid ones come out the same."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]] * 2).bool()
    outputs = []
    for rubbish in (0.0, 1e30, float("inf"), float("nan")):
        layer = sn.BatchNorm1d(3, statistics=policy)
        x = torch.where(mask.unsqueeze(1), randn(6, 3, 4), rubbish)
        y = layer(x, mask=mask)
        outputs.append((y.movedim(1, 2)[mask], buffers(layer)))
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-6, atol=1e-6)


@every_policy
@every_route
def test_all_masked_shrinks_nothing(policy: Any) -> None:
    """Keras shrinks the variance; ours answers by the running statistics and keeps them."""
    layer = sn.BatchNorm1d(3, statistics=policy)
    layer.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    layer.running_var.fill_(4.0)
    layer.num_batches_tracked.fill_(5)
    before = buffers(layer)
    x = randn(6, 3, 4)
    y = layer(x, mask=torch.zeros(6, 4, dtype=torch.bool))
    expected = truth.infer(x.numpy(), truth.Running(np.array([1.0, 2.0, 3.0]), np.full(3, 4.0)))
    tolerances.close(y, expected.y, "forward")
    torch.testing.assert_close(buffers(layer), before, rtol=0, atol=0)


# Renorm and the first steps --------------------------------------------------------------------


def test_renorm_corrections_stop_growing() -> None:
    """torchrl's grow 1×, 2×, 3× per warm-up length, past what they were set to."""
    policy = sn.Renorm(r_max=3.0, d_max=5.0, warmup=10, r_ramp=20, d_ramp=10)
    steps = (0, 10, 15, 20, 25, 30, 60, 10_000)
    found = [policy.bounds(t) for t in steps]
    np.testing.assert_allclose(
        found, [(1, 0), (1, 0), (1.5, 2.5), (2, 5), (2.5, 5), (3, 5), (3, 5), (3, 5)]
    )
    np.testing.assert_allclose(found, [truth.renorm_bounds(policy, t) for t in steps])


@every_route
def test_renorm_counts_positions_and_takes_one_sample() -> None:
    """torchrl's Bessel factor ignores H·W, and one sample gives NaN."""
    layer = sn.BatchNorm2d(2, statistics="renorm")
    x = randn(1, 2, 3, 3)
    y = layer(x)
    expected = truth.train(x.numpy(), sn.Renorm(), truth.Running(np.zeros(2), np.ones(2)))
    tolerances.close(y, expected.y, "forward")
    tolerances.close(layer.running_var, expected.running.var, "statistics")
    unbiased = x.var((0, 2, 3), correction=1).double()
    np.testing.assert_allclose(layer.running_var, 0.9 + 0.1 * unbiased, rtol=1e-6)


@pytest.mark.parametrize("policy", ["renorm", "batch", "ghost"])
def test_a_loaded_variance_survives_the_first_step(policy: str) -> None:
    """Keras's renorm: a loaded moving_variance of 25 becomes about 2 after one step."""
    layer = sn.BatchNorm1d(3, statistics=policy)
    state = nn.BatchNorm1d(3).state_dict()
    state["running_var"] = torch.full((3,), 25.0)
    layer.load_state_dict(state, strict=True)
    x = randn(32, 3)
    layer(x)
    expected = 0.9 * 25 + 0.1 * truth.moments(x.numpy()).var * 32 / 31
    tolerances.close(layer.running_var, expected, "statistics")


@every_route
@pytest.mark.parametrize("policy", ["steady", "running", "cumulative"])
@pytest.mark.parametrize("std", [0.1, 30.0])
def test_evaluation_is_right_from_the_first_step(policy: str, std: float) -> None:
    """equinox debiases a variance that starts at 1 as if it started at 0: evaluation gives std
    .19, .54, .93, .99 after 1, 10, 100, 300 steps."""
    settings: Any = {"momentum": None} if policy == "cumulative" else {"statistics": policy}
    layer = sn.BatchNorm1d(4, **settings)
    fresh = randn(4096, 4, seed=99) * std + 5
    for step in range(1, 101):
        layer.train()(randn(64, 4, seed=step) * std + 5)
        if step in {1, 10, 100}:
            spread = layer.eval()(fresh).std(0, correction=0)
            assert ((spread > 0.75) & (spread < 1.3)).all(), (step, spread)
