"""Micro-batches all at once and networks side by side, against the layers called in a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import steadynorm as sn
from steadynorm.evidence.digits import Digits
from steadynorm.evidence.lab.micro_batches import MicroBatchNorm
from steadynorm.evidence.lab.side_by_side import side_by_side, train
from steadynorm.evidence.networks import Normalization, convolutional, initialize, residual
from steadynorm.evidence.training import Recipe
from steadynorm.evidence.training import train as train_alone
from steadynorm.statistics import Policy

POLICIES = {
    "two-way": sn.Steady(prior=16, horizon=64, window=16),
    "one-way": sn.Steady(prior=4, horizon=64, window=None),
    "batch": sn.Batch(),
    "running": sn.Running(),
    "renorm": sn.Renorm(r_max=1.5, d_max=0.5, warmup=2, r_ramp=4, d_ramp=4),
}


@pytest.fixture
def double() -> object:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def of(policy: Policy, size: int) -> Normalization:
    return lambda channels: MicroBatchNorm(channels, policy, size)


def small(make: Callable[[Normalization], nn.Module], kind: Normalization, seed: int) -> nn.Module:
    network = make(kind)
    initialize(network, seed)
    return network


def two_blocks(normalization: Normalization) -> nn.Module:
    return residual(normalization, widths=(4, 6), blocks=1)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", POLICIES)
def test_in_order_and_side_by_side_equal_the_layers_in_a_loop(kind: str, size: int) -> None:
    """Outputs, gradients, running statistics and memory, three batches of six samples long."""
    policy = POLICIES[kind]

    def layer(channels: int) -> nn.Module:
        return sn.BatchNorm2d(channels, statistics=policy)

    apart = [small(two_blocks, layer, seed) for seed in (0, 1)]
    together = side_by_side([small(two_blocks, of(policy, size), seed) for seed in (0, 1)])
    random = torch.Generator().manual_seed(2)
    for _ in range(3):
        x = torch.randn(6, 2, 6, 6, generator=random)
        upstream = torch.randn(6, 2, 10, generator=random)
        inputs = x.clone().requires_grad_()
        y = together(inputs).unflatten(1, (2, 10))
        y.backward(upstream)
        for index, network in enumerate(apart):
            for part in torch.arange(6).split(size):
                alone = x[part, index : index + 1].requires_grad_()
                z = network(alone)
                z.backward(upstream[part, index])
                torch.testing.assert_close(y[part, index], z, rtol=1e-9, atol=1e-10)
                got = inputs.grad[part, index : index + 1]
                torch.testing.assert_close(got, alone.grad, rtol=1e-9, atol=1e-10)
    names = ["running_mean", "running_var"]
    if policy.gradient_rate(1) is not None:
        names.append("gradient_memory")
    for index, network in enumerate(apart):
        for name, module in network.named_modules():
            same = together.get_submodule(name)
            tensors: list[tuple[Tensor, Tensor]] = []
            if isinstance(module, nn.Conv2d | nn.Linear | sn.BatchNorm2d):
                tensors += [(same.weight.grad, module.weight.grad)]
            if isinstance(module, sn.BatchNorm2d):
                tensors += [(same.bias.grad, module.bias.grad)]
                tensors += [(getattr(m, n).movedim(-1, 0) for m in (same, module)) for n in names]
                assert int(same.num_batches_tracked) == int(module.num_batches_tracked)
            for joined, single in tensors:
                own = joined.reshape(2, *single.shape)[index]
                torch.testing.assert_close(own, single, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [{"dilation": 2}, {"padding": 1, "padding_mode": "circular"}, {"groups": 2, "bias": False}],
)
def test_a_convolution_side_by_side_keeps_its_settings(options: dict[str, Any]) -> None:
    networks = [nn.Sequential(nn.Conv2d(4, 6, 3, **options)) for _ in range(2)]
    x = torch.randn(3, 8, 7, 7)
    expected = [network(part) for network, part in zip(networks, x.chunk(2, 1), strict=True)]
    torch.testing.assert_close(side_by_side(networks)(x), torch.cat(expected, 1))


def drawn() -> Digits:
    random = np.random.default_rng(0)
    images = random.uniform(size=(96, 6, 6)).astype(np.float32)
    labels = random.integers(0, 10, 96)
    return Digits("noise", images[:64], labels[:64], images[64:], labels[64:])


@pytest.mark.parametrize("normalization", [None, lambda channels: nn.GroupNorm(2, channels)])
def test_training_side_by_side_is_training_alone(normalization: Normalization | None) -> None:
    digits, recipe = drawn(), Recipe(16, samples=256, rate=0.02, clip=1.0)

    def make(kind: Normalization) -> nn.Module:
        return convolutional(kind, channels=(4, 4))

    networks = [small(make, normalization, seed) for seed in (3, 4)]
    found = train(networks, digits, recipe, (3, 4))
    for network, seed, error in zip(networks, (3, 4), found["error"], strict=True):
        alone = train_alone(network, digits, recipe, seed=seed)
        assert error == pytest.approx(alone.error)
    assert found["error"] == found["error_calibrated"]  # nothing to calibrate


def test_a_batch_is_cut_without_rest() -> None:
    layer = MicroBatchNorm(3, sn.Batch(), 4)
    with pytest.raises(
        ValueError, match=r"^MicroBatchNorm: `input` must hold a multiple of 4 samp"
    ):
        layer(torch.randn(6, 3))
    assert layer.eval()(torch.ones(6, 3)).shape == (6, 3)
