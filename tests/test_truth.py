"""The truth against PyTorch in float64, and the checkers against what they must refuse."""

import numpy as np
import pytest
import torch
from tests import tolerances, truth
from torch.nn import functional as F

import steadynorm as sn
from steadynorm.kernels.activations import ACTIVATIONS

TORCH_ACTIVATIONS = {
    None: lambda z: z,
    **{name: getattr(F, name) for name in ACTIVATIONS},
}


@pytest.mark.parametrize("activation", truth.ACTIVATIONS)
def test_batch_equals_torch_in_float64(activation: str | None) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float64}
    x = (torch.randn(4, 3, 5, **draw) * 3 + 7).requires_grad_()
    weight, bias = (torch.randn(3, **draw).requires_grad_() for _ in range(2))
    residual = (2 * torch.randn(4, 3, 5, **draw)).requires_grad_()
    grad = torch.randn(4, 3, 5, **draw)
    mean, var = torch.randn(3, **draw), torch.rand(3, **draw) + 0.5
    setting = truth.Setting(weight.detach().numpy(), bias.detach().numpy(), activation, 0.3)
    expected = truth.train(
        x.detach().numpy(),
        sn.Batch(),
        truth.Running(mean.numpy().copy(), var.numpy().copy()),
        setting,
        residual=residual.detach().numpy(),
        grad=grad.numpy(),
    )
    z = F.batch_norm(x, mean, var, weight, bias, training=True, momentum=0.3) + residual
    y = TORCH_ACTIVATIONS[activation](z)
    y.backward(grad)
    np.testing.assert_allclose(y.detach(), expected.y, atol=1e-12)
    for tensor, found in zip((x, weight, bias, residual), expected[2:6], strict=True):
        np.testing.assert_allclose(tensor.grad, found, atol=1e-11)
    np.testing.assert_allclose(mean, expected.running.mean, atol=1e-12)
    np.testing.assert_allclose(var, expected.running.var, atol=1e-12)


@pytest.mark.parametrize("samples", range(1, 12))
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_ghost_lengths(samples: int, size: int) -> None:
    lengths = truth.ghost_lengths(samples, size)
    assert sum(lengths) == samples
    assert set(lengths[:-1]) <= {size}
    assert lengths[-1] <= size + 1
    assert size == 1 or len(lengths) == 1 or lengths[-1] >= 2


def test_the_checker_refuses_what_it_should() -> None:
    right = torch.ones(3)
    tolerances.close(right, np.ones(3), "forward")
    tolerances.close(right * (1 + 9e-7), np.ones(3), "forward")
    with pytest.raises(AssertionError, match=r"error 2\.98e-06 above 1e-06"):
        tolerances.close(right * (1 + 3e-6), np.ones(3), "forward")
    with pytest.raises(AssertionError, match="error nan"):
        tolerances.close(right * float("nan"), np.ones(3), "forward")
    with pytest.raises(AssertionError, match="shape"):
        tolerances.close(torch.ones(1), np.ones(3), "forward")
    with pytest.raises(AssertionError, match="not finite"):
        tolerances.close(right, np.full(3, np.nan), "forward")
    tolerances.within_bar(right * 8, np.full(3, 8 + 1.9e-6))
    with pytest.raises(AssertionError, match="above the bar"):
        tolerances.within_bar(right * 8, np.full(3, 8 + 2.1e-6))
