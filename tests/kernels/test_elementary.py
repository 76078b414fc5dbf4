"""The compiled kernels' elementary functions, value by value, against float64."""

import numpy as np
import pytest
import torch
from scipy.special import ndtr

import steadynorm as sn
from steadynorm.kernels import dispatch


def gelu_and_gradient(z: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    layer = sn.BatchNorm1d(1, eps=0.0, affine=False, dtype=dtype, activation="gelu").eval()
    x = torch.tensor(z, dtype=dtype)[:, None].requires_grad_()
    statistics = (layer.running_mean, layer.running_var)
    choice = dispatch.explain(x, None, None, *statistics, training=False, activation="gelu")
    assert choice.kernel == "cpu"
    y = layer(x)
    y.sum().backward()
    return y.detach().numpy()[:, 0], x.grad.numpy()[:, 0]


def truth(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    density = np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
    return z * ndtr(z), ndtr(z) + z * density


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1.5e-7), (torch.float64, 1e-15)], ids=str
)
def test_gelu_over_its_whole_range(dtype, limit):
    z = np.linspace(-16, 16, 200_001).astype(np.float32).astype(np.float64)
    found, expected = gelu_and_gradient(z, dtype), truth(z)
    for some, right in zip(found, expected, strict=True):
        assert np.max(np.abs(some - right) / np.maximum(1, np.abs(right))) <= limit
    near = (np.abs(z) < 1) & (z != 0)  # as exact where it is small
    assert np.max(np.abs(found[0][near] / expected[0][near] - 1)) <= 3 * limit


def test_gelu_at_the_ends():
    """torch's own in float32 makes NaN of infinity, too."""
    ends = {
        -1e30: (0, 0),
        -40: (0, 0),
        0: (0, 0.5),
        1e-40: (5e-41, 0.5),
        40: (40, 1),
        1e30: (1e30, 1),
    }
    z = np.array(list(ends) * 2000, dtype=np.float32)
    found = np.stack(gelu_and_gradient(z, torch.float32), axis=1)
    np.testing.assert_allclose(found, np.array(list(ends.values()) * 2000), rtol=1e-5)
    y, _ = gelu_and_gradient(np.array([-np.inf, np.inf, np.nan] * 4000), torch.float32)
    np.testing.assert_equal(y, np.array([np.nan, np.inf, np.nan] * 4000))
