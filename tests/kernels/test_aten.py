"""PyTorch's own operator, where overhead rules: as accurate as what serves more values."""

import numpy as np
import pytest
import torch
from tests import truth

import steadynorm as sn
from steadynorm.kernels import dispatch

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("samples", [16, 128, 1600])
@pytest.mark.parametrize(("dtype", "value"), [(torch.bfloat16, 1e6), (torch.float16, 6e4)])
def test_a_constant_channel_is_zero_whatever_the_size(dtype, value, samples):
    x = torch.full((samples, 8), value, dtype=dtype)
    layer = sn.BatchNorm1d(8)
    assert layer(x).abs().max() == 0
    layer.running_mean.copy_(x[0])
    layer.running_var.zero_()
    assert layer.eval()(x).abs().max() == 0


@pytest.mark.parametrize("samples", [16, 128, 1600])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("transposed", ["input", "gradient"])
def test_half_precision_sums_its_gradients_in_float32(dtype, samples, transposed):
    seed = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(samples, 24, generator=seed).to(dtype) for _ in range(2))
    if transposed == "input":
        x = x.t().contiguous().t()
    else:
        grad = grad.t().contiguous().t()
    layer = sn.BatchNorm1d(24)
    layer(x.requires_grad_()).backward(grad)
    torch.testing.assert_close(layer.bias.grad, grad.float().sum(0), rtol=0, atol=2e-4)
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("wide", [False, True])
def test_half_precision_is_rounded_once_and_comes_back_in_its_type(dtype, wide):
    seed = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(4, 8, 5, 5, generator=seed).to(dtype) for _ in range(2))
    residual = residual.float() if wide else residual
    assert dispatch.explain(x, residual=residual).kernel == "aten"
    layer = sn.BatchNorm2d(8, activation="relu")
    exact = sn.BatchNorm2d(8, activation="relu").double()(x.double(), residual=residual.double())
    y = layer(x, residual=residual)
    assert y.dtype == (torch.float32 if wide else dtype)
    torch.testing.assert_close(y, exact.to(y.dtype), rtol=torch.finfo(y.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("kind", ["every other value", "one value for all"])
@pytest.mark.parametrize("training", [False, True])
def test_a_weight_with_gaps_is_read_right(training, kind):
    """In the backward of (N, C), PyTorch's operator reads its memory as if it had none."""
    seed = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(8, 5, generator=seed) for _ in range(2))
    values = torch.rand(5, 2, generator=seed) + 0.5
    weight = values[:, 0] if kind == "every other value" else values[:1, 0].expand(5)
    running = truth.Running(np.full(5, 0.3), np.full(5, 0.7))
    setting = truth.Setting(weight.numpy())
    if training:
        expected = truth.train(x.numpy(), sn.Batch(), running, setting, grad=grad.numpy())
    else:
        expected = truth.infer(x.numpy(), running, setting, grad=grad.numpy())
    mean, var = torch.full((5,), 0.3), torch.full((5,), 0.7)
    y = sn.functional.batch_norm(x.requires_grad_(), mean, var, weight, training=training)
    y.backward(grad)
    np.testing.assert_allclose(y.detach().numpy(), expected.y, rtol=0, atol=2e-6)
    np.testing.assert_allclose(x.grad.numpy(), expected.dx, rtol=0, atol=5e-6)


@pytest.mark.parametrize("shape", [(1, 5, 3, 4), (4, 5, 1, 7), (4, 5, 3, 1), (2, 5, 3, 1, 4)])
@pytest.mark.parametrize("odd", ["input", "gradient"])
@pytest.mark.parametrize("training", [False, True])
def test_channels_last_with_an_axis_of_length_one_is_read_right(training, odd, shape):
    """Strides of that axis may say otherwise, as where (L, N, C) is what comes after the layer."""
    seed = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=seed) for _ in range(2))
    for front in range(len(shape)):  # the axis whose stride is the largest
        order = [front, *(i for i in (0, *range(2, len(shape)), 1) if i != front)]
        back = [order.index(i) for i in range(len(shape))]
        ours, upper = (
            t.permute(order).contiguous().permute(back) if odd == name else t
            for t, name in ((x.clone(), "input"), (grad, "gradient"))
        )
        running = truth.Running(np.full(5, 0.3), np.full(5, 0.7))
        if training:
            expected = truth.train(x.numpy(), sn.Batch(), running, grad=grad.numpy())
        else:
            expected = truth.infer(x.numpy(), running, grad=grad.numpy())
        mean, var = torch.full((5,), 0.3), torch.full((5,), 0.7)
        y = sn.functional.batch_norm(ours.requires_grad_(), mean, var, training=training)
        y.backward(upper)
        np.testing.assert_allclose(ours.grad.numpy(), expected.dx, rtol=0, atol=5e-6)
