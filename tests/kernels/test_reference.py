"""The four stages in plain PyTorch against the definition: types, layouts, masks, groups."""

from typing import Any

import numpy as np
import pytest
import torch
from tests import tolerances, truth
from torch import Tensor

from steadynorm.kernels.reference.torch_arrays import reference

SHAPES = {
    "nc": (9, 4),
    "ncl": (9, 4, 5),
    "nchw": (9, 4, 3, 5),
    "ncdhw": (9, 4, 3, 2, 2),
    "one_sample": (1, 4, 6),
    "one_channel": (9, 1, 5),
}
ACTIVATIONS = tuple(truth.ACTIVATIONS)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GROUPS = (3, 3, 2, 1)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def array(t: Tensor) -> np.ndarray:
    return t.detach().double().numpy()


def mask_for(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand((shape[0], *shape[2:]), generator=generator) < 0.6
    mask.view(-1)[0] = True
    return mask


def rows(values: Tensor, group: int) -> np.ndarray:
    return array(values[group] if values.ndim == 2 else values)


def spans(samples: int, groups: tuple[int, ...] | None) -> list[slice]:
    ends = np.cumsum(groups if groups else [samples])
    return [slice(int(b - n), int(b)) for b, n in zip(ends, groups or [samples], strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["whole", "groups"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_moments(
    shape: tuple[int, ...], groups: tuple[int, ...] | None, masked: bool, dtype: torch.dtype
) -> None:
    if groups and shape[0] != sum(groups):
        groups = (shape[0],)
    x = (randn(*shape) * 3 + 100).to(dtype)
    mask = mask_for(shape) if masked else None
    found = reference.moments(x, mask=mask, groups=groups)
    wide = torch.promote_types(dtype, torch.float32)
    assert {found.mean.dtype, found.var.dtype, found.mean_low.dtype} == {wide}
    assert found.mean.shape == ((shape[1],) if groups is None else (len(groups), shape[1]))
    for group, span in enumerate(spans(shape[0], groups)):
        right = truth.moments(array(x[span]), None if mask is None else mask[span].numpy())
        count = found.count if isinstance(found.count, int) else found.count.reshape(-1)[group]
        assert int(count) == right.count
        if right.count == 0:
            continue
        mean = rows(found.mean, group) + rows(found.mean_low, group)
        np.testing.assert_allclose(mean, right.mean, rtol=1e-12 if wide == torch.float64 else 1e-9)
        var = rows(found.var, group)
        np.testing.assert_allclose(
            var, right.var, rtol=1e-12 if wide == torch.float64 else 1e-6, atol=1e-12
        )


def coefficients(channels: int, groups: tuple[int, ...] | None, **like: Any) -> list[Tensor]:
    shape = (channels,) if groups is None else (len(groups), channels)
    return [randn(*shape, seed=seed).to(**like) for seed in range(10, 15)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["whole", "groups"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("rebuilt", [False, True], ids=["from_output", "rebuilt"])
def test_apply_and_its_gradient(
    activation: str | None, groups: tuple[int, ...] | None, layout: str, rebuilt: bool
) -> None:
    """`apply`, `reduce_grad` and `apply_grad` in double, with residual and mask."""
    x, residual, grad = (randn(9, 4, 3, 5, seed=seed) * 2 for seed in range(3))
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x = torch.cat([x, x], 3)[..., ::2]
    mask = mask_for(x.shape)
    center, scale, shift, slope, constant = coefficients(4, groups, dtype=torch.float64)
    branch: Any = {"residual": residual, "activation": activation, "groups": groups}
    y = reference.apply(x, center, scale, shift, **branch)
    branch["y"] = None if rebuilt else y
    sums = reference.reduce_grad(grad, x, center, scale, shift, **branch)
    dx, dresidual = reference.apply_grad(
        grad, x, center, scale, shift, slope, constant, mask=mask, want_residual=True, **branch
    )
    act, derivative = truth.ACTIVATIONS[activation]
    for group, span in enumerate(spans(9, groups)):
        mid, gain, step, tilt, level = (
            truth.beside(rows(t, group), 4) for t in (center, scale, shift, slope, constant)
        )
        away = array(x[span]) - mid
        z = away * gain + step + array(residual[span])
        g = array(grad[span]) * derivative(z)
        tolerances.close(y[span], act(z), "forward", "y")
        total, moved = (torch.as_tensor(rows(t, group)) for t in sums)
        tolerances.close(total, g.sum((0, 2, 3)), "backward", "sum_grad")
        tolerances.close(moved, (g * away).sum((0, 2, 3)), "backward", "sum_grad_x")
        valid = mask[span].numpy()[:, None]
        expected = gain * g + np.where(valid, tilt * away + level, 0)
        tolerances.close(dx[span], expected, "backward", "dx")
        tolerances.close(dresidual[span], g, "backward", "dresidual")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types(dtype: torch.dtype) -> None:
    """The map answers in the input's type, whatever it computes in."""
    x, grad = randn(6, 4, 5).to(dtype), randn(6, 4, 5, seed=1).to(dtype)
    like = torch.promote_types(dtype, torch.float32)
    center, scale, shift, slope, constant = coefficients(4, None, dtype=like)
    mid, gain, step, tilt, level = (
        truth.beside(array(t), 3) for t in (center, scale, shift, slope, constant)
    )
    away = array(x) - mid
    y = reference.apply(x, center, scale, shift)
    tolerances.close(y, away * gain + step, "forward")
    sums = reference.reduce_grad(grad, x, center, scale, shift)
    assert sums[0].dtype is sums[1].dtype is like
    tolerances.close(sums[1], (array(grad) * away).sum((0, 2)), "backward")
    dx, nothing = reference.apply_grad(grad, x, center, scale, shift, slope, constant)
    assert nothing is None
    tolerances.close(dx, gain * array(grad) + tilt * away + level, "backward")


def test_memory_format_is_kept() -> None:
    x = randn(6, 4, 3, 5).contiguous(memory_format=torch.channels_last)
    center, scale, shift, slope, constant = coefficients(4, None, dtype=torch.float64)
    y = reference.apply(x, center, scale, shift)
    dx, _ = reference.apply_grad(x, x, center, scale, shift, slope, constant)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert dx.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 5), (3, 4, 0)])
def test_an_empty_batch_has_no_moments(shape: tuple[int, ...]) -> None:
    found = reference.moments(torch.empty(shape))
    assert found.count == 0
    for part in found[1:]:
        assert part.tolist() == [0.0] * 4
    assert reference.apply(torch.empty(shape), *torch.ones(3, 4)).shape == shape


def test_no_valid_position_has_no_moments() -> None:
    found = reference.moments(randn(3, 4, 5), mask=torch.zeros(3, 5, dtype=torch.bool))
    assert float(found.count) == 0
    assert found.var.tolist() == found.mean.tolist() == [0.0] * 4


def test_inputs_stay_as_they_are() -> None:
    x, residual = randn(6, 4, 5), randn(6, 4, 5, seed=1)
    copies = x.clone(), residual.clone()
    with torch.no_grad():  # where intermediates are overwritten
        reference.moments(x)
        reference.apply(x, *torch.ones(3, 4).double(), residual=residual, activation="relu")
    assert torch.equal(x, copies[0])
    assert torch.equal(residual, copies[1])
