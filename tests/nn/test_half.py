"""Half precision: statistics stay float32, autocast, moving between types and devices."""

import copy
import io
from typing import Any

import pytest
import torch

import steadynorm as sn

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
POLICIES = {
    "batch": sn.Batch(),
    "steady": sn.Steady(),
    "running": sn.Running(),
    "renorm": sn.Renorm(warmup=0, r_ramp=2, d_ramp=2),
    "ghost": sn.Ghost(4),
    "frozen": sn.Frozen(),
}
everywhere = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
# Half the spacing of the type's numbers at 4, the largest output here.
ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@HALVES
def test_casting_keeps_the_statistics_float32(dtype: torch.dtype) -> None:
    layer = sn.BatchNorm1d(3)
    layer.running_mean.fill_(1.0001)
    before = layer.running_mean
    layer.to(dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert layer.running_mean is before
    assert layer.running_var.dtype == torch.float32
    assert layer.num_batches_tracked.dtype == torch.int64
    assert sn.BatchNorm1d(3, dtype=dtype).running_var.dtype == torch.float32
    layer.double()
    assert layer.weight.dtype == layer.running_mean.dtype == torch.float64
    layer.float()
    assert layer.running_mean.dtype == torch.float32


@HALVES
def test_a_cast_network_saves_and_loads_float32_statistics(dtype: torch.dtype) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 3), sn.BatchNorm1d(3, statistics="steady"))
    network.to(dtype)
    network(torch.randn(8, 4).to(dtype))
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    other = torch.nn.Sequential(torch.nn.Linear(4, 3), sn.BatchNorm1d(3)).to(dtype)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other[1].running_mean.dtype == torch.float32
    assert torch.equal(other[1].running_mean, network[1].running_mean)
    assert torch.equal(other[1].running_var, network[1].running_var)


@HALVES
@everywhere
@pytest.mark.parametrize("cast", [False, True], ids=["float32 layer", "cast layer"])
def test_half_input_has_float32_statistics(policy: Any, dtype: torch.dtype, cast: bool) -> None:
    """The same layer in float64 on the same rounded numbers, but for rounding the output."""
    torch.manual_seed(0)
    x, grad = torch.randn(8, 3, 5).to(dtype), torch.randn(8, 3, 5).to(dtype)
    layer = sn.BatchNorm1d(3, statistics=policy, activation="silu")
    truth = copy.deepcopy(layer).double()
    if cast:
        layer.to(dtype)
    for _ in range(3):
        x_half, x_wide = x.clone().requires_grad_(), x.double().requires_grad_()
        y, expected = layer(x_half), truth(x_wide)
        y.backward(grad)
        expected.backward(grad.double())
        assert y.dtype == x_half.grad.dtype == dtype
        near = {"rtol": 0, "atol": ROUNDING[dtype]}
        torch.testing.assert_close(y.double(), expected, **near)
        torch.testing.assert_close(x_half.grad.double(), x_wide.grad, **near)
    assert layer.running_mean.dtype == torch.float32
    torch.testing.assert_close(layer.running_mean.double(), truth.running_mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), truth.running_var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("policy", [sn.Batch(), sn.Running()], ids=repr)
def test_a_bfloat16_layer_with_small_momentum_reaches_the_mean(policy: sn.Batch) -> None:
    """torch.nn's stops at 1.0, where adding 0.001 of the difference no longer changes bfloat16."""
    layer = sn.BatchNorm1d(2, momentum=0.001, statistics=policy).bfloat16()
    x = torch.full((4, 2), 3.0, dtype=torch.bfloat16)
    x[::2] += 1
    x[1::2] -= 1
    with torch.no_grad():
        for _ in range(8000):
            layer(x)
    assert (layer.running_mean - 3).abs().max() < 2e-3
    assert int(layer.num_batches_tracked) == 8000


@everywhere
def test_autocast_in_a_network(policy: sn.Batch) -> None:
    """Convolutions answer in bfloat16; normalization keeps float32 statistics and parameters."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, bias=False),
        sn.BatchNorm2d(4, statistics=policy, activation="relu"),
        torch.nn.Conv2d(4, 3, 3),
    )
    truth = copy.deepcopy(network)
    x = torch.randn(6, 2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = network(x)
        loss = y.square().mean()
    loss.backward()
    truth(x).square().mean().backward()
    assert y.dtype == torch.bfloat16
    norm, wide = network[1], truth[1]
    assert norm.weight.grad.dtype == norm.running_mean.dtype == torch.float32
    torch.testing.assert_close(norm.running_mean, wide.running_mean, rtol=2e-2, atol=5e-3)
    torch.testing.assert_close(norm.running_var, wide.running_var, rtol=2e-2, atol=5e-3)
    scale = wide.weight.grad.abs().max()
    assert (norm.weight.grad - wide.weight.grad).abs().max() <= 0.05 * scale


def test_meta_and_back() -> None:
    layer = sn.BatchNorm2d(3, statistics="steady", device="meta", dtype=torch.bfloat16)
    assert layer.running_mean.is_meta
    assert layer.running_mean.dtype == torch.float32
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.running_mean.tolist() == [0, 0, 0]
    assert layer.running_var.tolist() == [1, 1, 1]
    assert layer.running_var.dtype == torch.float32
    y = layer(torch.randn(4, 3, 2, 2, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert int(layer.num_batches_tracked) == 1


def test_a_whole_layer_on_meta_computes_shapes() -> None:
    layer = sn.BatchNorm2d(3, device="meta")
    y = layer(torch.randn(4, 3, 2, 2, device="meta"))
    assert y.is_meta
    assert y.shape == (4, 3, 2, 2)


def test_a_checkpoint_in_half_precision_that_is_assigned():
    """`assign=True` puts the loaded tensors in the buffers' place."""
    state = {
        name: t.bfloat16() if t.is_floating_point() else t
        for name, t in sn.BatchNorm1d(3).state_dict().items()
    }
    layer = sn.BatchNorm1d(3, momentum=0.001)
    layer.load_state_dict(state, assign=True)
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
