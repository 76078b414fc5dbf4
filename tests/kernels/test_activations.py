"""The definitions of `activations`, against PyTorch's functions and their derivatives."""

import subprocess
import sys

import pytest
import torch

from steadynorm.kernels.activations import ACTIVATIONS
from steadynorm.kernels.torch_arrays import xp


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_definition_is_torchs_function_and_its_derivative(name: str) -> None:
    kind = ACTIVATIONS[name]
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64).requires_grad_()  # 0, 3 and 6 among them
    expected = xp.activate(name, z)
    torch.testing.assert_close(kind.forward(z, xp), expected, rtol=1e-14, atol=1e-15)
    grad = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).double()
    (right,) = torch.autograd.grad(expected, z, grad)
    found = kind.gradient(grad, expected if kind.from_output else z, xp)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_passes_and_the_type_stays(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        z = torch.tensor([float("nan"), 1000.0, -1000.0], dtype=dtype)
        y = ACTIVATIONS[name].forward(z, xp)
        assert y.dtype is dtype
        assert y.isnan().tolist() == [True, False, False]
        gradient = ACTIVATIONS[name].gradient(torch.ones_like(z), z, xp)
        assert gradient.dtype is dtype


def test_the_definitions_load_no_framework() -> None:
    ask = "import sys, steadynorm.kernels.activations; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert not {"torch", "numba", "jax", "keras"} & set(done.stdout.split())
