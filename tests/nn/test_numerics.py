"""Float32 within 2e-6 of float64, at any mean up to 1e6, in every layout and policy, both ways."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from tests import tolerances, truth

import steadynorm as sn

MEANS = (0.0, 1e2, 1e4, 1e6)
LAYOUTS = {
    "nc": (96, 8),
    "ncl": (12, 5, 33),
    "nchw": (8, 6, 9, 7),
    "channels_last": (8, 6, 9, 7),
    "ncdhw": (4, 3, 4, 6, 5),
    "transposed": (12, 5, 33),  # not contiguous in any format
}
POLICIES = {
    "batch": sn.Batch(),
    "steady": sn.Steady(prior=40.0, horizon=64),
    "one_way": sn.Steady(prior=40.0, horizon=64, window=None),
    "running": sn.Running(),
    "renorm": sn.Renorm(warmup=0, r_ramp=10, d_ramp=10),
    "renorm_clipped": sn.Renorm(r_max=1.05, d_max=0.05, warmup=0, r_ramp=10, d_ramp=10),
    "ghost": sn.Ghost(size=5),
    "frozen": sn.Frozen(),
}
LAYERS = {2: sn.BatchNorm1d, 3: sn.BatchNorm1d, 4: sn.BatchNorm2d, 5: sn.BatchNorm3d}
BATCHES_SEEN = 100


def arranged(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, laid out in memory as asked."""
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return values.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    return values.contiguous()


def data(layout: str, mean: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(LAYOUTS[layout], generator=generator, dtype=torch.float64) + mean
    return arranged(values.float(), layout)


def valid_positions(x: torch.Tensor, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand((len(x), *x.shape[2:]), generator=generator) < 0.7
    mask[:: max(1, len(x) // 3)] = True  # every ghost has a few
    return mask


def near(mean: float, channels: int) -> truth.Running:
    """Running statistics near the data, as float32 stores them."""
    offsets = np.linspace(-0.3, 0.3, channels)
    return truth.Running(
        np.float64(np.float32(mean + offsets)),
        np.float64(np.float32(1.2 + offsets)),
        BATCHES_SEEN,
    )


def layer_like(x: torch.Tensor, running: truth.Running, **settings: Any) -> torch.nn.Module:
    layer = LAYERS[x.ndim](x.shape[1], **settings)
    layer.running_mean.copy_(torch.as_tensor(running.mean))
    layer.running_var.copy_(torch.as_tensor(running.var))
    layer.num_batches_tracked.fill_(running.batches)
    return layer


def no_memory(policy: Any, x: torch.Tensor) -> np.ndarray | None:
    """The memory of the gradient that a new layer has."""
    return None if policy.gradient_rate(1) is None else np.zeros((2, x.shape[1]))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("route")
def test_training(layout: str, policy: str) -> None:
    for mean, masked in product(MEANS, (False, True)):
        check_training(layout, policy, mean, masked)


def check_training(layout: str, policy: str, mean: float, masked: bool) -> None:
    said = f"mean {mean:g}, {'masked' if masked else 'plain'}: "
    x = data(layout, mean)
    mask = valid_positions(x) if masked else None
    running = near(mean, x.shape[1])
    statistics = POLICIES[policy]
    if policy == "ghost" and x.ndim == 2:
        statistics = sn.Ghost(size=36)  # of so few values the output may be large, and its error
    layer = layer_like(x, running, statistics=statistics)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    leaf = x.detach().requires_grad_()
    y = layer(leaf, mask=mask)
    y.backward(grad)
    expected = truth.train(
        x.numpy(),
        statistics,
        running,
        mask=None if mask is None else mask.numpy(),
        grad=grad.numpy(),
        memory=no_memory(statistics, x),
    )
    tolerances.within_bar(y, expected.y, said)
    for name, found, right, direction in (
        ("dx", leaf.grad, expected.dx, "backward"),
        ("dweight", layer.weight.grad, expected.dweight, "backward"),
        ("dbias", layer.bias.grad, expected.dbias, "backward"),
        ("running_mean", layer.running_mean, expected.running.mean, "statistics"),
        ("running_var", layer.running_var, expected.running.var, "statistics"),
    ):
        tolerances.close(found, right, direction, said + name)
    assert int(layer.num_batches_tracked) == expected.running.batches
    assert y.dtype is torch.float32
    if layout == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("route")
def test_inference(layout: str, mean: float) -> None:
    x = data(layout, mean)
    running = near(mean, x.shape[1])
    layer = layer_like(x, running).eval()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    y.backward(grad)
    expected = truth.infer(x.numpy(), running, grad=grad.numpy())
    tolerances.within_bar(y, expected.y)
    tolerances.close(leaf.grad, expected.dx, "backward", "dx")
    tolerances.close(layer.weight.grad, expected.dweight, "backward", "dweight")
    tolerances.close(layer.bias.grad, expected.dbias, "backward", "dbias")
    assert layer.running_mean.double().numpy().tolist() == running.mean.tolist()
    assert int(layer.num_batches_tracked) == running.batches


@pytest.mark.usefixtures("route")
def test_gradients_in_inference_after_a_call_in_inference_mode() -> None:
    """What a kernel keeps between calls must not carry the mode of the call that made it."""
    layer = sn.BatchNorm1d(113).eval()  # a number of channels that no other test uses
    with torch.inference_mode():
        layer(torch.ones(2, 113))
    x = torch.ones(2, 113, requires_grad=True)
    layer(x).backward(torch.full((2, 113), 2.0))
    tolerances.close(x.grad, np.full((2, 113), 2 / np.sqrt(1 + 1e-5)), "backward")


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("policy", [*POLICIES, "inference"])
def test_a_large_batch(policy: str, mean: float) -> None:
    """Half a million values per channel: nothing is lost in long sums."""
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(128, 2, 64, 64, generator=generator, dtype=torch.float64) + mean).float()
    running = near(mean, 2)
    layer = layer_like(x, running, statistics=POLICIES.get(policy, "batch"))
    if policy == "inference":
        expected = truth.infer(x.numpy(), running)
        layer.eval()
    else:
        expected = truth.train(x.numpy(), POLICIES[policy], running)
    with torch.no_grad():
        y = layer(x)
    tolerances.within_bar(y, expected.y)
    tolerances.close(layer.running_mean, expected.running.mean, "statistics", "running_mean")
    tolerances.close(layer.running_var, expected.running.var, "statistics", "running_var")


@pytest.mark.parametrize("std", [1e-13, 1e-3, 1e3, 1e6, 1e15])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.usefixtures("route")
def test_any_scale(policy: str, std: float) -> None:
    """The error is measured in standard deviations, so the scale of the data plays no part.

    ρ³ is outside float32 at the first and last: dx was NaN at 1e-13, and off by 0.25 at 1e15.
    """
    statistics = POLICIES[policy]
    x = (data("nchw", 3.0).double() * std).float()
    running = truth.Running(np.full(6, np.float32(3 * std)), np.full(6, np.float32(std**2)), 100)
    layer = layer_like(x, running, statistics=statistics, eps=1e-30)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    (dx,) = torch.autograd.grad(y, leaf, grad, retain_graph=True)
    setting = truth.Setting(eps=1e-30)
    expected = truth.train(
        x.numpy(), statistics, running, setting, grad=grad.numpy(), memory=no_memory(statistics, x)
    )
    tolerances.close(y, expected.y, "forward")
    tolerances.close(dx.double().mul(std).float(), expected.dx * std, "backward")
    (dx,) = torch.autograd.grad(y, leaf, grad, create_graph=True)  # by PyTorch's own derivatives
    tolerances.close(dx.double().mul(std).float(), expected.dx * std, "backward")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.usefixtures("route")
def test_constant_channels(policy: str) -> None:
    """A constant channel has variance 0, not a rounding error blown up by 1/√ε."""
    x = torch.full((16, 3, 5), 123456.789)
    running = truth.Running(np.full(3, 123456.0), np.ones(3), 100)
    layer = layer_like(x, running, statistics=POLICIES[policy])
    y = layer(x)
    expected = truth.train(x.numpy(), POLICIES[policy], running)
    tolerances.close(y, expected.y, "forward")
    tolerances.close(layer.running_var, expected.running.var, "statistics")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.usefixtures("route")
def test_other_types(policy: str, activation: str | None, dtype: torch.dtype) -> None:
    """Half types take float32 parameters, statistics and sums; float64 is float64 throughout."""
    wide = torch.promote_types(dtype, torch.float32)
    x = data("nchw", 2.0).to(dtype)
    running = near(2.0, 6)
    layer = layer_like(x, running, statistics=POLICIES[policy], activation=activation, dtype=wide)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    y.backward(grad)
    expected = truth.train(
        x.double().numpy(),
        POLICIES[policy],
        running,
        truth.Setting(activation=activation),
        grad=grad.double().numpy(),
        memory=no_memory(POLICIES[policy], x),
    )
    assert y.dtype is dtype
    assert layer.running_mean.dtype is wide
    tolerances.close(y, expected.y, "forward", "y")
    tolerances.close(leaf.grad, expected.dx, "backward", "dx")
    limit = tolerances.TABLE[dtype, "backward"].limit  # of the input's type, kept in a wider one
    assert tolerances.error(layer.weight.grad, expected.dweight) <= limit
    assert tolerances.error(layer.bias.grad, expected.dbias) <= limit
    tolerances.close(layer.running_var, expected.running.var, "statistics", "running_var")
